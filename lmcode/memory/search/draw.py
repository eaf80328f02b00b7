"""A control instead of a search: rows drawn by lot, evenly, from those that a query sees.

A row's score is a number in [0, 1) made of its id and of the first component of the query, which holds the query's lot
number; so the draw is the same wherever an entry lies, on any number of ranks. Who reads the hits must weigh them anew.
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
    """K rows by lot for each query; it keeps nothing."""

    def search(self, query_HQD: Tensor, rows: Rows, k: int, *, hidden: Hidden = ()) -> Found:
        H, Q, _ = query_HQD.shape
        id_P, width, device = rows.id_P.cpu(), max(1, PAIRS // len(rows.id_P)), query_HQD.device
        lot_Q = query_HQD[..., 0].cpu().numpy().ravel().astype(np.int64)
        unseen_QP = np.zeros((Q, len(id_P)), bool)
        for query_q, row_p in hidden:
            unseen_QP[np.ix_(query_q.cpu().numpy(), row_p.cpu().numpy())] = True
        found = []
        for start in range(0, H * Q, width):
            drawn_qP = drawn(lot_Q[start:start + width], id_P.numpy())
            drawn_qP[unseen_QP[np.arange(start, start + len(drawn_qP)) % Q]] = NO_SCORE
            score_qP = torch.from_numpy(drawn_qP)
            place_qL = best_places(score_qP, k)
            row_qL = place_qL.clamp(min=0)
            found.append(in_order(score_qP.gather(1, row_qL), id_P[row_qL].where(place_qL >= 0, -1), place_qL, k))
        score_HQK, id_HQK, row_HQK = (torch.cat(parts).view(H, Q, k).to(device) for parts in zip(*found, strict=True))
        return score_HQK, id_HQK, row_HQK


def drawn(lot_Q: np.ndarray, id_P: np.ndarray) -> np.ndarray:
    """Scores of rows under lot numbers, fp32 [Q, P]; `NO_SCORE` for empty rows (id -1)."""
    mixed_QP = splitmix64(splitmix64(lot_Q)[:, None] ^ id_P.astype(np.uint64))
    score_QP: np.ndarray = (mixed_QP >> np.uint64(40)).astype(np.float32) / np.float32(LOTS)
    score_QP[:, id_P < 0] = NO_SCORE
    return score_QP


def lots(namespace_N: np.ndarray, heads: int, turn: int) -> np.ndarray:
    """A lot number for each head and query, int64 [H, N]: of the namespace, how many queries of it come before this one, the
    head, and how many times one has drawn before. So it does not depend on which other namespaces are read beside it."""
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
