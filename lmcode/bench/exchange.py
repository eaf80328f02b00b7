"""`lmcode bench exchange`: what a read moves between ranks, by phase, in every way that `memory.exchange` and `memory.fetch`
have, on real processes.

Bytes and seconds are those that the group counts inside its collectives; seconds include waiting for the slowest rank. The
bank is small, so that searching it takes little of a read. The peer is all_gather with rows: the hits of all ranks go to all
of them, and the winners' keys and values to their query's rank. Sending every rank's K best rows, which is simpler, would
take R times as many.
Letters: N queries of a rank and head.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from lmcode.bench.banks import fill
from lmcode.bench.turns import in_turns, medians, timed
from lmcode.bench.workers import Workers
from lmcode.config import MemoryConfig
from lmcode.dist import Group
from lmcode.memory import lifecycle
from lmcode.memory.bank import LongTermMemory

PHASES = ("queries", "hits", "values", "gradients")
WAYS = tuple((exchange, fetch) for exchange in ("all_gather", "all_to_all") for fetch in ("rows", "sums"))
PEER = ("all_gather", "rows")


@dataclass(frozen=True)
class Settings:
    """What `lmcode bench exchange` was asked for; `queries` of each rank and head, `rows` of the bank."""

    ranks: int
    queries: int
    top_k: int
    heads: int
    width: int
    rows: int
    rounds: int
    seed: int


class Reads:
    """What one worker holds: its slice of a bank, once for each way, and its queries."""

    def __init__(self, settings: Settings) -> None:
        self.group = Group.world()
        config = MemoryConfig(scope="global", tier="exact", virtual_shards=max(16, self.group.size), recall_queries=0)
        bank = LongTermMemory(heads=settings.heads, head_dim=settings.width, slots=settings.rows, top_k=settings.top_k,
                              config=config, group=self.group)
        fill(bank, seed=settings.seed)
        self.banks: dict[tuple[str, str], LongTermMemory] = {}
        for way in WAYS:
            changes = dict(zip(("exchange", "fetch"), way, strict=True))
            self.banks[way] = lifecycle.like(bank, config=config.model_copy(update=changes))
            for shard in bank.owned:
                self.banks[way].load(shard, bank.state(shard))
        chance = torch.Generator().manual_seed(settings.seed + 1 + self.group.rank)
        self.query_HND = 8 * F.normalize(
            torch.randn(settings.heads, settings.queries, settings.width, generator=chance), dim=-1)
        self.name_N = torch.zeros(settings.queries, dtype=torch.int64)

    def read(self, way: tuple[str, str]) -> dict[str, float]:
        """One read of all ranks, forward and backward: seconds on the wall and of the processor, seconds and received bytes
        of each phase."""
        self.group.barrier()
        self.group.take()
        spent = timed(lambda: self._read(self.banks[way]))
        seconds, received = self.group.take()
        return {"wall": spent.wall, "cpu": spent.cpu, **{f"seconds {phase}": seconds.get(phase, 0.0) for phase in PHASES},
                **{f"bytes {phase}": float(received.get(phase, 0)) for phase in PHASES}}

    def _read(self, bank: LongTermMemory) -> None:
        query_HND = self.query_HND.clone().requires_grad_()
        value_HND, lse_HN = bank.attend(query_HND, bank.search(query_HND.detach(), self.name_N))
        (value_HND.sum() + lse_HN.sum()).backward()


def run(settings: Settings) -> list[dict[str, Any]]:
    """Rows for each way: one for each phase, and one for all of them with what the whole read takes beside that of the
    peer."""
    with Workers(settings.ranks, Reads, settings) as workers:
        reads = in_turns({" ".join(way): partial(_read, workers, way) for way in WAYS}, settings.rounds)
    found = {way: medians(reads[" ".join(way)]) for way in WAYS}
    return [row for way in WAYS for row in _rows(way, found[way], found[PEER])]


def _read(workers: Workers, way: tuple[str, str]) -> dict[str, float]:
    """Of the slowest rank, and of the one that received most; processor time of all ranks."""
    by_rank = workers.call("read", way)
    return {name: (sum if name == "cpu" else max)(one[name] for one in by_rank) for name in by_rank[0]}


def _rows(way: tuple[str, str], mine: dict[str, float], peers: dict[str, float]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for phase in (*PHASES, "all"):
        phases = PHASES if phase == "all" else (phase,)
        (seconds, _), (received, beside) = ([sum(one[f"{kind} {part}"] for part in phases) for one in (mine, peers)]
                                            for kind in ("seconds", "bytes"))
        rows.append({"exchange": way[0], "fetch": way[1], "phase": phase, "ms": 1000 * seconds, "bytes": int(received),
                     "share": received / beside if beside else None, "read ms": None, "read cpu ms": None, "speed": None})
    rows[-1].update({"read ms": 1000 * mine["wall"], "read cpu ms": 1000 * mine["cpu"],
                     "speed": peers["wall"] / mine["wall"]})
    return rows
