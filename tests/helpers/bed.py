"""The two hosts that setup.sh makes, for tests and tools: commands on them, jobs for their Slurm, the cable between them.

Nothing in here knows of pytest. Jobs are described to Slurm as to a real one: by launch/slurm.sbatch and settings.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tests.helpers.disturbed import reached_file
from tests.helpers.sources import CHECKOUT

SETUP = CHECKOUT / "tests/cluster/setup.sh"
BED = Path(os.environ.get("LMCODE_BED", "/var/tmp/lmcode-bed"))
SETTINGS = ["model.hidden_size=32", "model.num_layers=2", "model.num_heads=2", "model.vocab_size=257",
            "model.memory_layers=[1]", "model.context_length=32", "model.long_term_memory_slots=600",
            "model.memory_top_k=8", "model.memory_bias=0", "data.tokenizer=bytes", "train.sequence_length=32",
            "train.total_steps=6", "train.warmup_steps=2", "train.log_every=2", "eval.every=0", "eval.final_windows=2"]
POLL_S = 0.1
UNDER_WAY = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "REQUEUED")
Row = dict[str, Any]


def is_up() -> bool:
    """Whether the bed has been made."""
    return (BED / "ready").exists()


def on(host: str, *command: str, timeout_s: float = 1200, **more: str) -> subprocess.CompletedProcess:
    """Runs a command on a host, in the checkout, with an environment that says nothing about ranks."""
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "LMCODE_BED")}
    env = {**kept, "LMCODE_SKIP_INSTALL": "1", "LMCODE_VENV": sys.prefix, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1",
           **more}
    return subprocess.run(["bash", str(SETUP), "on", host, *command], cwd=CHECKOUT, env=env, capture_output=True, text=True,
                          timeout=timeout_s)


def write_text(folder: Path) -> Path:
    """Some text to train on."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(24):
        (folder / f"{number:02d}.txt").write_text(" ".join(f"{word * number % 17} words" for word in range(120)))
    return folder


def until(condition: Callable[[], bool], what: Callable[[], str], *, timeout_s: float = 960.0) -> None:
    """Waits for something to become true; TimeoutError with what `what` says if it does not."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what())
        time.sleep(POLL_S)


def switch(host: str, state: str) -> None:
    """Pulls the cable of a host ('down') or plugs it in again ('up')."""
    done = on("switch", "ip", "link", "set", f"to-{host}", state)
    if done.returncode:
        raise RuntimeError(done.stderr)


@contextmanager
def unplugged(host: str) -> Iterator[None]:
    """The host's link is down inside, and up again afterwards."""
    switch(host, "down")
    try:
        yield
    finally:
        switch(host, "up")


# A job's record


def rows(run: Path) -> list[Row]:
    """The rows of a run's metrics.jsonl so far, without the times, which no two runs share."""
    file = run / "metrics.jsonl"
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    lines = [json.loads(line) for line in text.split("\n")[:-1]]
    bare = [{name: value for name, value in line.items() if not name.startswith("perf/")} for line in lines]
    return [line for line in bare if set(line) != {"step"}]


def losses(run: Path) -> list[float]:
    """The training losses that a run has logged."""
    return [row["train/loss"] for row in rows(run) if "train/loss" in row]


def content(run: Path) -> dict[str, str]:
    """The hash of every file in a run's last checkpoint (weights, moments, banks, streams, generators) that has no times
    or paths in it."""
    last = max((run / "checkpoints").glob("step-*"))
    files = json.loads((last / "manifest.json").read_text(encoding="utf-8"))["files"]
    return {f"{last.name}/{name}": facts["blake2b"] for name, facts in files.items()
            if name not in ("trainer.json", "config.yaml")}


# Jobs


class Job:
    """`sbatch launch/slurm.sbatch` from n0, on both hosts; a context manager that cancels what is still there.

    Args:
        folder: for run folder ("run") and what the job says ("job.out").
        words: settings.
        tasks: ranks on each host.
        plan: what is to happen to a rank (see `disturbed`).
    """

    def __init__(self, folder: Path, *words: str, tasks: int = 1, plan: str | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.run, self.out, self.ranks = folder, folder / "run", folder / "job.out", 2 * tasks
        env = {} if plan is None else {"LMCODE_VENV": str(_stand_in(folder, plan))}
        done = on("n0", "sbatch", "--parsable", f"--ntasks-per-node={tasks}", f"--output={self.out}", "launch/slurm.sbatch",
                  *words, f"train.run_dir={self.run}", **env)
        if done.returncode:
            raise RuntimeError(done.stderr)
        self.id = done.stdout.strip()

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_error: object) -> None:
        if not self.has_ended():
            self.cancel()

    def facts(self) -> dict[str, str]:
        """What Slurm says of the job: JobState, ExitCode, Restarts and more."""
        said = on("n0", "scontrol", "show", "job", self.id, "--oneliner").stdout
        return dict(word.split("=", 1) for word in said.split() if "=" in word)

    def has_ended(self) -> bool:
        return self.facts().get("JobState") not in UNDER_WAY

    def until_ended(self, *, timeout_s: float = 960.0) -> dict[str, str]:
        """Waits for the job's end; what Slurm says of it then."""
        until(self.has_ended, self.said, timeout_s=timeout_s)
        return self.facts()

    def until_reached(self, start: int = 0) -> None:
        """Waits until the planned phase of a start is reached."""
        until(lambda: reached_file(self.folder, start).exists() or self.has_ended(), self.said)
        if not reached_file(self.folder, start).exists():
            raise RuntimeError(f"the job has ended early\n{self.said()}")

    def ask(self) -> None:
        """What Slurm does to a job that it is about to preempt: asks the batch script to save and end."""
        on("n0", "scancel", "--signal=USR2", "--batch", self.id)

    def requeue(self) -> None:
        """What an administrator does: ends the job and puts it back into the queue."""
        on("n0", "scontrol", "requeue", self.id)

    def cancel(self) -> None:
        """What its owner does who has no more use for it."""
        on("n0", "scancel", self.id)

    def said(self) -> str:
        """What the job and its rank 0 have said so far."""
        return self.out.read_text(encoding="utf-8") if self.out.exists() else ""

    def log(self, rank: int) -> str:
        """The rank's log file."""
        path = self.run / "logs" / f"rank-{rank:05d}.log"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def processes(self) -> dict[int, psutil.Process]:
        """The running ranks, on either host."""
        found = {}
        for process in psutil.process_iter():
            try:
                env = process.environ()
                if env.get("SLURM_JOB_ID") == self.id and "SLURM_STEP_NUM_TASKS" in env and "train" in process.cmdline():
                    if process.name().startswith("python") and process.status() != psutil.STATUS_ZOMBIE:
                        found[int(env["SLURM_PROCID"])] = process
            except psutil.Error:
                continue
        return found


def _stand_in(folder: Path, plan: str) -> Path:
    """An environment whose Python starts `disturbed`."""
    python = folder / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    words = shlex.join([sys.executable, str(Path(__file__).with_name("disturbed.py")), plan, str(folder)])
    python.write_text(f'#!/bin/sh\nexec {words} "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    return python.parents[1]
