"""Searching one shard: queries that see the same rows go together through a tier, and what a query must not see is hidden.

The one thing to know: a searcher changes nothing and knows no other rank. Which rows a group of queries sees is `views`; how
the best of them are found is the tier's to say.
Letters: N queries, of all ranks or of one group; M rows that they see; X heads x groups of a `Stack`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Union

import numpy as np
from torch import Tensor

from lmcode.memory.ledger import Ledger
from lmcode.memory.search.decide import no_hits
from lmcode.memory.search.exact import attend_best
from lmcode.memory.search.hnsw import HnswTier
from lmcode.memory.search.ivf import IvfTier
from lmcode.memory.search.plan import Plan
from lmcode.memory.search.tier import Found, Hidden, Rows, Tier, tier_of
from lmcode.memory.views import Names, Views, on_device, runs
from lmcode.protocol import NO_SCORE

Scope = Union[str, Sequence[int]]  # noqa: UP007  (evaluated at run time)
Asking = tuple[np.ndarray, Any]  # positions of queries, and what all of them see


class Searcher:
    """Finds the best rows of a shard, for the queries of all ranks.

    Attributes:
        plan: how the whole bank is searched, the same on every rank; `use` sets it.
    """

    def __init__(self, views: Views, value_HMD: Tensor, ledger: Ledger) -> None:
        self._views, self._value_HMD, self._ledger = views, value_HMD, ledger
        self._tiers: dict[str, Tier] = {}
        self.plan = Plan()

    def use(self, plan: Plan) -> None:
        """How the whole bank is searched from now on."""
        self.plan = plan
        for tier in self._tiers.values():
            tier.use(plan)

    def changed(self, slot_E: np.ndarray) -> None:
        """Tells the tiers which slots have other keys, other entries or none now."""
        for tier in self._tiers.values() if len(slot_E) else ():
            tier.changed(slot_E)

    def forget(self, slot_E: np.ndarray) -> None:
        """Has no tier keep a copy of what was in these slots."""
        for tier in self._tiers.values():
            tier.forget(slot_E)

    def search(self, query_NHD: Tensor, namespace_N: np.ndarray, document_N: np.ndarray, k: int, *, scope: Scope,
               tier: str) -> Found:
        """The k best rows of this rank for each query and head: score, id and slot, [N, H, K], in total order.

        A query with a negative namespace sees nothing, whatever the scope; one of a known document sees nothing that was
        written from this document under another namespace.
        """
        columns, key_HMD = self._ledger.columns, self._views.key_HMD

        def hidden(slot_M: Tensor | None, queries: np.ndarray) -> Hidden:
            if scope == "document" or not (document_N[queries] >= 0).any():
                return ()
            slots = slice(None) if slot_M is None else slot_M.cpu().numpy()
            pairs = hidden_rows(columns["document"][slots], columns["namespace"][slots], document_N[queries],
                                namespace_N[queries])
            return [(on_device(some, key_HMD), on_device(unseen, key_HMD)) for some, unseen in pairs]

        searching = self.tier(tier)
        rows_of = self._table if searching.whole else self._views.of_namespaces
        return self._by_group(query_NHD, groups_of(namespace_N, scope), k, searching.search, rows_of, hidden)

    def nearest(self, unit_ND: Tensor, text_N2: np.ndarray, *, tier: str) -> Found:
        """The two entries here that are nearest to each query in its text, itself included: as `search`, [N, 2].

        Args:
            unit_ND: rows of `unit_keys`; so are the rows that they are compared with, a text at a time.
            text_N2: namespace (negative: none, so nothing is found) and document of each query.
        """
        order_N = np.lexsort((text_N2[:, 1], text_N2[:, 0]))
        groups = [(order_N[start:end], text) for start, end, text in zip(*runs(text_N2[order_N]), strict=True)
                  if text[0] >= 0]
        found = self._by_group(unit_ND.unsqueeze(1), groups, 2, self.tier(tier).search, self._views.of_text)
        return found[0][:, 0], found[1][:, 0], found[2][:, 0]

    def look_up(self, query_NHD: Tensor, namespace_N: np.ndarray, k: int, *, scope: Scope,
                longest: float) -> tuple[Tensor, ...] | None:
        """What attending to the hits of a `search` would give, [N, H, D], and its log-sum-exp, [N, H], and whether that
        takes a search after all, bool [N]; None if it does for all.

        Args:
            longest: length of the longest query, finite.
        """
        if self._value_HMD.device != self._views.key_HMD.device:
            return None
        (N, H, D), names = query_NHD.shape, namespace_N.tolist()
        groups: tuple[Names | None, ...] = (seen_in(scope),)
        if scope == "document":
            groups = tuple((name,) for name in (names if len(set(names)) > 1 else names[:1]))
        stack = self._views.stack(groups)
        if stack is None:
            return None
        value_XND, lse_XN, doubtful_XN = attend_best(query_NHD.transpose(0, 1).reshape(H * len(groups), -1, D), stack,
                                                     self._value_HMD.flatten(0, 1), k, longest)
        value_NHD, lse_NH = value_XND.view(H, N, -1).transpose(0, 1), lse_XN.view(H, N).transpose(0, 1)
        if stack.has_empty or min(names) < 0:
            sees_N1 = (~stack.empty & on_device(namespace_N >= 0, self._views.key_HMD))[:, None]
            value_NHD, lse_NH = value_NHD.where(sees_N1[..., None], 0.0), lse_NH.where(sees_N1, NO_SCORE)
        return value_NHD, lse_NH, doubtful_XN.view(H, N).any(dim=0)

    def list_lengths(self) -> np.ndarray:
        """How many entries each list of the plan's centroids holds here, int64 [H, lists]."""
        tier = self.tier("ivf")
        assert isinstance(tier, IvfTier)
        return tier.lengths(self._views.table())

    @property
    def graphs(self) -> HnswTier:
        """The tier of graphs."""
        tier = self.tier("hnsw")
        assert isinstance(tier, HnswTier)
        return tier

    def tier(self, name: str) -> Tier:
        """This shard's object of a tier, made when it is first asked for."""
        if name not in self._tiers:
            self._tiers[name] = tier_of(name)()
            self._tiers[name].placed(self._ledger.range_of)
            self._tiers[name].use(self.plan)
        return self._tiers[name]

    def _table(self, names: Names | None) -> Rows:
        """`Views.of_namespaces`, but all slots where all rows are seen."""
        return self._views.table() if names is None else self._views.of_namespaces(names)

    def _by_group(self, query_NHD: Tensor, groups: list[Asking], k: int, search: Callable[..., Found],
                  rows_of: Callable[[Any], Rows],
                  hidden_of: Callable[[Tensor | None, np.ndarray], Hidden] = lambda *_: ()) -> Found:
        """Group by group; a tier goes head by head, so here, and nowhere else, queries are turned for it."""
        N, H, _ = query_NHD.shape
        found = no_hits((N, H, k), query_NHD.device)
        for queries, seen in groups:
            rows = rows_of(seen)
            if len(rows.id_M) == 0:
                continue
            positions = on_device(queries, self._views.key_HMD)
            query_HND = query_NHD.index_select(0, positions).transpose(0, 1).contiguous()
            score_HNK, id_HNK, slot_HNK = search(query_HND, rows, k, hidden=hidden_of(rows.slot_M, queries))
            if rows.slot_M is not None:
                slot_HNK = rows.slot_M[slot_HNK.clamp(min=0)].where(slot_HNK >= 0, -1)
            for whole, part in zip(found, (score_HNK, id_HNK, slot_HNK), strict=True):
                whole.index_copy_(0, positions, part.transpose(0, 1))
        return found


def hidden_rows(document_M: np.ndarray, namespace_M: np.ndarray, document_N: np.ndarray,
                namespace_N: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Which rows are hidden from which queries, by position: those of a query's own document that were written under
    another namespace, so in another reading. What its own reading has written comes from earlier tokens."""
    documents = np.unique(document_N[document_N >= 0])
    if len(documents) == 0:
        return []
    own = np.flatnonzero(np.isin(document_M, documents))
    if len(own) == 0:
        return []
    readings, reading_N = np.unique(np.stack([document_N, namespace_N], axis=1), axis=0, return_inverse=True)
    pairs = [(np.flatnonzero(reading_N.reshape(-1) == number),
              own[(document_M[own] == document) & (namespace_M[own] != namespace)])
             for number, (document, namespace) in enumerate(readings) if document >= 0]
    return [(queries, unseen) for queries, unseen in pairs if len(unseen)]


def seen_in(scope: Scope) -> Names | None:
    """The namespaces of a scope that is the same for all queries; None: all."""
    return None if isinstance(scope, str) else tuple(scope)


def groups_of(namespace_N: np.ndarray, scope: Scope) -> list[Asking]:
    """Queries that see the same namespaces, and those (None: all); queries with a negative one are in no group."""
    if scope == "document" and len(namespace_N) == 1:
        return [(np.array([0]), (int(namespace_N[0]),))] if namespace_N[0] >= 0 else []
    if scope == "document":
        order = np.argsort(namespace_N, kind="stable")
        names, starts = np.unique(namespace_N[order], return_index=True)
        return [(queries, (int(name),)) for name, queries in zip(names, np.split(order, starts[1:]), strict=True)
                if name >= 0]
    queries = np.flatnonzero(namespace_N >= 0)
    return [(queries, seen_in(scope))] if len(queries) else []
