"""The scripts that start things: their syntax, what they refuse before any rank starts, and what they pass on.

Nothing is installed here: LMCODE_SKIP_INSTALL makes them use the Python that runs the tests. Launchers are replaced by
stand-ins that print what they were given, put before the real ones on the path.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.patience import PATIENCE_S
from tests.helpers.sources import CHECKOUT

SCRIPTS = [CHECKOUT / name for name in ("launch/environment.sh", "launch/local.sh", "launch/mpi.sh", "launch/multinode.sh",
                                        "launch/slurm.sbatch", "tests/run.sh", "tests/cluster/setup.sh", ".ci/run")]
Done = subprocess.CompletedProcess
RUNNER = """import os, sys, time
print("runner", *sys.argv[1:], "threads=" + os.environ["OMP_NUM_THREADS"], flush=True)
if "train.seed=99" in sys.argv:
    time.sleep(1000)
sys.exit(int(os.environ.get("STAND_IN_EXIT", "0")))
"""
STUB = """#!/usr/bin/env bash
echo "$(basename "$0")" "$@"
exit "${STAND_IN_EXIT:-0}"
"""


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenized corpora, shared by all copies of the checkout, so that each is prepared once."""
    return tmp_path_factory.mktemp("corpora")


@pytest.fixture
def stand_ins(tmp_path: Path, corpora: Path) -> dict[str, str]:
    """A copy of the checkout whose deepspeed and mpirun only print their arguments; returns the environment for it."""
    for name in ("launch", "lmcode", "ds_configs", "tests"):
        shutil.copytree(CHECKOUT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "corpora").symlink_to(corpora)
    launcher = tmp_path / "deepspeed" / "launcher"
    launcher.mkdir(parents=True)
    for folder in (launcher.parent, launcher):
        (folder / "__init__.py").touch()
    (launcher / "runner.py").write_text(RUNNER, encoding="utf-8")
    tools = tmp_path / "venv" / "bin"
    tools.mkdir(parents=True)
    (tools / "python").write_text(f'#!/usr/bin/env bash\nexec "{sys.executable}" "$@"\n', encoding="utf-8")
    (tools / "nvidia-smi").write_text("#!/usr/bin/env bash\nexit 1\n", encoding="utf-8")
    (tools / "mpirun").write_text(STUB, encoding="utf-8")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    kept = {name: value for name, value in os.environ.items()
            if not name.startswith(("LMCODE_", "OMP_", "OMPI_", "CUDA_")) and name not in ("RANK", "WORLD_SIZE")}
    return {**kept, "LMCODE_SKIP_INSTALL": "1", "LMCODE_VENV": str(tmp_path / "venv")}


def start(tmp_path: Path, env: dict[str, str], script: str, *arguments: str, **more: str) -> Done:
    return subprocess.run(["bash", str(tmp_path / script), *arguments], env={**env, **more}, cwd=tmp_path,
                          capture_output=True, text=True, timeout=PATIENCE_S)


def test_a_script_parses_and_can_be_started() -> None:
    for script in SCRIPTS:
        assert os.access(script, os.X_OK), script
        assert script.read_text(encoding="utf-8").startswith("#!/usr/bin/env bash\n"), script
        subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing() -> None:
    subprocess.run(["shellcheck", "--severity=warning", "--external-sources", *map(str, SCRIPTS)], check=True, cwd=CHECKOUT)


def test_no_package_source_is_named() -> None:
    for file in [*SCRIPTS, CHECKOUT / "setup.cfg", CHECKOUT / "launch/constraints.txt"]:
        assert not re.search(r"https?://|index-url|find-links|trusted-host", file.read_text(encoding="utf-8")), file


def test_constraints_pin_every_direct_requirement() -> None:
    pins = set(re.findall(r"^([\w.-]+)==", (CHECKOUT / "launch/constraints.txt").read_text(), re.MULTILINE))
    setup = (CHECKOUT / "setup.cfg").read_text(encoding="utf-8").split("[options.extras_require]")
    extras = setup[1].split("dev =")[0]
    needed = re.findall(r"([\w-]+)>=", setup[0].split("install_requires")[1]) + re.findall(r"([\w-]+)>=", extras)
    assert set(needed) - pins == set()


@pytest.mark.parametrize("script", ["launch/local.sh", "launch/mpi.sh"])
def test_a_bad_setting_is_one_line_before_any_rank(tmp_path: Path, stand_ins: dict[str, str], script: str) -> None:
    done = start(tmp_path, stand_ins, script, "train.total_stps=3")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1 and "Did you mean 'total_steps'?" in done.stderr


def test_ranks_that_cannot_share_the_run_are_refused(tmp_path: Path, stand_ins: dict[str, str]) -> None:
    done = start(tmp_path, stand_ins, "launch/local.sh", LMCODE_RANKS="3")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "8 % (3 x 1)" in done.stderr


@pytest.mark.parametrize("ranks", ["0", "two", "-1", "02"])
def test_a_number_of_ranks_is_a_positive_number(tmp_path: Path, stand_ins: dict[str, str], ranks: str) -> None:
    for script in ("launch/local.sh", "launch/mpi.sh"):
        done = start(tmp_path, stand_ins, script, LMCODE_RANKS=ranks)
        assert done.returncode == 2 and f"got '{ranks}'" in done.stderr


def test_local_passes_arguments_on_and_the_exit_code_back(tmp_path: Path, stand_ins: dict[str, str]) -> None:
    done = start(tmp_path, stand_ins, "launch/local.sh", "--preset", "tiny", "train.run_dir=a b",
                 LMCODE_RANKS="4", OMP_NUM_THREADS="3", STAND_IN_EXIT="75")
    assert done.returncode == 75, done.stderr
    call = done.stdout.splitlines()[-1]
    assert call.startswith("runner ") and call.endswith("threads=3")
    assert "--num_gpus 4" in call
    assert "--module lmcode train --preset tiny train.run_dir=a b " in call


@pytest.mark.parametrize(("arguments", "passed"), [
    ((), "train --preset tiny "),
    (("train.seed=1",), "train --preset tiny train.seed=1 "),
    (("--preset=small",), "train --preset=small "),
])
def test_local_takes_the_tiny_preset_unless_told(tmp_path: Path, stand_ins: dict[str, str], arguments: tuple[str, ...],
                                                 passed: str) -> None:
    done = start(tmp_path, stand_ins, "launch/local.sh", *arguments)
    assert done.returncode == 0, done.stderr
    assert passed in done.stdout and "--num_gpus 2 " in done.stdout


def test_two_jobs_get_two_ports(tmp_path: Path, stand_ins: dict[str, str]) -> None:
    said = [start(tmp_path, stand_ins, "launch/local.sh").stdout for _ in range(2)]
    assert len({re.search(r"--master_port (\d+)", text)[1] for text in said}) == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_launcher_too(tmp_path: Path, stand_ins: dict[str, str], number: int, code: int) -> None:
    # A shell cannot trap what is ignored when it starts, as SIGINT is in tests that run in the background.
    job = subprocess.Popen(["bash", str(tmp_path / "launch/local.sh"), "train.seed=99"], env=stand_ins, cwd=tmp_path,
                           stdout=subprocess.PIPE, text=True,
                           preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))
    while not job.stdout.readline().startswith("runner"):
        assert job.poll() is None
    job.send_signal(number)
    rest, _ = job.communicate(timeout=PATIENCE_S)  # ends only when every process that holds our pipe has ended
    assert (job.returncode, rest) == (code, "")


def test_mpi_passes_everything_to_mpirun_and_its_exit_code_back(tmp_path: Path, stand_ins: dict[str, str]) -> None:
    done = start(tmp_path, stand_ins, "launch/mpi.sh", "--preset", "tiny", "train.seed=1",
                 LMCODE_RANKS="4", LMCODE_MPI_ARGUMENTS="--hostfile some-hosts", STAND_IN_EXIT="75",
                 GLOO_SOCKET_IFNAME="ib0")
    assert done.returncode == 75, done.stderr
    call = done.stdout.splitlines()[-1]
    assert call.startswith("mpirun -n 4 ") and "--hostfile some-hosts" in call
    assert "-x GLOO_SOCKET_IFNAME" in call and "-x DS_ACCELERATOR" in call and "-x PATH" not in call
    assert call.endswith("-m lmcode train --preset tiny train.seed=1")


@pytest.mark.parametrize(("stub", "message"), [
    (None, "there is no"),
    ('#!/usr/bin/env bash\n[ "$1" = --version ] && echo Python 3.9.2\nexit 1\n', "is Python 3.9.2"),
])
def test_no_or_an_old_python_is_one_clear_line(tmp_path: Path, stand_ins: dict[str, str], stub: str | None,
                                               message: str) -> None:
    python = tmp_path / "old-python"
    if stub is not None:
        python.write_text(stub, encoding="utf-8")
        python.chmod(0o755)
    done = start(tmp_path, {**stand_ins, "LMCODE_SKIP_INSTALL": "0"}, "launch/environment.sh", PYTHON=str(python))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "3.10 or newer" in done.stderr and message in done.stderr


def make_ready(tmp_path: Path, env: dict[str, str]) -> str:
    """Writes the stamp of a finished environment; returns it."""
    for name in ("setup.cfg", "pyproject.toml"):
        shutil.copy(CHECKOUT / name, tmp_path / name)
    script = f'source "{tmp_path}/launch/environment.sh"; lmcode_wanted "{sys.executable}" cpu'
    stamp = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, check=True).stdout
    (tmp_path / "venv" / "lmcode.stamp").write_text(stamp, encoding="utf-8")
    return stamp


def test_a_finished_environment_is_reused_and_a_changed_one_not(tmp_path: Path, stand_ins: dict[str, str]) -> None:
    stamp = make_ready(tmp_path, stand_ins)
    path = f"{tmp_path}/venv/bin:{os.environ['PATH']}"
    env = {**stand_ins, "LMCODE_SKIP_INSTALL": "0", "PYTHON": sys.executable, "PATH": path}
    pip_fails(tmp_path, on="*")  # whoever calls pip is found out
    done = start(tmp_path, env, "launch/environment.sh")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "venv/lmcode.stamp").read_text(encoding="utf-8") == stamp
    assert not (tmp_path / "venv/lmcode.lock").exists(), "a ready environment is used without waiting for anybody"

    with (tmp_path / "setup.cfg").open("a", encoding="utf-8") as file:
        file.write("# changed\n")
    done = start(tmp_path, env, "launch/environment.sh")
    assert done.returncode == 1
    assert "failed" in done.stderr and "pip was called" in done.stderr


@pytest.mark.parametrize("theirs", ["thesis.tex", "bin/python", ".git/HEAD"])
def test_a_folder_that_is_no_environment_of_ours_is_not_touched(tmp_path: Path, stand_ins: dict[str, str],
                                                                theirs: str) -> None:
    make_ready(tmp_path, stand_ins)
    venv = tmp_path / "other"
    (venv / theirs).parent.mkdir(parents=True)
    (venv / theirs).write_text("years of work", encoding="utf-8")
    done = start(tmp_path, {**stand_ins, "LMCODE_SKIP_INSTALL": "0"}, "launch/environment.sh", PYTHON=sys.executable,
                 LMCODE_VENV=str(venv))
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "new or empty folder" in done.stderr
    assert [path for path in venv.rglob("*") if path.is_file()] == [venv / theirs]


def test_starting_over_removes_what_an_installation_made_and_nothing_else(tmp_path: Path, stand_ins: dict[str, str]) -> None:
    make_ready(tmp_path, stand_ins)
    venv = tmp_path / "venv"
    (venv / "lmcode.unfinished").touch()
    (venv / "lmcode.stamp").unlink()
    (venv / "notes.txt").write_text("mine", encoding="utf-8")
    (venv / "lib").mkdir()
    failing = tmp_path / "python"
    failing.write_text(f'#!/usr/bin/env bash\n[ "$2" = venv ] && exit 1\nexec "{sys.executable}" "$@"\n', encoding="utf-8")
    failing.chmod(0o755)
    done = start(tmp_path, {**stand_ins, "LMCODE_SKIP_INSTALL": "0"}, "launch/environment.sh", PYTHON=str(failing))
    assert done.returncode == 1 and "starting over" in done.stderr
    assert not (venv / "lib").exists() and not (venv / "bin").exists()
    assert (venv / "notes.txt").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("stage", ["*torch==*", "*uninstall*", "*--editable*"])
def test_a_failed_installation_does_not_look_finished(tmp_path: Path, stand_ins: dict[str, str], stage: str) -> None:
    make_ready(tmp_path, stand_ins)
    (tmp_path / "setup.cfg").write_text("changed", encoding="utf-8")
    pip_fails(tmp_path, on=stage)
    done = start(tmp_path, {**stand_ins, "LMCODE_SKIP_INSTALL": "0", "PYTHON": sys.executable}, "launch/environment.sh")
    assert done.returncode == 1
    assert "pip was called" in done.stderr, "the end of pip's log is shown"
    assert not (tmp_path / "venv/lmcode.stamp").exists()
    assert (tmp_path / "venv/lmcode.unfinished").exists()


def pip_fails(tmp_path: Path, *, on: str) -> None:
    """Puts a Python in place whose pip fails on matching arguments and otherwise does nothing, with success."""
    (tmp_path / "venv/bin/python").write_text(
        f"""#!/usr/bin/env bash
if [ "$2" = pip ]; then
    case "$*" in *--version*) exit 0 ;; {on}) echo pip was called; exit 1 ;; *) exit 0 ;; esac
fi
exec "{sys.executable}" "$@"
""", encoding="utf-8")
