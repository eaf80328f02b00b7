"""Shared by the tools here: starts real training jobs through the DeepSpeed launcher and reads what they left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from lmcode.dist import free_port
from lmcode.files import durable

CHECKOUT = Path(__file__).resolve().parents[1]


def train(name: str, overrides: list[str], *, ranks: int = 2, folder: Path) -> Path:
    """Trains `name` on `ranks` local ranks unless `folder` already holds it; returns the run folder. What has not finished
    there, or is something else, is renamed.

    Raises:
        RuntimeError: if the job fails, with the end of what it said.
    """
    run = folder / name
    if (run / "summary.txt").exists():
        return run
    if run.exists():
        durable.set_aside(run)
    folder.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // ranks)
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", "/dev/null", "--log_level", "error",
               "--master_port", str(free_port()), "--num_gpus", str(ranks), "--module", "lmcode", "train",
               f"train.run_dir={run}", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    job = subprocess.run(command, cwd=CHECKOUT, env=environment, stdin=subprocess.DEVNULL, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if job.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {job.returncode}:\n{job.stdout[-3000:]}")
    return run


def metrics(run: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def last(run: Path, key: str) -> float:
    """The last value of one metric; NaN if the run never wrote it."""
    values = [row[key] for row in metrics(run) if row.get(key) is not None]
    return values[-1] if values else float("nan")

