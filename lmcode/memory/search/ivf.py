"""`ivf`: a query scores the entries of a few lists. The lists are those of one coarse quantizer for the whole bank.

An entry is in the list of the centroid with which its key has the largest inner product, a query probes those of its
`probes` largest; both by products of one shape, so they follow from the vector's bits and the centroids alone. Every rank
works out the probes of all queries for itself: that costs less than sending them. So the candidates of a query, all entries
whose list it probes, hang on no layout, and `decide` scores them against the rows as they are now.

The work goes list by list, one matrix product for a list and all queries that probe it. A first pass over each query's
nearest lists bounds its K-th score, the second takes all that may reach it; both in fp32, with the rounding of their
products allowed for, so that nothing is left out that `decide` would keep.
Letters: L lists, C candidates of a query, Y pairs of a list and a query, W pairs of a query and a row.
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
from lmcode.memory.search.decide import decide, no_hits
from lmcode.memory.search.exact import ROUNDING, best_columns, kth_largest, search_exact
from lmcode.memory.search.lists import Lists
from lmcode.memory.search.plan import Plan
from lmcode.memory.search.tier import Found, HeadRows, Hidden, Rows, Tier
from lmcode.protocol import NO_SCORE

VECTORS = 1024  # that meet all centroids in one product
FIRST_ROWS = 4  # times K rows, on average, are in the lists of the first pass


class Hide(NamedTuple):
    """`Hidden` as a table: whether queries of kind a do not see rows of kind b, hidden_AB; kind 0 hides nothing."""

    kind_N: np.ndarray
    kind_P: np.ndarray
    hidden_AB: Tensor


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

    def search_alike(self, query_HQD: Tensor, rows: Rows, k: int, *, hidden: Hidden = ()) -> Found:
        return search_exact(query_HQD, rows, k, hidden=hidden, least_queries=256)

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
    hidden_AB = torch.zeros(len(hidden) + 1, len(codes) + 1, dtype=torch.bool)
    for kind, ((query_Q, _), row_P) in enumerate(zip(hidden, hidden_rows, strict=True), start=1):
        kind_N[query_Q.cpu().numpy()] = kind
        hidden_AB[kind, np.unique(kind_P[row_P])] = True
    return Hide(kind_N, kind_P, hidden_AB)


def search_lists(query_ND: Tensor, rows: HeadRows, k: int, *, probe_NP: Tensor, lists: Lists, hide: Hide | None) -> Found:
    """The k best of the rows in each query's lists, in total order: (score_NK, id_NK, row_NK).

    Args:
        probe_NP: int64, the lists of each query, none twice, the nearest first.
    """
    N, probes = probe_NP.shape
    device, live = query_ND.device, int(lists.length_L.sum())
    if N == 0 or live == 0:
        return no_hits((N, k), device)
    first = min(probes, max(1, -(-FIRST_ROWS * k * len(lists.length_L) // live)))
    walk = _Walk(query_ND, rows, lists, hide)
    kth_N = walk.kth_of(probe_NP[:, :first], k)
    return decide(query_ND, rows, _finalists(*walk.above(probe_NP, kth_N), k=k, slack_N=walk.slack_N()), k)


class _Walk:
    """One head's queries on their way through the lists."""

    def __init__(self, query_ND: Tensor, rows: HeadRows, lists: Lists, hide: Hide | None) -> None:
        self._query_ND, self._rows, self._lists, self._hide = query_ND, rows, lists, hide
        self._length_N, self._longest = query_ND.norm(dim=1), query_ND.new_zeros(())

    def slack_N(self) -> Tensor:
        """By how much rounding may turn the order of two scores of those met so far."""
        slack_N: Tensor = 2 * ROUNDING * (self._length_N * self._longest + 10.0)
        return slack_N

    def _stops(self, probe_NP: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """List by list: its rows, the queries that probe it (and which of their probes it is), and their scores."""
        flat_Y = probe_NP.flatten().cpu().numpy()
        order_Y = np.argsort(flat_Y.astype(np.uint16 if len(self._lists.length_L) <= 2**16 else np.int64), kind="stable")
        numbers, starts = np.unique(flat_Y[order_Y], return_index=True)
        for number, pairs in zip(numbers.tolist(), np.split(order_Y, starts[1:]), strict=True):
            member_P = self._lists.members(number)
            if len(member_P) == 0:
                continue
            asking = pairs // probe_NP.shape[1]
            row_P, query_Q = (torch.from_numpy(one).to(self._query_ND.device) for one in (member_P.astype(np.int64), asking))
            key_PD = self._rows.key_PD.index_select(0, row_P).float()
            self._longest = torch.maximum(self._longest, key_PD.norm(dim=1).max())
            score_QP = torch.addmm(self._rows.addend_P[row_P], self._query_ND.index_select(0, query_Q), key_PD.T)
            self._cover(score_QP, asking, member_P)
            yield row_P, query_Q, torch.from_numpy(pairs % probe_NP.shape[1]).to(query_Q.device), score_QP

    def _cover(self, score_QP: Tensor, query_Q: np.ndarray, row_P: np.ndarray) -> None:
        if self._hide is None:
            return
        kind_Q, kind_P = self._hide.kind_N[query_Q], self._hide.kind_P[row_P]
        if kind_Q.any() and kind_P.any():
            hidden_QP = self._hide.hidden_AB[torch.from_numpy(kind_Q)][:, torch.from_numpy(kind_P)]
            score_QP.masked_fill_(hidden_QP.to(score_QP.device), NO_SCORE)

    def kth_of(self, probe_NP: Tensor, k: int) -> Tensor:
        """The k-th best score of each query in these lists, fp32 [N]; -inf where there are fewer."""
        N, probes = probe_NP.shape
        best_NPK = self._query_ND.new_full((N, probes, k), -torch.inf)
        for row_P, query_Q, probe_Q, score_QP in self._stops(probe_NP):
            width = min(k, len(row_P))
            best_NPK[query_Q, probe_Q, :width] = score_QP.topk(width, dim=1).values
        best_NC = best_NPK.flatten(1)
        return best_NC.amin(dim=1) if best_NC.shape[1] == k else kth_largest(best_NC, k).squeeze(1)

    def above(self, probe_NP: Tensor, kth_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All pairs of a query and a row in its lists that may reach its bound: query_W, row_W and score_W."""
        nobody = torch.zeros(0, dtype=torch.int64, device=self._query_ND.device)
        query, row, score = [nobody], [nobody], [self._query_ND.new_zeros(0)]
        for row_P, query_Q, _, score_QP in self._stops(probe_NP):
            at_W = _where(score_QP >= (kth_N - self.slack_N())[query_Q, None])
            query.append(query_Q[at_W // len(row_P)])
            row.append(row_P[at_W % len(row_P)])
            score.append(score_QP.flatten()[at_W])
        return torch.cat(query), torch.cat(row), torch.cat(score)


def _where(mask: Tensor) -> Tensor:
    """Positions in the flattened mask; numpy's is the faster one on a CPU."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.flatten().nonzero().squeeze(1)


def _finalists(query_W: Tensor, row_W: Tensor, score_W: Tensor, *, k: int, slack_N: Tensor) -> Tensor:
    """Rows that can be among the k best of each query, int64 [N, C], -1 where there are fewer."""
    queries = len(slack_N)
    row_NC, score_NC = _padded(query_W, row_W, score_W, queries)
    if row_NC.shape[1] > k:
        keep_NC = (score_NC >= kth_largest(score_NC, k) - slack_N[:, None]) & (score_NC > NO_SCORE / 2)
        query_W, at_W = keep_NC.nonzero(as_tuple=True)
        row_NC, score_NC = _padded(query_W, row_NC[query_W, at_W], score_NC[query_W, at_W], queries)
    return row_NC.where(score_NC > NO_SCORE / 2, -1)


def _padded(query_W: Tensor, row_W: Tensor, score_W: Tensor, queries: int) -> tuple[Tensor, Tensor]:
    """From pairs to lists of one length: row_NC, -1 where a list ends, and score_NC, -inf there."""
    order_W = torch.from_numpy(np.argsort(query_W.cpu().numpy(), kind="stable")).to(query_W.device)
    query_W, count_N = query_W[order_W], query_W.bincount(minlength=queries)
    width = int(count_N.max()) if queries else 0
    place_W = torch.arange(len(query_W), device=query_W.device) - (count_N.cumsum(0) - count_N)[query_W]
    row_NC = torch.full((queries, width), -1, device=query_W.device)
    score_NC = torch.full((queries, width), -torch.inf, device=query_W.device)
    row_NC[query_W, place_W], score_NC[query_W, place_W] = row_W[order_W], score_W[order_W]
    return row_NC, score_NC


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
