"""A control in place of a search: rows drawn at random, all with equal chances, from those that a query sees.

A row's score is a number in [0, 1) made of its id and of the first component of the query, which holds the query's lot
number, its seed; so the draw is the same wherever an entry lies, on any number of ranks. Whoever reads the hits must compute
their weights from the real query.
Letters: N queries, M rows, X = H * N lot numbers.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lmcode.memory.placement import splitmix64
from lmcode.memory.search.decide import in_order
from lmcode.memory.search.pairs import best_places
from lmcode.memory.search.tier import Found, Hidden, Rows, Tier
from lmcode.protocol import NO_SCORE

LOTS = 2**24  # lot numbers are below it, so that fp32 holds them; scores have as many values
PAIRS = 2**22  # of query and row whose scores are held at once


class DrawTier(Tier):
    """K random rows for each query; it keeps nothing."""

    def search(self, query_HND: Tensor, rows: Rows, k: int, *, hidden: Hidden = ()) -> Found:
        H, N, _ = query_HND.shape
        id_M, width, device = rows.id_M.cpu(), max(1, PAIRS // len(rows.id_M)), query_HND.device
        lot_X = query_HND[..., 0].cpu().numpy().ravel().astype(np.int64)
        unseen_NM = np.zeros((N, len(id_M)), bool)
        for queries, unseen in hidden:
            unseen_NM[np.ix_(queries.cpu().numpy(), unseen.cpu().numpy())] = True
        found = []
        for start in range(0, H * N, width):
            drawn_XM = drawn(lot_X[start:start + width], id_M.numpy())
            drawn_XM[unseen_NM[np.arange(start, start + len(drawn_XM)) % N]] = NO_SCORE
            score_XM = torch.from_numpy(drawn_XM)
            place_XK = best_places(score_XM, k)
            row_XK = place_XK.clamp(min=0)
            found.append(in_order(score_XM.gather(1, row_XK), id_M[row_XK].where(place_XK >= 0, -1), place_XK, k))
        score_HNK, id_HNK, row_HNK = (torch.cat(parts).view(H, N, k).to(device) for parts in zip(*found, strict=True))
        return score_HNK, id_HNK, row_HNK


def drawn(lot_X: np.ndarray, id_M: np.ndarray) -> np.ndarray:
    """Scores of rows under lot numbers, fp32 [X, M]; `NO_SCORE` for empty rows (id -1)."""
    mixed_XM = splitmix64(splitmix64(lot_X)[:, None] ^ id_M.astype(np.uint64))
    score_XM: np.ndarray = (mixed_XM >> np.uint64(40)).astype(np.float32) / np.float32(LOTS)
    score_XM[:, id_M < 0] = NO_SCORE
    return score_XM


def lots(namespace_N: np.ndarray, heads: int, turn: int) -> np.ndarray:
    """A lot number for each head and query, int64 [H, N]: made of the namespace, how many queries of it come before this
    one, the head, and the number of earlier draws. So it does not depend on which other namespaces are read beside it."""
    order_N = np.argsort(namespace_N, kind="stable")
    sorted_N = namespace_N[order_N]
    place_N = np.empty(len(order_N), np.int64)
    place_N[order_N] = np.arange(len(order_N)) - np.searchsorted(sorted_N, sorted_N)
    mixed_N: np.ndarray = np.full(len(order_N), turn, np.uint64)
    for part_N in (namespace_N, place_N):
        mixed_N = splitmix64(mixed_N ^ part_N.astype(np.uint64))
    mixed_HN = splitmix64(mixed_N[None] + np.arange(heads, dtype=np.uint64)[:, None])
    lot_HN: np.ndarray = (mixed_HN >> np.uint64(40)).astype(np.int64)
    return lot_HN
