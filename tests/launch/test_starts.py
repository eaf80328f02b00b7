"""The same small job started in every way there is on one machine, with the real launchers: the same numbers come out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.patience import PATIENCE_S
from tests.helpers.sources import CHECKOUT

OVERRIDES = ["model.hidden_size=32", "model.num_layers=2", "model.num_heads=2", "model.vocab_size=257",
             "model.memory_layers=[1]", "model.context_length=32", "model.long_term_memory_slots=600",
             "model.memory_top_k=8",
             "model.memory_bias=0",
             "data.tokenizer=bytes", "train.sequence_length=32", "train.total_steps=6", "train.warmup_steps=2",
             "train.log_every=2", "eval.every=0", "eval.final_windows=2"]
STARTS = {
    "deepspeed": ["bash", "launch/local.sh", "--preset", "tiny"],
    "mpirun": ["bash", "launch/mpi.sh", "--preset", "tiny"],
    "single": [sys.executable, "-m", "lmcode", "train", "--preset", "tiny"],
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for number in range(24):
        (folder / f"{number:02d}.txt").write_text(" ".join(f"{word * number % 17} words" for word in range(120)))
    return folder


def start(how: str, folder: Path, text: Path, *more: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items()
            if not name.startswith(("LMCODE_", "OMPI_", "PMIX_")) and name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env = {**kept, "LMCODE_SKIP_INSTALL": "1", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    settings = [*OVERRIDES, f"data.path={text}", f"data.cache={folder / 'cache'}", f"train.run_dir={folder / how}"]
    return subprocess.run([*STARTS[how], *settings, *more], cwd=CHECKOUT, env=env, capture_output=True, text=True,
                          timeout=PATIENCE_S)


def test_every_way_of_starting_gives_the_same_run(tmp_path: Path, text: Path) -> None:
    losses = {}
    for how in STARTS:
        job = start(how, tmp_path, text)
        assert job.returncode == 0, f"{how}: {job.stdout[-2000:]}\n{job.stderr[-4000:]}"
        said = job.stdout + job.stderr
        for words in ("memory on", "memory off", "memory shuffled", "slots filled per rank", "where the hits", "ETA",
                      "search", "exchange", "continued by the model", "tensorboard --logdir"):
            assert words in said, f"{how} does not say '{words}'"
        assert said.count("trained 6 steps") == 1, f"{how}: rank 0 alone sums up"
        assert ("rank 1 " in said) == (how != "single")
        rows = [json.loads(line) for line in (tmp_path / how / "metrics.jsonl").read_text().splitlines()]
        losses[how] = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses["single"]) == 3
    assert losses["deepspeed"] == losses["mpirun"]
    assert losses["deepspeed"] == pytest.approx(losses["single"], abs=1e-5)


def test_a_run_is_evaluated_and_goes_on_writing_from_the_command_line(tmp_path: Path, text: Path) -> None:
    assert start("single", tmp_path, text).returncode == 0
    run = str(tmp_path / "single")

    def lmcode(*words: str) -> str:
        done = subprocess.run([sys.executable, "-m", "lmcode", *words], capture_output=True, text=True, cwd=CHECKOUT,
                              timeout=PATIENCE_S)
        assert done.returncode == 0, done.stderr
        return done.stdout

    summary = (tmp_path / "single" / "summary.txt").read_text()
    results = json.loads(lmcode("eval", run, "--json").splitlines()[-1])
    assert f"{results['on']['loss']:.4f}" in summary, "the saved model is the one that was measured"
    one, two = (lmcode("generate", run, "--prompt", "3 words", "--max-new-tokens", "20", "--seed", "5") for _ in range(2))
    assert one == two and one.startswith("3 words")


def test_a_run_goes_on_through_the_launcher_from_where_it_was(tmp_path: Path, text: Path) -> None:
    assert start("deepspeed", tmp_path, text).returncode == 0
    run = tmp_path / "deepspeed"
    env = {**os.environ, "LMCODE_SKIP_INSTALL": "1", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    job = subprocess.run(["bash", "launch/local.sh", "--resume", str(run), "train.total_steps=8"], cwd=CHECKOUT, env=env,
                         capture_output=True, text=True, timeout=PATIENCE_S)
    assert job.returncode == 0, job.stderr[-3000:]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row] == [2, 4, 6, 8]


def test_a_run_folder_is_never_overwritten(tmp_path: Path, text: Path) -> None:
    (tmp_path / "single").mkdir()
    (tmp_path / "single" / "config.yaml").write_text("preset: mine\n")
    job = start("single", tmp_path, text)
    assert job.returncode == 2 and "was not written by a run" in job.stderr
    assert (tmp_path / "single" / "config.yaml").read_text() == "preset: mine\n"


def test_what_launchers_do_not_know_is_refused_before_a_rank_starts(tmp_path: Path, text: Path) -> None:
    job = start("deepspeed", tmp_path, text, "data.path=/nowhere/at/all")
    assert job.returncode == 2 and job.stderr.strip().splitlines() == [
        "lmcode: error: data.path '/nowhere/at/all' does not exist."]
