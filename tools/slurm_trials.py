"""What a real Slurm job survives: python tools/slurm_trials.py [--phase training ...]

On the two hosts of tests/cluster/setup.sh (as root, first). Hands `launch/slurm.sbatch` to Slurm, meets it in one phase
after the other and does to it what Slurm does before a preemption (`scancel --signal=USR2 --batch`), what an administrator
does (`scontrol requeue`), or its owner (`scancel`). Prints a Markdown table: what the script ended with, how often Slurm
started it again, the step it went on from, whether its metrics.jsonl and the files of its last checkpoint (weights,
moments, banks) are those of an undisturbed run. First the losses of the same run on one host with mpirun and on two with
sbatch.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.helpers import bed  # noqa: E402
from tests.helpers.bed import Job  # noqa: E402
from tests.helpers.disturbed import PHASES  # noqa: E402

SETTINGS = [*bed.SETTINGS, "train.total_steps=10", "train.log_every=1", "eval.every=5", "eval.windows=2",
            "train.save_every=6", "train.memory_consolidation_interval=3"]
REQUEUED, CANCELLED = "scontrol requeue", "scancel"  # while it trains


def compare_with_one_host(scratch: Path, data: list[str]) -> None:
    """Prints the losses of 4 ranks on one host by mpirun and on two hosts by sbatch."""
    run = scratch / "one-host" / "run"
    done = bed.on("n0", "bash", "launch/mpi.sh", "--preset", "tiny", *bed.SETTINGS, *data, f"train.run_dir={run}",
                  LMCODE_RANKS="4")
    if done.returncode:
        raise RuntimeError(done.stderr)
    with Job(scratch / "two-hosts", *bed.SETTINGS, *data, tasks=2) as job:
        job.until_ended()
    pairs = list(zip(bed.losses(run), bed.losses(job.run), strict=True))
    print("4 ranks, 6 steps, loss after 2, 4 and 6: on one host by mpirun " + " ".join(f"{one:.7f}" for one, _ in pairs)
          + "; on 2 x 2 by sbatch " + " ".join(f"{two:.7f}" for _, two in pairs)
          + f"; largest difference {max(abs(one - two) for one, two in pairs):.1e}\n", flush=True)


def trial(folder: Path, words: list[str], phase: str, whole: Job) -> str:
    """One line of the table."""
    if phase == "corpus":
        words = [*words, f"data.cache={folder / 'cache'}"]
    rank = 0 if phase in ("corpus", "preparing") else 1  # the one that prepares
    began = time.monotonic()
    with Job(folder, *words, plan=f"{phase if phase in PHASES else 'training'}:{rank}") as job:
        job.until_reached()
        asked = time.monotonic()
        {REQUEUED: job.requeue, CANCELLED: job.cancel}.get(phase, job.ask)()
        bed.until(lambda: job.facts().get("Restarts") != "0" or job.has_ended(), job.said)
        back = time.monotonic() - asked
        ended = job.until_ended()
        seconds, left = time.monotonic() - began, len(job.processes())
    code = "75" if re.search("goes back into the queue|saved in .*; Slurm ends this job", job.said()) else "NOT 75"
    steps = re.findall(r"(?:resuming from|starting at) step[- ]0*(\d+)", job.said())
    same = ["yes" if of(job.run) == of(whole.run) else "NO" for of in (bed.rows, bed.content)]
    if phase == CANCELLED:  # it is not to come back, but could
        steps, same = ["-"], ["-", max((job.run / "checkpoints").glob("step-*")).name]
    return " | ".join(["", phase, code, ended["Restarts"], steps[-1], *same, f"{ended['JobState']} {ended['ExitCode']}",
                       str(left), f"{back:.1f}", f"{seconds:.0f}", ""]).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--phase", action="append", choices=[*PHASES, REQUEUED, CANCELLED],
                        help="only this one; may be repeated")
    arguments = parser.parse_args()
    if not bed.is_up():
        sys.exit("there is no two-host test bed: run tests/cluster/setup.sh as root")
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        data = [f"data.path={bed.write_text(scratch / 'text')}", f"data.cache={scratch / 'cache'}"]
        compare_with_one_host(scratch, data)
        words = [*SETTINGS, *data]
        with Job(scratch / "whole", *words) as whole:
            whole.until_ended()
        print("| asked in | exit code | starts again | goes on from step | metrics equal | checkpoint equal | Slurm's end | "
              "processes left | s to be queued | s in all |")
        print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
        for phase in arguments.phase or [*PHASES, REQUEUED, CANCELLED]:
            print(trial(scratch / phase.replace(" ", "-"), words, phase, whole), flush=True)


if __name__ == "__main__":
    main()
