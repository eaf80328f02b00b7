"""python tools/chaos_crash.py [--ranks 1 2] [--cuts 500] [--every 1] [--seed 0] [--folder FOLDER]

A crash at every call that a save makes, and power cuts at random ones. A real run saves four times, with removal of old
checkpoints and, on one rank, a change of the saved memory; every call to the disk is noted. Then the disk is laid out as
it was after each single call, after half of each write (crash), or without what was not yet forced to disk (power cut: a
strict disk on which content and names need an fsync each). Every time the newest checkpoint that verifies must be the
last acknowledged one or the next, byte for byte, and after a crash the next save must work and leave no litter. Exit code
1 otherwise.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import chaos
import torch
import traced
from traced import Op

from lmcode import opening
from lmcode.dist import Group
from lmcode.files import durable
from lmcode.saved import checkpoint
from lmcode.saved.amend import amend
from lmcode.train import saving

SAVES, RUN = 4, "crashed"
Contents = dict[str, dict[str, bytes]]  # what each checkpoint held when it was acknowledged


def save_and_trace(folder: Path) -> tuple[list[Op], Contents]:
    """Some saves on this rank: its calls, and on rank 0 what lay there whenever a save had returned."""
    values = chaos.settings(folder, RUN, train={"deepspeed": "zero2"})
    contents: Contents = {}
    (folder / "runs").mkdir(exist_ok=True)
    with traced.Recorder(folder / "runs") as recorder:
        session = chaos.resumed(values)
        for _ in range(SAVES):
            chaos.step(session)
            saved = saving.save(session)
            if session.me.rank == 0:
                recorder.note(saved.name)
                contents[saved.name] = chaos.content_of(saved)
            session.group.barrier()
        session.close()
        if session.group.size == 1:
            changed = change_memory(folder / "runs" / RUN)
            recorder.note(changed.name)
            contents[changed.name] = chaos.content_of(changed)
    return recorder.ops, contents


def change_memory(run: Path) -> Path:
    """Stores an experience in the newest checkpoint of a run; returns the revision."""
    group, device = Group(), torch.device("cpu")
    model, *_ = opening.open_model(run, group=group, device=device)
    return amend(checkpoint.find(run), model, lambda draft: draft.model.store_experience("a line to remember")).folder


@dataclass
class Judge:
    """Compares what lies on a disk with what should."""

    contents: Contents
    order: list[str]
    found: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def judge(self, root: Path, acknowledged: int, where: str) -> None:
        """`acknowledged`: how many saves had returned at this moment."""
        newest, skipped = durable.newest_verified(root / RUN / "checkpoints")
        index = -1 if newest is None else self.order.index(newest.name)
        self.found["the new one" if index == acknowledged else "the old one" if acknowledged else "none yet"] += 1
        if skipped:
            self.failures.append(f"{where}: {skipped}")
        if not acknowledged - 1 <= index <= acknowledged:
            self.failures.append(f"{where}: {acknowledged} acknowledged, the newest is {newest}")
        if newest is not None and chaos.content_of(newest) != self.contents[newest.name]:
            self.failures.append(f"{where}: {newest.name} is a mixture")


def goes_on(root: Path, scratch: Path) -> bool:
    """Whether a next commit works on a copy of this disk and leaves nothing but commits."""
    checkpoints = root / RUN / "checkpoints"
    if not checkpoints.exists():
        return True
    shutil.copytree(checkpoints, scratch)
    final = durable.step_folder(scratch, 99)
    with durable.commit(final, durable.CommitFacts(99, 1, 1, "0" * 64, {})) as place:
        (place / "data").write_text("x")
    fine = durable.newest_verified(scratch)[0] == final and not [p for p in scratch.iterdir() if p.name[0] == "."]
    shutil.rmtree(scratch)
    return fine


def crash_everywhere(ops: list[Op], judge: Judge, folder: Path, every: int) -> Counter[str]:
    """Lays out every state (or each `every`-th) that a crash can leave; returns how many by the call that comes next."""
    live, scratch, kinds, acknowledged = folder / "live", folder / "scratch", Counter[str](), 0
    live.mkdir()
    for number, op in enumerate(ops):
        acknowledged += op.kind == "note"
        if op.kind == "write" and len(op.data) > 1 and number % every == 0:
            traced.apply(live, op._replace(data=op.data[:len(op.data) // 2]))
            judge.judge(live, acknowledged, f"half of call {number}, {op.kind} {op.path}")
            kinds["half a write"] += 1
        traced.apply(live, op)
        if number % every and op.kind != "rename":
            continue
        judge.judge(live, acknowledged, f"after call {number}, {op.kind} {op.path}")
        if not goes_on(live, scratch):
            judge.failures.append(f"after call {number}, {op.kind} {op.path}: the next save leaves litter")
        if op.kind != "note":
            kinds[op.kind] += 1
    shutil.rmtree(live)
    return kinds


def cut_power(ops: list[Op], judge: Judge, folder: Path, cuts: int, chance: random.Random) -> None:
    """Power cuts after random calls; every third one loses all that may be lost."""
    live, disk, acknowledged = folder / "live", traced.Disk(), 0
    due = Counter(chance.randrange(len(ops)) for _ in range(cuts))
    live.mkdir()
    for number, op in enumerate(ops):
        acknowledged += op.kind == "note"
        disk.do(op)
        for turn in range(due[number]):
            disk.cut(live, None if (number + turn) % 3 == 0 else chance)
            judge.judge(live, acknowledged, f"power cut after call {number}, {op.kind} {op.path}")
            traced.clear(live)
    shutil.rmtree(live)


def try_ranks(folder: Path, ranks: int, arguments: argparse.Namespace) -> tuple[list[tuple[Any, ...]], list[str]]:
    """All states of a run on so many ranks: rows of the table, and failures."""
    folder.mkdir()
    results = chaos.on_ranks(save_and_trace, ranks, folder, folder=folder)
    ops, contents = traced.merged(trace for trace, _ in results), results[0][1]
    crash, power = (Judge(contents, [op.path for op in ops if op.kind == "note"]) for _ in range(2))
    if not traced.complete(ops, folder / "runs", f"{RUN}/checkpoints"):
        crash.failures.append("the trace, done again, does not give what the run left: calls are missing in it")
    kinds = crash_everywhere(ops, crash, folder, arguments.every)
    cut_power(ops, power, folder, arguments.cuts, random.Random(arguments.seed))
    said = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    rows = [(f"{ranks} rank(s), crash", sum(crash.found.values()), *(crash.found[one] for one in OUTCOMES), said),
            (f"{ranks} rank(s), power cut", sum(power.found.values()), *(power.found[one] for one in OUTCOMES),
             f"{len(ops)} calls, {len(contents)} commits")]
    return rows, [f"{ranks} rank(s): {one}" for one in crash.failures + power.failures]


OUTCOMES = ("none yet", "the old one", "the new one")


def run(arguments: argparse.Namespace) -> int:
    rows: list[tuple[Any, ...]] = [("", "states", *OUTCOMES, "after")]
    failures: list[str] = []
    with chaos.place(arguments.folder) as folder:
        for ranks in arguments.ranks:
            more, failed = try_ranks(folder / f"ranks-{ranks}", ranks, arguments)
            rows += more
            failures += failed
    print(chaos.table(rows))
    return chaos.verdict("a crash at every call and half of every write: the old state or the new, never a mixture; "
                         f"{arguments.cuts} power cuts x R = {', '.join(map(str, arguments.ranks))}: 0 acknowledged "
                         f"commits lost ({len(failures)} failures)", failures)


def main(argv: list[str] | None = None) -> int:
    parser = chaos.parser_of(__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--cuts", type=int, default=500, help="power cuts for each number of ranks")
    parser.add_argument("--every", type=int, default=1, help="lay out only every N-th crash, and all around renames")
    parser.add_argument("--seed", type=int, default=0)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
