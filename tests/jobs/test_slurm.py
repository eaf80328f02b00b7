"""Slurm: the text of a job, what is refused, what is handed to sbatch; and how ranks find themselves in srun's variables."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lmcode import dist
from lmcode.cli import command as cli
from lmcode.config import ConfigError
from lmcode.jobs.slurm import Job, hand_in, render
from tests.helpers.patience import PATIENCE_S
from tests.helpers.sources import CHECKOUT

STEP = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "7", "SLURM_LOCALID": "1", "SLURM_NODEID": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_STEP_NODELIST": "gpu[07-09,12]", "SLURM_JOB_ID": "40017"}


def directives(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH ")]


def stand_in(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
    (folder / name).chmod(0o755)


def test_the_script_in_launch_is_the_default_job() -> None:
    assert (CHECKOUT / "launch/slurm.sbatch").read_text(encoding="utf-8") == render(Job())


@pytest.mark.parametrize("job", [Job(), Job(nodes=3, arguments=("--config", "/a b/it's.yaml", "data.path=x*$y"),
                                            python="/p q/python", checkout="/c'd", gpus_per_node=8, account="a1")])
def test_the_script_is_valid_bash(job: Job) -> None:
    subprocess.run(["bash", "-n"], input=render(job), text=True, check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--severity=warning", "-"], input=render(job), text=True, check=True)


def test_words_and_paths_reach_bash_as_they_are() -> None:
    job = Job(arguments=("--config", "/a b/it's.yaml", "data.path=x*$y`z`"), python="/p q/python", checkout="/c'd @words@")
    lines = render(job).splitlines()
    assigned = "\n".join(line for line in lines if line.startswith(("checkout=", "python=", "words=(")))
    show = f'{assigned}\nprintf "%s\\n" "$checkout" "$python" "${{words[@]}}"'
    shown = subprocess.run(["bash", "-c", show, "x", "more=1"], capture_output=True, text=True,
                           check=True).stdout.splitlines()
    assert shown == [job.checkout, job.python, *job.arguments, "more=1"]


def test_every_field_of_a_job_changes_its_text() -> None:
    changes = dict(nodes=3, tasks_per_node=5, gpus_per_node=4, cpus_per_task=6, time="2-00:00:00", name="n", partition="p",
                   account="a", arguments=("--preset", "small"), python="/x/python", checkout="/y")
    assert set(changes) == set(Job.__dataclass_fields__)
    texts = {render(Job()), *(render(replace(Job(), **{field: value})) for field, value in changes.items())}
    assert len(texts) == len(changes) + 1


def test_a_job_comes_back_after_saving_and_is_asked_in_time() -> None:
    assert {"requeue", "signal=B:USR2@120", "open-mode=append"} <= set(directives(render(Job())))


@pytest.mark.parametrize(("field", "value"), [
    ("nodes", 0), ("tasks_per_node", 0), ("gpus_per_node", -1), ("cpus_per_task", 0), ("time", "soon"), ("time", "1:2:3:4"),
    ("name", "a b"), ("name", "x\n#SBATCH --uid=0"), ("partition", "--x"), ("account", ""), ("arguments", ("a\nb",)),
    ("checkout", "a\nb")])
def test_what_slurm_could_not_take_is_refused(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field.rstrip("s") if field != "checkout" else "paths"):
        Job(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("time", ["90", "10:30", "12:00:00", "2-0", "2-00:00", "2-00:00:00"])
def test_slurms_notations_of_time_are_taken(time: str) -> None:
    assert f"time={time}" in directives(render(Job(time=time)))


def run_script(folder: Path, *, srun: str, python: str = "",
               state: str = "JobState=RUNNING Reason=None") -> subprocess.CompletedProcess:
    """The default script where srun, scontrol and the environment's Python are stand-ins that write down their words."""
    tools = folder / "venv" / "bin"
    tools.mkdir(parents=True)
    stand_in(tools, "python", f'echo "python $*" >>{folder}/said\n{python}')
    stand_in(tools, "srun", f'echo "srun $*" >>{folder}/said\nenv >{folder}/env\n{srun}')
    stand_in(tools, "scontrol", f'echo "scontrol $*" >>{folder}/said\n[ "$2" = hostnames ] && printf "a1\\na2\\n"; '
             f'[ "$2" = job ] && echo "   {state} Dependency=(null)"; true')
    variables = {"PATH": f"{tools}:{os.environ['PATH']}", "LMCODE_VENV": str(folder / "venv"), "SLURM_JOB_ID": "40017",
                 "SLURM_SUBMIT_DIR": str(folder), "SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "a[1-2]",
                 "SLURM_JOB_NAME": "lmcode"}
    return subprocess.run(["bash", "-c", render(Job()), "script", "train.seed=3"], env=variables, capture_output=True,
                          text=True, timeout=PATIENCE_S)


def test_the_script_checks_first_and_goes_on_where_the_job_was(tmp_path: Path) -> None:
    done = run_script(tmp_path, srun="exit 0")
    said = (tmp_path / "said").read_text().splitlines()
    words = "--preset tiny train.seed=3 train.run_dir=runs/lmcode-40017 --resume auto"
    assert done.returncode == 0, done.stderr
    assert said[0] == f"python -m lmcode config check --data --world 4 {words}"
    assert any(line.endswith(f"-m lmcode train {words}") for line in said)
    assert not any("requeue" in line for line in said)
    hosts = (tmp_path / "runs/lmcode-40017/hostfile").read_text()
    assert hosts == "# Written by lmcode: the hosts of the job.\na1 slots=2\na2 slots=2\n"
    env = (tmp_path / "env").read_text().splitlines()
    assert "MASTER_ADDR=a1" in env and "MASTER_PORT=25017" in env
    assert not [line for line in env if line.startswith(("NCCL_", "GLOO_"))]


def test_a_hostfile_of_somebody_else_is_not_replaced(tmp_path: Path) -> None:
    file = tmp_path / "runs/lmcode-40017/hostfile"
    file.parent.mkdir(parents=True)
    file.write_text("mine slots=8\n")
    done = run_script(tmp_path, srun="exit 0")
    assert done.returncode == 2 and "is not replaced" in done.stderr and file.read_text() == "mine slots=8\n"
    file.write_text("# Written by lmcode: the hosts of the job.\ngone slots=2\n")
    shutil.rmtree(tmp_path / "venv")
    assert run_script(tmp_path, srun="exit 0").returncode == 0 and "a1 slots=2" in file.read_text()


@pytest.mark.parametrize(("code", "requeued"), [(75, True), (1, False), (143, False)])
def test_only_exit_code_75_puts_the_job_back_into_the_queue(tmp_path: Path, code: int, requeued: bool) -> None:
    done = run_script(tmp_path, srun=f"exit {code}")
    assert done.returncode == code
    assert ("scontrol requeue 40017" in (tmp_path / "said").read_text()) == requeued


@pytest.mark.parametrize(("state", "requeued"), [
    ("JobState=RUNNING Reason=None", True), ("", True), ("JobState=COMPLETING Reason=TimeLimit", True),
    ("JobState=COMPLETING Reason=None", False), ("JobState=CANCELLED Reason=None", False),
    ("JobState=PENDING Reason=BeginTime", False)])
def test_a_job_that_was_cancelled_does_not_come_back(tmp_path: Path, state: str, requeued: bool) -> None:
    done = run_script(tmp_path, srun="exit 75", state=state)
    assert done.returncode == 75
    assert ("scontrol requeue 40017" in (tmp_path / "said").read_text()) == requeued
    assert ("goes back into the queue" in done.stdout) == requeued


LISTENER = """import os, signal, sys, time
if "{when}" in sys.argv[-1]:
    os.kill(os.getppid(), signal.SIGUSR2)
    time.sleep({deaf_s})
    heard = []
    signal.signal(signal.SIGUSR2, lambda *_: heard.append(1))
    while not heard:
        time.sleep(0.01)
    sys.exit(75)
"""


@pytest.mark.parametrize(("when", "deaf_s"), [("config check", 0), ("lmcode train", 0), ("lmcode train", 0.8)])
def test_a_signal_to_the_script_reaches_what_it_runs_even_if_that_only_starts(tmp_path: Path, when: str,
                                                                              deaf_s: float) -> None:
    (tmp_path / "listener.py").write_text(LISTENER.format(when=when, deaf_s=deaf_s))
    listen = f'exec "{sys.executable}" {tmp_path}/listener.py "$*"'
    done = run_script(tmp_path, srun=listen, python=listen)
    assert done.returncode == 75, done.stderr
    said = (tmp_path / "said").read_text()
    assert "scontrol requeue 40017" in said and ("srun" in said) == (when == "lmcode train")


def test_the_script_says_that_it_belongs_to_sbatch() -> None:
    done = subprocess.run(["bash", "launch/slurm.sbatch"], cwd=CHECKOUT, capture_output=True, text=True,
                          env={"PATH": os.environ["PATH"]})
    assert done.returncode == 2 and "start it with: sbatch" in done.stderr


def test_submit_prints_what_it_would_submit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # a dry run needs no sbatch
    assert cli.main(["submit", "tiny", "--nodes", "2", "--dry-run"]) == 0
    assert capsys.readouterr().out == render(Job())
    assert cli.main(["submit", "tiny", "--nodes", "1", "--tasks-per-node", "4", "--dry-run", "train.seed=1"]) == 0
    assert capsys.readouterr().out == render(Job(nodes=1, tasks_per_node=4,
                                                 arguments=("--preset", "tiny", "train.seed=1")))


@pytest.mark.parametrize(("words", "message"), [
    (["tiny"], "--nodes"), (["tiny", "--nodes", "0"], "1 or more"), (["tinny", "--nodes", "1"], "Did you mean 'tiny'"),
    (["tiny", "--nodes", "3"], r"8 % (6 x 1)"), (["tiny", "--nodes", "1", "--gpus-per-node", "1"], "--gpus-per-node"),
    (["tiny", "--nodes", "1"], "no sbatch"), (["tiny", "--nodes", "1", "--dry-run", "train.sed=1"], "'seed'")])
def test_submit_refuses_what_cannot_work(words: list[str], message: str, capsys: pytest.CaptureFixture[str],
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert cli.main(["submit", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1


def test_sbatch_gets_the_script_and_its_refusal_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    stand_in(tmp_path, "sbatch", f"cat >{tmp_path}/got; echo Submitted batch job 17")
    assert hand_in(render(Job())) == "Submitted batch job 17"
    assert (tmp_path / "got").read_text() == render(Job())
    stand_in(tmp_path, "sbatch", "cat >/dev/null; echo invalid partition >&2; exit 1")
    with pytest.raises(ConfigError, match="invalid partition"):
        hand_in(render(Job()))


def test_ranks_find_themselves_in_an_srun_step_and_only_there() -> None:
    me = dist.discover(STEP)
    assert (me.rank, me.world_size, me.local_rank, me.local_world_size, me.launcher) == (5, 7, 1, 2, "slurm")
    assert dist.discover({**STEP, "SLURM_PROCID": "6", "SLURM_NODEID": "3"}).local_world_size == 1
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "7", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    assert dist.discover(batch).world_size == 1, "the batch script itself is no rank"
    with pytest.raises(ValueError, match="slurm"):
        dist.discover({**STEP, "SLURM_STEP_TASKS_PER_NODE": "two"})


@pytest.mark.parametrize(("nodes", "first"), [("n0", "n0"), ("n[0-1]", "n0"), ("gpu[07-12,20],cpu1", "gpu07"),
                                              ("a-b.c,d", "a-b.c"), ("n[3,5]-ib", "n3-ib"), ("", "")])
def test_the_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert dist.first_host(nodes) == first


def test_a_bare_srun_has_a_rendezvous_unless_the_user_gave_one() -> None:
    assert dist.slurm_rendezvous(STEP) == {"MASTER_ADDR": "gpu07", "MASTER_PORT": "25017"}
    given = {"MASTER_ADDR": "head", "MASTER_PORT": "1234"}
    assert dist.slurm_rendezvous({**STEP, **given}) == given
    assert dist.slurm_rendezvous({})["MASTER_ADDR"] == "127.0.0.1"
