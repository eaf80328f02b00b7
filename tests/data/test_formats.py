"""Every format gives the same documents; what is damaged or cannot be read is refused by file, line and reason."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

from lmcode.config import ConfigError, TextConfig
from lmcode.data.formats import format_of, read_documents
from lmcode.data.text_files import TextFile

TEXTS = ["one", "zwei\n\nZeilen 😀\u2028", "", "drei\t" * 50]
ROWS = [{"text": text, "id": number} for number, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def read(path: Path, **settings: object) -> list[tuple[str, str]]:
    return list(read_documents(TextFile(path.name, path), TextConfig(**settings)))


def refused(path: Path, match: str) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        read(path)
    assert "\n" not in str(caught.value) and path.name in str(caught.value)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def zstd(content: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor().compress(content)


def parquet(path: Path, columns: dict[str, list[object]]) -> Path:
    import pyarrow
    from pyarrow import parquet as files

    files.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


@pytest.mark.parametrize(("name", "content"), [
    ("a.jsonl", LINES), ("a.ndjson", LINES), ("a.json", LINES), ("a.json", json.dumps(ROWS).encode()),
    ("a.json", b"\xef\xbb\xbf" + json.dumps(ROWS, indent=2).encode()), ("a.jsonl.gz", gzip.compress(LINES)),
    ("a.json.gz", gzip.compress(json.dumps(ROWS).encode())), ("a.NDJSON.GZ", gzip.compress(LINES))])
def test_json_in_every_guise(tmp_path, name, content):
    assert read(write(tmp_path / name, content)) == [(f"{name}:{i}", text) for i, text in enumerate(TEXTS, start=1)]


def test_zstd_and_several_frames(tmp_path):
    file = write(tmp_path / "a.jsonl.zst", zstd(LINES[:30]) + zstd(b"") + zstd(LINES[30:]))
    assert [text for _, text in read(file)] == TEXTS
    big = "".join(chr(0x4E00 + i % 5000) for i in range(300_000))
    assert read(write(tmp_path / "b.txt.zst", zstd(big.encode()))) == [("b.txt.zst", big)]


def test_parquet(tmp_path):
    file = parquet(tmp_path / "a.parquet", {"id": [1, 2, 3, 4], "text": TEXTS})
    assert read(file) == [(f"a.parquet:{i}", text) for i, text in enumerate(TEXTS, start=1)]
    refused(parquet(tmp_path / "b.parquet", {"texts": ["x"]}), "lacks the column data.text_field = 'text'. Did you mean")
    refused(parquet(tmp_path / "c.parquet", {"text": ["x", None]}), "field 'text' of '.*c.parquet:2' must be a string")
    refused(write(tmp_path / "d.parquet", file.read_bytes()[:-20]), "cannot be read: ")
    refused(write(tmp_path / "e.parquet", b"text"), "cannot be read: ")


def test_one_row_may_be_a_whole_file(tmp_path):
    assert read(write(tmp_path / "a.json", json.dumps(ROWS[1], indent=1).encode())) == [("a.json", TEXTS[1])]
    assert read(write(tmp_path / "b.json", b"\n\n")) == []


@pytest.mark.parametrize(("content", "match"), [
    (b'[{"text": "x"}\n {"text": "y"}]', r"a\.json:2' is not valid JSON: expected ',' or '\]' after a row, got '{'"),
    (b'[{"text": "x"},\n\n7]', r"a\.json:3' must be a JSON object with the field 'text': got int"),
    (b'\n[]\n]', r"a\.json:3' is not valid JSON: something follows the list"),
    (b'[{"text": "x"},\n', r"a\.json:2' is not valid JSON"), (b'{"text":\n"x"', r"a\.json' is not valid JSON.*line 2")])
def test_json_that_is_broken_is_refused_by_line(tmp_path, content, match):
    refused(write(tmp_path / "a.json", content), match)
    assert read(write(tmp_path / "b.json", b" [ ] ")) == []


def test_compressed_text_is_text(tmp_path):
    assert read(write(tmp_path / "a.txt.gz", gzip.compress(b"text\r\n"))) == [("a.txt.gz", "text\r\n")]


@pytest.mark.parametrize(("name", "kind", "compression"), [
    ("a.md", "text", None), ("a.RST", "text", None), ("a.rs", "code", None), ("a.jsonl.zst", "lines", "zstd"),
    ("a.json.gz", "json", "gzip"), ("a.parquet.gz", "other", "gzip"), ("a.png", "other", None), ("Makefile", "other", None),
    ("a.tar.gz", "other", "gzip"), ("wiki.train.txt", "text", None)])
def test_the_name_says_what_it_is(name, kind, compression):
    assert format_of(name) == (kind, compression)


@pytest.mark.parametrize("separator", ["<|endoftext|>", "---"])
def test_lines_separate_the_documents_of_a_text_file(tmp_path, separator):
    text = "S\none\n\n S \n\nS\ntwo S\nlines\nS\nthree".replace("S", separator)
    file = write(tmp_path / "a.txt", text.encode())
    assert read(file, document_separator=separator) == [("a.txt:2", "one\n\n"), ("a.txt:7", f"two {separator}\nlines\n"),
                                                        ("a.txt:10", "three")]
    assert len(read(file, document_separator=None)) == 1


DEEP = b"[" * 200_000 + b"]" * 200_000


@pytest.mark.parametrize("frame", [b'{"text": "ok"}\n%s\n', b'{"text": "ok", "n": %s}', b'[{"text": "ok"},\n%s]'],
                         ids=["lines", "object", "list"])
@pytest.mark.parametrize(("row", "match"), [
    (b'{"text": "x", "n": ' + b"9" * 5000 + b"}", "limit"), (DEEP, "nested too deeply"),
    (b"{oops}", "is not valid JSON: ")], ids=["digits", "levels", "words"])
def test_rows_that_python_cannot_parse_are_refused_in_one_line(tmp_path, frame, row, match):
    for name in ("rows.json",) if frame.startswith(b"[") else ("rows.jsonl", "rows.json"):
        file = write(tmp_path / name, frame % row)
        refused(file, match)
        if b"\n" in frame:
            refused(file, rf"{name}:2'")


@pytest.mark.parametrize(("name", "compress"), [("a.txt.gz", gzip.compress), ("a.jsonl.zst", zstd)])
def test_damage_is_noticed(tmp_path, name, compress):
    whole = compress(LINES * 200)
    for content in (whole[:-5], whole[:len(whole) // 2], b"no archive" * 5):
        refused(write(tmp_path / name, content), "cannot be read: ")


@pytest.mark.parametrize(("name", "package"), [("a.txt.zst", "zstandard"), ("a.parquet", "pyarrow")])
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    refused(write(tmp_path / name, b""), rf"needs the package {package}: pip install 'lmcode\[data\]'")
