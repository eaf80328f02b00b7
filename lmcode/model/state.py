"""What a batch of streams carries from one window of its documents to the next.

Whoever carries a state on needs to know none of its parts; a model refuses the state of another shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmcode.config import LMCODEConfig


class StreamState(NamedTuple):
    """What a batch of streams carries from one window to the next; all detached. M slots, a cache of X tokens.

    slots: fp32 [B, M, D] for each layer; empty without short-term memory.
    pending_key: fp32 [B, H, D] for each memory layer, ascending: the key of the last token, whose successor is to come.
    pending_valid_B: bool, False until a stream has seen a token.
    pending_surprise_B: fp32, the loss of predicting the token to come, in nats; 0 where unknown.
    past: [B, X, D] for each layer, the cache of `cache_windows` (`past.py`); empty without one.
    past_length: int64 [B], alone: how many of its last tokens are of the document that the stream is in; empty without one.
    """

    slots: tuple[Tensor, ...]
    pending_key: tuple[Tensor, ...]
    pending_valid_B: Tensor
    pending_surprise_B: Tensor
    past: tuple[Tensor, ...] = ()
    past_length: tuple[Tensor, ...] = ()


def check_state(state: StreamState, config: LMCODEConfig, num_streams: int) -> None:
    """Refuses the state of another number of streams or of a model of another shape."""
    B, M = num_streams, config.short_term_memory_size
    slots = [(B, M, config.short_term_dim)] * (config.num_layers if M else 0)
    keys = [(B, config.memory_heads, config.memory_head_dim)] * len(config.memory_layer_indices)
    cached = config.cache_tokens > 0
    past = [(B, config.cache_tokens, config.hidden_size)] * config.num_layers * cached
    for name, expected, tensors in (("slots", slots, state.slots), ("pending_key", keys, state.pending_key),
                                    ("pending_valid_B", [(B,)], [state.pending_valid_B]),
                                    ("pending_surprise_B", [(B,)], [state.pending_surprise_B]),
                                    ("past", past, state.past),
                                    ("past_length", [(B,)] * cached, state.past_length)):
        shapes = [tuple(tensor.shape) for tensor in tensors]
        if shapes != expected:
            raise ValueError(f"the state must be this model's, of as many streams as input_ids has rows: {name} "
                             f"must have shapes {expected}, got {shapes}")


def rows_of(state: StreamState, streams: Sequence[int]) -> StreamState:
    """The state of some of the streams."""
    index = list(streams)
    return _with_each(lambda rows: rows[index], state)


def with_rows(state: StreamState, streams: Sequence[int], part: StreamState) -> StreamState:
    """`state` with that of some streams replaced by `part`."""
    where = torch.tensor(list(streams), device=state.pending_valid_B.device)

    def put(whole: Tensor, rows: Tensor) -> Tensor:
        return whole.index_copy(0, where, rows.to(whole.dtype))

    return _with_each(put, state, part)


def _with_each(function: Callable[..., Tensor], *states: StreamState) -> StreamState:
    """A state of what `function` makes of the tensors that stand in one place of all these."""
    made: Any = (tuple(map(function, *parts)) if isinstance(parts[0], tuple) else function(*parts)
                 for parts in zip(*states, strict=True))
    return StreamState(*made)
