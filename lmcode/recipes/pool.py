"""A pool of fixed size that new tokens enter and random old ones leave, as pure functions over places.

After MemoryLLM (Wang et al., "MemoryLLM: Towards Self-Updatable Large Language Models", ICML 2024): when K tokens enter a
full pool of N, K of the old ones, drawn at random, make way: a token survives t renewals with probability (1 - K/N)^t.
The pool is filled from the right and in the order of age: its newest token is in place N - 1. Letters: N places of the pool,
T tokens that could enter, X = N + T places of pool and tokens side by side.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lmcode.memory.placement import splitmix64


class Renewal(NamedTuple):
    """Where pool and tokens go: places in [X], each list in the order of age.

    kept_BN: int64, for each place of the new pool. count_B: how many of them are filled, the last ones.
    dropped_BT: int64, those that leave. dropped_valid_BT: bool, False beyond the last of them.
    """

    kept_BN: Tensor
    count_B: Tensor
    dropped_BT: Tensor
    dropped_valid_BT: Tensor


def filled(count_B: Tensor, places: int) -> Tensor:
    """Which places of a pool hold a token: bool [B, N]."""
    return torch.arange(places, device=count_B.device) >= places - count_B[:, None]


def last_of(valid_BT: Tensor, count: int) -> Tensor:
    """The last `count` valid ones of tokens whose padding trails: bool [B, T]."""
    place_T = torch.arange(valid_BT.shape[1], device=valid_BT.device)
    return valid_BT & (place_T >= valid_BT.sum(dim=1, keepdim=True) - count)


def draws(namespace_B: Tensor, renewal_B: Tensor, *, places: int, layer: int, seed: int) -> Tensor:
    """A number for each place of a pool, int64 [B, N], non-negative: those with the smallest ones leave.

    It follows from the seed, the layer, the stream's namespace and how often its pool was renewed: so it is the same in
    whatever row, batch or rank the stream is read.
    """
    mixed_B = splitmix64(np.full(len(namespace_B), seed, np.int64))
    for part in (np.int64(layer), namespace_B.cpu().numpy(), renewal_B.cpu().numpy()):
        mixed_B = splitmix64(mixed_B ^ part.astype(np.uint64))
    drawn_BN = splitmix64(mixed_B[:, None] ^ np.arange(places, dtype=np.uint64))
    return torch.from_numpy((drawn_BN >> np.uint64(1)).astype(np.int64)).to(namespace_B.device)


def renewed(count_B: Tensor, entering_BT: Tensor, draw_BN: Tensor) -> Renewal:
    """Who stays and who leaves when tokens enter; at most N of them in a stream.

    Args:
        count_B: filled places of the pool. entering_BT: bool, the tokens that enter.
        draw_BN: see `draws`. Nobody leaves while there is room.
    """
    N, T = draw_BN.shape[1], entering_BT.shape[1]
    filled_BN, entering_B = filled(count_B, N), entering_BT.sum(dim=1)
    leaving_B = (count_B + entering_B - N).clamp(min=0)
    place_BN = draw_BN.masked_fill(~filled_BN, torch.iinfo(torch.int64).max).argsort(dim=1, stable=True).argsort(dim=1)
    leaves_BN = place_BN < leaving_B[:, None]
    stays_BX = torch.cat([filled_BN & ~leaves_BN, entering_BT], dim=1)
    leaves_BX = torch.cat([leaves_BN, torch.zeros_like(entering_BT)], dim=1)
    return Renewal(stays_BX.long().argsort(dim=1, stable=True)[:, -N:], (count_B + entering_B).clamp(max=N),
                   *first(leaves_BX, T))


def first(chosen_BX: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The places of the first `count` chosen ones, int64 [B, count], and which of these are chosen at all."""
    place_BT = (~chosen_BX).long().argsort(dim=1, stable=True)[:, :count]
    return place_BT, chosen_BX.gather(1, place_BT)
