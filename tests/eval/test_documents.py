"""Held-out documents of a saved run: its own corpus again, or any text in the tokens of its model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lmcode.config import ConfigError, RunConfig, build, to_yaml
from lmcode.data.corpus import load_corpus
from lmcode.eval.documents import held_out_documents
from lmcode.opening import Opened
from lmcode.presets import load_run_config
from lmcode.saved.places import Kind, Place

WORDS = "the cat sat on the mat and saw a dog run by "


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """What there is of a checkpoint when documents are looked for: settings, digest of the corpus, tokenizer."""
    write_texts(tmp_path / "text", WORDS)
    config = build(RunConfig, {"model": {"vocab_size": 300}, "data": {
        "path": str(tmp_path / "text"), "cache": str(tmp_path / "corpora"), "held_out_share": 0.3}})
    corpus, folder = load_corpus(config), tmp_path / "checkpoint"
    folder.mkdir()
    corpus.tokenizer.save(folder / "tokenizer")
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "trainer.json").write_text(json.dumps({"corpus": corpus.meta["digest"]}))
    return folder


def write_texts(folder: Path, words: str) -> None:
    folder.mkdir()
    for number in range(12):
        (folder / f"{number}.txt").write_text(words * 20 + str(number))


def read(checkpoint: Path, *overrides: str) -> tuple[dict[str, list[int]], bool]:
    opened = Opened(None, Place(Kind.LONE_CHECKPOINT, checkpoint, checkpoint), checkpoint,
                    load_run_config(checkpoint / "config.yaml", overrides), 0)
    documents, same, _ = held_out_documents(opened)
    return {name: documents.document(i).tolist() for i, name in enumerate(documents.names)}, same


def test_the_corpus_of_the_run_is_found_again_wherever_it_is_now(saved: Path, tmp_path: Path) -> None:
    here, same = read(saved)
    prepared = len(list((tmp_path / "corpora").iterdir()))
    assert same and here and prepared == 1, "and not prepared anew"
    (tmp_path / "text").rename(tmp_path / "moved")
    assert read(saved, f"data.path={tmp_path / 'moved'}") == (here, True)


def test_other_text_comes_in_the_tokens_of_the_model(saved: Path, tmp_path: Path) -> None:
    """A tokenizer trained on that text would give ids that mean something else."""
    write_texts(tmp_path / "other", WORDS[::-1])
    documents, same = read(saved, f"data.path={tmp_path / 'other'}")
    assert len(documents) == 12, "all of them, with nothing held back for training"
    tokenizer = load_corpus(load_run_config(saved / "config.yaml")).tokenizer
    assert not same and documents
    for name, ids in documents.items():
        text = (tmp_path / "other" / name).read_text()
        assert ids[1:-1] == tokenizer.encode(text) and tokenizer.decode(ids[1:-1]) == text


def test_all_of_another_text_is_read_whatever_its_files_are_called(saved: Path, tmp_path: Path) -> None:
    write_texts(tmp_path / "other", WORDS[::-1])
    (tmp_path / "other" / "valid.txt").write_text(WORDS)
    assert {*read(saved, f"data.path={tmp_path / 'other'}")[0]} == {"valid.txt", *(f"{n}.txt" for n in range(12))}
    for setting in ("path", "held_out"):
        documents, same = read(saved, f"data.{setting}={tmp_path / 'other' / '3.txt'}")
        assert [*documents] == ["3.txt"] and not same


def test_a_corpus_that_has_changed_comes_in_the_tokens_of_the_model(saved: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "text").iterdir():
        path.write_text(WORDS[::-1] * 20)
    tokenizer_of_the_run = json.loads((saved / "tokenizer" / "tokenizer.json").read_text())
    documents, same = read(saved)
    assert not same and documents
    used = [json.loads((folder / "tokenizer" / "tokenizer.json").read_text()) for folder in (tmp_path / "corpora").iterdir()]
    assert used.count(tokenizer_of_the_run) == 2, "that of the run and that of these documents"


def test_what_cannot_be_found_or_read_is_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="keeps its tokenizer: .* was 'bpe' and cannot become 'bytes'"):
        read(saved, "data.tokenizer=bytes")
    config = load_run_config(saved / "config.yaml", ["data.path=null"])
    (saved / "config.yaml").write_text(to_yaml(config.model_copy(update={"preset": "trainer"})))
    with pytest.raises(ConfigError, match="trained on samples given in Python.*data.path="):
        read(saved)
    assert read(saved, f"data.path={tmp_path / 'text'}")[1]
