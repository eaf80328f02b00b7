"""python tools/scale.py [--check] [--queries 2048] [--slots 65536]

What the memory of one layer costs a step on R ranks, from constants that were measured on one rank: the formula, a table for
8, 64 and 512 ranks and 10^8 to 10^10 entries, and with --check its terms beside what 1, 2 and 4 ranks on this machine take.
Processor time is checked, not the time on the wall: ranks that share two cores wait for each other.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional as F

from lmcode.config import MemoryConfig
from lmcode.dist import Group
from lmcode.memory import LongTermMemory
from lmcode.protocol import Candidates
from tests.helpers.ranks import run_on_ranks

HEADS, D, K, BYTES = 2, 64, 32, 4


@dataclass(frozen=True)
class Machine:
    """What one rank does, all measured.

    flat: multiplications and additions per second of a search of all rows.
    hit: seconds of merging, weighting and booking per hit of a query and head.
    entry: seconds per entry that a rank stores.
    network: bytes per second that a rank receives. call: seconds of one collective per other rank.
    """

    flat: float
    hit: float
    entry: float
    network: float
    call: float


HERE = Machine(flat=60e9, hit=0.6e-6, entry=10e-6, network=0.45e9, call=0.1e-3)  # 2 cores, gloo; see lmcode/memory/README.md
NODE = Machine(flat=20e12, hit=10e-9, entry=0.2e-6, network=25e9, call=5e-6)  # a GPU and its share of a network: data sheets
CALLS = 8  # collectives of one layer in a step


def seconds(machine: Machine, *, ranks: int, entries: float, tokens: int, probed: float = 1.0,
            lists: int = 0) -> dict[str, float]:
    """One layer's step on each of `ranks` ranks of a memory group.

    Args:
        tokens: of one rank. probed: share of the bank that is scored; lists: centroids that every query is compared with.
    """
    n, others = tokens * HEADS, ranks - 1
    rows = entries / ranks * probed
    read = n * (2 * D * BYTES + 12 * K + 16 + (2 * D + 2) * BYTES)  # queries and values, hits, gradients
    received = others * (read + tokens * (24 + 2 * HEADS * D * BYTES / ranks))
    return {"search": (ranks * n * rows + n * lists) * 2 * D / machine.flat, "hits": n * K * machine.hit,
            "writes": tokens * machine.entry, "network": received / machine.network, "calls": CALLS * others * machine.call}


def table(machine: Machine, tokens: int) -> None:
    """Milliseconds for flat, ivf (4 sqrt(M) lists of which 1/256 is probed) and ivf in groups of 8."""
    print(f"{'entries':>10}{'ranks':>7}" + "".join(f"{name:>16}" for name in ("flat", "ivf", "ivf, groups of 8")))
    for entries in (1e8, 1e9, 1e10):
        ivf = {"probed": 1 / 256, "lists": int(4 * entries**0.5)}
        for ranks in (8, 64, 512):
            ways: list[dict[str, Any]] = [{"ranks": ranks}, {"ranks": ranks, **ivf}, {"ranks": 8, **ivf}]
            ms = [1e3 * sum(seconds(machine, entries=entries, tokens=tokens, **way).values()) for way in ways]
            print(f"{entries:>10.0e}{ranks:>7}" + "".join(f"{one:>16,.0f}" for one in ms))


def one_step(slots: int, queries: int) -> dict[str, float]:
    """Processor seconds and received bytes of this rank's part of one step; median of three."""
    group = Group.world()
    torch.set_num_threads(1)
    config = MemoryConfig(scope="global", tier="faiss-flat", exchange="all_to_all")
    bank = LongTermMemory(heads=HEADS, head_dim=D, slots=slots, top_k=K, config=config, group=group)
    torch.manual_seed(0)
    for part in range(0, slots, 8192):
        key = F.normalize(torch.randn(HEADS, 8192, D), dim=-1)
        bank.write(key, key, torch.zeros(8192).long(), step=part)
    tokens, rows = queries // HEADS, []
    for step in range(4):
        torch.manual_seed(1 + group.rank)
        query = (F.normalize(torch.randn(HEADS, tokens, D), dim=-1) * 8).requires_grad_()
        names, times = torch.zeros(tokens).long(), [time.process_time()]
        group.take()
        hits = bank.search(query.detach(), names)
        times.append(time.process_time())
        value, lse = bank.attend(query, hits)
        (value.sum() + lse.sum()).backward()
        times.append(time.process_time())
        offered = Candidates(query.detach(), query.detach(), names, torch.ones(tokens), torch.ones(tokens).bool())
        bank.commit([offered], [hits], step=step)
        times.append(time.process_time())
        rows.append({"search": times[1] - times[0], "attend": times[2] - times[1], "commit": times[3] - times[2],
                     "bytes": float(sum(group.take()[1].values()))})
    return {name: sorted(row[name] for row in rows[1:])[1] for name in rows[0]}


def check(slots: int, queries: int) -> None:
    """The terms of the formula beside what they are on 1, 2 and 4 ranks, with the constants of one."""
    alone = None
    for ranks in (1, 2, 4):
        found = run_on_ranks(one_step, ranks, slots, queries)
        mean = {name: sum(one[name] for one in found) / ranks for name in found[0]}
        alone = alone or mean
        machine = replace(HERE, flat=queries * slots * 2 * D / alone["search"], entry=0.0,
                          hit=(alone["attend"] + alone["commit"]) / queries / K)
        said = seconds(machine, ranks=ranks, entries=slots, tokens=queries // HEADS)
        print(f"{ranks} rank(s): search {1e3 * mean['search']:,.0f} ms (formula {1e3 * said['search']:,.0f}), "
              f"attend and commit {1e3 * (mean['attend'] + mean['commit']):,.0f} ms ({1e3 * said['hits']:,.0f}), "
              f"received {mean['bytes'] / 1e6:,.2f} MB ({said['network'] * machine.network / 1e6:,.2f})")
    print(f"here: {machine.flat / 1e9:.0f} GFLOP/s, {machine.hit * 1e6:.2f} microseconds per hit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--queries", type=int, default=2048, help="of one rank, all heads")
    parser.add_argument("--slots", type=int, default=65536)
    arguments = parser.parse_args()
    if arguments.check:
        check(arguments.slots, arguments.queries)
    for name, machine, tokens in (("this machine, 1,024 tokens a rank", HERE, 1024),
                                  ("a GPU by its data sheet, 8,192", NODE, 8192)):
        print(f"\nmilliseconds a step and layer: {name}")
        table(machine, tokens)


if __name__ == "__main__":
    main()
