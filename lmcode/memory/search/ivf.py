"""`ivf`: a query scores the entries of a few lists. The lists are those of one coarse quantizer for the whole bank.

An entry is in the list of the centroid with which its key has the largest inner product, a query probes those of its
`probes` largest; both by products of one shape, so they follow from the vector's bits and the centroids alone. Every rank
works out the probes of all queries for itself: that costs less than sending them. So the candidates of a query, all entries
whose list it probes, hang on no layout, and `decide` scores them against the rows as they are now.

The work goes query by query: the rows of its lists are scored one pair at a time, where they lie, by the routine of
`decide`. Products list by list, for all queries that probe it, took over twice as long on a CPU, since lists are short.
Letters: L lists, C candidates of a query, W pairs of a query and a candidate.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lmcode.config import ConfigError
from lmcode.memory.search import faiss_index
from lmcode.memory.search.decide import decide, in_order, no_hits, score_pairs
from lmcode.memory.search.exact import best_columns, search_exact
from lmcode.memory.search.lists import Lists
from lmcode.memory.search.pairs import best_places
from lmcode.memory.search.plan import Plan
from lmcode.memory.search.tier import Found, HeadRows, Hidden, Rows, Tier
from lmcode.protocol import NO_SCORE

VECTORS = 1024  # that meet all centroids in one product
QUERIES = 256  # and
PAIRS = 2**20  # candidates of theirs that are scored at once


class Hide(NamedTuple):
    """`Hidden` as a table: whether queries of kind a do not see rows of kind b, hidden_AB; kind 0 hides nothing."""

    kind_N: np.ndarray
    kind_P: np.ndarray
    hidden_AB: np.ndarray

    def covers(self, at_Q: np.ndarray, row_QC: Tensor) -> Tensor:
        """Which of these rows are hidden from these queries, bool [Q, C]."""
        kind_QC = self.kind_P[row_QC.cpu().numpy()]
        return torch.from_numpy(self.hidden_AB[self.kind_N[at_Q][:, None], kind_QC]).to(row_QC.device)


class IvfTier(Tier):
    """Keeps the lists of a shard. Before there are centroids, and for rows that are not the whole shard, it is exact."""

    approximate = True

    def __init__(self) -> None:
        self._plan: Plan | None = None
        self._lists: list[Lists] = []
        self._changed: list[np.ndarray] | None = None  # None: everything

    @staticmethod
    def check(device: torch.device) -> None:
        if not faiss_index.available(torch.device("cpu")):
            raise ConfigError("memory.tier = ivf needs FAISS, which trains its centroids: found none")

    @property
    def whole(self) -> bool:
        return self._plan is not None and self._plan.centroid_HLD is not None

    def use(self, plan: Plan) -> None:
        if self._plan is None or plan.centroid_HLD is not self._plan.centroid_HLD:
            self._changed = None
        self._plan = plan

    def changed(self, slot_E: np.ndarray) -> None:
        if self._changed is not None:
            self._changed.append(slot_E)

    def search(self, query_HQD: Tensor, rows: Rows, k: int, *, hidden: Hidden = ()) -> Found:
        if rows.slot_P is not None or self._plan is None or self._plan.centroid_HLD is None:
            return search_exact(query_HQD, rows, k, hidden=hidden)
        self._follow(rows)
        hide = as_table(hidden, query_HQD.shape[1], len(rows))
        found = [search_lists(query_QD, rows.of_head(head), k, lists=lists, hide=hide,
                              probe_NP=nearest_centroids(query_QD, centroid_LD.to(query_QD.device), self._plan.probes))
                 for head, (query_QD, lists, centroid_LD) in
                 enumerate(zip(query_HQD, self._lists, self._plan.centroid_HLD, strict=True))]
        score_HQK, id_HQK, row_HQK = (torch.stack(parts) for parts in zip(*found, strict=True))
        return score_HQK, id_HQK, row_HQK

    def lengths(self, rows: Rows) -> np.ndarray:
        """How many entries each list holds, int64 [H, L]."""
        self._follow(rows)
        return np.stack([lists.length_L for lists in self._lists])

    def _follow(self, rows: Rows) -> None:
        """Puts the slots that have changed since the last search into their lists."""
        assert self._plan is not None and self._plan.centroid_HLD is not None
        H, L, _ = self._plan.centroid_HLD.shape
        if self._changed is None:
            self._lists, slot_E = [Lists(L, len(rows)) for _ in range(H)], np.arange(len(rows))
        else:
            slot_E = np.unique(np.concatenate([np.zeros(0, np.int64), *self._changed]))
        self._changed = []
        if len(slot_E) == 0:
            return
        slots = torch.from_numpy(slot_E).to(rows.id_P.device)
        live_E = (rows.id_P[slots] >= 0).cpu().numpy()
        for key_PD, lists, centroid_LD in zip(rows.key_HPD, self._lists, self._plan.centroid_HLD, strict=True):
            list_E = nearest_centroids(key_PD, centroid_LD.to(key_PD.device), 1, rows=slots)[:, 0].cpu().numpy()
            lists.move(slot_E, np.where(live_E, list_E, -1))


def nearest_centroids(vector_ND: Tensor, centroid_LD: Tensor, count: int, *, rows: Tensor | None = None) -> Tensor:
    """For each vector the `count` centroids with the largest inner products, in no order but that the first is the nearest:
    int64 [N, count]; the lower number among equals.

    Args:
        rows: int64, which of the vectors; all when None.
    """
    count, parts = min(count, len(centroid_LD)), []
    index = torch.arange(len(vector_ND), device=vector_ND.device) if rows is None else rows
    for at in index.split(VECTORS):
        block_VD = vector_ND[at].float()
        score_VL = torch.mm(F.pad(block_VD, (0, 0, 0, VECTORS - len(block_VD))), centroid_LD.T)[:len(block_VD)]
        nearest_V1 = score_VL.argmax(dim=1, keepdim=True)
        if count == 1:
            parts.append(nearest_V1)
            continue
        parts.append(torch.cat([nearest_V1, _others(score_VL, nearest_V1, count)], dim=1))
    return torch.cat(parts) if parts else index.new_zeros(0, count)


def _others(score_VL: Tensor, nearest_V1: Tensor, count: int) -> Tensor:
    """The best `count` of each row but for the nearest, ties by number."""
    score_VL = score_VL.scatter(1, nearest_V1, -torch.inf)
    wanted = count - 1
    score_VX, column_VX, gap_V = best_columns(score_VL.unsqueeze(0), wanted)
    column_VX = column_VX[0].clone()
    tied_V = (gap_V[0] <= 0).nonzero().squeeze(1)  # equals at the end of the list: the sort is stable
    if len(tied_V):
        column_VX[tied_V] = score_VL[tied_V].sort(dim=1, descending=True, stable=True).indices[:, :wanted]
    return column_VX


def as_table(hidden: Hidden, queries: int, rows: int) -> Hide | None:
    """Rows that are hidden from the same queries are of one kind; None if nothing is hidden."""
    if not hidden:
        return None
    hidden_rows = [row_P.cpu().numpy() for _, row_P in hidden]
    some_P = np.unique(np.concatenate(hidden_rows))
    code_P = np.zeros(len(some_P), np.int64)
    for word, row_P in zip(np.random.default_rng(0).integers(1, 2**62, len(hidden)), hidden_rows, strict=True):
        code_P[np.searchsorted(some_P, row_P)] ^= word  # rows hidden from the same have the same code
    codes, number_P = np.unique(code_P, return_inverse=True)
    kind_N, kind_P = np.zeros(queries, np.int64), np.zeros(rows, np.int64)
    kind_P[some_P] = number_P.reshape(-1) + 1
    hidden_AB = np.zeros((len(hidden) + 1, len(codes) + 1), bool)
    for kind, ((query_Q, _), row_P) in enumerate(zip(hidden, hidden_rows, strict=True), start=1):
        kind_N[query_Q.cpu().numpy()] = kind
        hidden_AB[kind, np.unique(kind_P[row_P])] = True
    return Hide(kind_N, kind_P, hidden_AB)


def search_lists(query_ND: Tensor, rows: HeadRows, k: int, *, probe_NP: Tensor, lists: Lists, hide: Hide | None) -> Found:
    """The k best of the rows in each query's lists, in total order: (score_NK, id_NK, row_NK).

    Args:
        probe_NP: int64, the lists of each query, none twice.
    """
    N, device = len(query_ND), query_ND.device
    found = no_hits((N, k), device)
    probe_np = probe_NP.cpu().numpy()
    count_N = lists.length_L[probe_np].sum(axis=1)
    if rows.key_PD.dtype != torch.float32 and count_N.sum() > len(rows.key_PD):  # else less is converted pair by pair
        rows = rows._replace(key_PD=rows.key_PD.float())
    # Neighbours in this order share lists, whose rows then are in a cache; and have about as many candidates.
    order_N = np.lexsort((count_N, probe_np[:, 0]))
    for at_Q in _portions(order_N, count_N):
        query_Q = torch.from_numpy(at_Q).to(device)
        row_QC = torch.from_numpy(lists.members_of(probe_np[at_Q])).to(device)
        hidden_QC = None if hide is None else hide.covers(at_Q, row_QC)
        for whole, part in zip(found, _best(query_ND[query_Q], rows, row_QC, hidden_QC, k), strict=True):
            whole[query_Q] = part
    return found


def _portions(order_N: np.ndarray, count_N: np.ndarray) -> Iterator[np.ndarray]:
    """Runs of queries whose candidates, side by side, are at most about `PAIRS`."""
    start = 0
    while start < len(order_N):
        widest_N = np.maximum.accumulate(count_N[order_N[start:start + QUERIES]])
        length = max(1, int(np.searchsorted(widest_N * np.arange(1, len(widest_N) + 1), PAIRS, side="right")))
        yield order_N[start:start + length]
        start += length


def _best(query_QD: Tensor, rows: HeadRows, row_QC: Tensor, hidden_QC: Tensor | None, k: int) -> Found:
    """The k best candidates of each query by exact scores, in total order."""
    score_QC = score_pairs(query_QD, rows, row_QC).masked_fill_(row_QC < 0, NO_SCORE)
    if hidden_QC is not None:
        score_QC.masked_fill_(hidden_QC, NO_SCORE)
    place_QL = best_places(score_QC, k)
    if place_QL.shape[1] == 0:
        return no_hits((len(query_QD), k), query_QD.device)
    row_QL = row_QC.gather(1, place_QL.clamp(min=0)).where(place_QL >= 0, -1)
    id_QL = rows.id_P[row_QL.clamp(min=0)].where(row_QL >= 0, -1)
    return in_order(score_QC.gather(1, place_QL.clamp(min=0)), id_QL, row_QL, k)


def search_by_probing(query_ND: Tensor, rows: HeadRows, k: int, *, probe_NP: Tensor, list_P: np.ndarray,
                      hidden: Hidden = ()) -> Found:
    """What `search_lists` returns, by deciding on all rows and probes one query at a time: slow and obvious, for tests."""
    found = []
    for number, (query_D, probe_P) in enumerate(zip(query_ND, probe_NP.cpu().numpy(), strict=True)):
        seen_P = np.isin(list_P, probe_P)
        for query_Q, row_P in hidden:
            if number in query_Q.tolist():
                seen_P[row_P.cpu().numpy()] = False
        row_1C = torch.from_numpy(np.flatnonzero(seen_P))[None].to(query_ND.device)
        found.append(decide(query_D[None], rows, row_1C, k) if row_1C.numel() else no_hits((1, k), query_ND.device))
    score_NK, id_NK, row_NK = (torch.cat(parts) for parts in zip(*found, strict=True))
    return score_NK, id_NK, row_NK
