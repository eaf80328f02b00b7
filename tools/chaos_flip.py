"""python tools/chaos_flip.py [--flips 1000] [--ranks 2] [--seed 0] [--folder FOLDER]

One flipped bit in each of many random bytes, over all files of the newest of two checkpoints of a real run (every file at
least once, the rest by size): each must be refused with a line that names the file, and `auto` must fall back to the older
checkpoint. Exit code 1 otherwise.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from pathlib import Path

import chaos

from lmcode.config import ConfigError
from lmcode.files import durable
from lmcode.saved import checkpoint
from lmcode.train import saving


def save_twice(values: dict) -> None:
    session = chaos.resumed(values)
    for _ in range(2):
        chaos.step(session)
        saving.save(session)
    session.close()


def flip(path: Path, bit: int) -> None:
    """Flips one bit in place."""
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def choose(files: list[Path], count: int, chance: random.Random) -> list[tuple[Path, int]]:
    """Files and bits: a random byte of each file, then of all bytes."""
    sizes = [path.stat().st_size for path in files]
    chosen = files[:count] + chance.choices(files, sizes, k=max(0, count - len(files)))
    return [(path, chance.randrange(8 * path.stat().st_size)) for path in chosen]


def refusal(folder: Path) -> str:
    """Why a checkpoint is refused; empty if it is not."""
    try:
        durable.verify(folder)
    except durable.DamagedCheckpoint as error:
        return str(error)
    return ""


def kind_of(name: str) -> str:
    """The part of a checkpoint that a file belongs to."""
    return name.split("/")[0] if "/" in name else name


def try_flips(run: Path, flips: int, chance: random.Random) -> tuple[Counter[str], list[str]]:
    """Flips tried by part of the checkpoint, and what went wrong."""
    old, new = durable.steps(run / "checkpoints")
    files = sorted(path for path in new.rglob("*") if path.is_file() and path.stat().st_size)
    parts, failures = Counter[str](), []
    for path, bit in choose(files, flips, chance):
        flip(path, bit)
        why, found = refusal(new), durable.newest_verified(run / "checkpoints")
        parts[kind_of(path.relative_to(new).as_posix())] += 1
        where = f"bit {bit} of {path.relative_to(new)}"
        if str(path) not in why or "\n" in why or found[0] != old or [one for one, _ in found[1]] != [new]:
            failures.append(f"{where}: said '{why}', auto takes {found[0]}")
        flip(path, bit)
    try:
        fallen = checkpoint.find(run)
    except ConfigError as error:
        failures.append(str(error))
    else:
        if fallen != new or refusal(new):
            failures.append("the undamaged checkpoint does not verify any more")
    return parts, failures


def run(arguments: argparse.Namespace) -> int:
    with chaos.place(arguments.folder) as folder:
        values = chaos.settings(folder, "flipped")
        chaos.on_ranks(save_twice, arguments.ranks, values, folder=folder)
        parts, failures = try_flips(folder / "runs" / "flipped", arguments.flips, random.Random(arguments.seed))
    tried = sum(parts.values())
    print(chaos.table([("part of the checkpoint", "bits flipped"), *sorted(parts.items()), ("all", tried)]))
    return chaos.verdict(f"{tried - len(failures):,} of {tried:,} flipped bits refused by name, and auto falls back",
                         failures)


def main(argv: list[str] | None = None) -> int:
    parser = chaos.parser_of(__doc__)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
