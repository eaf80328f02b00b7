"""What a path means, and what can be opened there: one model, saved in every way, comes back the same from each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lmcode import LMCODE, LMCODEConfig, MemoryAwareTrainer, MemoryDataset
from lmcode.cli import command as cli
from lmcode.config import ConfigError, MemoryConfig
from lmcode.files.replace import beside
from lmcode.memories.files import graph_folder
from lmcode.memory import planning
from lmcode.memory.search import faiss_index, hnsw
from lmcode.opening import open_model, shape_of
from lmcode.presets import load_run_config
from lmcode.saved import files, pretrained
from lmcode.saved.places import Kind, place_of
from lmcode.train import loop
from tests.helpers.ranks import run_on_ranks

SHAPE = LMCODEConfig(vocab_size=257, hidden_size=16, num_layers=2, num_heads=2, context_length=16, short_term_memory_size=4,
                     short_term_dim=8, memory_layers=(1,), memory_head_dim=8, memory_heads=1, long_term_memory_slots=200,
                     memory_top_k=4)
SAMPLES = [[(7 * place + number) % 250 for place in range(33)] for number in range(6)]
SMALL = ["train.total_steps=2", "train.warmup_steps=1", "train.streams=2", "train.sequence_length=16", "eval.streams=2",
         "eval.final_windows=2", "train.heartbeat_s=0", "train.deepspeed=cpu", "train.save_every=0"]


def trainer_in(run: Path | None, **more: Any) -> MemoryAwareTrainer:
    torch.manual_seed(0)
    settings = {"total_steps": 4, "warmup_steps": 1, "log_every": 1, "deepspeed": "cpu", "heartbeat_s": 0, **more}
    return MemoryAwareTrainer(LMCODE(SHAPE), settings if run is None else {**settings, "run_dir": str(run), "save_every": 2})


def train_all(folder: str) -> None:
    """A run with checkpoints, a checkpoint by itself and a saved model, all after step 4; and text."""
    place = Path(folder)
    trainer = trainer_in(place / "run")
    trainer.train(MemoryDataset(SAMPLES), num_epochs=9, batch_size=2)
    trainer.model.store_experience("The key is under the mat")
    trainer.save_checkpoint(place / "best.pt")
    trainer.model.save_pretrained(place / "model")
    (place / "text").mkdir()
    for number in range(8):
        (place / "text" / f"{number}.txt").write_text(" ".join(f"word{number * word % 13}" for word in range(60)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("opening")
    run_on_ranks(train_all, 1, str(folder))
    return folder


KINDS = {"run": Kind.RUN, "run/checkpoints/step-00000004": Kind.CHECKPOINT, "best.pt": Kind.LONE_CHECKPOINT,
         "model": Kind.SAVED_MODEL}


@pytest.mark.parametrize("name", KINDS)
def test_a_path_means_what_lies_there(saved: Path, name: str, tmp_path: Path) -> None:
    place = place_of(saved / name)
    assert place.kind is KINDS[name] and (place.run == saved / "run") == name.startswith("run")
    (tmp_path / "link").symlink_to(saved / name)
    assert place_of(tmp_path / "link") == place


def test_what_a_kill_has_left_beside_a_path_is_found(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    beside(path).mkdir()
    (beside(path) / "new").symlink_to(saved / "best.pt")
    assert place_of(path) == (Kind.LONE_CHECKPOINT, path, beside(path) / "new")


def test_another_kind_of_model_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert place_of(tmp_path).kind is Kind.HUGGING_FACE
    with pytest.raises(ConfigError, match="holds a model of transformers: say how it is to remember"):
        open_model(tmp_path)
    with pytest.raises(ConfigError, match="nor a saved model. Did you mean"):
        place_of(tmp_path.with_name(tmp_path.name + "x"))


@pytest.mark.parametrize("name", KINDS)
def test_one_model_comes_back_the_same_from_everywhere(saved: Path, name: str) -> None:
    opened, expected = open_model(saved / name), LMCODE.from_pretrained(saved / "model")
    assert opened.place.kind is KINDS[name] and opened.step == (0 if name == "model" else 4)
    for model in (opened.model, LMCODE.from_pretrained(saved / name)):
        assert all(torch.equal(one, other) for one, other in zip(model.parameters(), expected.parameters(), strict=True))
        assert model.banks[1].content_hash() == expected.banks[1].content_hash() or name.startswith("run"), (
            "the experience came after the run's last checkpoint")
    assert not LMCODE.from_pretrained(saved / name, include_memory=False).banks[1].stats()["live"]


@pytest.mark.parametrize("name", KINDS)
def test_a_model_is_exported_from_everywhere(saved: Path, name: str, tmp_path: Path,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", str(saved / name), str(tmp_path / "out"), "--no-memory"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n" and not (tmp_path / "out" / "banks").exists()
    model = LMCODE.from_pretrained(tmp_path / "out")
    assert torch.equal(model.embedding.weight, LMCODE.from_pretrained(saved / "model").embedding.weight)


@pytest.mark.parametrize("name", ["best.pt", "model"])
def test_other_text_is_evaluated_from_everywhere(saved: Path, name: str, tmp_path: Path,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", str(saved / name), "--json", f"data.path={saved / 'text'}", f"data.cache={tmp_path}", "eval.streams=2"]
    assert cli.main(words) == 0
    assert json.loads(capsys.readouterr().out)["on"]["tokens"] > 0


def test_a_saved_model_has_no_text_of_its_own(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", str(saved / "model")]) == 2
    assert "name one by data.path=" in capsys.readouterr().err


def train_from(source: str, run: str, text: str, *words: str) -> int:
    return cli.main(["train", "--init-from", source, *words, *SMALL, f"data.path={text}", f"train.run_dir={run}",
                     f"data.cache={run}-cache"])


@pytest.mark.parametrize(("name", "words"), [("run", ()), ("best.pt", ("--init-memory",)), ("model", ())])
def test_training_starts_from_a_model_with_a_fresh_optimizer(saved: Path, tmp_path: Path, name: str,
                                                             words: tuple[str, ...]) -> None:
    run = tmp_path / "new"
    assert run_on_ranks(train_from, 1, str(saved / name), str(run), str(saved / "text"), *words,
                        "train.learning_rate=1e-12") == [0]
    opened, source = open_model(run), open_model(saved / name)
    for (parameter, mine), other in zip(opened.model.named_parameters(), source.model.parameters(), strict=True):
        torch.testing.assert_close(mine, other, msg=parameter)
    assert opened.step == 2 and opened.config.model == source.config.model
    namespaces = [set(bank.shard.columns["namespace"][bank.shard.live_M].tolist()) for bank in
                  (opened.model.banks[1], source.model.banks[1])]
    assert (namespaces[1] <= namespaces[0]) == bool(words), "with the memory of the source, in namespaces of its own"
    assert bool(opened.model.memories.has_experiences) == bool(words)


def test_another_shape_is_refused_before_anything_is_made(saved: Path, tmp_path: Path) -> None:
    shape = shape_of(saved / "model", memory=False)
    assert shape["model"] == SHAPE.model_dump() and shape["train"]["init_from"] == str(saved / "model")
    assert run_on_ranks(train_from, 1, str(saved / "model"), str(tmp_path / "new"), str(saved / "text"),
                        "model.num_heads=1") == [2]


def train_on(run: str, total_steps: int) -> tuple[int, list[float]]:
    """The step that a trainer goes on from in its own folder, and the losses of the steps after it."""
    trainer = trainer_in(Path(run), total_steps=total_steps)
    return trainer.resume(), trainer.train(MemoryDataset(SAMPLES), num_epochs=9, batch_size=2)["loss"]


def test_a_trainer_goes_on_in_its_own_folder(tmp_path: Path) -> None:
    """The first process ends after 2 of 4 steps, as if it had crashed after its last checkpoint."""
    (_, first), = run_on_ranks(train_on, 1, str(tmp_path / "run"), 2)
    (step, rest), = run_on_ranks(train_on, 1, str(tmp_path / "run"), 4)
    (_, whole), = run_on_ranks(train_on, 1, str(tmp_path / "whole"), 4)
    assert step == 2 and len(first) == len(rest) == 2 and first == whole[:2] and rest == pytest.approx(whole[2:], rel=1e-6)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == [1, 2, 3, 4]


def test_what_cannot_be_resumed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="resume needs run_dir"):
        trainer_in(None).resume()
    assert trainer_in(tmp_path / "new").resume() == 0, "a folder that is yet to be made"


GRAPHS = MemoryConfig(tier="hnsw", scope="global", virtual_shards=2)


def test_graphs_are_refused_in_training_with_the_tiers_that_it_may_have() -> None:
    config = load_run_config("tiny", ["memory.tier=hnsw"])
    trainer = MemoryAwareTrainer(LMCODE(SHAPE, memory=GRAPHS), {"total_steps": 1})
    for refuses in (config.check_trains, lambda: loop.run(config),
                    lambda: trainer.train(MemoryDataset(SAMPLES), batch_size=2)):
        with pytest.raises(ConfigError, match=r"memory.tier of a training must .*'faiss-flat', 'ivf': got 'hnsw'.* 'ivf'\?"):
            refuses()
    load_run_config("tiny", ["memory.tier=hnsw", "model.long_term_memory_slots=0"]).check_trains()


def test_an_opened_model_has_its_graphs_beside_it_and_a_deletion_takes_them_away(tmp_path: Path,
                                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss")
    made, build = list[int](), faiss_index.build_graph
    monkeypatch.setattr(hnsw, "LEAST_ENTRIES", 20)
    monkeypatch.setattr(faiss_index, "build_graph", lambda key, **more: made.append(len(key)) or build(key, **more))
    key, model = torch.randn(1, 150, 8), LMCODE(SHAPE, memory=GRAPHS)
    model.banks[1].write(key, key, torch.zeros(150).long())
    model.save_pretrained(tmp_path / "model")
    opened = open_model(tmp_path / "model").model
    planning.build_graphs(opened.banks[1])
    kept = tmp_path / "model.graphs" / "layer-01"
    assert kept == graph_folder(tmp_path / "model", 1) and len([*kept.iterdir()]) == 2
    assert graph_folder(Path("runs/one/checkpoints/step-00000300"), 1) == Path("runs/one/graphs/layer-01")
    again = LMCODE.from_pretrained(tmp_path / "model")  # it holds what it held
    again.banks[1].shard.searcher.graphs.wait()
    assert planning.tend_graphs(again.banks[1].shard, again.group) and again.banks[1].shard.searcher.graphs.nodes == 150
    assert sum(made) == 150 and len(made) == 2, "they were made once, and read"
    snapshot = tmp_path / "snapshots" / "model"
    shutil.copytree(tmp_path / "model", snapshot)
    planning.build_graphs(LMCODE.from_pretrained(snapshot).banks[1])
    assert len(made) == 4 and [*snapshot.parent.iterdir()] == [snapshot], "the hub's cache is left alone"
    other = open_model(tmp_path / "model", ["memory.tier=exact"])
    assert other.model.memory_config.tier == other.config.memory.tier == "exact"
    assert other.model.banks[1].content_hash() == opened.banks[1].content_hash()
    with pytest.raises(ConfigError, match="virtual shard"):
        open_model(tmp_path / "model", ["memory.virtual_shards=3"])
    with files.replacing(tmp_path / "model"):
        pretrained.rewrite_memory(opened, tmp_path / "model", lambda: opened.banks[1].delete(ids=[3]))
    assert not kept.exists() and opened.banks[1].stats()["live"] == 149
