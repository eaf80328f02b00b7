"""python tools/chaos_kill.py [--kills 200] [--ranks 1 2 4] [--index-kills 100] [--seed 0] [--folder FOLDER]

Kills all ranks of a real training job with SIGKILL at uniformly random moments of a save, resumes it with `auto`, and goes
on. Claims: whatever was acknowledged (the save returned on rank 0) is there, and each resumed bank is bit for bit the one
that was saved. Beside it the baseline: `faiss.write_index` over an existing file, killed in the same way. Exit code 1 if
an acknowledged commit was lost or a run could not be loaded.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import chaos
import numpy as np

from lmcode.files import commit, durable
from lmcode.train import saving

PHASES = ("before", "prepare", "copy to host", "write files", "fsync, hash", "wait for all", "manifest, folders", "named",
          "drop old", "after")


# A rank


def save_for_ever(values: dict[str, Any], phase: Any, pipe: Connection) -> None:
    """Resumes, then trains and saves every step, the next one while files are written; rank 0 says what it is about to do
    and what is done."""
    session = chaos.resumed(values)
    tell = pipe.send if session.me.rank == 0 else lambda message: None
    bank = session.model.banks[1]
    tell(("resumed", session.step, bank.content_hash()))
    if session.me.rank == 0:
        mark_phases(phase)
    began, saved_step = 0.0, None
    while True:
        chaos.step(session)
        content = bank.content_hash()
        if saved_step is not None:
            saving.settle(session, wait=True)
            fine = durable.step_of(session.saved)[0] == saved_step
            tell(("saved" if fine else "failed", saved_step, time.monotonic() - began))
            phase.value = len(PHASES) - 1
        phase.value, began, saved_step = 0, time.monotonic(), session.step
        tell(("saving", session.step, content))
        saving.start(session)


def mark_phases(phase: Any) -> None:
    """Makes the functions of a save note in shared memory how far it has come."""
    def marked(owner: Any, name: str, number: int, *, then: int | None = None) -> None:
        real: Callable[..., Any] = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            phase.value = number
            result = real(*args, **kwargs)
            phase.value = number if then is None else then
            return result

        setattr(owner, name, call)

    marked(commit.Commit, "_prepare", 1)
    marked(saving, "snapshot", 2)
    marked(commit.Commit, "_write", 3, then=5)
    marked(durable, "seal", 4)
    marked(durable, "publish", 6)
    marked(durable.os, "rename", 6, then=7)
    marked(commit, "drop_old", 8)


# The one who kills


@dataclass
class Record:
    """What has happened to one run. hashes: of the bank, by step, as rank 0 told them before saving."""

    hashes: dict[int, str] = field(default_factory=dict)
    acknowledged: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    phases: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def note(self, message: tuple[str, Any, Any]) -> None:
        kind, step, value = message
        if kind == "saved":
            self.acknowledged = max(self.acknowledged, step)
            self.seconds.append(value)
        elif kind == "saving":
            if self.hashes.setdefault(step, value) != value:
                self.failures.append(f"step {step} was trained twice and came out different")
        elif kind == "resumed":
            if step < self.acknowledged:
                self.failures.append(f"resumed at step {step}, though step {self.acknowledged} was acknowledged")
            if step and self.hashes.get(step) != value:
                self.failures.append(f"the bank resumed at step {step} is not the one that was saved")
        else:
            self.failures.append(f"{kind}: {step}: {value}")


def listen(pipe: Connection, record: Record, until: str) -> None:
    """Notes messages until one of this kind has come."""
    while True:
        if not pipe.poll(chaos.TIMEOUT_S):
            raise RuntimeError("the job says nothing")
        message = pipe.recv()
        if message[0] == "error":
            raise RuntimeError(message[1])
        record.note(message)
        if message[0] == until:
            return


def drain(pipe: Connection, record: Record) -> None:
    """Notes what was said before the end."""
    try:
        while pipe.poll():
            message = pipe.recv()
            if message[0] != "error":  # a rank that saw another one die
                record.note(message)
    except (EOFError, OSError):
        pass


def kill_once(values: dict[str, Any], ranks: int, record: Record, chance: random.Random, log: Path) -> None:
    """One start, one save that is waited for (the first of a process is slower), and a kill within the next."""
    phase = chaos.CONTEXT.RawValue("i", 0)
    job = chaos.Ranks.start(save_for_ever, ranks, values, phase, log=log)
    try:
        listen(job.pipes[0], record, "resumed")
        listen(job.pipes[0], record, "saved")
        listen(job.pipes[0], record, "saving")
        known = len(record.seconds)
        time.sleep(chance.random() * 1.1 * statistics.median(record.seconds[-20:]))
        job.kill(chance.sample(range(ranks), ranks))
        drain(job.pipes[0], record)
        hit = len(PHASES) - 1 if len(record.seconds) > known else phase.value
        record.phases[PHASES[hit]] += 1
    finally:
        job.close()
    judge(Path(values["train"]["run_dir"]) / "checkpoints", record)


def judge(checkpoints: Path, record: Record) -> None:
    """What lies on the disk after a kill."""
    found, skipped = durable.newest_verified(checkpoints)
    step = 0 if found is None else durable.verify(found).facts.step
    if skipped:
        record.failures.append(f"a name is there and does not verify: {skipped}")
    if step < record.acknowledged:
        record.failures.append(f"step {record.acknowledged} was acknowledged and {found} is the newest")
    record.outcomes["not yet acknowledged, there whole" if step > record.acknowledged else "the acknowledged one"] += 1
    record.acknowledged = max(record.acknowledged, step)


def kill_runs(folder: Path, ranks: int, kills: int, seed: int) -> Record:
    """A run that is killed this often and started again as often, and once more at the end."""
    record, chance = Record(), random.Random(seed * 10 + ranks)
    values = chaos.settings(folder, f"killed-{ranks}", train={"deepspeed": "zero2" if ranks < 4 else "zero3"})
    for number in range(kills):
        kill_once(values, ranks, record, chance, folder / f"ranks-{ranks}.log")
        if (number + 1) % 25 == 0:
            print(f"  {ranks} rank(s): {number + 1} kills, at step {record.acknowledged}, "
                  f"{len(record.failures)} failures", flush=True)
    job = chaos.Ranks.start(save_for_ever, ranks, values, chaos.CONTEXT.RawValue("i", 0),
                            log=folder / f"ranks-{ranks}.log")
    listen(job.pipes[0], record, "saved")
    job.close()
    return record


# The baseline


def write_index_for_ever(path: str, ready: Connection) -> None:
    """Writes a flat index over itself with FAISS's own function, which opens the file and fills it."""
    import faiss

    index = faiss.IndexFlatIP(64)
    index.add(np.zeros((20_000, 64), np.float32))
    while True:
        began = time.monotonic()
        faiss.write_index(index, path)
        ready.send(time.monotonic() - began)


def kill_index_writers(folder: Path, kills: int, seed: int) -> int:
    """Of so many kills within `write_index`, those that left a file that FAISS cannot read."""
    import faiss

    chance, path, unreadable = random.Random(seed), str(folder / "baseline.index"), 0
    for _ in range(kills):
        ours, theirs = chaos.CONTEXT.Pipe(duplex=False)
        process = chaos.forked.process(write_index_for_ever, path, theirs)
        process.start()
        theirs.close()
        seconds = [ours.recv() for _ in range(3)]
        time.sleep(chance.random() * statistics.median(seconds))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        ours.close()
        try:
            faiss.read_index(path)
        except RuntimeError:
            unreadable += 1
    return unreadable


def main(argv: list[str] | None = None) -> int:
    parser = chaos.parser_of(__doc__)
    parser.add_argument("--kills", type=int, default=200, help="for each number of ranks")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--index-kills", type=int, default=100, help="of the baseline; 0 leaves it out")
    parser.add_argument("--seed", type=int, default=0)
    return run(parser.parse_args(argv))


def run(arguments: argparse.Namespace) -> int:
    with chaos.place(arguments.folder) as folder:
        records = {ranks: kill_runs(folder, ranks, arguments.kills, arguments.seed) for ranks in arguments.ranks}
        unreadable = kill_index_writers(folder, arguments.index_kills, arguments.seed)
    print(chaos.table([
        ("killed while", *(f"{ranks} rank(s)" for ranks in records)),
        *((phase, *(record.phases[phase] for record in records.values())) for phase in PHASES),
        ("all kills", *(sum(record.phases.values()) for record in records.values())), ("",),
        ("newest after the kill: acknowledged", *(r.outcomes["the acknowledged one"] for r in records.values())),
        ("newest: whole, not acknowledged", *(r.outcomes["not yet acknowledged, there whole"] for r in records.values())),
        ("median save, ms", *(f"{1000 * statistics.median(r.seconds):.0f}" for r in records.values())),
        ("steps reached", *(record.acknowledged for record in records.values()))]))
    if arguments.index_kills:
        print(f"baseline: {unreadable} of {arguments.index_kills} kills within faiss.write_index over an existing file "
              "left it unreadable")
    failures = [f"{ranks} rank(s): {one}" for ranks, record in records.items() for one in record.failures]
    return chaos.verdict(f"{arguments.kills} kills x R = {', '.join(map(str, records))}: 0 acknowledged commits lost, "
                         "0 unloadable runs", failures)


if __name__ == "__main__":
    sys.exit(main())
