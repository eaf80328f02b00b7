"""Shared by the chaos tools: a very small real run, rank processes that can be killed, and how a verdict is printed.

Ranks are forked (`tests.helpers.forked`), so that a start costs a fraction of a second; in all else they are ordinary ranks
with a gloo group of their own.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from lmcode import dist
from lmcode.config import RunConfig, build
from lmcode.train import loop
from lmcode.train.session import Session
from lmcode.train.start import open_run, set_up

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.helpers import forked, small_run  # noqa: E402
from tests.helpers.forked import CONTEXT  # noqa: E402

STAGES = ("cpu", "zero1", "zero2", "zero3", "zero3_offload")
TIMEOUT_S = 600.0


def settings(folder: Path, name: str, **sections: dict[str, Any]) -> dict[str, Any]:
    """The values of a run of milliseconds a step, which does not end by itself, with its corpus in `folder`."""
    if not (folder / "text").exists():
        folder.mkdir(parents=True, exist_ok=True)
        small_run.write_corpus(folder)
    endless = {"total_steps": 10**6, "log_every": 10**6, "min_learning_rate": 1.0}
    return small_run.settings(folder, name, **{**sections, "train": {**endless, **sections.get("train", {})}})


def resumed(values: dict[str, Any]) -> Session:
    """A session of this run, which goes on from its newest checkpoint that verifies, or starts. A collective."""
    config = build(RunConfig, values)
    return set_up(config, dist.discover(), start=open_run(config, dist.Group.world(), "auto"))


def step(session: Session) -> float:
    """One real training step; returns its loss."""
    return loop.train_step(session).loss


@dataclass
class Ranks:
    """Processes of one job. `pipes`: what each sends."""

    processes: list[Any]
    pipes: list[Connection]

    @classmethod
    def start(cls, function: Callable[..., Any], ranks: int, *args: Any, log: Path) -> Ranks:
        """Starts `function(*args, pipe)` on every rank of a fresh group; what they say goes to the end of `log`."""
        port, job = dist.free_port(), cls([], [])
        for rank in range(ranks):
            ours, theirs = CONTEXT.Pipe(duplex=False)
            process = forked.process(_be_rank, rank, ranks, port, log, theirs, function, args)
            process.start()
            theirs.close()
            job.processes.append(process)
            job.pipes.append(ours)
        return job

    def kill(self, order: Sequence[int] | None = None) -> None:
        """SIGKILL to every process, in this order, and an end of all of them."""
        for rank in range(len(self.processes)) if order is None else order:
            if self.processes[rank].is_alive():
                os.kill(self.processes[rank].pid, signal.SIGKILL)
        for process in self.processes:
            process.join()

    def close(self) -> None:
        self.kill()
        for pipe in self.pipes:
            pipe.close()


def _be_rank(rank: int, ranks: int, port: int, log: Path, pipe: Connection, function: Callable[..., Any],
             args: tuple[Any, ...]) -> None:
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        _join_group(rank, ranks, port)
        function(*args, pipe)
        dist.stop()
    except BaseException:
        pipe.send(("error", f"rank {rank}: {traceback.format_exc()}"))
    finally:
        pipe.close()
        sys.stderr.flush()
        os._exit(0)  # no exit handlers of libraries: a rank of a chaos run ends here


def _join_group(rank: int, ranks: int, port: int) -> None:
    import faiss

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks),
                      LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    dist.start(timeout_s=TIMEOUT_S)


def on_ranks(function: Callable[..., Any], ranks: int, *args: Any, folder: Path) -> list[Any]:
    """Calls `function(*args)` on every rank of a fresh group; returns the results in rank order.

    Raises:
        RuntimeError: if a rank raises, dies or does not finish; the others are killed.
    """
    job = Ranks.start(_call, ranks, function, args, log=folder / "ranks.log")
    results: dict[int, Any] = {}
    deadline = time.monotonic() + TIMEOUT_S
    try:
        while len(results) < ranks:
            waiting = {pipe: rank for rank, pipe in enumerate(job.pipes) if rank not in results}
            for pipe in wait(list(waiting), timeout=max(0.0, deadline - time.monotonic())) or [None]:
                results[waiting.get(pipe, -1)] = _received(pipe)
        return [results[rank] for rank in range(ranks)]
    finally:
        job.close()


def _received(pipe: Connection | None) -> Any:
    try:
        kind, value = ("error", "no rank finished in time") if pipe is None else pipe.recv()
    except EOFError:
        kind, value = "error", "a rank died"
    if kind == "error":
        raise RuntimeError(value)
    return value


def _call(function: Callable[..., Any], args: tuple[Any, ...], pipe: Connection) -> None:
    pipe.send(("result", function(*args)))


def content_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by relative path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file()}


# The command line of a chaos tool


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """A parser that knows --folder; the tool's docstring is its help."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder, removed at the end, if left out")
    return parser


@contextlib.contextmanager
def place(folder: Path | None) -> Iterator[Path]:
    """The folder to write in, absolute and empty, since what is in it is removed; made, and removed if it was temporary."""
    with contextlib.ExitStack() as stack:
        chosen = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-"))) if folder is None else folder
        chosen.mkdir(parents=True, exist_ok=True)
        if any(chosen.iterdir()):
            raise SystemExit(f"--folder must be new or empty: '{chosen}' is not")
        yield chosen.resolve()


def table(rows: Sequence[Sequence[Any]]) -> str:
    """Columns as wide as they need to be; the first flush left, the others flush right; the first row is the head."""
    cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in itertools.zip_longest(*cells, fillvalue="")]
    return "\n".join("  ".join(cell.ljust(width) if not at else cell.rjust(width)
                               for at, (cell, width) in enumerate(zip(row, widths, strict=False))).rstrip()
                     for row in cells)


def verdict(claim: str, failures: Sequence[str]) -> int:
    """Prints the claim and whether it holds, with the first failures; returns the exit code."""
    for failure in failures[:10]:
        print(f"  FAILED: {failure}")
    print(f"{'holds' if not failures else 'DOES NOT HOLD'}: {claim}", flush=True)
    return int(bool(failures))
