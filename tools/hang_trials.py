"""How soon a job that is hurt names the guilty rank and ends: python tools/hang_trials.py [--trials 20] [--ranks 2]

Starts a very small training job on local ranks again and again and hurts one rank at a random moment: kill -9, SIGSTOP, an
exception, a bank that diverges. Prints, as a Markdown table, the seconds until the last rank has ended (median and worst),
how often every surviving rank named the right rank (of two ranks that diverge nobody can say which is wrong), and the
processes left over.
"""

from __future__ import annotations

import argparse
import random
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.helpers import small_job  # noqa: E402
from tests.helpers.small_job import Job  # noqa: E402

KINDS = {"kill -9": signal.SIGKILL, "SIGSTOP": signal.SIGSTOP, "one rank raises": small_job.raise_,
         "one rank diverges": small_job.diverge}


@dataclass(frozen=True)
class Trial:
    """What came of hurting one job: seconds to the end, whether all named the right rank, processes left over."""

    seconds: float
    named: bool
    left_over: int


def hurt(kind: str, folder: Path, text: Path, *, rank: int, ranks: int, heartbeat_s: float) -> Trial:
    """One trial; the clock starts with the signal, or with the record of the last step before the sabotage."""
    how = KINDS[kind]
    by_signal = isinstance(how, signal.Signals)
    settings = ["train.total_steps=100000", f"train.heartbeat_s={heartbeat_s}"]
    with Job(folder, text, *settings, ranks=ranks, sabotage={} if by_signal else {rank: how}) as job:
        job.until_step(3)
        if by_signal:
            time.sleep(random.uniform(0.0, 1.0))
            began = job.send(rank, how)
        else:
            began = time.monotonic()
        codes = job.end(timeout_s=4 * heartbeat_s + 60)
        seconds = time.monotonic() - began
        left_over = sum(psutil.pid_exists(process.pid) for process in job.processes)
        survivors = [other for other in range(ranks) if not (by_signal and other == rank)]
        named = all(codes[other] == 1 and f"this job ends: rank {rank} on " in job.log(other) for other in survivors)
    return Trial(seconds, named, left_over)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=20, help="of each kind (%(default)s)")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--heartbeat", type=float, default=30.0, help="seconds; of the stopped rank (%(default)s)")
    parser.add_argument("--kind", action="append", choices=KINDS, help="only this one; may be repeated")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    print(f"{arguments.ranks} ranks, train.heartbeat_s={arguments.heartbeat:g}\n")
    print("| hurt by | trials | median s | worst s | right rank named | processes left |")
    print("|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        text = small_job.write_text(Path(scratch) / "text")
        for kind in arguments.kind or KINDS:
            trials = []
            for number in range(arguments.trials):
                folder = Path(scratch) / f"{kind}-{number}"
                folder.mkdir()
                trials.append(hurt(kind, folder, text, rank=random.randrange(arguments.ranks), ranks=arguments.ranks,
                                   heartbeat_s=arguments.heartbeat))
            seconds = [one.seconds for one in trials]
            print(f"| {kind} | {len(trials)} | {statistics.median(seconds):.1f} | {max(seconds):.1f} | "
                  f"{sum(one.named for one in trials)} | {sum(one.left_over for one in trials)} |", flush=True)


if __name__ == "__main__":
    main()
