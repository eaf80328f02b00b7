"""`python -m lmcode` for a rank that is to be met in a certain phase, or that is to fail: what stands for Python in a Slurm
job of tests and tools. Its words are PLAN FOLDER -m lmcode WORDS.

PLAN: what happens in the first start of the job, in the second, and so on: 'PHASE:RANK,...'. In a phase the rank stands
still until it is asked to save and end, at most a minute; the file FOLDER/reached-START says that it is there.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

GO = "go"
WAIT_S = 900.0
STEP = 3  # steps behind a rank that is met while it trains, and before it raises


def reached_file(folder: Path, start: int) -> Path:
    """The file that says that a job has reached the planned phase of its start (0, 1, ...)."""
    return folder / f"reached-{start}"


def gate_file(folder: Path, rank: int) -> Path:
    """The file that says that a rank waits before its first step."""
    return folder / f"gate-{rank}"


def raised_file(folder: Path) -> Path:
    """The file that says that a rank is raising its exception."""
    return folder / "raised"


def _before(module: Any, name: str, act: Callable[..., None]) -> None:
    honest = getattr(module, name)

    def call(*arguments: Any, **named: Any) -> Any:
        act(*arguments)
        return honest(*arguments, **named)

    setattr(module, name, call)


def _in_corpus(stand: Callable[..., None]) -> None:
    """While the batch script, which is no rank, prepares the corpus."""
    from lmcode.data import corpus

    _before(corpus._SideWriter, "add", stand)


def _in_preparing(stand: Callable[..., None]) -> None:
    from lmcode.train import start

    _before(start, "load_corpus", stand)


def _in_training(stand: Callable[..., None]) -> None:
    from lmcode.train import loop

    _before(loop, "train_step", lambda session: stand() if session.step == STEP else None)


def _in_consolidation(stand: Callable[..., None]) -> None:
    from lmcode.memory.bank import LongTermMemory

    _before(LongTermMemory, "consolidate", stand)


def _in_evaluation(stand: Callable[..., None]) -> None:
    from lmcode.train import loop

    _before(loop, "evaluate_midway", stand)


def _in_saving(stand: Callable[..., None]) -> None:
    from lmcode.train import loop

    _before(loop.saving, "_begin", stand)


def _in_final_evaluation(stand: Callable[..., None]) -> None:
    """After the last step was trained and saved."""
    from lmcode.train import loop

    def act(session: Any, *_rest: object) -> None:
        if session.step == session.last_step:
            stand()

    _before(loop, "held_out_loss", act)


PHASES = {"corpus": _in_corpus, "preparing": _in_preparing, "training": _in_training,
          "consolidation": _in_consolidation, "evaluation": _in_evaluation, "saving": _in_saving,
          "final evaluation": _in_final_evaluation}
GATED = ("raise", "gate")  # an exception at STEP; nothing at all: all ranks wait before their first step for FOLDER/go


def _stand_until_asked(reached: Path) -> None:
    from lmcode.jobs.preempt import noticing

    if reached.exists():
        return
    reached.touch()
    deadline = time.monotonic() + WAIT_S
    with noticing() as request:  # the one of the process
        while not request.asked():
            if time.monotonic() > deadline:
                raise TimeoutError("nobody asked this rank to save and end")
            time.sleep(0.02)


def _wait_to_go(folder: Path) -> None:
    """Keeps all ranks before their first step, where the watch is patient."""
    from lmcode.train import loop

    def act(session: Any) -> None:
        if session.step == 0:
            gate_file(folder, session.me.rank).touch()
            while not (folder / GO).exists():
                time.sleep(0.05)

    _before(loop, "train_step", act)


def _raise_at_step(reached: Path) -> None:
    from lmcode.train import loop

    def act(session: Any) -> None:
        if session.step == STEP:
            with session.clock("data"):
                reached.touch()
                raise RuntimeError("an error of one rank alone")

    _before(loop, "train_step", act)


def _disturb(plan: str, folder: Path, command: str) -> None:
    start, rank = int(os.environ.get("SLURM_RESTART_COUNT") or 0), int(os.environ["SLURM_PROCID"])
    steps = plan.split(",")
    if start >= len(steps) or command not in ("train", "config"):
        return
    what, _, whom = steps[start].partition(":")
    if (what == "corpus") != (command == "config"):
        return
    if what in GATED:
        _wait_to_go(folder)
    if rank != int(whom):
        return
    if what == "raise":
        _raise_at_step(raised_file(folder))
    elif what in PHASES:
        PHASES[what](lambda *_: _stand_until_asked(reached_file(folder, start)))


def _main() -> int:
    plan, folder, _, _, *words = sys.argv[1:]
    sys.argv[1:] = words
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # the checkout, not this folder
    from lmcode.cli.command import main
    from lmcode.jobs.preempt import noticing

    with noticing():  # as soon as the real program does
        _disturb(plan, Path(folder), words[0])
        return main(words)


if __name__ == "__main__":
    sys.exit(_main())
