"""`lmcode bench step`: a model with its bank and the same without, in turns in one process per rank; what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lmcode.bench import step
from lmcode.cli.command import BAD_USAGE, DONE, main
from lmcode.config import RunConfig, build, to_yaml
from lmcode.jobs.clock import PHASES
from tests.helpers.small_run import settings, write_corpus


@pytest.fixture
def config(tmp_path: Path) -> list[str]:
    """Arguments that name the settings of a very small run."""
    write_corpus(tmp_path)
    values = settings(tmp_path, "bench")
    values["train"].pop("run_dir")
    (tmp_path / "small.yaml").write_text(to_yaml(build(RunConfig, values)))
    return ["--config", str(tmp_path / "small.yaml")]


def test_both_models_have_their_rows_and_their_turns(config: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    turns, turn = list[str](), step._turn

    def counted(workers: step.Workers, name: str, steps: int) -> dict[str, float]:
        turns.append(name)
        return turn(workers, name, steps)

    monkeypatch.setattr(step, "_turn", counted)
    out = tmp_path / "step.json"
    assert main(["bench", "step", *config, "--ranks", "2", "--steps", "2", "--rounds", "2", "--out", str(out),
                 "memory.recall_queries=0", "model.long_term_memory_slots=4800"]) == DONE
    said = json.loads(out.read_text())
    bank, none, others = said["rows"]
    assert turns == [bank["way"], none["way"]] * 3 == [step.WITH, step.WITHOUT] * 3, "the first round does not count"
    assert none["speed"] == 1.0 and bank["speed"] == bank["tokens/s"] / none["tokens/s"]
    assert {f"{phase} ms" for phase in PHASES} <= bank.keys() and bank["search ms"] > 0 == none["search ms"]
    assert bank["bytes"] > none["bytes"] > 0 and bank["forward ms"] > 0
    assert bank["note"] == "4,800 of 4,800 slots taken" and none["note"] == "", "steps alone do not fill it"
    assert others["way"] == "memorizing-transformers-pytorch" and others["note"].startswith("left out: ")
    assert said["settings"]["config"]["memory"]["recall_queries"] == 0 and said["settings"]["steps"] == 2
    assert "left out: " in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"text", "cache", "small.yaml", "step.json"}, "no run is left"


@pytest.mark.parametrize(("words", "message"), [
    (["model.long_term_memory_slots=0"], "as the peer is the same model without a bank: got 0 slots, layers [1]"),
    (["model.memory_layers=[]"], "got 480 slots, layers []"),
    (["memory.tier=hnsw"], "Did you mean 'ivf'?"),
    (["--ranks", "5"], "train.streams must be a multiple of ranks"),
    (["data.path=nowhere"], "nowhere"),
    (["data.pth=x"], "Did you mean 'path'?"),
    (["--out", "nowhere/file.json"], "--out must lie in a folder that exists"),
])
def test_what_cannot_be_measured_is_refused(config: list[str], words: list[str], message: str,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    """A corpus that is not there is known to the ranks alone, which end with the one line of it."""
    assert main(["bench", "step", *config, "--ranks", "1", *words]) == BAD_USAGE
    assert message in capsys.readouterr().err
