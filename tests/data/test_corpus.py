"""A prepared corpus is verbatim, split by name, made once and whole; what is not text is refused."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from lmcode.config import ConfigError, DataConfig, RunConfig, build
from lmcode.data import corpus as corpus_module
from lmcode.data import sources
from lmcode.data.corpus import Corpus, load_corpus, prepare_corpus
from lmcode.data.tokenizer import BPETokenizer, ByteTokenizer


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
    assert len(corpus.passed_over) == 0
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


def test_hidden_and_foreign_files_of_a_folder_are_passed_over_and_named(text, tmp_path):
    before = set(contents(prepare(text, tmp_path / "cache")))
    (text / ".git").mkdir()
    for name in (".git/x.txt", ".hidden.txt", "image.png"):
        (text / name).write_bytes(b"\0\0")
    (text / "settings.json").write_text('{"indent": 4}')
    for _ in range(2):  # the second time the corpus is found ready, and its line says the same
        corpus = prepare(text, tmp_path / "cache")
        assert set(contents(corpus)) == before
        assert ("4 passed over: 1 JSON without the field 'text' (settings.json), 2 hidden (.git, .hidden.txt), 1 of a kind "
                "that is not read (image.png)") in corpus.describe()


def rows_of(corpus: Corpus) -> tuple[set[str], set[str]]:
    return set(corpus.train.names), set(corpus.held_out.names)


LOOKALIKES = {
    "plain": ("train.txt", "val.txt"), "wiki": ("wiki.train.txt", "wiki.valid.txt", "wiki.test.txt"),
    "stories": ("TinyStories-train.txt", "TinyStories-valid.txt"), "mixed": ("text.jsonl", "dev.jsonl"),
    "hub": ("train-00000-of-00001.jsonl", "test-00000-of-00001.jsonl"),
    "folders": ("train/a.txt", "valid/a.txt", "test/b.txt")}


def write_texts(root: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        row = json.dumps({"text": name * 20}) if name.endswith("jsonl") else name * 20
        (root / name).write_text(row)


@pytest.mark.parametrize("names", LOOKALIKES.values(), ids=LOOKALIKES)
def test_nobody_trains_on_files_that_look_held_out_unless_a_setting_says_so(tmp_path, names):
    root = tmp_path / "text"
    write_texts(root, names)
    refused(root, tmp_path, f"look held out beside files to train on: .*{names[1]}.*data.held_out.*data.exclude")
    refused(root / "**", tmp_path, "look held out beside files to train on")
    corpus = prepare(root, tmp_path / "cache", held_out=str(root / names[1].split("/")[0]), exclude=names[2:])
    train, held_out = (name + ":1" * name.endswith("jsonl") for name in names[:2])
    assert rows_of(corpus) == ({train}, {held_out.removeprefix("valid/")})
    assert "held out (named by data.held_out)" in corpus.describe()
    mixed = prepare(root, tmp_path / "cache", held_out="share")
    assert len(mixed.train) + len(mixed.held_out) == len(names)


def test_source_code_may_be_called_as_it_likes(tmp_path):
    write_texts(tmp_path / "code", ("module.py", "test/test_module.py", "eval.py"))
    assert len(contents(prepare(tmp_path / "code", tmp_path / "cache"))) == 3


def test_held_out_files_are_never_trained_on_and_others_that_look_so_are_named(text, tmp_path, caplog):
    write_texts(text, ("val.txt", "test.txt"))
    corpus = prepare(text, tmp_path / "cache", held_out=str(text / "deep"))
    train, held_out = rows_of(corpus)
    assert train == {file.name for file in text.glob("*.*") if file.stat().st_size} and {"val.txt", "test.txt"} <= train
    assert held_out == {file.name for file in (text / "deep").iterdir()}
    assert sum("though they look held out" in record.message and "test.txt, val.txt" in record.message
               for record in caplog.records) == 1
    refused(text / "deep", tmp_path, "nothing is left to train on", held_out=str(text))
    refused(text, tmp_path, "data.held_out '.*nowhere' does not exist", held_out=str(text / "nowhere"))


def held_out_share(corpus: Corpus) -> float:
    return len(corpus.held_out.tokens) / (len(corpus.held_out.tokens) + len(corpus.train.tokens))


def test_the_end_of_one_text_file_is_held_out(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("".join(f"Chapter {number}.\n" + "word " * 50 + "\n\n" for number in range(40)))
    corpus = prepare(file, tmp_path / "cache", held_out_share=0.1)
    parts = contents(corpus)
    assert list(parts) == ["book.txt", "book.txt (end)"] and "".join(parts.values()) == file.read_text()
    assert parts["book.txt (end)"].startswith("Chapter "), "cut where a paragraph begins"
    assert 0.08 < held_out_share(corpus) < 0.12
    assert "(the end of the file, 10.0% of it" in corpus.describe()
    file.write_text("x" * 100)
    assert list(contents(prepare(file, tmp_path / "cache", held_out_share=0.1)).values()) == ["x" * 90, "x" * 10]


def test_documents_of_one_text_file_are_kept_whole_and_the_last_held_out(tmp_path):
    file = tmp_path / "stories.txt"
    stories = [f"Story {number}.\r\n" + "word " * number for number in range(1, 41)]
    file.write_bytes("\n<|endoftext|>\n".join(stories).encode())
    corpus = prepare(file, tmp_path / "cache", held_out_share=0.2)
    parts = contents(corpus)
    assert [text.removesuffix("\n") for text in parts.values()] == stories
    assert list(parts)[:2] == ["stories.txt:1", "stories.txt:4"], "the line at which it begins"
    assert 0.18 < held_out_share(corpus) < 0.22
    assert list(corpus.held_out.names) == list(parts)[-len(corpus.held_out):]
    assert f"the last {len(corpus.held_out)} documents" in corpus.describe()
    (whole,) = set(contents(prepare(file, tmp_path / "cache", document_separator=None))) - {"stories.txt (end)"}
    assert whole == "stories.txt"


def test_everything_can_be_held_out_for_measuring(text, tmp_path):
    write_texts(text, ("val.txt",))
    config = DataConfig(path=str(text), tokenizer="bytes")
    corpus = prepare_corpus(config, vocab_size=257, folder=tmp_path / "cache", whole=True)
    assert len(corpus.train) == 0 and len(corpus.held_out) == 61 and "val.txt" in corpus.held_out.names


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
    writer.add("", [("a", "hello")])
    counts = writer.finish("train", needed=[""])
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
        {"held_out": str(text / "deep")}, {"exclude": "deep"}, {"document_separator": "--"},
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
from lmcode.data import corpus
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


def test_standard_library_is_the_default_and_odd_files_are_counted(standard_library, tmp_path):
    corpus = prepare_corpus(DataConfig(tokenizer="bytes"), vocab_size=257, folder=tmp_path / "cache")
    assert set(contents(corpus)) == {file.relative_to(standard_library).as_posix()
                                     for file in standard_library.rglob("[0-9]*.py")}
    assert "2 passed over: 2 not UTF-8 text (test/latin.py, test/nul.py)" in corpus.describe()


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
    refused(text / "**" / "*.rst", tmp_path, "matches no file")
    (tmp_path / "bare").mkdir()
    refused(tmp_path / "bare", tmp_path, r"has no file to read \(\.txt, ")
    (tmp_path / "bare" / "image.png").touch()
    refused(tmp_path / "bare", tmp_path, r"1 passed over: 1 of a kind that is not read \(image\.png\)")


def test_corpora_that_cannot_be_split_are_refused(text, tmp_path):
    refused(text / "empty.txt", tmp_path, "is empty")
    (text / "one.txt").write_text("x")
    refused(text / "one.txt", tmp_path, "one character: too little to train on and to hold out")
    refused(write_jsonl(text / "one.jsonl", [{"text": "row"}]), tmp_path, "at least 2 documents with text.*got 1")
    (text / "one.jsonl").unlink()
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


@pytest.mark.parametrize(("line", "match"), [(b"{oops\n", r"rows\.jsonl:2' is not valid JSON: "),
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
