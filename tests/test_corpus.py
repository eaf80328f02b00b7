"""A prepared corpus is verbatim, split by name, made once and whole; what is not text is refused."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from lmcode.config import ConfigError, DataConfig, RunConfig, build
from lmcode.tokenizer import BPETokenizer, ByteTokenizer
from lmcode.train import corpus as corpus_module
from lmcode.train import sources
from lmcode.train.corpus import Corpus, load_corpus, prepare_corpus


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Sixty small files in two folders, one of them empty."""
    root = tmp_path / "text"
    for number in range(60):
        file = root / ("deep" if number % 2 else ".") / f"{number:02}.{('txt', 'md', 'py')[number % 3]}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(f"file {number} 😀\r\n".encode() * (number + 1))
    (root / "empty.txt").touch()
    return root


def prepare(path: object, folder: Path, *, vocab_size: int = 400, **settings: object) -> Corpus:
    settings = {"tokenizer": "bytes", "held_out_share": 0.2, **settings}
    return prepare_corpus(DataConfig(path=str(path), **settings), vocab_size=vocab_size, folder=folder)


def contents(corpus: Corpus) -> dict[str, str]:
    return {name: corpus.tokenizer.decode(side.document(index).tolist())
            for side in (corpus.train, corpus.held_out) for index, name in enumerate(side.names)}


def write_jsonl(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_every_document_is_kept_verbatim_between_end_marks(text, tmp_path, tokenizer):
    corpus = prepare(text, tmp_path / "cache", tokenizer=tokenizer)
    expected = {file.relative_to(text).as_posix(): file.read_bytes().decode() for file in text.rglob("*.*")}
    del expected["empty.txt"]
    assert contents(corpus) == expected
    for side in (corpus.train, corpus.held_out):
        assert side.end_id == corpus.tokenizer.end_id
        for index in range(len(side)):
            ids = side.document(index)
            assert np.flatnonzero(ids == side.end_id).tolist() == [0, len(ids) - 1]
            assert ids[1:-1].tolist() == corpus.tokenizer.encode(expected[side.names[index]])
        assert list(side.names) == sorted(side.names)
    assert corpus.train.tokens.dtype == np.uint16 and isinstance(corpus.train.tokens, np.memmap)


def test_counts_are_true(text, tmp_path):
    (text / "exact.txt").write_text("x" * 100)
    (text / "short.txt").write_text("x" * 99)
    corpus = prepare(text, tmp_path / "cache", min_document_tokens=100)
    assert "exact.txt" in contents(corpus) and "short.txt" not in contents(corpus)
    sides = {"train": corpus.train, "held_out": corpus.held_out}
    assert sum(corpus.meta[side]["documents"] + corpus.meta[side]["left_out"] for side in sides) == 63
    assert corpus.meta["documents"] == 63
    for name, side in sides.items():
        assert corpus.meta[name]["documents"] == len(side) == len(side.names)
        assert corpus.meta[name]["tokens"] == len(side.tokens) == corpus.meta[name]["bytes"] + 2 * len(side)
        assert min(np.diff(side.offsets)) >= 102
    assert "documents too short" in corpus.describe() and "\n" not in corpus.describe()


def test_split_depends_on_the_name_alone(text, tmp_path):
    before = prepare(text, tmp_path / "cache")
    assert 2 <= len(before.held_out) <= 25
    assert not set(before.train.names) & set(before.held_out.names)
    for number in range(0, 60, 3):
        (text / f"another{number}.txt").write_text("new text")
    after = prepare(text, tmp_path / "cache")
    assert set(before.held_out.names) <= set(after.held_out.names)
    assert set(before.train.names) <= set(after.train.names)


@pytest.mark.parametrize("share", [1e-9, 1 - 1e-9])
def test_no_side_stays_empty(text, tmp_path, share):
    corpus = prepare(text, tmp_path / "cache", held_out_share=share)
    assert sorted((len(corpus.train), len(corpus.held_out))) == [1, 59]


def test_jsonl_lines_are_documents(tmp_path):
    file = write_jsonl(tmp_path / "rows.jsonl", [{"body": f"row {i}\u2028\0 same line", "id": i} for i in range(30)])
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\n\n", 1))  # a BOM and a blank line
    corpus = prepare(file, tmp_path / "cache", text_field="body")
    expected = {f"rows.jsonl:{i + 1 + (i > 0)}": f"row {i}\u2028\0 same line" for i in range(30)}
    assert contents(corpus) == expected
    assert len(corpus.held_out) > 1


def test_folder_glob_and_file_agree(text, tmp_path):
    folder = prepare(text, tmp_path / "cache")
    assert contents(prepare(text / "**" / "*.*", tmp_path / "cache")) == contents(folder)
    assert set(contents(prepare(text / "deep" / "*.md", tmp_path / "cache"))) == {
        Path(name).name for name in contents(folder) if name.startswith("deep/") and name.endswith(".md")}


def test_hidden_and_foreign_files_of_a_folder_are_passed_over(text, tmp_path):
    before = set(contents(prepare(text, tmp_path / "cache")))
    (text / ".git").mkdir()
    for name in (".git/x.txt", ".hidden.txt", "image.png"):
        (text / name).write_bytes(b"\0\0")
    assert set(contents(prepare(text, tmp_path / "cache"))) == before


def test_bpe_sees_training_documents_only(text, tmp_path):
    held_out = set(prepare(text, tmp_path / "cache").held_out.names)
    for file in list(text.rglob("*.*")):
        word = "zygomorphic " if file.relative_to(text).as_posix() in held_out else "quintessence "
        file.write_text(word * 400)
    corpus = prepare(text, tmp_path / "cache", tokenizer="bpe")
    assert held_out <= set(corpus.held_out.names)
    assert len(corpus.tokenizer.encode(" quintessence")) == 1
    assert len(corpus.tokenizer.encode(" zygomorphic")) == len(" zygomorphic")


def test_bpe_sample_is_bounded_and_spread_evenly():
    early, late = ([chr(first + i) * 37 for i in range(2000)] for first in (0x4E00, 0x6000))
    texts = [*early, "z" * 1_000_000, *late]
    total = sum(map(len, texts))
    pieces = list(corpus_module._sample(texts, 0.25))
    assert 0.2 * total < sum(map(len, pieces)) <= 0.25 * total
    joined = "".join(pieces)
    for share in (joined.count("z") / 1_000_000, sum("\u4e00" <= c < "\u6000" for c in joined) / 74_000,
                  sum("\u6000" <= c for c in joined) / 74_000):
        assert 0.15 < share < 0.4
    assert "".join(corpus_module._sample(texts, 1.0)) == "".join(texts)


def test_wide_vocabulary_is_stored_as_uint32(tmp_path):
    class Wide:
        vocab_size, end_id = 100_000, 99_999

        def encode_batch(self, texts):
            return [[70_000 + ord(c) % 50 for c in text] for text in texts]

    writer = corpus_module._SideWriter(tmp_path / "train", Wide(), 2)
    writer.add([("a", "hello")])
    counts = writer.finish("train")
    tokens = np.fromfile(tmp_path / "train.tokens", dtype=np.uint32)
    assert writer.dtype == np.uint32 and len(tokens) == counts["tokens"] == 7
    assert tokens[0] == tokens[-1] == 99_999 and tokens[1] == 70_000 + ord("h") % 50


def test_second_call_reuses_and_writes_nothing(text, tmp_path, monkeypatch):
    first = prepare(text, tmp_path / "cache", tokenizer="bpe")
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*")}
    monkeypatch.setattr(corpus_module, "_prepare", None)  # calling it would raise
    second = prepare(text, tmp_path / "cache", tokenizer="bpe")
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*")} == times
    assert contents(second) == contents(first) and second.meta == first.meta and second.folder == first.folder


def test_every_decision_is_in_the_fingerprint(text, tmp_path):
    BPETokenizer.train(["some text"], 300).save(tmp_path / "a")
    BPETokenizer.train(["other words, other words"], 300).save(tmp_path / "b")
    folders = [prepare(text, tmp_path / "cache", **settings).folder for settings in (
        {}, {"vocab_size": 401}, {"tokenizer": "bpe"}, {"held_out_share": 0.3}, {"min_document_tokens": 3},
        {"tokenizer": str(tmp_path / "a")}, {"tokenizer": str(tmp_path / "b")})]
    os.utime(text / "00.txt", ns=(1, 1))
    folders.append(prepare(text, tmp_path / "cache").folder)
    (text / "00.txt").write_text("longer than it was before, by far")
    os.utime(text / "00.txt", ns=(1, 1))
    changed = prepare(text, tmp_path / "cache")
    folders.append(changed.folder)
    (text / "00.txt").rename(text / "renamed.txt")
    folders.append(prepare(text, tmp_path / "cache").folder)
    assert len(set(folders)) == len(folders)
    assert contents(changed)["00.txt"] == "longer than it was before, by far"


def test_digest_follows_the_tokens_not_the_machine(text, tmp_path):
    first = prepare(text, tmp_path / "cache")
    os.utime(text / "00.txt", ns=(1, 1))
    assert prepare(text, tmp_path / "elsewhere").meta["digest"] == first.meta["digest"]
    (text / "00.txt").write_text("changed")
    assert prepare(text, tmp_path / "cache").meta["digest"] != first.meta["digest"]


KILLED = """
import os, sys
from pathlib import Path
from lmcode.config import DataConfig
from lmcode.train import corpus
def die(draft, home): os._exit(9)
corpus._move_into_place = die
corpus.prepare_corpus(DataConfig(path=sys.argv[1], tokenizer="bytes"), vocab_size=257, folder=Path(sys.argv[2]))
"""


def test_a_kill_leaves_nothing_that_counts(text, tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(text), str(tmp_path / "cache")], check=False)
    assert killed.returncode == 9
    (left,) = (tmp_path / "cache").iterdir()
    corpus = prepare(text, tmp_path / "cache", vocab_size=257, held_out_share=0.03)
    assert corpus.folder != left and len(contents(corpus)) == 60


def test_an_error_leaves_no_draft(text, tmp_path):
    with pytest.raises(ConfigError):
        prepare(text, tmp_path / "cache", min_document_tokens=10**6)
    assert list((tmp_path / "cache").iterdir()) == []


def test_concurrent_preparation_agrees(text, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        corpora = list(pool.map(lambda _: prepare(text, tmp_path / "cache"), range(4)))
    assert len({corpus.folder for corpus in corpora}) == 1
    assert list((tmp_path / "cache").iterdir()) == [corpora[0].folder]
    assert all(contents(corpus) == contents(corpora[0]) for corpus in corpora)


def test_the_loser_of_a_race_uses_the_winners_corpus(text, tmp_path, monkeypatch):
    winner = prepare(text, tmp_path / "cache")
    monkeypatch.setattr(Path, "is_file", _first_answer_is_no(winner.folder / "meta.json"))
    inode = winner.folder.stat().st_ino
    loser = prepare(text, tmp_path / "cache")
    assert loser.folder == winner.folder and loser.folder.stat().st_ino == inode
    assert list((tmp_path / "cache").iterdir()) == [winner.folder]


def _first_answer_is_no(file: Path):
    asked, is_file = [], Path.is_file

    def answer(self: Path) -> bool:
        if self == file and not asked:
            asked.append(self)
            return False
        return is_file(self)

    return answer


def test_damage_is_noticed(text, tmp_path):
    file = prepare(text, tmp_path / "cache").folder / "train.tokens"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(ConfigError, match="is damaged, delete it"):
        prepare(text, tmp_path / "cache")


def test_progress_counts_to_the_end(text, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "CHUNK_CHARACTERS", 1000)
    calls: list[tuple[int, int]] = []
    prepare_corpus(DataConfig(path=str(text), tokenizer="bytes"), vocab_size=257, folder=tmp_path / "cache",
                   progress=lambda done, total: calls.append((done, total)))
    assert len(calls) > 3 and calls == sorted(calls) and calls[-1] == (61, 61)


@pytest.fixture
def standard_library(text, tmp_path, monkeypatch) -> Path:
    """A small standard library with installed packages and two files that are not text."""
    for name in ("site-packages/x.py", "dist-packages/y.py", "test/latin.py", "test/nul.py"):
        (text / name).parent.mkdir(exist_ok=True)
        (text / name).write_bytes(b"installed")
    (text / "test" / "latin.py").write_bytes(b"caf\xe9")
    (text / "test" / "nul.py").write_bytes(b"a\0b")
    monkeypatch.setattr(sources.sysconfig, "get_paths", lambda: {"stdlib": str(text)})
    return text


def test_standard_library_is_the_default_and_odd_files_are_counted(standard_library, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="lmcode"):
        corpus = prepare_corpus(DataConfig(tokenizer="bytes"), vocab_size=257, folder=tmp_path / "cache")
    assert set(contents(corpus)) == {file.relative_to(standard_library).as_posix()
                                     for file in standard_library.rglob("[0-9]*.py")}
    assert corpus.meta["skipped_files"] == 2
    (record,) = (record for record in caplog.records if "skipped" in record.message)
    assert "test/latin.py, test/nul.py" in record.message


def test_the_real_standard_library_is_found():
    files = sources._standard_library()
    names = [file.name for file in files]
    assert len(names) > 100 and "json/decoder.py" in names and names == sorted(names)
    assert not any("-packages" in name for name in names)


def refused(path: object, tmp_path: Path, match: str, **settings: object) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        prepare(path, tmp_path / "cache", **settings)
    assert "\n" not in str(caught.value)


def test_missing_paths_are_refused(text, tmp_path):
    refused(text.with_name("texd"), tmp_path, "texd' does not exist. Did you mean 'text'")
    refused(text / "*.rst", tmp_path, "matches no file")
    (tmp_path / "bare").mkdir()
    refused(tmp_path / "bare", tmp_path, r"without \.txt, \.md, \.py, \.jsonl files")


def test_corpora_that_cannot_be_split_are_refused(text, tmp_path):
    refused(text / "empty.txt", tmp_path, "is empty")
    refused(text / "00.txt", tmp_path, "at least 2 documents with text.*got 1")
    refused(text, tmp_path, "every train document is shorter than data.min_document_tokens = 5000",
            min_document_tokens=5000)


@pytest.mark.parametrize(("data", "match"), [(b"a\0b", r"odd\.txt' is not text: it holds NUL"),
                                             (b"caf\xe9 au lait", r"odd\.txt' is not UTF-8 text: byte 0xe9 at 3")])
def test_files_that_are_not_text_are_refused_by_name(text, tmp_path, data, match):
    (text / "odd.txt").write_bytes(data)
    refused(text, tmp_path, match)


@pytest.mark.parametrize(("row", "match"), [
    ([1], r"rows\.jsonl:3' must be a JSON object with the field 'text': got list"),
    ({"texts": "x"}, r"rows\.jsonl:3' lacks the field data\.text_field = 'text'\. Did you mean 'texts'"),
    ({"text": 5}, r"field 'text' of '.*rows\.jsonl:3' must be a string: got int"),
    ({"text": "\ud800"}, r"rows\.jsonl:3' is not text: it holds a lone surrogate"),
])
def test_bad_jsonl_rows_are_refused_by_line(tmp_path, row, match):
    refused(write_jsonl(tmp_path / "rows.jsonl", [{"text": "ok"}, {"text": "fine"}, row]), tmp_path, match)


@pytest.mark.parametrize(("line", "match"), [(b"{oops\n", r"rows\.jsonl:2' is not a JSON object"),
                                             (b'{"text": "\xff"}\n', r"rows\.jsonl:2' is not UTF-8")])
def test_lines_that_are_no_json_are_refused(tmp_path, line, match):
    file = write_jsonl(tmp_path / "rows.jsonl", [{"text": "ok"}])
    file.write_bytes(file.read_bytes() + line)
    refused(file, tmp_path, match)


def test_tokenizers_that_cannot_serve_are_refused(text, tmp_path):
    refused(text, tmp_path, "data.tokenizer must be.*got 'byte'.*Did you mean 'bytes'", tokenizer="byte")
    refused(text, tmp_path, "256 < 257", vocab_size=256)
    (tmp_path / "folder").mkdir()
    refused(text, tmp_path, "there is no tokenizer file", tokenizer=str(tmp_path / "folder"))


class Rows(list):
    _fingerprint = "abc"


def hugging_face(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, load, setting: str) -> Corpus:
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))
    return prepare_corpus(DataConfig(hf=setting, tokenizer="bytes", text_field="body"), vocab_size=257,
                          folder=tmp_path / "cache")


@pytest.mark.parametrize(("setting", "asked"), [("set", ("set", None, "train")), ("set:en", ("set", "en", "train")),
                                                ("me/set::test", ("me/set", None, "test"))])
def test_hugging_face_rows_are_documents(monkeypatch, tmp_path, setting, asked):
    calls = []

    def load(name, config, *, split):
        calls.append((name, config, split))
        return Rows({"body": f"row {i}"} for i in range(40))

    corpus = hugging_face(monkeypatch, tmp_path, load, setting)
    assert calls == [asked]
    assert contents(corpus) == {f"{asked[2]}:{i}": f"row {i}" for i in range(40)}


def test_hugging_face_refusals(monkeypatch, tmp_path):
    def missing(name, config, *, split):
        raise FileNotFoundError("no such\ndataset")

    with pytest.raises(ConfigError, match="cannot be loaded: no such dataset"):
        hugging_face(monkeypatch, tmp_path, missing, "set")
    with pytest.raises(ConfigError, match="lacks the field data.text_field = 'body'"):
        hugging_face(monkeypatch, tmp_path, lambda *_, split: Rows([{"text": "x"}]), "set")
    with pytest.raises(ConfigError, match="must look like"):
        hugging_face(monkeypatch, tmp_path, missing, "a:b:c:d")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match="needs the package 'datasets'"):
        prepare_corpus(DataConfig(hf="set"), vocab_size=300, folder=tmp_path / "cache")


@pytest.mark.parametrize("stage", ["mkdir", "tokenizer", "tokens", "rename"])
def test_a_cache_that_takes_nothing_is_one_line_that_names_it(text, tmp_path, monkeypatch, stage):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    def full_for_rust(*_, **__):
        raise Exception("No space left on device (os error 28)")  # as the tokenizers package says it

    cache = tmp_path / "cache"
    place = {"mkdir": None, "tokenizer": (ByteTokenizer, "save", full_for_rust), "tokens": (np, "save", full),
             "rename": (corpus_module, "_move_into_place", full)}[stage]
    if place is None:
        cache.write_text("a file where the folder should be")
    else:
        monkeypatch.setattr(*place)
    with pytest.raises(ConfigError, match="cannot be kept in '.*cache', the folder that data.cache names: ") as error:
        prepare(text, cache)
    assert "\n" not in str(error.value)
    assert stage == "mkdir" or not [*cache.iterdir()], "nothing is left behind"


def test_the_cache_may_lie_in_the_home_folder(text, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = build(RunConfig, {"data": {"path": "~/text", "tokenizer": "bytes", "cache": "~/kept"}})
    assert text == tmp_path / "text"
    assert load_corpus(config).folder.parent == tmp_path / "kept"
