"""How soon a job on two hosts that is hurt names the guilty and ends: python tools/host_trials.py [--trials 20] [--tasks 1]

On the two hosts of tests/cluster/setup.sh (as root, first). Hands very small training jobs to Slurm, several at once, and
hurts each at a random moment: kill -9, SIGSTOP, an exception on one rank, or the cable between the hosts pulled. Prints a
Markdown table: seconds until every surviving rank has named the right rank, and until the last process has ended (median
and worst); how often all named the right one (each side of a pulled cable one on the other side); processes left over when
Slurm says that the job has ended.
"""

from __future__ import annotations

import argparse
import random
import re
import signal
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.helpers import bed  # noqa: E402
from tests.helpers.bed import Job  # noqa: E402
from tests.helpers.disturbed import GO, gate_file, raised_file  # noqa: E402

SIGNALS = {"kill -9": signal.SIGKILL, "SIGSTOP": signal.SIGSTOP}
RAISES, CABLE = "one rank raises", "cable pulled"
PATIENCE_S = 360.0  # for a blow and all its consequences
KINDS = (*SIGNALS, RAISES, CABLE)


@dataclass
class Trial:
    """One job, how it is hurt and when, and what came of it: seconds since then, by rank for the verdicts."""

    job: Job
    kind: str
    victim: int
    processes: dict[int, psutil.Process] = field(default_factory=dict)
    due: float | None = None
    began: float | None = None
    named: dict[int, float] = field(default_factory=dict)
    ended: float | None = None
    left: int = 0

    def expected(self, rank: int) -> str | None:
        """A pattern of what a rank has to say; None for one that cannot speak."""
        if rank == self.victim and self.kind in SIGNALS:
            return None
        half = self.job.ranks // 2
        if self.kind == CABLE:  # of ranks that were all lost at once, any
            return r"this job ends: rank \d+ on n1 " if rank < half else r"this job ends: rank 0 on n0 "
        return f"this job ends: rank {self.victim} on n{self.victim // half} "

    def survivors(self) -> list[int]:
        return [rank for rank in range(self.job.ranks) if self.expected(rank) is not None]

    def go_on(self) -> bool:
        """Gives the blow when it is time, then notes what happens; whether everything has."""
        now = time.time()
        if self.began is not None:
            self._look(now - self.began)
        elif self.kind == RAISES:
            raised = raised_file(self.job.folder)
            self.began = raised.stat().st_mtime if raised.exists() else None
        elif self.due is None:
            self.due = now + random.uniform(0.0, 1.0) if self.trains() else None
        elif now >= self.due:
            self.began = now
            self.processes[self.victim].send_signal(SIGNALS[self.kind])
        return self.ended is not None

    def is_started(self) -> bool:
        return all(gate_file(self.job.folder, rank).exists() for rank in range(self.job.ranks))

    def trains(self) -> bool:
        return len(bed.rows(self.job.run)) > 3

    def _look(self, seconds: float) -> None:
        over = not any(_runs(process) for process in self.processes.values())
        for rank in self.survivors():
            if rank not in self.named and "this job ends" in self.job.log(rank):
                self.named[rank] = seconds
        self.ended = seconds if over else None

    def is_right(self) -> bool:
        return all(re.search(self.expected(rank), self.job.log(rank)) for rank in self.survivors())


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def run_at_once(kind: str, folder: Path, words: list[str], *, jobs: int, tasks: int) -> list[Trial]:
    """Some trials at the same time."""
    trials = []
    with ExitStack() as stack:
        for number in range(jobs):
            victim = random.randrange(2 * tasks)
            plan = f"{'raise' if kind == RAISES else 'gate'}:{victim}"
            job = stack.enter_context(Job(folder / str(number), *words, tasks=tasks, plan=plan))
            trials.append(Trial(job, kind, victim))
        for trial in trials:
            bed.until(trial.is_started, trial.job.said, timeout_s=600)
            trial.processes = trial.job.processes()
        for trial in trials:
            (trial.job.folder / GO).touch()
        if kind == CABLE:
            bed.until(lambda: all(trial.trains() for trial in trials), trials[0].job.said)
            time.sleep(random.uniform(0.0, 1.0))
            with bed.unplugged("n1"):
                for trial in trials:
                    trial.began = time.time()
                watch(trials)
        else:
            watch(trials)
        for trial in trials:
            trial.job.until_ended()
            trial.left = len(trial.job.processes())
    return trials


def watch(trials: list[Trial]) -> None:
    """Follows trials to their ends."""
    deadline = time.time() + PATIENCE_S
    while trials and time.time() < deadline:
        trials = [trial for trial in trials if not trial.go_on()]
        time.sleep(0.05)


def row_of(kind: str, trials: list[Trial]) -> str:
    named = [max(trial.named.values()) for trial in trials if len(trial.named) == len(trial.survivors())]
    ended = [trial.ended for trial in trials if trial.ended is not None]
    times = [f"{number:.1f}" for values in (named, ended) for number in (statistics.median(values), max(values))]
    return " | ".join(["", kind, str(len(trials)), *times, str(sum(trial.is_right() for trial in trials)),
                       str(sum(trial.left for trial in trials)), ""]).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=20, help="of each kind (%(default)s)")
    parser.add_argument("--at-once", type=int, default=5, help="jobs at the same time (%(default)s)")
    parser.add_argument("--tasks", type=int, default=1, help="ranks on each host (%(default)s)")
    parser.add_argument("--heartbeat", type=float, default=30.0, help="seconds (%(default)s)")
    parser.add_argument("--kind", action="append", choices=KINDS, help="only this one; may be repeated")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    if not bed.is_up():
        sys.exit("there is no two-host test bed: run tests/cluster/setup.sh as root")
    print(f"2 hosts x {arguments.tasks} rank(s), train.heartbeat_s={arguments.heartbeat:g}, {arguments.at_once} jobs at "
          "once\n")
    print("| hurt by | trials | named after: median s | worst s | last process ended after: median s | worst s | "
          "right rank named by all | processes left |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        words = [*bed.SETTINGS, "train.log_every=1", "train.total_steps=1000000",
                 f"train.heartbeat_s={arguments.heartbeat}", f"data.path={bed.write_text(scratch / 'text')}",
                 f"data.cache={scratch / 'cache'}"]
        for kind in arguments.kind or KINDS:
            trials: list[Trial] = []
            while len(trials) < arguments.trials:
                jobs = min(arguments.at_once, arguments.trials - len(trials))
                trials += run_at_once(kind, scratch / f"{kind}-{len(trials)}".replace(" ", "-"), words, jobs=jobs,
                                      tasks=arguments.tasks)
            print(row_of(kind, trials), flush=True)


if __name__ == "__main__":
    main()
