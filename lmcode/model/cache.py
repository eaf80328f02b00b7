"""What a model keeps of the windows it is in the middle of, so that a new token costs a pass over one token.

A `Cache` is made empty. The first pass over each stream's window fills it; after that every pass (`decode.py`) reads one new
token per stream. Streams may stand at different places in their windows, and nothing reaches across a window's end: what
outlives a window is `StreamState`, and `restart` says that a stream is in a new one. Buffers are [..., B, X, T, D], tokens
second to last; X is any dim between streams and tokens; some buffers have one of size 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class LayerCache:
    """One layer's buffers; those of tokens hold arbitrary numbers where a stream has no token yet, which a mask must hide.

    window: the largest number of tokens.
    slots_BMD: the short-term slots after each stream's last complete segment; set by the first pass, if there is short-term
        memory.
    slots_read: what a step has computed from these slots alone, for the steps to come; None after the slots have changed.
    """

    slots_BMD: Tensor

    def __init__(self, window: int) -> None:
        self.slots_read: tuple[Tensor, Tensor] | None = None
        self.window = window
        self._buffers: dict[str, Tensor] = {}

    def fill(self, name: str, x_BXTD: Tensor, *, length: int | None = None) -> None:
        """Makes the buffer `name` of `length` tokens (a window when None); its first ones are `x_BXTD`."""
        buffer = x_BXTD.new_zeros(*x_BXTD.shape[:-2], length or self.window, x_BXTD.shape[-1])
        buffer[..., :x_BXTD.shape[-2], :] = x_BXTD
        self._buffers[name] = buffer

    def put(self, name: str, x_BXD: Tensor, index_B: Tensor, place: int | None = None) -> Tensor:
        """Stores one token of each stream at that stream's index, which is `place` if all share it; returns the buffer."""
        buffer = self._buffers[name]
        if place is not None:
            buffer.select(-2, place).copy_(x_BXD)
            return buffer
        x_BX1D = x_BXD.unsqueeze(-2).to(buffer.dtype)
        return buffer.scatter_(-2, index_B.view(-1, 1, 1, 1).expand_as(x_BX1D), x_BX1D)

    def get(self, name: str, index_B: Tensor) -> Tensor:
        """One token of each stream, [..., B, X, D]."""
        buffer = self._buffers[name]
        index = index_B.view(-1, 1, 1, 1).expand(*buffer.shape[:-2], 1, buffer.shape[-1])
        return buffer.gather(-2, index).squeeze(-2)


class Step:
    """What all layers share about a pass that reads one new token per stream.

    index_B: int64, the new token's place in its window.
    place: the same as a number where all streams stand at one place, which needs no masks; else None.
    num_seen: tokens of the longest window up to and with the new one.
    unseen_BT: bool, those of `num_seen` that lie after the new token; None where there are none.
    valid_B: bool, False for streams that have no new token, for which nothing is kept; None if all have one.
    ends_B: bool, streams whose short-term segment ends with this token; None if there are none.
    """

    def __init__(self, places: Sequence[int], valid: Sequence[bool], *, segment: int, device: torch.device) -> None:
        self.index_B = torch.tensor(places, device=device)
        self.place = places[0] if len(set(places)) == 1 else None
        self.num_seen = max(places) + 1
        self.unseen_BT = None
        if self.place is None:
            self.unseen_BT = torch.arange(self.num_seen, device=device) > self.index_B[:, None]
        self.valid_B = None if all(valid) else torch.tensor(valid, device=device)
        ends = [is_new and (place + 1) % segment == 0 for place, is_new in zip(places, valid, strict=True)]
        self.ends_B = torch.tensor(ends, device=device) if any(ends) else None


class Cache:
    """All layers' buffers for one batch of streams.

    Args:
        window: the largest number of tokens of a window.

    Attributes:
        layers: by number; made by the first pass, as is everything that depends on the model.
        lengths: tokens of its current window that each stream has read; empty before the first pass. Kept on the host,
            since what a pass does depends on it, and must be the same on every rank.
    """

    def __init__(self, window: int) -> None:
        if window < 1:
            raise ValueError(f"a window must have at least one token: got {window}")
        self.window = window
        self.layers: list[LayerCache] = []
        self.lengths: list[int] = []

    def begin(self, num_layers: int, lengths: Sequence[int]) -> None:
        """Makes the layers' empty parts for a first pass over `lengths` tokens."""
        self.layers = [LayerCache(self.window) for _ in range(num_layers)]
        self.lengths = list(lengths)

    def step(self, valid: Sequence[bool], *, segment: int, device: torch.device) -> Step:
        """Makes room for one new token in each `valid` stream.

        Raises:
            ValueError: if a valid stream's window is full.
        """
        full = [b for b, (length, is_new) in enumerate(zip(self.lengths, valid, strict=True))
                if is_new and length >= self.window]
        if full:
            raise ValueError(f"a full window must be restarted before its stream reads on: streams {full} have "
                             f"{self.window} tokens")
        places = [min(length, self.window - 1) for length in self.lengths]  # an idle stream may be full: it is masked
        self.lengths = [length + is_new for length, is_new in zip(self.lengths, valid, strict=True)]
        return Step(places, valid, segment=segment, device=device)

    def restart(self, streams: Sequence[int], slots: Sequence[Tensor]) -> None:
        """Puts these streams at the start of a new window, with the short-term slots that they carry, by layer [B, M, D].

        `slots` is empty without short-term memory.
        """
        for layer, slots_BMD in zip(self.layers, slots, strict=False):
            layer.slots_BMD[streams] = slots_BMD[streams]
            layer.slots_read = None
        for stream in streams:
            self.lengths[stream] = 0
