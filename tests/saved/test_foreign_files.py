"""Whatever lies in a folder that we are told to write into is there afterwards, byte for byte; a refusal changes nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lmcode import LMCODE, BPETokenizer, LMCODEConfig, MemoryConfig
from lmcode.cli import command as cli
from lmcode.config import DataConfig, RunConfig, TrainConfig
from lmcode.data.corpus import prepare_corpus
from lmcode.dist import Group
from lmcode.doctor.folder import file_system_rows
from lmcode.files import commit, durable, replace
from lmcode.report.plots import plot_training_history
from lmcode.report.run import write_page
from lmcode.report.suite import write_suite
from lmcode.train import path_checkpoint, resuming
from lmcode.train.start import open_run, record_in
from lmcode.version import MADE_BY
from tests.helpers.folders import everything, lay_out

CONFIG = LMCODEConfig(vocab_size=300, hidden_size=16, num_layers=1, num_heads=2, context_length=16, short_term_memory_size=2,
                      short_term_dim=8, long_term_memory_slots=64, memory_head_dim=8, memory_top_k=4)
SUITE = {"made_by": MADE_BY, "suite": "toys", "version": "0", "torch": "0", "threads": 1, "seeds": [0], "trials": {},
         "measured": []}
ALWAYS = (".git/HEAD", "thesis/ch1.tex", "checkpoint-4/model.safetensors", ".hidden", "banks/mine",
          "checkpoints/.cache.tmp/x", "checkpoints/by-hand/notes", "a-dangling-link")
IN_THE_WAY = ("README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
              "lmcode_files.json", "banks/layer-00/shard-00000.safetensors", "index.html", "figure.png", "figure.jpg",
              "results.json", "results.md", "config.yaml", "ds_config.json", "metrics.jsonl", "summary.txt", "writer.lock",
              "experiences.jsonl", "checkpoints/step-00000001/notes", "manifest.json")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="module")
def model() -> LMCODE:
    torch.manual_seed(0)
    model = LMCODE(CONFIG, memory=MemoryConfig(virtual_shards=2, experience_slots=16))
    model.tokenizer = BPETokenizer.train(["what comes next"], 280)
    model.store_experience(["a text"])
    return model


def command(*words: object) -> None:
    """A command of `lmcode memory`, which says what it refuses by its exit code."""
    if cli.main(["memory", *map(str, words)]) != 0:
        raise ValueError("refused")


def save_and_add(model: LMCODE, folder: Path) -> None:
    model.save_pretrained(folder)
    command("add", folder, "another text")
    model.save_pretrained(folder, include_memory=False)


def open_a_run(folder: Path, resume: str | None) -> None:
    config = RunConfig(train=TrainConfig(run_dir=str(folder)))
    start = open_run(config, Group(), resume)
    session = SimpleNamespace(config=config, step=0, folder=folder, engine=SimpleNamespace(ds_config={}),
                              saved=folder / "checkpoints" / "step-00000000")
    resuming.set_the_future_aside(session)
    record_in(folder, session).close()
    for step in (2, 3):
        durable_commit(durable.step_folder(folder / "checkpoints", step))
    commit.drop_old(folder / "checkpoints", keep=1)
    start.close()


def durable_commit(final: Path) -> None:
    with durable.commit(final, durable.CommitFacts(1, 1, 1, "0" * 64, {}) if final.name == "new" else
                        durable.CommitFacts(durable.step_of(final)[0], 1, 1, "0" * 64, {})) as place:
        (place / "data").write_text("x")


def save_a_checkpoint(path: Path) -> None:
    path = path.resolve()
    path_checkpoint._make_way(path)
    durable_commit(replace.beside(path) / "new")
    replace.take_place(path)


def export(model: LMCODE, folder: Path) -> None:
    model.save_pretrained(folder.with_name("model"))
    command("export", folder.with_name("model"), "--output", folder / "experiences.jsonl")


def reshard(model: LMCODE, folder: Path) -> None:
    model.save_pretrained(folder.with_name("model"))
    command("reshard", folder.with_name("model"), "--virtual-shards", 4, "--out", folder)


def prepare(folder: Path) -> None:
    lay_out(folder.with_name("text"), {"a.txt": "some text " * 50, "b.txt": "other words " * 50})
    prepare_corpus(DataConfig(path=str(folder.with_name("text")), tokenizer="bytes"), vocab_size=300, folder=folder)


ACTIONS: dict[str, Callable[[LMCODE, Path], object]] = {
    "save_pretrained and memory add": save_and_add,
    "tokenizer": lambda model, folder: model.tokenizer.save(folder),
    "report": lambda model, folder: write_page(folder / "index.html", f"<p>{MADE_BY}</p>"),
    "suite": lambda model, folder: write_suite(SUITE, folder),
    "figure": lambda model, folder: plot_training_history([{"step": 1, "loss": 1.0}], path=folder / "figure.png"),
    "figure without a note": lambda model, folder: plot_training_history([{"step": 1, "loss": 1.0}],
                                                                         path=folder / "figure.jpg"),
    "new run": lambda model, folder: open_a_run(folder, None),
    "run that goes on": lambda model, folder: open_a_run(folder, "auto"),
    "checkpoint at a path": lambda model, folder: save_a_checkpoint(folder),
    "export": export,
    "reshard": reshard,
    "corpus": lambda model, folder: prepare(folder),
    "doctor": lambda model, folder: file_system_rows(folder),
}


@pytest.mark.parametrize("name", ACTIONS)
def test_what_lies_there_stays_byte_for_byte(name: str, model: LMCODE, tmp_path: Path) -> None:
    """With no file in the way, and with each of those that could be; twice, as a folder may be written into again."""
    accepted = set()
    for number, other in enumerate((None, *IN_THE_WAY)):
        folder = tmp_path / str(number) / "folder"
        lay_out(folder, {theirs: f"theirs: {theirs}" for theirs in (*ALWAYS[:-1], *([other] if other else []))})
        (folder / ALWAYS[-1]).symlink_to("nowhere")
        (folder / ".hidden").chmod(0o600)
        theirs = everything(folder)
        for _ in range(2 if other is None else 1):
            before = everything(folder)
            try:
                ACTIONS[name](model, folder)
                accepted.add(other)
            except ValueError as error:
                assert "\n" not in str(error)
                assert everything(folder) == before, "a refusal changes nothing"
            assert theirs.items() <= everything(folder).items()
    needs_new = ("checkpoint at a path", "reshard")
    assert name in needs_new and not accepted or {None, "manifest.json"} <= accepted


def test_what_we_wrote_ourselves_is_replaced(model: LMCODE, tmp_path: Path) -> None:
    for loss in (1.0, 2.0):
        write_page(tmp_path / "index.html", f"<p>{MADE_BY} {loss}</p>")
        for kind in ("png", "svg", "pdf", "ps", "eps"):
            plot_training_history([{"step": 1, "loss": loss}, {"step": 2, "loss": loss}], path=tmp_path / f"figure.{kind}")
    assert "2.0" in (tmp_path / "index.html").read_text()
    with pytest.raises(ValueError, match="was not drawn by this program"):
        for _ in range(2):
            plot_training_history([{"step": 1, "loss": 1.0}], path=tmp_path / "figure.jpg")


def test_links_are_followed_and_stay_links(model: LMCODE, tmp_path: Path) -> None:
    for name, action in {"model": model.save_pretrained, "best.pt": save_a_checkpoint}.items():
        action(tmp_path / f"target-{name}")
        (tmp_path / name).symlink_to(f"target-{name}")
        before = everything(tmp_path / f"target-{name}").keys()
        action(tmp_path / name)
        assert os.readlink(tmp_path / name) == f"target-{name}" and everything(tmp_path / f"target-{name}").keys() == before


def test_a_checkpoint_with_a_file_of_somebody_else_in_it_is_not_replaced(tmp_path: Path) -> None:
    save_a_checkpoint(tmp_path / "best.pt")
    save_a_checkpoint(tmp_path / "best.pt")
    lay_out(tmp_path, {"best.pt/notes.txt": "mine", ".best.pt.saving/notes.txt": "mine"})
    before = everything(tmp_path)
    with pytest.raises(ValueError, match=r"'notes\.txt' is in the folder and missing from the manifest"):
        save_a_checkpoint(tmp_path / "best.pt")
    assert everything(tmp_path) == before
    (tmp_path / "best.pt" / "notes.txt").unlink()
    save_a_checkpoint(tmp_path / "best.pt")
    assert (tmp_path / ".best.pt.saving" / "notes.txt").read_text() == "mine"
