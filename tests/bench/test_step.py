"""`lmcode bench step`: a model with its bank and the same without, in turns in one process per rank; what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lmcode.bench import memorizing, step
from lmcode.cli.command import BAD_USAGE, DONE, main
from lmcode.config import RunConfig, build, to_yaml
from lmcode.data.corpus import load_corpus
from lmcode.dist import Group
from lmcode.jobs.clock import PHASES
from lmcode.presets import load_run_config
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


STUB = """
import torch

class Memories(list):
    def clear_memory(self, batch_indices):
        self.append(batch_indices)

class MemorizingTransformer(torch.nn.Module):
    def __init__(self, *, num_tokens, dim, max_knn_memories, memorizing_layers, pad_id, **rest):
        super().__init__()
        self.given = max_knn_memories, memorizing_layers
        self.embedding, self.out, self.pad = torch.nn.Embedding(num_tokens, dim), torch.nn.Linear(dim, num_tokens), pad_id

    def create_knn_memories(self, *, batch_size):
        return Memories()

    def forward(self, x, knn_memories, labels):
        return torch.nn.functional.cross_entropy(self.out(self.embedding(x)).flatten(0, 1), labels.flatten(),
                                                 ignore_index=self.pad)
"""


def test_somebody_elses_model_is_trained_on_the_same_documents_where_it_is_installed(
        config: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package, with the same interface."""
    (tmp_path / "memorizing_transformers_pytorch.py").write_text(STUB)
    monkeypatch.setattr(memorizing, "_MODULE", "none_of_this_name")
    assert memorizing.missing() == "left out: No module named 'none_of_this_name'"
    monkeypatch.undo()
    monkeypatch.syspath_prepend(tmp_path)
    assert memorizing.missing() == ""
    settings = load_run_config(config[1])
    others = memorizing.Memorizing(settings, load_corpus(settings).train, Group(), tmp_path / "files")
    before = [parameter.clone() for parameter in others._model.parameters()]
    spent = others.turn(2)
    assert others._model.given == (480 // 12, (2,)) and others.weights == 2 * 257 * 32 + 257
    assert others._memories[0] == [*range(12)] != others._memories[1], "emptied where documents begin"
    assert 12 * 16 < spent["tokens"] <= 2 * 12 * 16 and spent["wall"] > 0
    assert all(not torch.equal(one, other) for one, other in zip(before, others._model.parameters(), strict=True))


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
