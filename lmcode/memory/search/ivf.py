"""`ivf`: a query scores the entries of a few lists. The lists are those of one coarse quantizer for the whole bank.

An entry is in the list of the centroid with which its key has the largest inner product, a query probes those of its
`probes` largest; both by products of one shape, so they follow from the vector's bits and the centroids alone. Every rank
works out the probes of all queries for itself: that costs less than sending them. So the candidates of a query, all entries
whose list it probes, do not depend on the layout, and `decide` scores them against the rows as they are now.

The work goes query by query: the rows of its lists are scored one pair at a time, where they lie, by the routine of
`decide`. Products list by list, for all queries that probe it, took over twice as long on a CPU, since lists are short.
Letters: N queries, or vectors; M rows; X lists, the lists that a query probes, or its candidates.
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
from lmcode.memory.search.inverted_lists import InvertedLists
from lmcode.memory.search.pairs import best_places
from lmcode.memory.search.plan import Plan
from lmcode.memory.search.tier import Found, HeadRows, Hidden, Rows, Tier
from lmcode.protocol import NO_SCORE

VECTORS = 1024  # vectors whose products with all centroids are computed at once
QUERIES = 256  # queries that are answered at once, if they have
PAIRS = 2**20  # at most so many candidates together


class Hide(NamedTuple):
    """`Hidden` as a table: hides[a, b] is whether queries of kind a do not see rows of kind b; kind 0 hides nothing."""

    kind_N: np.ndarray
    kind_M: np.ndarray
    hides: np.ndarray

    def covers(self, portion: np.ndarray, row_NX: Tensor) -> Tensor:
        """Which of these rows are hidden from these queries, bool [N, X]."""
        kind_NX = self.kind_M[row_NX.cpu().numpy()]
        return torch.from_numpy(self.hides[self.kind_N[portion][:, None], kind_NX]).to(row_NX.device)


class IvfTier(Tier):
    """Keeps the lists of a shard. Before there are centroids, and for rows that are not the whole shard, it is exact."""

    approximate = True

    def __init__(self) -> None:
        self._plan: Plan | None = None
        self._lists: list[InvertedLists] = []
        self._changed: list[np.ndarray] | None = None  # None: everything

    @staticmethod
    def check(device: torch.device) -> None:
        if not faiss_index.available(torch.device("cpu")):
            raise ConfigError("memory.tier = ivf needs FAISS, which trains its centroids: found none")

    @property
    def whole(self) -> bool:
        return self._plan is not None and self._plan.centroid_HXD is not None

    def use(self, plan: Plan) -> None:
        if self._plan is None or plan.centroid_HXD is not self._plan.centroid_HXD:
            self._changed = None
        self._plan = plan

    def changed(self, slot_E: np.ndarray) -> None:
        if self._changed is not None:
            self._changed.append(slot_E)

    def search(self, query_HND: Tensor, rows: Rows, k: int, *, hidden: Hidden = ()) -> Found:
        if rows.slot_M is not None or self._plan is None or self._plan.centroid_HXD is None:
            return search_exact(query_HND, rows, k, hidden=hidden)
        self._follow(rows)
        hide = as_table(hidden, query_HND.shape[1], len(rows))
        found = [search_lists(query_ND, rows.of_head(head), k, lists=lists, hide=hide,
                              probe_NX=nearest_centroids(query_ND, centroid_XD.to(query_ND.device), self._plan.probes))
                 for head, (query_ND, lists, centroid_XD) in
                 enumerate(zip(query_HND, self._lists, self._plan.centroid_HXD, strict=True))]
        score_HNK, id_HNK, row_HNK = (torch.stack(parts) for parts in zip(*found, strict=True))
        return score_HNK, id_HNK, row_HNK

    def lengths(self, rows: Rows) -> np.ndarray:
        """How many entries each list holds, int64 [H, X]."""
        self._follow(rows)
        return np.stack([lists.length_X for lists in self._lists])

    def _follow(self, rows: Rows) -> None:
        """Puts the slots that have changed since the last search into their lists."""
        assert self._plan is not None and self._plan.centroid_HXD is not None
        H, X, _ = self._plan.centroid_HXD.shape
        if self._changed is None:
            self._lists, slot_E = [InvertedLists(X, len(rows)) for _ in range(H)], np.arange(len(rows))
        else:
            slot_E = np.unique(np.concatenate([np.zeros(0, np.int64), *self._changed]))
        self._changed = []
        if len(slot_E) == 0:
            return
        slots = torch.from_numpy(slot_E).to(rows.id_M.device)
        live_E = (rows.id_M[slots] >= 0).cpu().numpy()
        for key_MD, lists, centroid_XD in zip(rows.key_HMD, self._lists, self._plan.centroid_HXD, strict=True):
            list_E = nearest_centroids(key_MD, centroid_XD.to(key_MD.device), 1, rows=slots)[:, 0].cpu().numpy()
            lists.move(slot_E, np.where(live_E, list_E, -1))


def nearest_centroids(vector_ND: Tensor, centroid_XD: Tensor, count: int, *, rows: Tensor | None = None) -> Tensor:
    """For each vector the `count` centroids with the largest inner products, in no order but that the first is the nearest:
    int64 [N, count]; the lower number among equals.

    Args:
        rows: int64, which of the vectors; all when None.
    """
    count, parts = min(count, len(centroid_XD)), []
    index = torch.arange(len(vector_ND), device=vector_ND.device) if rows is None else rows
    for at in index.split(VECTORS):
        block_ND = vector_ND[at].float()
        score_NX = torch.mm(F.pad(block_ND, (0, 0, 0, VECTORS - len(block_ND))), centroid_XD.T)[:len(block_ND)]
        nearest_N1 = score_NX.argmax(dim=1, keepdim=True)
        if count == 1:
            parts.append(nearest_N1)
            continue
        parts.append(torch.cat([nearest_N1, _others(score_NX, nearest_N1, count)], dim=1))
    return torch.cat(parts) if parts else index.new_zeros(0, count)


def _others(score_NX: Tensor, nearest_N1: Tensor, count: int) -> Tensor:
    """The best `count` of each row but for the nearest, ties by number."""
    score_NX = score_NX.scatter(1, nearest_N1, -torch.inf)
    wanted = count - 1
    score_NK, column_NK, gap_N = best_columns(score_NX.unsqueeze(0), wanted)
    column_NK = column_NK[0].clone()
    tied = (gap_N[0] <= 0).nonzero().squeeze(1)  # equals at the end of the list: the sort is stable
    if len(tied):
        column_NK[tied] = score_NX[tied].sort(dim=1, descending=True, stable=True).indices[:, :wanted]
    return column_NK


def as_table(hidden: Hidden, num_queries: int, num_rows: int) -> Hide | None:
    """Rows that are hidden from the same queries are of one kind; None if nothing is hidden."""
    if not hidden:
        return None
    hidden_rows = [unseen.cpu().numpy() for _, unseen in hidden]
    some_M = np.unique(np.concatenate(hidden_rows))
    code_M = np.zeros(len(some_M), np.int64)
    for word, unseen in zip(np.random.default_rng(0).integers(1, 2**62, len(hidden)), hidden_rows, strict=True):
        code_M[np.searchsorted(some_M, unseen)] ^= word  # rows hidden from the same have the same code
    codes, number_M = np.unique(code_M, return_inverse=True)
    kind_N, kind_M = np.zeros(num_queries, np.int64), np.zeros(num_rows, np.int64)
    kind_M[some_M] = number_M.reshape(-1) + 1
    hides = np.zeros((len(hidden) + 1, len(codes) + 1), bool)
    for kind, ((queries, _), unseen) in enumerate(zip(hidden, hidden_rows, strict=True), start=1):
        kind_N[queries.cpu().numpy()] = kind
        hides[kind, np.unique(kind_M[unseen])] = True
    return Hide(kind_N, kind_M, hides)


def search_lists(query_ND: Tensor, rows: HeadRows, k: int, *, probe_NX: Tensor, lists: InvertedLists,
                 hide: Hide | None) -> Found:
    """The k best of the rows in each query's lists, in total order: (score_NK, id_NK, row_NK).

    Args:
        probe_NX: int64, the lists of each query, none twice.
    """
    N, device = len(query_ND), query_ND.device
    found = no_hits((N, k), device)
    probes = probe_NX.cpu().numpy()
    count_N = lists.length_X[probes].sum(axis=1)
    if rows.key_MD.dtype != torch.float32 and count_N.sum() > len(rows.key_MD):  # else less is converted pair by pair
        rows = rows._replace(key_MD=rows.key_MD.float())
    # Neighbours in this order share lists, whose rows then are in a cache; and have about as many candidates.
    order_N = np.lexsort((count_N, probes[:, 0]))
    for portion in _portions(order_N, count_N):
        queries = torch.from_numpy(portion).to(device)
        row_NX = torch.from_numpy(lists.members_of(probes[portion])).to(device)
        hidden_NX = None if hide is None else hide.covers(portion, row_NX)
        for whole, part in zip(found, _best(query_ND[queries], rows, row_NX, hidden_NX, k), strict=True):
            whole[queries] = part
    return found


def _portions(order_N: np.ndarray, count_N: np.ndarray) -> Iterator[np.ndarray]:
    """Runs of queries whose candidates, side by side, are at most about `PAIRS`."""
    start = 0
    while start < len(order_N):
        widest_N = np.maximum.accumulate(count_N[order_N[start:start + QUERIES]])
        length = max(1, int(np.searchsorted(widest_N * np.arange(1, len(widest_N) + 1), PAIRS, side="right")))
        yield order_N[start:start + length]
        start += length


def _best(query_ND: Tensor, rows: HeadRows, row_NX: Tensor, hidden_NX: Tensor | None, k: int) -> Found:
    """The k best candidates of each query by exact scores, in total order."""
    score_NX = score_pairs(query_ND, rows, row_NX).masked_fill_(row_NX < 0, NO_SCORE)
    if hidden_NX is not None:
        score_NX.masked_fill_(hidden_NX, NO_SCORE)
    place_NK = best_places(score_NX, k)
    if place_NK.shape[1] == 0:
        return no_hits((len(query_ND), k), query_ND.device)
    row_NK = row_NX.gather(1, place_NK.clamp(min=0)).where(place_NK >= 0, -1)
    id_NK = rows.id_M[row_NK.clamp(min=0)].where(row_NK >= 0, -1)
    return in_order(score_NX.gather(1, place_NK.clamp(min=0)), id_NK, row_NK, k)


def search_by_probing(query_ND: Tensor, rows: HeadRows, k: int, *, probe_NX: Tensor, list_M: np.ndarray,
                      hidden: Hidden = ()) -> Found:
    """What `search_lists` returns, by deciding on all rows and probes one query at a time: slow and obvious, for tests."""
    found = []
    for number, (query_D, probe_X) in enumerate(zip(query_ND, probe_NX.cpu().numpy(), strict=True)):
        seen_M = np.isin(list_M, probe_X)
        for queries, unseen in hidden:
            if number in queries.tolist():
                seen_M[unseen.cpu().numpy()] = False
        row_1X = torch.from_numpy(np.flatnonzero(seen_M))[None].to(query_ND.device)
        found.append(decide(query_D[None], rows, row_1X, k) if row_1X.numel() else no_hits((1, k), query_ND.device))
    score_NK, id_NK, row_NK = (torch.cat(parts) for parts in zip(*found, strict=True))
    return score_NK, id_NK, row_NK
