"""What a stream carries from window to window beside a backbone: its first tokens and its last ones, as keys and values.

A row of M = sinks + cache places is filled from the left. When it is full, the first `sinks` tokens of the document stay
(attention sinks; Xiao et al., "Efficient Streaming Language Models with Attention Sinks", ICLR 2024) and the oldest of the
others leave: those are what a memory is written from. Keys are stored before their rotation, so that the tokens in the row
can be numbered anew, from 0, in every window. Pure functions; letters: M places of the row, T tokens of the window, X
places of both.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Carried(NamedTuple):
    """The state of a batch of streams; all detached.

    key, value: of each layer of the backbone, then of the recipe's own ones, [B, H, M, D]; empty tuples where nothing is
        carried (M = 0).
    count_B: int64, places that are filled.
    surprise_BM: fp32, the loss of predicting each token in the row, nats.
    recipe: what the recipe carries, tensors [B, ...].
    pending_valid_B: bool, False until a stream has seen a token.
    pending_surprise_B: fp32, the loss of predicting the token to come.
    """

    key: tuple[Tensor, ...]
    value: tuple[Tensor, ...]
    count_B: Tensor
    surprise_BM: Tensor
    recipe: tuple[Tensor, ...]
    pending_valid_B: Tensor
    pending_surprise_B: Tensor


class Moves(NamedTuple):
    """Where the tokens of a row and of the window behind it go: places in their concatenation, [M + T].

    kept_BM: int64, for each place of the new row. kept_B: how many of them are filled.
    left_BT: int64, those that leave, in their order. left_valid_BT: bool, False beyond the last of them.
    """

    kept_BM: Tensor
    kept_B: Tensor
    left_BT: Tensor
    left_valid_BT: Tensor


def moves(count_B: Tensor, length_B: Tensor, *, sinks: int, places: int, window: int) -> Moves:
    """Who stays and who leaves when a window was read.

    Args:
        count_B: filled places of the row; length_B: tokens of the window.
        places: M, all places of the row; of these `sinks` belong to the first tokens.
        window: T, tokens of the window, padding included.
    """
    total_B = count_B + length_B
    leaving_B = (total_B - places).clamp(min=0)
    place_M = torch.arange(places, device=count_B.device)
    order_BM = torch.where(place_M < sinks, place_M, place_M + leaving_B[:, None])
    order_BT = sinks + torch.arange(window, device=count_B.device).expand(len(count_B), -1)
    gone_BT = order_BT - sinks < leaving_B[:, None]
    return Moves(place_of(order_BM, count_B, places, window), total_B.clamp(max=places),
                 place_of(order_BT, count_B, places, window), gone_BT)


def place_of(order_BX: Tensor, count_B: Tensor, places: int, window: int) -> Tensor:
    """From the n-th token of a stream to its place in row and window side by side: those of the row come first."""
    at_BX = torch.where(order_BX < count_B[:, None], order_BX, order_BX - count_B[:, None] + places)
    return at_BX.clamp(max=places + window - 1)


def pick(row_BHMD: Tensor, window_BHTD: Tensor, place_BX: Tensor) -> Tensor:
    """The vectors at some places of row and window side by side: [B, H, X, D]."""
    both_BHXD = torch.cat([row_BHMD.to(window_BHTD.dtype), window_BHTD], dim=2)
    return both_BHXD.gather(2, place_BX[:, None, :, None].expand(-1, both_BHXD.shape[1], -1, both_BHXD.shape[3]))
