"""How far `lmcode estimate` is from real runs: .venv/bin/python tools/estimate_check.py [--ranks 1,2,4] [KEY=VALUE ...]

Trains a few steps of the preset tiny on as many CPU ranks, each a process of its own, and prints estimate and measurement
side by side: peak resident memory of the largest rank (as the kernel counts it); bytes of the memory per step (as the run
counts them); all bytes per step, DeepSpeed's too (as the kernel counts them on the loopback interface: the difference of a
longer and a shorter run, while nobody else uses it); and bytes of the checkpoint on disk. Ends with 1 if any is off by
more than 15 %. Takes about two minutes for each number of ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from lmcode.config import RunConfig
from lmcode.dist import free_port
from lmcode.estimate import MIB, estimate
from lmcode.presets import load_run_config

LIMIT = 0.15
STEPS = ["train.total_steps=6", "train.warmup_steps=2", "train.log_every=2", "eval.every=0", "eval.final_windows=2"]
MORE_STEPS = 20


def peak_of_rank(rank: int, world_size: int, port: int, words: list[str]) -> None:
    """Trains as one rank and writes the peak resident bytes of that process to stdout. Never returns."""
    env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1",
           "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    done = subprocess.run([sys.executable, "-m", "lmcode", "train", *words], env=env, stdout=sys.stderr)
    print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
    sys.exit(done.returncode)


def loopback_bytes() -> int:
    """What this machine has sent to itself since it started."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])


def train(config: RunConfig, world_size: int, folder: Path, run: Path) -> tuple[int, int]:
    """Trains in `run`; peak resident bytes of the largest rank, and bytes that went over the loopback interface."""
    from lmcode.config import to_yaml

    (folder / "config.yaml").write_text(to_yaml(config))
    words = ["--config", str(folder / "config.yaml"), f"train.run_dir={run}", f"data.cache={folder / 'cache'}"]
    subprocess.run([sys.executable, "-m", "lmcode", "config", "check", "--data", *words], check=True, stdout=sys.stderr)
    port, before = str(free_port()), loopback_bytes()
    ranks = [subprocess.Popen([sys.executable, __file__, "--as-rank", str(rank), "--ranks", str(world_size), "--port", port,
                               *words], stdout=subprocess.PIPE, text=True) for rank in range(world_size)]
    peaks = [int(rank.communicate()[0]) for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise RuntimeError(f"a rank of {world_size} failed")
    return max(peaks), loopback_bytes() - before


def measure(config: RunConfig, world_size: int, folder: Path) -> dict[str, float]:
    """Runs `config` on `world_size` ranks; what it used."""
    run, longer = folder / f"ranks-{world_size}", folder / f"ranks-{world_size}-longer"
    peak, wire = train(config, world_size, folder, run)
    more = config.train.model_copy(update={"total_steps": config.train.total_steps + MORE_STEPS})
    wire_longer = train(config.model_copy(update={"train": more}), world_size, folder, longer)[1]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    sent = [row["perf/bytes_received"] for row in rows if "perf/bytes_received" in row]
    saved = sum(file.stat().st_size for file in (run / "checkpoints").rglob("*") if file.is_file())
    return {"memory": peak, "traffic": sent[-1], "wire": (wire_longer - wire) / MORE_STEPS / world_size, "checkpoint": saved}


def compare(config: RunConfig, world_size: int, folder: Path) -> bool:
    """Prints one row for each quantity; whether all are within the limit."""
    made, measured = estimate(config, world_size), measure(config, world_size, folder)
    ours = {name: part for name, part in made.traffic.items() if not name.startswith("zero ")}
    guesses = {"memory": made.memory, "traffic": ours, "wire": made.traffic, "checkpoint": made.checkpoint}
    good = True
    for name, parts in guesses.items():
        guess, real = sum(parts.values()), measured[name]
        if name == "wire" and world_size == 1:
            continue
        off = guess / real - 1 if real else float(guess > 0)
        good &= abs(off) <= LIMIT
        print(f"{world_size} ranks  {name:<12}{guess / MIB:>10.2f} MiB estimated {real / MIB:>10.2f} MiB measured "
              f"{off:>+7.1%}", flush=True)
    return good


def main() -> int:
    """Exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2, 4])
    parser.add_argument("--as-rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    arguments, words = parser.parse_known_args()
    if arguments.as_rank is not None:
        peak_of_rank(arguments.as_rank, arguments.ranks[0], arguments.port, words)
    config = load_run_config("tiny", [*STEPS, *words])
    with tempfile.TemporaryDirectory() as folder:
        return 1 - all([compare(config, ranks, Path(folder)) for ranks in arguments.ranks])


if __name__ == "__main__":
    sys.exit(main())
