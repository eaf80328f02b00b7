"""Two hosts, started for real in every way there is: Slurm, the DeepSpeed launcher over ssh, MPI. The numbers are the same.

The hosts are made by tests/cluster/setup.sh, which .ci/run calls first; where they are not there the tests are skipped and
say why. One small job, 6 steps on 2 x 2 ranks; its losses must be those of 4 ranks on a single host. All tests of the
hosts are in this one file, as parts of the suite that run at the same time would disturb each other.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from tests.helpers import bed
from tests.helpers.bed import Job, losses, on, unplugged

pytestmark = [
    pytest.mark.cluster, pytest.mark.timeout(3600),
    pytest.mark.skipif(not bed.is_up(), reason="there is no two-host test bed: run tests/cluster/setup.sh as root"),
]

DISTURBED = ["train.total_steps=10", "train.log_every=1", "eval.every=5", "eval.windows=2", "train.save_every=6",
             "train.memory_consolidation_interval=3"]  # of jobs that are disturbed; tools/slurm_trials.py has all phases


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = bed.write_text(tmp_path_factory.mktemp("text"))
    return [*bed.SETTINGS, f"data.path={folder}", f"data.cache={tmp_path_factory.mktemp('cache')}"]


@pytest.fixture(scope="module")
def single_host(tmp_path_factory: pytest.TempPathFactory, settings: list[str]) -> list[float]:
    """The losses of 4 ranks on one host, started by mpirun."""
    run = tmp_path_factory.mktemp("mpi") / "run"
    done = on("n0", "bash", "launch/mpi.sh", "--preset", "tiny", *settings, f"train.run_dir={run}", LMCODE_RANKS="4")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "4 rank(s) by mpirun" in done.stdout + done.stderr
    return losses(run)


def nothing_is_left(host: str) -> bool:
    """Whether no rank runs on a host any more; ranks take a moment to go."""
    for _ in range(1000):
        if on(host, "pgrep", "-f", "lmcode.* train").returncode == 1:
            return True
        time.sleep(0.2)
    return False


def test_mpirun_on_one_host(single_host: list[float]) -> None:
    assert len(single_host) == 3 and single_host[-1] < single_host[0]


def test_mpirun_over_a_hostfile_is_the_same_run(tmp_path: Path, settings: list[str], single_host: list[float]) -> None:
    hostfile, run = tmp_path / "hostfile", tmp_path / "run"
    hostfile.write_text("n0 slots=2\nn1 slots=2\n")
    done = on("n0", "bash", "launch/mpi.sh", "--preset", "tiny", *settings, f"train.run_dir={run}", LMCODE_RANKS="4",
              LMCODE_MPI_ARGUMENTS=f"--hostfile {hostfile}")
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-3000:]
    assert "4 rank(s) by mpirun" in said and "n1 rank 2" in (run / "logs/rank-00002.log").read_text()
    assert "ranks listen: n0 left0 10.77.0.10, n1 right0 10.77.0.11" in said and "ranks differ" not in said
    assert losses(run) == pytest.approx(single_host, abs=1e-4)
    assert nothing_is_left("n0") and nothing_is_left("n1")


def test_sbatch_on_two_hosts_is_the_same_run(tmp_path: Path, settings: list[str], single_host: list[float]) -> None:
    out, run = tmp_path / "job.out", tmp_path / "run"
    done = on("n0", "sbatch", "--wait", f"--output={out}", "launch/slurm.sbatch", *settings, f"train.run_dir={run}")
    said = out.read_text() if out.exists() else ""
    assert done.returncode == 0, f"{done.stderr}\n{said[-3000:]}"
    assert "4 ranks on n0 n1" in said and "4 rank(s) by slurm" in said
    assert "n0: GLOO_SOCKET_IFNAME=left0" in said and "n1: GLOO_SOCKET_IFNAME=right0" in said, "each its own interface"
    assert "ranks listen: n0 left0 10.77.0.10, n1 right0 10.77.0.11" in said and "ranks differ" not in said
    assert (run / "hostfile").read_text() == "# Written by lmcode: the hosts of the job.\nn0 slots=2\nn1 slots=2\n"
    print(f"4 ranks, losses on one host by mpirun {single_host}, on 2 x 2 by sbatch {losses(run)}")
    assert losses(run) == pytest.approx(single_host, abs=1e-4)
    assert nothing_is_left("n0") and nothing_is_left("n1")


def test_a_bad_setting_ends_the_slurm_job_before_any_rank(tmp_path: Path) -> None:
    out = tmp_path / "job.out"
    done = on("n0", "sbatch", "--wait", f"--output={out}", "launch/slurm.sbatch", "train.total_stps=6")
    assert done.returncode == 2
    assert "Did you mean 'total_steps'?" in out.read_text()


def test_submit_hands_a_job_to_a_real_sbatch(settings: list[str]) -> None:
    done = on("n0", sys.executable, "-m", "lmcode", "submit", "tiny", "--nodes", "2", "--partition", "elsewhere", *settings)
    assert done.returncode == 2
    assert "sbatch refused the job" in done.stderr and "partition" in done.stderr


def test_the_deepspeed_launcher_over_ssh_is_the_same_run(tmp_path: Path, settings: list[str],
                                                         single_host: list[float]) -> None:
    hostfile, run = tmp_path / "hostfile", tmp_path / "run"
    hostfile.write_text("# two hosts\nn0 slots=2\n\nn1 slots=2  # ranks\n")
    done = on("n0", "bash", "launch/multinode.sh", str(hostfile), *settings, f"train.run_dir={run}")
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-3000:]
    assert "4 ranks on n0 n1" in said and "4 rank(s) by deepspeed" in said
    assert "ranks listen: n0 left0 10.77.0.10, n1 right0 10.77.0.11" in said and "ranks differ" not in said
    assert losses(run) == pytest.approx(single_host, abs=1e-4)
    assert nothing_is_left("n0") and nothing_is_left("n1")


@pytest.mark.parametrize(("text", "message"), [
    (None, "there is no hostfile"), ("", "names no host"), ("# nobody\n", "names no host"),
    ("n0 slots=2\nn1\n", "line 2: expected 'HOST slots=N'"), ("n0 slots=0\n", "line 1"), ("n0 slots=2 n1\n", "line 1"),
    ("n0;reboot slots=1\n", "line 1"), ("n0 slots=2\nn0 slots=2\n", "there twice"), ("n0 slots=3\n", "8 % (3 x 1)"),
    ("n0 slots=2\nn9 slots=2\n", "n9 does not answer to ssh")])
def test_a_wrong_hostfile_is_an_error_and_never_a_smaller_run(tmp_path: Path, settings: list[str], text: str | None,
                                                              message: str) -> None:
    hostfile, run = tmp_path / "hostfile", tmp_path / "run"
    if text is not None:
        hostfile.write_text(text)
    done = on("n0", "bash", "launch/multinode.sh", str(hostfile), *settings, f"train.run_dir={run}")
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert not run.exists()


def doctor(*words: str) -> tuple[int, dict[str, dict], str]:
    """Exit code, rows by name and standard error of `lmcode doctor` on n0."""
    done = on("n0", sys.executable, "-m", "lmcode", "doctor", "--json", *words)
    assert done.stdout, done.stderr[-3000:]
    return done.returncode, {row["name"]: row for row in json.loads(done.stdout)["checks"]}, done.stderr


@pytest.mark.parametrize("way", ["--hostfile", "--srun"])
def test_the_doctor_compares_two_hosts(tmp_path: Path, way: str) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("n0 slots=2\nn1 slots=2\n")
    words = ["--hostfile", str(hostfile)] if way == "--hostfile" else ["--srun", "--nodes", "2"]
    code, found, said = doctor(*words, "--run-dir", str(tmp_path / "runs"), "--preset", "tiny")
    assert code == 0, f"{found}\n{said}"
    assert found["hosts"]["detail"] == "2 of 2 answered to the end"
    assert found["interface"]["detail"] == "n0 left0 10.77.0.10, n1 right0 10.77.0.11"
    assert "GB/s received by each host (2 hosts" in found["all_gather"]["detail"]
    for name in ("same versions", "same devices", "clocks", "shared folder", "locks between hosts", "open ports"):
        assert found[name]["state"] == "ok", found[name]
    assert [path.name for path in tmp_path.iterdir() if path != hostfile] == [], "nothing is left behind"


def test_a_host_that_was_taken_away_is_named_by_the_doctor(tmp_path: Path) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("n0 slots=2\nn1 slots=2\n")
    with unplugged("n1"):
        code, found, _ = doctor("--hostfile", str(hostfile), "--run-dir", str(tmp_path))
    assert code == 1
    assert found["host"]["hosts"] == ["n1"] and found["host"]["state"] == "fail"
    assert found["hosts"]["detail"] == "1 of 2 answered to the end"
    assert found["faiss search"]["state"] == "ok", "the other host was looked at"


def test_a_job_that_is_preempted_and_then_requeued_computes_what_an_undisturbed_one_does(tmp_path: Path,
                                                                                          settings: list[str]) -> None:
    words = [*settings, *DISTURBED]
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


def test_when_the_cable_is_pulled_both_sides_end_and_name_who_was_lost(tmp_path: Path, settings: list[str]) -> None:
    with Job(tmp_path, *settings, *DISTURBED, "train.total_steps=100000", "train.heartbeat_s=3") as job:
        bed.until(lambda: len(bed.rows(job.run)) > 3, job.said)
        with unplugged("n1"):
            bed.until(lambda: all("this job ends" in job.log(rank) for rank in range(2)), job.said)
            bed.until(lambda: not job.processes(), job.said)
        assert job.until_ended()["ExitCode"] == "1:0", "and it is not put back into the queue"
    for rank, other in enumerate(("rank 1 on n1", "rank 0 on n0")):
        line = next(line for line in job.log(rank).splitlines() if "this job ends" in line)
        assert f"this job ends: {other} " in line and "has not been heard of for" in line and "out of reach" in line, line
