"""Two hosts, started for real in every way there is: Slurm, the DeepSpeed launcher over ssh, MPI. The numbers are the same.

The hosts are made by tests/cluster/setup.sh, which .ci/run calls first; where they are not there the tests are skipped and
say why. One small job, 6 steps on 2 x 2 ranks; its losses must be those of 4 ranks on a single host.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
SETUP = CHECKOUT / "tests/cluster/setup.sh"
BED = Path(os.environ.get("LMCODE_BED", "/var/tmp/lmcode-bed"))
SETTINGS = ["model.hidden_size=32", "model.num_layers=2", "model.num_heads=2", "model.vocab_size=257",
            "model.memory_layers=[1]", "model.context_length=32", "model.long_term_memory_slots=600",
            "model.memory_top_k=8", "model.memory_bias=0", "data.tokenizer=bytes", "train.sequence_length=32",
            "train.total_steps=6", "train.warmup_steps=2", "train.log_every=2", "eval.every=0", "eval.final_windows=2"]
pytestmark = [
    pytest.mark.cluster, pytest.mark.timeout(600),
    pytest.mark.skipif(not (BED / "ready").exists(),
                       reason="there is no two-host test bed: run tests/cluster/setup.sh as root"),
]


def on(host: str, *command: str, timeout_s: float = 300) -> subprocess.CompletedProcess:
    """Runs a command on a host, in the checkout, with an environment that says nothing about ranks."""
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "LMCODE_BED")}
    env = {**kept, "LMCODE_SKIP_INSTALL": "1", "LMCODE_VENV": sys.prefix, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", str(SETUP), "on", host, *command], cwd=CHECKOUT, env=env, capture_output=True, text=True,
                          timeout=timeout_s)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("text")
    for number in range(24):
        (folder / f"{number:02d}.txt").write_text(" ".join(f"{word * number % 17} words" for word in range(120)))
    return [*SETTINGS, f"data.path={folder}", f"data.cache={tmp_path_factory.mktemp('cache')}"]


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


@pytest.fixture(scope="module")
def single_host(tmp_path_factory: pytest.TempPathFactory, settings: list[str]) -> list[float]:
    """The losses of 4 ranks on one host, started by mpirun."""
    run = tmp_path_factory.mktemp("mpi") / "run"
    done = on("n0", "env", "LMCODE_RANKS=4", "bash", "launch/mpi.sh", "--preset", "tiny", *settings, f"train.run_dir={run}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "4 rank(s) by mpirun" in done.stdout + done.stderr
    return losses(run)


def nothing_is_left(host: str) -> bool:
    """Whether no rank runs on a host any more; ranks take a moment to go."""
    for _ in range(50):
        if on(host, "pgrep", "-f", "lmcode.* train").returncode == 1:
            return True
        time.sleep(0.2)
    return False


def test_mpirun_on_one_host(single_host: list[float]) -> None:
    assert len(single_host) == 3 and single_host[-1] < single_host[0]


def test_sbatch_on_two_hosts_is_the_same_run(tmp_path: Path, settings: list[str], single_host: list[float]) -> None:
    out, run = tmp_path / "job.out", tmp_path / "run"
    done = on("n0", "sbatch", "--wait", f"--output={out}", "launch/slurm.sbatch", *settings, f"train.run_dir={run}")
    said = out.read_text() if out.exists() else ""
    assert done.returncode == 0, f"{done.stderr}\n{said[-3000:]}"
    assert "4 ranks on n0 n1" in said and "4 rank(s) by slurm" in said
    assert "n0: GLOO_SOCKET_IFNAME=left0" in said and "n1: GLOO_SOCKET_IFNAME=right0" in said, "each its own interface"
    assert (run / "hostfile").read_text() == "n0 slots=2\nn1 slots=2\n"
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
