"""python tools/bookkeeping.py [--slots 100000 1000000 10000000] [--steps 20] [--eviction clock ...] [--json FILE]

What a step costs one bank beside searching, as the bank grows: 2,048 writes in 16 namespaces, 65,536 hits that are credited,
the rows of the 16 namespaces looked up, and the counts of a log line. One process, one head of width 16 (the width decides
what a vector costs, not what is kept beside it), every slot taken. Medians over the steps, milliseconds of processor time;
"ratio" is the whole step beside that of the smallest bank, "worst" the slowest step.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from lmcode.config import EVICTIONS, MemoryConfig
from lmcode.memory import LongTermMemory
from lmcode.memory.ticket import Ticket
from lmcode.protocol import Candidates, Hits

D, K, QUERIES, WRITES, STREAMS = 16, 32, 2048, 2048, 16
PARTS = ("commit", "namespaces", "stats")
LENGTH = 2048  # entries of a document


def filled(slots: int, eviction: str) -> LongTermMemory:
    """A full bank whose documents are of one length."""
    bank = LongTermMemory(heads=1, head_dim=D, slots=slots, top_k=K, config=MemoryConfig(eviction=eviction))
    for start in range(0, slots + slots // 20, 50_000):  # virtual shards are of equal size, their shares of ids are not
        key_1ED = F.normalize(torch.randn(1, 50_000, D), dim=-1)
        bank.write(key_1ED, key_1ED, (start + torch.arange(50_000)) // LENGTH, step=start // WRITES)
    return bank


def hits_of(bank: LongTermMemory, rng: np.random.Generator) -> Hits:
    """As of a search: every query has won K slots, drawn at random, with equal weights."""
    row_E = torch.from_numpy(rng.integers(0, bank.shard.num_slots, QUERIES * K))
    score_HNK = torch.zeros(1, QUERIES, K)
    ticket = Ticket(row_E, torch.arange(QUERIES).repeat_interleave(K), torch.arange(QUERIES) * K,
                    torch.full((QUERIES * K,), 1 / K), torch.zeros_like(row_E), QUERIES, bank.shard.version)
    return Hits(score_HNK, torch.zeros_like(score_HNK, dtype=torch.int64), ticket)


def step_of(bank: LongTermMemory, rng: np.random.Generator, step: int) -> dict[str, float]:
    """Seconds of each part of one step."""
    key_1ED = F.normalize(torch.randn(1, WRITES, D), dim=-1)
    first = bank.next_id // LENGTH
    name_E = first + torch.arange(WRITES) // (WRITES // STREAMS)
    candidates = Candidates(key_1ED, key_1ED, name_E, torch.rand(WRITES), torch.ones(WRITES).bool())
    hits = hits_of(bank, rng)
    parts: tuple[Callable[[], object], ...] = (
        lambda: bank.commit([candidates], [hits], step=step),
        lambda: bank.shard.ledger.slots_of_namespaces(np.unique(name_E.numpy())), bank.stats)
    seconds = {}
    for name, part in zip(PARTS, parts, strict=True):
        started = time.process_time()
        part()
        seconds[name] = time.process_time() - started
    return seconds


def measure(slots: int, eviction: str, steps: int) -> dict[str, float]:
    """Milliseconds of each part and of a step, medians."""
    torch.manual_seed(0)
    rng, bank = np.random.default_rng(0), filled(slots, eviction)
    start = bank.next_id // WRITES
    rows = [step_of(bank, rng, start + number) for number in range(steps + 3)][3:]
    medians = {name: 1e3 * statistics.median(row[name] for row in rows) for name in PARTS}
    whole = [sum(row.values()) for row in rows]
    return {**medians, "step": 1e3 * statistics.median(whole), "worst": 1e3 * max(whole)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, nargs="+", default=[10**5, 10**6, 10**7])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--eviction", nargs="+", default=["clock"], choices=sorted(EVICTIONS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = {eviction: {slots: measure(slots, eviction, arguments.steps) for slots in arguments.slots}
             for eviction in arguments.eviction}
    print(f"{'eviction':<12}{'slots':>12}" + "".join(f"{name:>12}" for name in (*PARTS, "step", "worst")) + f"{'ratio':>8}")
    for eviction, rows in found.items():
        smallest = rows[min(rows)]["step"]
        for slots, row in rows.items():
            print(f"{eviction:<12}{slots:>12,}" + "".join(f"{ms:>12.2f}" for ms in row.values())
                  + f"{row['step'] / smallest:>8.2f}")
    print(f"peak resident memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MiB")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
