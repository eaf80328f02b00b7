"""A real Slurm job that is preempted, put back into the queue, or torn in two comes back by itself, or says who was lost.

All phases and many trials: tools/slurm_trials.py and tools/host_trials.py.
"""

from __future__ import annotations

from pathlib import Path

import bed
import pytest
from bed import Job

SETTINGS = [*bed.SETTINGS, "train.total_steps=10", "train.log_every=1", "eval.every=5", "eval.windows=2",
            "train.save_every=6", "train.memory_consolidation_interval=3"]
pytestmark = [
    pytest.mark.cluster, pytest.mark.timeout(300),
    pytest.mark.skipif(not bed.is_up(), reason="there is no two-host test bed: run tests/cluster/setup.sh as root"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = bed.write_text(tmp_path_factory.mktemp("text"))
    return [f"data.path={folder}", f"data.cache={tmp_path_factory.mktemp('cache')}"]


def test_a_job_that_is_preempted_and_then_requeued_computes_what_an_undisturbed_one_does(tmp_path: Path,
                                                                                          data: list[str]) -> None:
    words = [*SETTINGS, *data]
    with (Job(tmp_path / "asked", *words, plan="training:1,evaluation:0") as asked,
          Job(tmp_path / "whole", *words) as whole):
        asked.until_reached(0)
        asked.ask()
        asked.until_reached(1)
        assert "saved in" in asked.said() and "goes back into the queue" in asked.said(), "exit code 75"
        assert "resuming from step-00000004" in asked.said()
        asked.requeue()
        for job in (asked, whole):
            ended = job.until_ended()
            assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), job.said()
        assert (asked.facts()["Restarts"], whole.facts()["Restarts"]) == ("2", "0")
        assert not asked.processes()
    assert "start 3:" in asked.said() and "resuming from step-00000005" in asked.said()
    assert bed.rows(asked.run) == bed.rows(whole.run)
    assert bed.content(asked.run) == bed.content(whole.run)
    assert len(bed.losses(whole.run)) == 10


def test_when_the_cable_is_pulled_both_sides_end_and_name_who_was_lost(tmp_path: Path, data: list[str]) -> None:
    with Job(tmp_path, *SETTINGS, *data, "train.total_steps=100000", "train.heartbeat_s=3") as job:
        bed.until(lambda: len(bed.rows(job.run)) > 3, job.said)
        with bed.unplugged("n1"):
            bed.until(lambda: all("this job ends" in job.log(rank) for rank in range(2)), job.said, timeout_s=30)
            bed.until(lambda: not job.processes(), job.said, timeout_s=30)
        assert job.until_ended()["ExitCode"] == "1:0", "and it is not put back into the queue"
    for rank, other in enumerate(("rank 1 on n1", "rank 0 on n0")):
        line = next(line for line in job.log(rank).splitlines() if "this job ends" in line)
        assert f"this job ends: {other} " in line and "has not been heard of for" in line and "out of reach" in line, line
