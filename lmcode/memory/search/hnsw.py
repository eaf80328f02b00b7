"""`hnsw`: graphs, for banks that are read and not written; one for each virtual shard and head.

A query asks the graph of every virtual shard for its nearest keys, and `decide` scores those against the rows as they are
now. Slots that have changed since their graph was begun are searched exactly and never through a graph, so who was
overwritten or deleted is not found, and the newest entry is. Whatever decides is a fact of one virtual shard: what its graph
was made of, what has changed in it, what is hidden in it. So what is found depends neither on ranks nor on their threads;
when graphs come into use does, and that is agreed by all ranks (`planning.tend_graphs`). Until then search is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lmcode.config import ConfigError
from lmcode.memory.search import faiss_index
from lmcode.memory.search.decide import decide, in_order
from lmcode.memory.search.exact import search_exact
from lmcode.memory.search.graphs import Building, Graph, content_of
from lmcode.memory.search.plan import FIRST_WIDTH, Plan
from lmcode.memory.search.tier import Found, Hidden, Rows, Tier
from lmcode.protocol import NO_SCORE

LEAST_ENTRIES = 1024  # of a virtual shard with a graph: fewer are searched faster one by one
STALE = 0.25  # of its nodes: when so many slots of a virtual shard have changed, its graph is given up
NOTHING, DUE, BUILDING, DONE, FAILED = range(5)  # what a rank says of its graphs


class Rest(NamedTuple):
    """The entries that no graph proposes: slots ascending, int64, with copies of their keys and ids."""

    slots: Tensor
    key_HED: Tensor
    id_E: Tensor


class HnswTier(Tier):
    """Keeps the graphs of a shard. Without any, and for rows that are not the whole shard, it is exact.

    Attributes:
        frozen: whether it makes no graphs beyond those that it was given.
    """

    approximate = True

    def __init__(self) -> None:
        self.frozen = False
        self._width = FIRST_WIDTH
        self._places: Mapping[int, slice] = {}
        self._graphs: dict[int, Graph] = {}
        self._changed_M = np.zeros(0, bool)  # since the graph in use was begun
        self._changed_later: list[np.ndarray] = []  # since those in the making were
        self._building: Building | None = None
        self._failed = False
        self._due: tuple[int, ...] | None = None  # virtual shards that should get a graph; None: not known
        self._rest: Rest | None = None

    @staticmethod
    def check(device: torch.device) -> None:
        if not faiss_index.available(torch.device("cpu")):
            raise ConfigError("memory.tier = hnsw needs FAISS, which makes its graphs: found none")

    @property
    def whole(self) -> bool:
        return bool(self._graphs)

    def placed(self, places: Mapping[int, slice]) -> None:
        self._places = places
        self._changed_M = np.zeros(max((place.stop for place in places.values()), default=0), bool)

    def use(self, plan: Plan) -> None:
        self._width = plan.width

    def changed(self, slot_E: np.ndarray) -> None:
        self._changed_M[slot_E] = True
        if self._building is not None:
            self._changed_later.append(slot_E)
        self._due = self._rest = None
        for shard, graph in [*self._graphs.items()]:
            if np.count_nonzero(self._changed_M[self._places[shard]]) > STALE * len(graph.slot_E):
                del self._graphs[shard]

    # --- graphs come and go ----------------------------------------------------------------------------------------

    @property
    def building(self) -> bool:
        """Whether graphs are in the making, by this rank or by others."""
        return self._building is not None

    @property
    def nodes(self) -> int:
        """Entries in the graphs in use."""
        return sum(len(graph.slot_E) for graph in self._graphs.values())

    @property
    def problem(self) -> str:
        """Why graphs could not be made; empty if they could."""
        return "" if self._building is None else self._building.problem or ""

    def state(self, id_M: np.ndarray) -> int:
        """What this rank has to say of its graphs.

        Args:
            id_M: int64, the ids in all slots; -1 in an empty one.
        """
        if self._building is not None:
            return BUILDING if not self._building.done else FAILED if self._building.problem else DONE
        if self.frozen or self._failed:
            return NOTHING
        if self._due is None:
            self._due = tuple(shard for shard, place in self._places.items() if shard not in self._graphs
                              and np.count_nonzero(id_M[place] >= 0) >= LEAST_ENTRIES)
        return DUE if self._due else NOTHING

    def begin(self, rows: Rows, folder: Path | None) -> None:
        """Begins to make the graphs that are due, from copies of these rows, all of the shard.

        Args:
            folder: where graphs are kept from one process to the next; None: nowhere.
        """
        self._changed_later = []
        self._building = Building({shard: content_of(rows, self._places[shard]) for shard in self._due or ()}, folder)

    def wait(self) -> None:
        """Until those in the making are made."""
        if self._building is not None:
            self._building.wait()

    def finish(self, *, use: bool) -> None:
        """Puts the graphs that were made into use, or gives them up for good. On all ranks alike."""
        assert self._building is not None
        building, self._building = self._building, None
        building.stop()
        self._failed, self._due, self._rest = not use, None, None
        if not use:
            return
        for shard, graph in building.made.items():
            self._graphs[shard] = graph
            self._changed_M[self._places[shard]] = False
        self.changed(np.concatenate([np.zeros(0, np.int64), *self._changed_later]))
        self._changed_later = []

    def try_again(self) -> None:
        """Makes graphs from now on, even if it failed before."""
        self._failed = False

    def forget(self, slot_E: np.ndarray) -> None:
        """Leaves no copy of the keys in these slots, which are to be gone; graphs that are in the making are given up."""
        if self._building is not None:
            self._building.stop()
            self._building = None
        self._due = self._rest = None
        for shard, place in self._places.items():
            if ((slot_E >= place.start) & (slot_E < place.stop)).any():
                self._graphs.pop(shard, None)

    def share(self, other: HnswTier) -> None:
        """Takes the graphs of the same entries in the same slots, and makes none of its own."""
        self.frozen = True
        self._graphs, self._changed_M = dict(other._graphs), other._changed_M.copy()
        self._due = self._rest = None

    # --- searching -------------------------------------------------------------------------------------------------

    def search(self, query_HND: Tensor, rows: Rows, k: int, *, hidden: Hidden = ()) -> Found:
        if rows.slot_P is not None or not self._graphs or query_HND.shape[1] == 0:
            return search_exact(query_HND, rows, k, hidden=hidden)
        rest = self._rest = self._rest or self._rest_of(rows)
        lists = [self._ask(self._places[shard], graph, query_HND, rows, k, hidden)
                 for shard, graph in sorted(self._graphs.items())]
        if len(rest.slots):
            seen = Rows(rest.key_HED, rows.addend_P[rest.slots], rest.id_E)
            score_HNK, id_HNK, at_HNK = search_exact(query_HND, seen, k, hidden=among(hidden, rest.slots))
            lists.append((score_HNK, id_HNK, rest.slots[at_HNK.clamp(min=0)].where(at_HNK >= 0, -1)))
        score_HNX, id_HNX, row_HNX = (torch.cat(parts, dim=-1) for parts in zip(*lists, strict=True))
        return in_order(score_HNX, id_HNX, row_HNX, k)

    def _rest_of(self, rows: Rows) -> Rest:
        outside_M = self._changed_M.copy()
        for shard in self._places.keys() - self._graphs.keys():
            outside_M[self._places[shard]] = True
        slots = torch.from_numpy(np.flatnonzero(outside_M)).to(rows.id_P.device)
        slots = slots[rows.id_P[slots] >= 0]
        return Rest(slots, rows.key_HPD.index_select(1, slots), rows.id_P[slots])

    def _ask(self, place: slice, graph: Graph, query_HND: Tensor, rows: Rows, k: int, hidden: Hidden) -> Found:
        """The k best that the graph of one virtual shard proposes; of a query from which anything there is hidden the best
        of all that have not changed, for hidden rows could be all that a graph proposes."""
        width, found = min(max(self._width, k), len(graph.slot_E)), []
        for head, query_ND in enumerate(query_HND):
            node_NX = faiss_index.ask_graph(graph.heads[head], query_ND.cpu(), width)
            row_NX = graph.slot_E[node_NX]
            row_NX[(node_NX < 0) | self._changed_M[row_NX]] = -1
            found.append(decide(query_ND, rows.of_head(head), torch.from_numpy(row_NX).to(query_ND.device), k))
        score_HNK, id_HNK, row_HNK = (torch.stack(parts) for parts in zip(*found, strict=True))
        slots = torch.arange(place.start, place.stop, device=rows.id_P.device)
        if hidden_here := among(hidden, slots):
            changed_X = torch.from_numpy(self._changed_M[place]).to(slots.device)
            here = Rows(rows.key_HPD[:, place], rows.addend_P[place].masked_fill(changed_X, NO_SCORE), rows.id_P[place])
            at = torch.cat([query_N for query_N, _ in hidden_here])
            order = torch.split(torch.arange(len(at), device=at.device), [len(query_N) for query_N, _ in hidden_here])
            part = search_exact(query_HND[:, at].contiguous(), here, k,
                                hidden=[(one, row_X) for one, (_, row_X) in zip(order, hidden_here, strict=True)])
            rows_there = (part[2] + place.start).where(part[2] >= 0, -1)
            for whole, one in zip((score_HNK, id_HNK, row_HNK), (*part[:2], rows_there), strict=True):
                whole[:, at] = one
        return score_HNK, id_HNK, row_HNK


def among(hidden: Hidden, slots: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What is hidden among some rows, ascending, by their positions there; without queries from which nothing is."""
    if len(slots) == 0:
        return []
    inside = []
    for query_N, row_X in hidden:
        at_X = torch.searchsorted(slots, row_X).clamp(max=len(slots) - 1)
        inside.append((query_N, at_X[slots[at_X] == row_X]))
    return [(query_N, at_X) for query_N, at_X in inside if len(at_X)]
