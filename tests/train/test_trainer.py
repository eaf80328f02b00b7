"""`MemoryAwareTrainer` on real ranks: the loop of the command line, exact continuation, checkpoints at a path."""

from __future__ import annotations

import logging
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lmcode import LMCODE, LMCODEConfig, MemoryAwareTrainer, MemoryDataset, create_synthetic_dataset
from lmcode.cli import command as cli
from lmcode.config import ConfigError, MemoryConfig
from lmcode.data.tokenizer import BPETokenizer, same_tokenizer
from lmcode.files.commit import SaveFailed
from lmcode.memories.experiences import VISITS
from lmcode.memories.remembering import Deleted
from lmcode.saved import checkpoint
from lmcode.train import optimizer_files, path_checkpoint
from tests.helpers.ranks import run_on_ranks

SNIPPET = """
from lmcode import MemoryAwareTrainer, MemoryDataset
from lmcode import create_synthetic_dataset

train_data = create_synthetic_dataset(num_samples=1000, seq_len=50)
train_dataset = MemoryDataset(train_data, memory_sample_ratio=0.2)

trainer_config = {
    'learning_rate': 1e-4,
    'weight_decay': 0.01,
    'gradient_clip': 1.0,
    'memory_consolidation_interval': 1000,
    'warmup_steps': 1000,
    'total_steps': 10000,
}
trainer = MemoryAwareTrainer(model, trainer_config)
history = trainer.train(train_dataset, num_epochs=10, batch_size=32, eval_dataset=None)
trainer.save_checkpoint('best_model.pt')
"""
STEPS = 6
CONSTANT = {"learning_rate": 3e-3, "min_learning_rate": 1.0, "warmup_steps": 0, "log_every": 1, "sequence_length": 8}


def make_model(seed: int = 0, slots: int = 480) -> LMCODE:
    torch.manual_seed(seed)
    return LMCODE(LMCODEConfig(vocab_size=256, hidden_size=32, num_layers=2, num_heads=2, context_length=64,
                               short_term_memory_size=4, short_term_dim=8, memory_layers=(1,), memory_head_dim=8,
                               memory_top_k=4, memory_bias=0.0, long_term_memory_slots=slots),
                  memory=MemoryConfig(virtual_shards=4))


def data(seed: int = 0, ratio: float = 0.25, samples: int = 24) -> MemoryDataset:
    return MemoryDataset(create_synthetic_dataset(samples, 40, seed=seed), ratio)


def trainer_of(model: LMCODE, **config: Any) -> MemoryAwareTrainer:
    return MemoryAwareTrainer(model, {**CONSTANT, "total_steps": STEPS, **config})


def weights_of(model: LMCODE) -> dict[str, list[float]]:
    return {name: parameter.detach().flatten().tolist() for name, parameter in model.named_parameters()}


def state_of(trainer: MemoryAwareTrainer) -> dict[str, Any]:
    """What two trainers that are the same share, bit for bit."""
    return {"weights": weights_of(trainer.model), "bank": trainer.model.banks[1].content_hash(), "step": trainer.step,
            "spans": trainer.replay.token_MX.tolist(), "importance": trainer.replay.columns["importance"].tolist()}


def message_of(action: Any) -> str:
    try:
        action()
    except (ValueError, SaveFailed) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def go_on(folder: Path) -> dict[str, Any]:
    """A straight run, and one that is cut short, saved, loaded by a trainer with another model, and gone on with."""
    whole = trainer_of(make_model(torch.distributed.get_rank()))  # weights are those of rank 0
    history = whole.train(data(), batch_size=4, eval_dataset=data(1, samples=8))
    half = trainer_of(make_model(), total_steps=STEPS // 2)
    first = half.train(data(), batch_size=4)
    half.save_checkpoint(folder / "half.pt")
    rest = trainer_of(make_model(seed=9))
    rest.load_checkpoint(folder / "half.pt")
    loaded = state_of(rest) == state_of(half)
    second = rest.train(data(), batch_size=4)
    end = state_of(rest) == state_of(whole)
    stats = whole.model.banks[1].stats()
    return {"history": history, "loss": first["loss"] + second["loss"], "loaded": loaded, "end": end,
            "live": stats["live_by_rank"], "told": whole.evaluate(data(1, samples=8)),
            "other": message_of(lambda: whole.train(data(torch.distributed.get_rank() + 5), batch_size=4)),
            "odd": message_of(lambda: whole.train(data(), batch_size=5))}


def test_a_loaded_trainer_goes_on_exactly_and_ranks_change_nothing(tmp_path: Path) -> None:
    reports = {}
    for R in (1, 2):
        (tmp_path / str(R)).mkdir()
        every = run_on_ranks(go_on, R, tmp_path / str(R))
        for report in every:
            assert report["loaded"] and report["end"] and report["loss"] == report["history"]["loss"]
            assert report["history"]["loss"] == every[0]["history"]["loss"]
        reports[R] = every[0]
    one, two = reports[1], reports[2]
    assert len(two["live"]) == 2 and min(two["live"]) > 0 and sum(two["live"]) == sum(one["live"])
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
    assert two["told"] == pytest.approx(one["told"], abs=1e-4)
    assert one["loss"][-1] < one["loss"][0]
    assert one["history"]["step"] == list(range(1, STEPS + 1)) and one["history"]["eval_step"] == [STEPS]
    assert one["history"]["eval_loss"] == [pytest.approx(one["told"]["loss"])]
    assert one["told"]["perplexity"] == pytest.approx(math.exp(one["told"]["loss"])) and one["told"]["tokens"] == 8 * 39
    assert one["told"]["loss_memory_off"] != one["told"]["loss"]
    assert "every rank must pass the same samples" in two["other"] and "nothing" in one["other"]
    assert "train.streams must be a multiple of ranks" in two["odd"]


def live_in_one_process(folder: Path) -> dict[str, Any]:
    os.chdir(folder)
    return {"snippet": run_snippet(), "passes": several_passes(), "saves": saves(folder), "run": keep_a_run(folder)}


def run_snippet() -> dict[str, Any]:
    """The original README's, with fewer steps."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("lmcode").addHandler(handler)
    model = make_model()
    before = weights_of(model)
    names: dict[str, Any] = {"model": model}
    exec(SNIPPET.replace("'total_steps': 10000", "'total_steps': 40"), names)
    logging.getLogger("lmcode").removeHandler(handler)
    return {"history": names["history"], "saved": Path("best_model.pt/manifest.json").exists(), "said": said,
            "in place": names["trainer"].model is model and weights_of(model) != before, "training": model.training,
            "live": model.banks[1].stats()["live"]}


def several_passes() -> dict[str, Any]:
    """Epochs that end, a second reading, another dataset, another window, evaluation in between."""
    model = make_model(slots=8000)
    model.eval()
    trainer = trainer_of(model, total_steps=1000, memory_consolidation_interval=7)
    first = trainer.train(data(ratio=0.0), num_epochs=2, batch_size=24, eval_dataset=create_synthetic_dataset(9, 40))
    namespaces = set(model.banks[1].shard.columns["namespace"].tolist())
    content = model.banks[1].content_hash(), weights_of(model), torch.get_rng_state().tolist()
    trainer.evaluate(create_synthetic_dataset(9, 40, seed=4))
    same = content == (model.banks[1].content_hash(), weights_of(model), torch.get_rng_state().tolist())
    second = trainer.train(data(3, ratio=0.5), num_epochs=1, batch_size=8)
    columns = model.banks[1].shard.columns
    new = set(columns["namespace"][(columns["step"] >= first["step"][-1]) & (columns["id"] >= 0)].tolist())
    return {"first": first, "second": second, "untouched": same, "training": model.training,
            "apart": max(namespaces) < min(new), "step": trainer.step}


def test_training_and_experiences_are_in_namespaces_of_their_own() -> None:
    """The default one, too: deleting either leaves the other as it is. The spans of a document go with its entries."""
    model = make_model(slots=8000)
    trainer = trainer_of(model, total_steps=6)
    trainer.train(data(ratio=0.25), batch_size=8)
    columns = model.banks[1].shard.columns
    trained = int(model.banks[1].shard.live_M.sum())
    assert columns["namespace"][columns["id"] >= 0].min() == VISITS
    visits = trainer.replay.columns["namespace"][trainer.replay.columns["number"] >= 0].tolist()
    assert min(visits) >= VISITS and visits.count(VISITS + 1)
    model.store_experience([[1, 2, 3, 4, 5]] * 2, [0, 1])
    assert model.delete_experiences(namespace=0) == Deleted(1, 4, 0)
    mine = int((columns["namespace"] == VISITS + 1).sum())
    assert model.delete_experiences(namespace="visit:1") == Deleted(0, mine, visits.count(VISITS + 1))
    assert VISITS + 1 not in trainer.replay.columns["namespace"]
    assert model.banks[1].stats()["live"] == trained - mine + 4 and len(model.experiences.all()) == 1


def test_what_was_trained_before_goes_on_in_its_namespaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint of a program that numbered documents from 0 on."""
    with monkeypatch.context() as former:
        former.setattr("lmcode.memories.memories.VISITS", 0)
        trainer = trainer_of(make_model(slots=8000), total_steps=3)
        trainer.train(data(ratio=0.0), batch_size=8)
        trainer.save_checkpoint(tmp_path / "old")
    model = make_model(slots=8000)
    trainer = trainer_of(model, total_steps=1000)
    trainer.load_checkpoint(tmp_path / "old")

    def namespaces() -> list[int]:
        columns = model.banks[1].shard.columns
        return sorted({*columns["namespace"][columns["id"] >= 0].tolist()})

    trainer.train(data(ratio=0.0), num_epochs=1, batch_size=8)
    assert namespaces() == [*range(24)], "the pass that was under way"
    trainer.train(data(3, ratio=0.0), num_epochs=1, batch_size=8)
    assert namespaces() == [*range(24), *range(VISITS, VISITS + 24)]


def saves(folder: Path) -> dict[str, Any]:
    trainer = trainer_of(make_model(), total_steps=2)
    told = {"early": message_of(lambda: trainer.save_checkpoint("early.pt"))}
    trainer.train(data(), batch_size=4)
    trainer.save_checkpoint("model.pt")
    first = checkpoint.find(Path("model.pt"))
    old = {path.name: path.read_bytes() for path in first.iterdir() if path.is_file()}
    (folder / "file.pt").write_text("something of the user's")
    told["taken"] = message_of(lambda: trainer.save_checkpoint("file.pt"))
    real, optimizer_files.divide = optimizer_files.divide, lambda *_, **__: ({}, {"bad": None})
    told["failed"] = message_of(lambda: trainer.save_checkpoint("model.pt"))
    optimizer_files.divide = real
    told["survives"] = old == {path.name: path.read_bytes() for path in first.iterdir() if path.is_file()}
    trainer.save_checkpoint("model.pt")
    told["left"] = sorted(path.name for path in folder.glob(".*.saving"))
    # what a kill between the two renames leaves: both beside the path; the newer one counts, here and at the next save
    place = path_checkpoint.beside(folder / "model.pt")
    place.mkdir()
    shutil.copytree("model.pt", place / "former")
    os.rename("model.pt", place / "new")
    other = trainer_of(make_model(seed=5), total_steps=2)
    other.load_checkpoint("model.pt")
    told["recovered"] = state_of(other) == state_of(trainer)
    trainer.save_checkpoint("model.pt")
    told["swept"] = (folder / "model.pt" / "manifest.json").exists() and not place.exists()
    told["missing"] = message_of(lambda: other.load_checkpoint("modle.pt"))
    told["shape"] = message_of(lambda: trainer_of(make_model(slots=500)).load_checkpoint("model.pt"))
    weights = folder / "model.pt" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    told["damaged"] = message_of(lambda: other.load_checkpoint("model.pt"))
    return told


def keep_a_run(folder: Path) -> list[str]:
    trainer = trainer_of(make_model(), run_dir=str(folder / "run"), save_every=3)
    trainer.train(data(), batch_size=4)
    return sorted(path.relative_to(folder / "run").as_posix() for path in (folder / "run").glob("*")) + sorted(
        path.name for path in (folder / "run" / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_on_ranks(live_in_one_process, 1, tmp_path_factory.mktemp("trainer"))[0]


def test_the_original_snippet_runs(lived: dict[str, Any]) -> None:
    report = lived["snippet"]
    assert report["saved"] and report["in place"] and report["training"] and report["live"] > 0
    assert report["history"]["step"] == [10, 20, 30, 40]
    assert all(len(report["history"][name]) == 4 for name in ("loss", "learning_rate", "grad_norm", "tokens_per_s"))
    assert report["history"]["loss"] == pytest.approx([math.log(256)] * 4, abs=0.1), "at the first steps of a long warm-up"
    assert 0 < report["history"]["replay_share"][-1] <= 0.25 and report["history"]["eval_loss"] == []
    assert any("the learning rate never reaches its peak" in line for line in report["said"])


def test_epochs_end_and_another_call_reads_new_documents(lived: dict[str, Any]) -> None:
    report = lived["passes"]
    # 24 samples of 39 predictions, in windows of 8, all at once: 5 steps an epoch; then 8 rows, half of them replayed
    assert report["first"]["step"] == list(range(1, 11)) and report["first"]["eval_step"] == [5, 10]
    assert math.isnan(report["first"]["replay_loss"][0])
    assert report["second"]["step"][0] == 11 and report["step"] == report["second"]["step"][-1]
    assert 28 <= len(report["second"]["step"]) <= 30
    assert sum(report["second"]["replay_share"]) / len(report["second"]["step"]) == pytest.approx(0.5, abs=0.03)
    assert report["untouched"] and not report["training"], "evaluating changes nothing; the mode is the user's"
    assert report["apart"], "a second reading must not see what the first one wrote"


def test_a_checkpoint_at_a_path_is_there_whole_or_as_it_was(lived: dict[str, Any]) -> None:
    told = lived["saves"]
    assert "call train or load_checkpoint first" in told["early"]
    assert "is no checkpoint of this program" in told["taken"]
    assert told["failed"].startswith("SaveFailed") and told["survives"]
    assert told["left"] == [] and told["recovered"] and told["swept"]
    assert "there is no run folder or checkpoint" in told["missing"] and "Did you mean 'model.pt'?" in told["missing"]
    assert "model.long_term_memory_slots must be that of the checkpoint" in told["shape"]
    assert "does not have the hash of the manifest" in told["damaged"]


def test_a_run_folder_is_kept_on_request(lived: dict[str, Any]) -> None:
    assert {"config.yaml", "ds_config.json", "metrics.jsonl", "tensorboard", "step-00000003",
            "step-00000006"} <= set(lived["run"])


def refusals() -> list[str]:
    trainer = trainer_of(make_model(), streams=8, memory_sample_ratio=0.5)
    return [message_of(action) for action in (
        lambda: MemoryAwareTrainer(make_model(), {"learning_rte": 1e-3}),
        lambda: MemoryAwareTrainer(make_model(), {"learning_rate": -1}),
        lambda: MemoryAwareTrainer(torch.nn.Linear(1, 1)),
        lambda: MemoryAwareTrainer(make_model(), {"save_every": 3}),
        lambda: trainer.train(data(ratio=0.5), batch_size=4),
        lambda: trainer.train(data(ratio=0.2), batch_size=8),
        lambda: trainer.train([[1, 256]], batch_size=8),
        lambda: trainer.train(data(ratio=0.5), num_epochs=0, batch_size=8),
        lambda: trainer.evaluate([]))]


def test_what_cannot_work_is_refused() -> None:
    expected = ["unknown key 'learning_rte' in TrainConfig. Did you mean 'learning_rate'?", "learning_rate",
                "must be an LMCODE", "save_every needs run_dir", "streams = 8 and the call 4",
                "memory_sample_ratio = 0.5 and the call 0.2", "vocab_size, 256: the dataset has 256",
                "num_epochs must be an integer of at least 1", "at least one sample"]
    for message, part in zip(run_on_ranks(refusals, 1)[0], expected, strict=True):
        assert message.startswith(ConfigError.__name__) and part in message


def save_one(path: Path) -> None:
    model = LMCODE(make_model().config.model_copy(update={"vocab_size": 257}), memory=MemoryConfig(virtual_shards=4))
    trainer = trainer_of(model)
    trainer.train(data(), num_epochs=1, batch_size=4)
    trainer.save_checkpoint(path)


def test_a_checkpoint_at_a_path_is_used_from_the_command_line_and_nothing_is_added_to_it(
        tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path, page = tmp_path / "best.pt", tmp_path / "best.pt.report.html"
    run_on_ranks(save_one, 2, path)
    content = sorted(path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    for name in range(12):
        Path(f"text-{name}.txt").write_text(f"some words to be read {name} " * 20)
    assert cli.main(["report", "best.pt"]) == 0 and capsys.readouterr().out.strip() == str(page)
    assert "given in Python" in page.read_text() and sorted(path.rglob("*")) == content
    assert cli.main(["eval", "best.pt"]) == 2 and "name a text by data.path=" in capsys.readouterr().err
    assert cli.main(["eval", "best.pt", "data.path=text-*.txt", "data.held_out_share=0.5", "eval.streams=2"]) == 0
    printed = capsys.readouterr().out
    assert f"step {STEPS}" in printed and "memory shuffled" in printed and "not the one that this run was" in printed


def take_over(folder: Path) -> dict[str, Any]:
    """A model with a past of its own loads a checkpoint of another one, which has a tokenizer and no experiences."""
    texts = ["the cat sat on the mat", "a dog ran by the cat"] * 6
    bpe = BPETokenizer.train(texts, 257)
    config = make_model().config.model_copy(update={"vocab_size": 300})
    models = [LMCODE(config, memory=MemoryConfig(virtual_shards=4)) for _ in range(2)]
    models[0].tokenizer = bpe
    first = trainer_of(models[0])
    first.train(MemoryDataset(texts, tokenizer=bpe), num_epochs=1, batch_size=4)
    first.save_checkpoint(folder / "first")
    refused = message_of(lambda: trainer_of(models[1]).train(MemoryDataset(texts, tokenizer=bpe), batch_size=4))
    models[1].store_experience("stale words")
    second = trainer_of(models[1])
    second.load_checkpoint(folder / "first")
    losses = [one.evaluate(texts, batch_size=4)["loss"] for one in (first, second)]
    return {"refused": refused, "same": same_tokenizer(models[1].tokenizer, bpe), "losses": losses,
            "experiences": [one.text for one in models[1].experiences.all()]}


def test_loading_brings_tokenizer_and_experiences_of_the_checkpoint(tmp_path: Path) -> None:
    (facts,) = run_on_ranks(take_over, 1, tmp_path)
    assert facts["same"] and facts["experiences"] == [] and facts["losses"][0] == facts["losses"][1]
    assert "set model.tokenizer to the dataset's, of 257 ids; the model has another one" in facts["refused"]
