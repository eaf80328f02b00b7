"""A very small training job on several real processes, through the command line, for tests and tools that hurt it."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmcode.dist import free_port
from lmcode.files import durable
from tests.helpers import forked
from tests.helpers.patience import PATIENCE_S

SETTINGS = ["model.hidden_size=32", "model.num_layers=2", "model.num_heads=2", "model.vocab_size=257",
            "model.memory_layers=[1]", "model.context_length=32", "model.long_term_memory_slots=600",
            "model.memory_top_k=8", "model.short_term_memory_size=8", "data.tokenizer=bytes", "train.sequence_length=32",
            "train.streams=4", "eval.streams=4", "train.warmup_steps=2", "train.log_every=1", "eval.every=0",
            "eval.final_windows=2"]

Sabotage = Callable[[Any], None]  # gets the module `loop` and changes what it likes


def write_text(folder: Path) -> Path:
    """Some text to train on."""
    folder.mkdir()
    for number in range(24):
        words = " ".join(f"{word * number % 17} words" for word in range(120))
        (folder / f"{number:02d}.txt").write_text(words, encoding="utf-8")
    return folder


class Job:
    """`lmcode train` on `ranks` processes of this machine; a context manager that leaves none of them behind.

    Args:
        folder: for run folder ("run"), corpus cache and what the ranks say.
        words: more words for the command line.
        sabotage: by rank, what changes the program there before it starts; functions at module level.
    """

    def __init__(self, folder: Path, text: Path, *words: str, ranks: int = 2,
                 sabotage: dict[int, Sabotage] | None = None) -> None:
        self.run = folder / "run"
        self._said = [folder / f"said-{rank}.txt" for rank in range(ranks)]
        arguments = ["train", "--preset", "tiny", *SETTINGS, f"data.path={text}", f"data.cache={folder / 'cache'}",
                     f"train.run_dir={self.run}", *words]
        port = free_port()
        self.processes = [forked.process(_rank, rank, ranks, port, str(self._said[rank]), arguments,
                                         (sabotage or {}).get(rank)) for rank in range(ranks)]

    def __enter__(self) -> Job:
        for process in self.processes:
            process.start()
        return self

    def __exit__(self, *_error: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def said(self, rank: int) -> str:
        """What a rank wrote to its console."""
        return self._said[rank].read_text(encoding="utf-8") if self._said[rank].exists() else ""

    def log(self, rank: int) -> str:
        """The rank's log file."""
        path = self.run / "logs" / f"rank-{rank:05d}.log"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def until(self, condition: Callable[[], bool], *, timeout_s: float = PATIENCE_S) -> None:
        """Waits for something to become true while every rank runs."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, self._everything("it did not happen")
            assert all(process.is_alive() for process in self.processes), self._everything("a rank has ended")
            time.sleep(0.02)

    def until_step(self, step: int) -> None:
        """Waits until `step` has been recorded."""
        metrics = self.run / "metrics.jsonl"
        self.until(lambda: metrics.exists() and f'"step": {step},' in metrics.read_text(encoding="utf-8"))

    def send(self, rank: int, number: int) -> float:
        """Sends a signal to one rank; returns when, as `time.monotonic` counts."""
        now = time.monotonic()
        os.kill(self.processes[rank].pid, number)
        return now

    def end(self, *, timeout_s: float = PATIENCE_S) -> list[int]:
        """The exit codes of all ranks, when all have ended."""
        deadline = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        assert None not in codes, self._everything(f"exit codes {codes}")
        return codes

    def _everything(self, problem: str) -> str:
        said = "\n".join(f"--- rank {rank}\n{self.said(rank)[-3000:]}" for rank in range(len(self.processes)))
        return f"{problem}\n{said}"


# Settings of a job that is killed again and again: saved in every step, of a length that nothing depends on.
KILLED = ["train.save_every=1", "train.min_learning_rate=1.0"]


def killed_after_saving(folder: Path, text: Path, *words: str, chance: random.Random, ranks: int = 1, steps: int = 1) -> int:
    """Starts a job with `KILLED`, or lets it go on, and kills all ranks, a drawn one first, soon after it has saved so many
    steps more; the newest step on the disk."""
    checkpoints = folder / "run" / "checkpoints"
    reached = len(durable.steps(checkpoints)) and durable.step_of(durable.steps(checkpoints)[-1])[0]
    with Job(folder, text, "--resume", "auto", *KILLED, *words, "train.total_steps=10000", ranks=ranks) as job:
        job.until(lambda: any(durable.step_of(path)[0] >= reached + steps for path in durable.steps(checkpoints)))
        time.sleep(chance.random() * 0.2)
        for rank in chance.sample(range(ranks), ranks):
            job.send(rank, signal.SIGKILL)
        assert job.end() == [-signal.SIGKILL] * ranks
    found, skipped = durable.newest_verified(checkpoints)
    assert skipped == []
    return durable.step_of(found)[0]


def trained_to(folder: Path, text: Path, step: int, *words: str, ranks: int = 1) -> Path:
    """Such a job, begun or resumed, that ends with this step; its run folder."""
    with Job(folder, text, "--resume", "auto", *KILLED, *words, f"train.total_steps={step}", ranks=ranks) as job:
        assert job.end() == [0] * ranks, job.said(0)[-3000:]
    return job.run


def what_was_computed(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without speeds and seconds, in its order."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = [{tag: value for tag, value in row.items() if not tag.startswith("perf/")} for row in rows]
    return [row for row in kept if len(row) > 1]


def _rank(rank: int, ranks: int, port: int, said: str, arguments: list[str], sabotage: Sabotage | None) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks),
                      LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks), OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(said, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from lmcode.cli.command import main
    from lmcode.train import loop

    if sabotage is not None:
        sabotage(loop)
    sys.exit(main(arguments))


def before(module: Any, name: str, act: Callable[..., None]) -> None:
    """Makes `act` happen, with the same arguments, before each call of a function."""
    honest = getattr(module, name)

    def call(*arguments: Any, **named: Any) -> Any:
        act(*arguments)
        return honest(*arguments, **named)

    setattr(module, name, call)


# Sabotage, after 3 steps


def raise_(loop: Any) -> None:
    def act(session: Any) -> None:
        if session.step == 3:
            with session.clock("data"):
                raise RuntimeError("an error of one rank alone")

    before(loop, "train_step", act)


def diverge(loop: Any) -> None:
    def act(session: Any) -> None:
        if session.step == 3:
            next(iter(session.model.banks.values())).rejected += 1

    before(loop, "train_step", act)


def hang(loop: Any) -> None:
    def act(session: Any) -> None:
        if session.step == 3:
            with session.clock("data"):
                time.sleep(1000)

    before(loop, "train_step", act)
