"""`lmcode bench evict`: what a step does to the books of a full bank, by policy of eviction and number of slots.

A step writes 2,048 entries of 16 namespaces, credits 65,536 hits, looks up the rows of these namespaces and makes the counts
of a log line, in one process. The bank has one head of width 16: the width decides what a vector costs, and not what is kept
beside it. The peer of a bank is the smallest one of the same policy, and both take turns, step by step.
Letters: E entries; N queries; X hits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lmcode.bench.banks import DOCUMENT, fill
from lmcode.bench.turns import Spent, in_turns, medians, timed
from lmcode.config import EVICTIONS, ConfigError, MemoryConfig, near_match
from lmcode.memory.bank import LongTermMemory
from lmcode.memory.entry import UNKNOWN, Entries
from lmcode.memory.evict import policy_of
from lmcode.memory.placement import virtual_shard_of
from lmcode.memory.ticket import Ticket
from lmcode.protocol import Candidates, Hits

WIDTH, TOP_K, QUERIES, WRITES, STREAMS = 16, 32, 2048, 2048, 16
PARTS = ("touch", "write", "namespaces", "stats")  # of a step; what `evict` measures is in `write`, too


@dataclass(frozen=True)
class Settings:
    """What `lmcode bench evict` was asked for."""

    slots: tuple[int, ...]
    policies: tuple[str, ...]
    rounds: int
    seed: int


class FullBank:
    """A bank without a free slot, and steps that change it."""

    def __init__(self, slots: int, policy: str, *, seed: int) -> None:
        self.bank = LongTermMemory(heads=1, head_dim=WIDTH, slots=slots, top_k=TOP_K, config=MemoryConfig(eviction=policy))
        fill(self.bank, seed=seed, aging=True)
        self._chance, self._numbers = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
        self._policy, self._step = policy_of(policy), self.bank.next_id // DOCUMENT

    def step(self) -> dict[str, float]:
        """Milliseconds of processor time by part, and of the whole step on the wall ("wall") and of the processor ("step").

        touch: a commit of hits alone. evict: the policy asked where the next entries would go, which changes nothing. write:
        a commit of entries alone, with the same question in it.
        """
        bank, step = self.bank, self._step
        self._step += 1
        key_1ED = F.normalize(torch.randn(1, WRITES, WIDTH, generator=self._chance), dim=-1)
        name_E = bank.next_id // DOCUMENT + torch.arange(WRITES) // (WRITES // STREAMS)
        offered = Candidates(key_1ED, key_1ED, name_E, torch.rand(WRITES, generator=self._chance), torch.ones(WRITES).bool())
        hits, names = self._hits(), np.unique(name_E.numpy())
        spent = {"touch": timed(lambda: bank.commit([], [hits], step=step)),
                 "evict": self._placing(key_1ED, name_E.numpy(), step),
                 "write": timed(lambda: bank.commit([offered], [], step=step)),
                 "namespaces": timed(lambda: bank.shard.ledger.slots_of_namespaces(names)),
                 "stats": timed(bank.stats)}
        whole = [spent[part] for part in PARTS]
        return {**{name: 1000 * one.cpu for name, one in spent.items()}, "step": 1000 * sum(one.cpu for one in whole),
                "wall": 1000 * sum(one.wall for one in whole)}

    def _hits(self) -> Hits:
        """As of a search: every query has won K slots, drawn at random, with equal weights."""
        row_X = torch.from_numpy(self._numbers.integers(0, self.bank.shard.num_slots, QUERIES * TOP_K))
        score_HNK = torch.zeros(1, QUERIES, TOP_K)
        ticket = Ticket(row_X, torch.arange(QUERIES).repeat_interleave(TOP_K), torch.arange(QUERIES) * TOP_K,
                        torch.full((QUERIES * TOP_K,), 1 / TOP_K), torch.zeros_like(row_X), QUERIES, self.bank.shard.version)
        return Hits(score_HNK, torch.zeros_like(score_HNK, dtype=torch.int64), ticket)

    def _placing(self, key_1ED: Tensor, name_E: np.ndarray, step: int) -> Spent:
        """What it takes the policy to place the next entries, in each virtual shard."""
        shard, id_E = self.bank.shard, self.bank.next_id + np.arange(WRITES)
        columns = Entries(key_1ED[0], key_1ED[0], id_E, name_E, np.full(WRITES, UNKNOWN), np.ones(WRITES, np.float32),
                          np.full(WRITES, step)).metadata()
        shard_E = virtual_shard_of(id_E, self.bank.config.virtual_shards)
        newcomers = {one: {name: column[shard_E == one] for name, column in columns.items()} for one in shard.owned}
        return timed(lambda: [self._policy(shard.ledger.ring(one), some) for one, some in newcomers.items()])


def run(settings: Settings) -> list[dict[str, Any]]:
    """A row for each policy and number of slots: medians of milliseconds, and the step beside that of the smallest bank.

    Raises:
        ConfigError: for an unknown policy, or sizes of which there is only one.
    """
    for policy in settings.policies:
        if policy not in EVICTIONS:
            raise ConfigError(f"--policies must name some of {', '.join(EVICTIONS)}: got '{policy}'."
                              f"{near_match(policy, EVICTIONS)}")
    sizes = sorted({*settings.slots})
    if len(sizes) < 2:
        raise ConfigError(f"--slots must name two sizes or more, as the smallest is the peer of the others: got {sizes[0]}")
    return [row for policy in settings.policies for row in _rows(policy, sizes, settings)]


def _rows(policy: str, sizes: list[int], settings: Settings) -> list[dict[str, Any]]:
    banks = {str(slots): FullBank(slots, policy, seed=settings.seed) for slots in sizes}
    steps = in_turns({name: bank.step for name, bank in banks.items()}, settings.rounds)
    found = {name: medians(some) for name, some in steps.items()}
    beside = found[str(sizes[0])]["step"]
    return [{"policy": policy, "slots": slots, **{f"{part} ms": ms for part, ms in found[str(slots)].items()},
             "worst ms": max(one["step"] for one in steps[str(slots)]), "cost": found[str(slots)]["step"] / beside}
            for slots in sizes]
