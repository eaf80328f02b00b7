"""Runs of tokens as entries of a bank: how they are put together, asked for, and attended to. Pure functions.

An entry holds the keys of c tokens side by side, and their values. A query that is repeated c times and divided by c has
with such a row of keys the inner product that it has with their mean: so a bank that knows nothing of chunks searches by
their mean keys, and what it returns is all that a softmax over the single tokens needs.

Letters: c tokens of a chunk, T tokens of a window or the K * c of the hits, X = c * D width of an entry, M = c - 1 places
for what waits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lmcode.protocol import NO_SCORE
from lmcode.recipes.carried import pick, place_of
from lmcode.recipes.recipe import Left


class Waiting(NamedTuple):
    """Tokens of each stream that are too few for a chunk so far; fp32, detached.

    key_BHMD, value_BHMD; surprise_BM. count_B: int64, how many there are.
    """

    key_BHMD: Tensor
    value_BHMD: Tensor
    surprise_BM: Tensor
    count_B: Tensor


class Chunks(NamedTuple):
    """Chunks of the streams, as many places as any stream could fill: [B, H, N, X], [B, N].

    surprise_BN: the mean of its tokens'. valid_BN: bool, False beyond the last one of a stream.
    """

    key_BHNX: Tensor
    value_BHNX: Tensor
    surprise_BN: Tensor
    valid_BN: Tensor


def in_chunks(waiting: Waiting, left: Left, *, chunk: int, fill_up: bool = False) -> tuple[Chunks, Waiting]:
    """The chunks that waiting tokens and those behind them make, and who waits from now on.

    Args:
        fill_up: nobody waits: a last chunk that is incomplete repeats its last token.
    """
    (B, T), places, device = left.valid_BT.shape, chunk - 1, left.valid_BT.device
    total_B = waiting.count_B + left.valid_BT.sum(dim=1)
    whole_B = (total_B + places if fill_up else total_B) // chunk
    most = (places + T + places) // chunk
    order_BX = torch.arange(most * chunk, device=device).expand(B, -1)
    order_BX = order_BX.minimum((total_B - 1).clamp(min=0)[:, None])
    rest_BM = whole_B[:, None] * chunk + torch.arange(places, device=device)
    at_BX, stay_BM = (place_of(order, waiting.count_B, places, T) for order in (order_BX, rest_BM))

    both_BX = torch.cat([waiting.surprise_BM, left.surprise_BT], dim=1)
    key_BHNX, value_BHNX = (pick(row, window.float(), at_BX).unflatten(2, (most, chunk)).flatten(3)
                            for row, window in ((waiting.key_BHMD, left.key_BHTD), (waiting.value_BHMD, left.value_BHTD)))
    made = Chunks(key_BHNX, value_BHNX, both_BX.gather(1, at_BX).unflatten(1, (most, chunk)).mean(dim=2),
                  torch.arange(most, device=device) < whole_B[:, None])
    stay = Waiting(pick(waiting.key_BHMD, left.key_BHTD.float(), stay_BM),
                   pick(waiting.value_BHMD, left.value_BHTD.float(), stay_BM), both_BX.gather(1, stay_BM),
                   (total_B - whole_B * chunk).clamp(min=0))
    return made, stay


def chunk_query(query_HND: Tensor, chunk: int) -> Tensor:
    """The query [H, N, X] whose inner product with a chunk's keys is the mean of those of `query_HND` with each."""
    return query_HND.repeat(1, 1, chunk) / chunk


def attend_chunks(query_HND: Tensor, key_HNKX: Tensor, value_HNKX: Tensor, valid_HNK: Tensor, *, chunk: int) -> Tensor:
    """One softmax over all tokens of the chunks that each query has found: fp32 [H, N, D], 0 where it has found none.

    Differentiable with respect to the query.
    """
    key_HNTD, value_HNTD = (part.unflatten(-1, (chunk, -1)).flatten(2, 3) for part in (key_HNKX, value_HNKX))
    valid_HNT = valid_HNK.repeat_interleave(chunk, dim=-1)
    score_HNT = torch.einsum("hnd,hntd->hnt", query_HND.float(), key_HNTD).masked_fill(~valid_HNT, NO_SCORE)
    return torch.einsum("hnt,hntd->hnd", score_HNT.softmax(dim=-1) * valid_HNT, value_HNTD)
