"""python tools/soak.py [--steps 5000] [--every 500] [--output FOLDER] [--folder FOLDER]

A long run of a very small model through the command line, with saving, consolidation, replay and eviction all the time,
watched from outside: resident memory by stretches of steps, its slope after the first fifth, and what lies about at the
end. --output gets rss.csv (second, step, MiB) and, with matplotlib, rss.png. Exit code 1 if memory grows by more than
--allowed per cent from the second fifth to the last, or a file is left over.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import chaos
import numpy as np
import psutil
import yaml

CHECKOUT = Path(__file__).resolve().parents[1]
SAMPLE_S = 0.2


class Sample(NamedTuple):
    second: float
    step: int
    mib: float


def values_of(folder: Path, steps: int) -> dict:
    """Saves, consolidations and evaluations come many times; 480 slots fill within three steps."""
    return chaos.settings(folder, "soak", train={
        "total_steps": steps, "log_every": max(1, steps // 500), "save_every": max(1, steps // 50),
        "memory_consolidation_interval": max(1, steps // 100), "memory_sample_ratio": 0.25, "replay_slots": 256,
        "min_learning_rate": 0.1}, eval={"every": max(1, steps // 10)})


def start(folder: Path, steps: int) -> subprocess.Popen:
    """The job, with a folder of its own for temporary files."""
    config, temporary = folder / "config.yaml", folder / "tmp"
    config.write_text(yaml.safe_dump(values_of(folder, steps)))
    temporary.mkdir(exist_ok=True)
    own = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    with (folder / "said.txt").open("w") as said:
        return subprocess.Popen([sys.executable, "-m", "lmcode", "train", "--config", str(config)], cwd=CHECKOUT,
                                env={**own, "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}, stdin=subprocess.DEVNULL,
                                stdout=said, stderr=said)


def last_step(metrics: Path) -> int:
    """The step of the last whole row; 0 before there is one."""
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, metrics.stat().st_size - 20_000))
            rows = file.read().split(b"\n")[:-1]
        return json.loads(rows[-1])["step"]
    except (OSError, IndexError, ValueError):
        return 0


def watch(job: subprocess.Popen, metrics: Path) -> list[Sample]:
    """Resident memory of the job and its children until it ends."""
    process, samples, began = psutil.Process(job.pid), [], time.monotonic()
    while job.poll() is None:
        try:
            size = sum(one.memory_info().rss for one in (process, *process.children(recursive=True)))
        except psutil.NoSuchProcess:
            break
        samples.append(Sample(time.monotonic() - began, last_step(metrics), size / 2**20))
        time.sleep(SAMPLE_S)
    job.wait()
    return samples


def left_over(folder: Path) -> list[str]:
    """What no finished run should leave: temporary files, more checkpoints than asked for, unknown names."""
    run = folder / "runs" / "soak"
    known = {"config.yaml", "ds_config.json", "metrics.jsonl", "tensorboard", "checkpoints", "logs", "summary.txt",
             "writer.lock"}
    found = [f"runs/soak/{path.name}" for path in run.iterdir() if path.name not in known]
    found += [str(path.relative_to(run)) for path in run.rglob(".*")]
    checkpoints = sorted(path.name for path in (run / "checkpoints").iterdir())
    found += [f"checkpoints/{name}" for name in checkpoints if not name.startswith("step-")]
    if len(checkpoints) > 2:
        found.append(f"{len(checkpoints)} checkpoints where save_total_limit is 2")
    return found + [f"tmp/{path.relative_to(folder / 'tmp')}" for path in (folder / "tmp").rglob("*") if path.is_file()]


def record(samples: list[Sample], output: Path) -> None:
    """rss.csv, and rss.png where matplotlib is installed."""
    output.mkdir(parents=True, exist_ok=True)
    lines = ["second,step,mib", *(f"{one.second:.2f},{one.step},{one.mib:.1f}" for one in samples)]
    (output / "rss.csv").write_text("\n".join(lines) + "\n")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot([one.step for one in samples], [one.mib for one in samples])
    axes.set(xlabel="step", ylabel="resident memory, MiB", ylim=(0, None), title="A soak of a very small run")
    figure.savefig(output / "rss.png", dpi=120)


def growth(samples: list[Sample], steps: int) -> tuple[float, float]:
    """Slope in MiB per 1,000 steps after the first fifth; growth in per cent from the second fifth to the last."""
    late = [one for one in samples if one.step >= steps / 5]
    slope = float(np.polyfit([one.step for one in late], [one.mib for one in late], 1)[0]) * 1000
    second = np.mean([one.mib for one in late if one.step < steps * 2 / 5])
    last = np.mean([one.mib for one in late if one.step >= steps * 4 / 5])
    return slope, float(100 * (last / second - 1))


def events(metrics: Path) -> str:
    """How much happened, from the run's own rows."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    last = next(row for row in reversed(rows) if "memory/L1/evicted" in row)
    return (f"{last['memory/L1/evicted']:,.0f} entries evicted, {last['memory/L1/merged']:,.0f} live ones merged, "
            f"{sum('eval/loss' in row for row in rows)} evaluations")


def run(arguments: argparse.Namespace) -> int:
    with chaos.place(arguments.folder) as folder:
        job, metrics = start(folder, arguments.steps), folder / "runs" / "soak" / "metrics.jsonl"
        samples = watch(job, metrics)
        if job.returncode:
            print((folder / "said.txt").read_text()[-3000:])
            return 1
        found, what = left_over(folder), events(metrics)
        record(samples, arguments.output or folder)
    rows = [("steps", "RSS min, MiB", "mean", "max", "samples")]
    for first in range(0, arguments.steps, arguments.every):
        part = [one.mib for one in samples if first <= one.step < first + arguments.every]
        if part:
            rows.append((f"{first:,} to {first + arguments.every:,}", f"{min(part):.1f}", f"{np.mean(part):.1f}",
                         f"{max(part):.1f}", len(part)))
    slope, per_cent = growth(samples, arguments.steps)
    print(chaos.table(rows))
    print(f"{samples[-1].second:.0f} s, {what}; slope {slope:+.2f} MiB per 1,000 steps, last fifth {per_cent:+.2f} % "
          "beside the second")
    failures = [f"left over: {name}" for name in found]
    if per_cent > arguments.allowed:
        failures.append(f"memory grew by {per_cent:.2f} %")
    return chaos.verdict(f"{arguments.steps:,} steps: resident memory flat to {arguments.allowed:g} %, no file left over",
                         failures)


def main(argv: list[str] | None = None) -> int:
    parser = chaos.parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--every", type=int, default=500, help="steps in a row of the table")
    parser.add_argument("--allowed", type=float, default=2.0, metavar="PERCENT")
    parser.add_argument("--output", type=Path, help="folder for rss.csv and rss.png; --folder if left out")
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
