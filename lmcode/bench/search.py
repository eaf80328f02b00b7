"""`lmcode bench search`: a bank that is sliced over processes of one thread, beside its peers in one process with as many
threads, on the same keys; everything included, gathering of queries and merging of hits too.

Hits are compared as sets with those of `faiss.knn`, and by what their last one scores: equals at the end of a list may be
others. What a way needs beforehand (lists, graphs) is made before anybody is timed, and its seconds are shown.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmcode.bench import peers
from lmcode.bench.keys import Vectors, random_vectors, trained_vectors
from lmcode.bench.turns import Result, Spent, Way, take_turns, timed
from lmcode.bench.workers import Workers
from lmcode.config import TIERS, ConfigError, MemoryConfig, near_match
from lmcode.memory.search.faiss_index import KEPT, LINKS
from lmcode.memory.search.hnsw import LEAST_ENTRIES as LEAST_IN_GRAPH
from lmcode.memory.search.plan import LEAST_ENTRIES as LEAST_IN_LISTS

WRITTEN_AT_ONCE = 65536
WIDTH = 64  # of random keys
NEAR = 1e-4  # scores that differ by less are equals


@dataclass(frozen=True)
class Settings:
    """What `lmcode bench search` was asked for; `model` None: random keys only."""

    model: str | None
    rows: tuple[int, ...]
    queries: int
    top_k: int
    ranks: int
    rounds: int
    tiers: tuple[str, ...]
    probes: int
    width: int
    seed: int


class Graphs(NamedTuple):
    """The graphs of one worker: the seconds that they took, the entries in them, and the entries that it holds."""

    seconds: float
    nodes: int
    entries: int


class Slice:
    """What one worker holds: its part of a bank, and its share of the queries."""

    def __init__(self, file: str, top_k: int) -> None:
        from safetensors.torch import load_file

        from lmcode.dist import Group
        from lmcode.memory.bank import LongTermMemory

        tables, self.group = load_file(file), Group.world()
        key_MD, R = tables["key"], self.group.size
        slots = len(key_MD) + R * (8 + 8 * int((len(key_MD) / R) ** 0.5))  # so that no virtual shard overflows
        config = MemoryConfig(tier="ivf", scope="global", virtual_shards=R, importance_weight=0.0, recall_queries=0)
        self.bank = LongTermMemory(heads=1, head_dim=key_MD.shape[1], slots=slots, top_k=top_k, config=config,
                                   group=self.group)
        for part_MD in key_MD.split(WRITTEN_AT_ONCE):
            self.bank.write(part_MD[None], part_MD[None], torch.zeros(len(part_MD), dtype=torch.int64))
        share = -(-len(tables["query"]) // R)
        self.query_1ND = tables["query"][self.group.rank * share:(self.group.rank + 1) * share][None].contiguous()
        self.name_N = torch.zeros(self.query_1ND.shape[1], dtype=torch.int64)

    def prepare(self, probes: int) -> Tensor | None:
        """Trains centroids and fixes how many lists are probed; returns those of the first head."""
        from lmcode.memory import planning

        planning.prepare(self.bank)
        self.bank.use(replace(self.bank.plan, probes=probes))
        centroid_HXD = self.bank.plan.centroid_HXD
        return None if centroid_HXD is None else centroid_HXD[0]

    def build(self, width: int) -> Graphs:
        """Makes graphs, which are searched with so many entries in view."""
        from lmcode.memory import planning

        spent = timed(lambda: planning.build_graphs(self.bank))
        self.bank.use(replace(self.bank.plan, width=width))
        return Graphs(spent.wall, self.bank.shard.searcher.graphs.nodes, self.bank.shard.ledger.tally.live)

    def search(self, tier: str) -> Spent:
        """One search of all ranks."""
        self.group.barrier()
        return timed(lambda: self.bank.search(self.query_1ND, self.name_N, tier=tier, ragged=True))

    def hits(self, tier: str) -> tuple[Tensor, Tensor]:
        """Ids, which count the keys, and scores, of this rank's queries."""
        found = self.bank.search(self.query_1ND, self.name_N, tier=tier, ragged=True)
        return found.id_HNK[0], found.score_HNK[0]


def run(settings: Settings) -> list[dict[str, Any]]:
    """A row for each kind of keys, number of rows and way: seconds, speed beside `faiss.knn`, and what was found.

    Raises:
        ConfigError: for an unknown tier, or keys that cannot be had.
    """
    for tier in settings.tiers:
        if tier not in TIERS:
            raise ConfigError(f"--tiers must name some of {', '.join(TIERS)}: got '{tier}'.{near_match(tier, TIERS)}")
    rows: list[dict[str, Any]] = []
    for kind, vectors in _keys(settings):
        for count in settings.rows:
            rows += _measure(settings, kind, Vectors(vectors.key_MD[:count].contiguous(), vectors.query_ND))
    return rows


def _keys(settings: Settings) -> Iterator[tuple[str, Vectors]]:
    most = max(settings.rows)
    if settings.model is not None:
        yield "trained", trained_vectors(settings.model, most, settings.queries)
    yield "random", random_vectors(most, settings.queries, WIDTH, seed=settings.seed)


def _measure(settings: Settings, kind: str, vectors: Vectors) -> list[dict[str, Any]]:
    from safetensors.torch import save_file

    key_MD, query_ND, k = vectors.key_MD, vectors.query_ND, settings.top_k
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "vectors.safetensors")
        save_file({"key": key_MD, "query": query_ND}, file)
        with Workers(settings.ranks, Slice, file, k) as workers:
            brute = {"faiss.knn": peers.faiss_knn(query_ND, key_MD, k, settings.ranks),
                     "torch": peers.torch_brute(query_ND, key_MD, k, settings.ranks)}
            made: dict[str, float] = {}
            notes: dict[str, str] = {}
            if "ivf" in settings.tiers:
                centroid_XD, made["lmcode ivf"] = _took(lambda: workers.call("prepare", settings.probes)[0])
                notes["lmcode ivf"] = no_lists(centroid_XD)
                if centroid_XD is not None:
                    brute["faiss.IndexIVFFlat"], made["faiss.IndexIVFFlat"] = _took(lambda: peers.faiss_ivf(
                        query_ND, key_MD, k, settings.ranks, centroid_XD=centroid_XD, probes=settings.probes))
            if "hnsw" in settings.tiers:
                graphs = workers.call("build", settings.width)
                made["lmcode hnsw"], notes["lmcode hnsw"] = max(one.seconds for one in graphs), about_graphs(graphs)
                brute["faiss.IndexHNSWFlat"], made["faiss.IndexHNSWFlat"] = _took(lambda: peers.faiss_hnsw(
                    query_ND, key_MD, k, settings.ranks, links=LINKS, kept=KEPT, width=max(k, settings.width)))
            ways: dict[str, Way] = {name: _way(search) for name, search in brute.items()}
            ways.update({f"lmcode {tier}": _tier(workers, tier) for tier in settings.tiers})
            spent = take_turns(ways, settings.rounds)
            found = {name: search() for name, search in brute.items()}
            found.update({f"lmcode {tier}": torch.cat([ids for ids, _ in workers.call("hits", tier)])
                          for tier in settings.tiers})
    return [{**_row(kind, len(key_MD), name, one, spent["faiss.knn"],
                    recall(found[name], found["faiss.knn"], query_ND, key_MD)),
             "made s": made.get(name), "note": notes.get(name, "")} for name, one in spent.items()]


def _took(make: Callable[[], Result]) -> tuple[Result, float]:
    """What is made, and how many seconds on the wall that takes."""
    started = time.perf_counter()
    return make(), time.perf_counter() - started


def no_lists(centroid_XD: Tensor | None) -> str:
    """Why `ivf` does not probe; empty if it does."""
    return "" if centroid_XD is not None else f"no lists, so exact: they need {LEAST_IN_LISTS:,} entries"


def about_graphs(graphs: list[Graphs]) -> str:
    """What `hnsw` goes through, and why not through graphs alone."""
    nodes, entries = sum(one.nodes for one in graphs), sum(one.entries for one in graphs)
    if nodes == entries:
        return "all entries in graphs"
    small = f"virtual shards of fewer than {LEAST_IN_GRAPH:,} entries have none"
    why = small if min(one.entries for one in graphs) < LEAST_IN_GRAPH else "the log says why they could not be made"
    return f"{nodes:,} of {entries:,} entries in graphs, the rest exact: {why}" if nodes else f"no graphs, so exact: {why}"


def _way(search: peers.Found) -> Way:
    return lambda: timed(search)


def _tier(workers: Workers, tier: str) -> Way:
    return lambda: workers.timed("search", tier)


def _row(kind: str, rows: int, name: str, spent: Spent, beside: Spent, found: float) -> dict[str, Any]:
    return {"keys": kind, "rows": rows, "way": name, "ms": 1000 * spent.wall, "cpu ms": 1000 * spent.cpu,
            "speed": beside.wall / spent.wall, "cpu speed": beside.cpu / spent.cpu, "recall": found}


def recall(id_NK: Tensor, wanted_NK: Tensor, query_ND: Tensor, key_MD: Tensor) -> float:
    """Share of the wanted hits that were found, or of which an equal was: rows that score as much as the last of them."""
    least_N = (key_MD[wanted_NK[:, -1]] * query_ND).sum(dim=1)
    score_NK = torch.stack([key_MD[row_N.clamp(min=0)].mul(query_ND).sum(dim=1).where(row_N >= 0, -torch.inf)
                            for row_N in id_NK.unbind(dim=1)], dim=1)
    return float((score_NK >= least_N[:, None] - NEAR).float().mean())
