"""python tools/chaos_reshard.py [--ranks 1 2 3 4] [--stages cpu zero1 zero2 zero3 zero3_offload] [--folder FOLDER]

A real run is saved by each number of ranks and resumed by each, for each ZeRO stage. The hash of the bank's content must be
the saved one in the whole grid; the hits of the next training step and its loss (to 1e-6), and the loss after one more
update (to 1e-5), must not depend on who resumes. Exit code 1 otherwise.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

import chaos
import numpy as np
import torch

from lmcode.train import loop, saving

STEPS = 4
Save = tuple[str, int]  # stage, ranks


class Seen(NamedTuple):
    """What a resumed run shows: the bank's hash, losses of the next two steps, ids of the hits, in the global order."""

    content: str
    first: float
    second: float
    hits: np.ndarray


def values_of(folder: Path, save: Save) -> dict[str, Any]:
    stage, ranks = save
    return chaos.settings(folder, f"{stage}-{ranks}", train={"deepspeed": stage})


def save_all(runs: list[dict[str, Any]]) -> list[str]:
    """Trains and saves each; the hashes of the banks."""
    contents = []
    for values in runs:
        session = chaos.resumed(values)
        for _ in range(STEPS):
            chaos.step(session)
        saving.save(session)
        contents.append(session.model.banks[1].content_hash())
        session.close()
    return contents


def load_all(runs: list[dict[str, Any]]) -> list[Seen]:
    """Resumes each on these ranks and goes on for two steps; nothing is saved."""
    seen = []
    for values in runs:
        session = chaos.resumed(values)
        content = session.model.banks[1].content_hash()
        first, second = loop.train_step(session), loop.train_step(session)
        hits = session.group.all_gather_object(first.reads[1][0].hits.id_HNK)
        seen.append(Seen(content, first.loss, second.loss, torch.cat(hits, dim=1).numpy()))
        session.close()
    return seen


class Cell(NamedTuple):
    """One cell of the grid: who saved, who resumed, and what is right about it; the losses' distances."""

    source: int
    target: int
    fine: dict[str, bool]
    first: float
    second: float


def cell_of(source: int, target: int, saved: str, seen: Seen, own: Seen) -> Cell:
    """`saved`: the hash when saving; `own`: what the number of ranks that saved sees."""
    first, second = abs(seen.first - own.first), abs(seen.second - own.second)
    return Cell(source, target, {"hash": seen.content == saved, "hits": np.array_equal(seen.hits, own.hits),
                                 "losses": first <= 1e-6 and second <= 1e-5, "something found": (seen.hits >= 0).any()},
                first, second)


def try_stage(stage: str, ranks: list[int], folder: Path) -> list[Cell]:
    """The whole grid of one stage."""
    runs = [values_of(folder, (stage, source)) for source in ranks]
    saved = [chaos.on_ranks(save_all, source, [values], folder=folder)[0][0]
             for source, values in zip(ranks, runs, strict=True)]
    seen = {target: chaos.on_ranks(load_all, target, runs, folder=folder)[0] for target in ranks}
    return [cell_of(source, target, saved[at], seen[target][at], seen[source][at])
            for at, source in enumerate(ranks) for target in ranks]


def run(arguments: argparse.Namespace) -> int:
    rows: list[tuple[Any, ...]] = [("stage, ranks x ranks", "hashes equal", "hits equal", "loss of step 1 differs by",
                                    "of step 2 by")]
    failures: list[str] = []
    with chaos.place(arguments.folder) as folder:
        for stage in arguments.stages:
            cells = try_stage(stage, arguments.ranks, folder)
            rows.append((f"{stage}, {arguments.ranks}", *(f"{sum(cell.fine[one] for cell in cells)} of {len(cells)}"
                                                          for one in ("hash", "hits")),
                         f"{max(cell.first for cell in cells):.1e}", f"{max(cell.second for cell in cells):.1e}"))
            failures += [f"{stage}: {cell.source} -> {cell.target} ranks: {cell.fine}" for cell in cells
                         if not all(cell.fine.values())]
    print(chaos.table(rows))
    size = len(arguments.ranks) ** 2
    return chaos.verdict(f"hashes and hits equal in all {size} cells, in each of {len(arguments.stages)} stages", failures)


def main(argv: list[str] | None = None) -> int:
    parser = chaos.parser_of(__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--stages", nargs="+", default=list(chaos.STAGES), choices=chaos.STAGES)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
