"""Where text comes from: the standard library, files, JSONL lines or a Hugging Face dataset, as named documents.

A `Source` is found without being read, can be read more than once, and yields the same documents in the same order on
every machine. Text is UTF-8 without NUL bytes, kept verbatim; anything else is refused by name.
"""

from __future__ import annotations

import glob
import json
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lmcode.config import ConfigError, DataConfig, expanded, near_match

TEXT_SUFFIXES = (".txt", ".md", ".py")  # taken from a folder; a file or glob given by name may end in anything
JSONL_SUFFIX = ".jsonl"

Document = tuple[str, str]  # name, text


@dataclass(frozen=True)
class Source:
    """Where documents come from.

    title: what a person calls it.
    identity: JSON values that change whenever the documents do.
    read: yields every document; its name is the relative path, with ':line' for JSONL.
    skipped: names of files that `read` passed over because they are not text (the standard library has a few).
    """

    title: str
    identity: list[Any]
    read: Callable[[], Iterator[Document]]
    skipped: set[str] = field(default_factory=set)


class TextFile(NamedTuple):
    """A file and its name relative to the corpus, with '/' on every machine."""

    name: str
    path: Path


def open_source(config: DataConfig) -> Source:
    """The documents that `config` names, found but not yet read (reading raises ConfigError for what is not text).

    Raises:
        ConfigError: if there is no such path, nothing matches, or the package that reads it is not installed.
    """
    if config.hf is not None:
        return _hugging_face(config.hf, config.text_field)
    skipped: set[str] = set()
    if config.path is None:
        title, files, odd = "the Python standard library", _standard_library(), skipped
    else:
        title, files, odd = f"'{config.path}'", _matching_files(config.path), None
    stats = [(file.name, file.path.stat()) for file in files]
    identity = [config.text_field, *([name, stat.st_size, stat.st_mtime_ns] for name, stat in stats)]
    return Source(title, identity, lambda: _read_files(files, config.text_field, odd), skipped)


def _standard_library() -> list[TextFile]:
    """The running Python's own source: tens of megabytes of real text that every machine has."""
    return _walk(Path(sysconfig.get_paths()["stdlib"]), (".py",), without=("site-packages", "dist-packages"))


def _walk(root: Path, suffixes: tuple[str, ...], *, without: tuple[str, ...] = ()) -> list[TextFile]:
    """Files below `root` by suffix, sorted by relative path; hidden files and folders are passed over."""
    files = []
    for parent, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in without and not name.startswith(".")]
        files += [_named(Path(parent, name), root) for name in names
                  if name.lower().endswith(suffixes) and not name.startswith(".")]
    return sorted(file for file in files if file.path.is_file())


def _named(path: Path, root: Path) -> TextFile:
    return TextFile(path.relative_to(root).as_posix(), path)


def _matching_files(setting: str) -> list[TextFile]:
    path = expanded("data.path", setting)
    suffixes = (*TEXT_SUFFIXES, JSONL_SUFFIX)
    if path.is_file():
        return [TextFile(path.name, path)]
    if path.is_dir():
        files = _walk(path, suffixes)
        if not files:
            raise ConfigError(f"data.path '{setting}' is a folder without {', '.join(suffixes)} files")
        return files
    if not glob.has_magic(str(path)):
        siblings = os.listdir(path.parent) if path.parent.is_dir() else ()
        raise ConfigError(f"data.path '{setting}' does not exist.{near_match(path.name, siblings)}")
    fixed = next(parent for parent in path.parents if not glob.has_magic(str(parent)))
    found = (Path(match) for match in glob.glob(str(path), recursive=True))
    files = sorted(_named(match, fixed) for match in found if match.is_file())
    if not files:
        raise ConfigError(f"data.path '{setting}' matches no file")
    return files


def _read_files(files: Sequence[TextFile], text_field: str, skipped: set[str] | None) -> Iterator[Document]:
    """Every document; names of files that are not text go to `skipped` if it is a set, else they are refused."""
    for file in files:
        if file.path.suffix.lower() == JSONL_SUFFIX:
            yield from _read_jsonl(file, text_field)
            continue
        try:
            text = _decode(_read_bytes(file.path), str(file.path))
        except ConfigError:
            if skipped is None:
                raise
            skipped.add(file.name)
            continue
        yield file.name, text


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"'{path}' cannot be read: {error.strerror}") from None


def _decode(data: bytes, place: str) -> str:
    if b"\0" in data:
        raise ConfigError(f"'{place}' is not text: it holds NUL bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"'{place}' is not UTF-8 text: byte {data[error.start]:#04x} at {error.start}") from None


def _read_jsonl(file: TextFile, text_field: str) -> Iterator[Document]:
    """One document per line; blank lines are passed over but counted, so that ':line' is what an editor shows."""
    try:
        lines = open(file.path, "rb")
    except OSError as error:
        raise ConfigError(f"'{file.path}' cannot be read: {error.strerror}") from None
    with lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{file.path}:{number}"
            try:
                row = json.loads(_decode(line, place).removeprefix("\ufeff"))
            except json.JSONDecodeError as error:
                raise ConfigError(f"'{place}' is not a JSON object: {error.msg}") from None
            yield f"{file.name}:{number}", _text_of(row, text_field, place)


def _text_of(row: Any, text_field: str, place: str) -> str:
    if not isinstance(row, dict):
        raise ConfigError(f"'{place}' must be a JSON object with the field '{text_field}': got {type(row).__name__}")
    if text_field not in row:
        raise ConfigError(f"'{place}' lacks the field data.text_field = '{text_field}'.{near_match(text_field, row)}")
    text = row[text_field]
    if not isinstance(text, str):
        raise ConfigError(f"field '{text_field}' of '{place}' must be a string: got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError(f"field '{text_field}' of '{place}' is not text: it holds a lone surrogate") from None
    return text


def _hugging_face(setting: str, text_field: str) -> Source:
    """Rows of a Hugging Face dataset, 'name', 'name:config' or 'name:config:split' (split 'train' unless given)."""
    name, *rest = setting.split(":")
    if not name or len(rest) > 2:
        raise ConfigError(f"data.hf must look like 'name' or 'name:config:split': got '{setting}'")
    try:
        import datasets
    except ImportError:
        raise ConfigError(f"data.hf = '{setting}' needs the package 'datasets': pip install datasets") from None
    subset, split = (rest[0] or None if rest else None), (rest[1] if len(rest) == 2 else "train")
    try:
        rows = datasets.load_dataset(name, subset, split=split)
    except (OSError, ValueError) as error:  # not found, no such config or split, no network
        raise ConfigError(f"data.hf = '{setting}' cannot be loaded: {' '.join(str(error).split())}") from None

    def read() -> Iterator[Document]:
        for number, row in enumerate(rows):
            yield f"{split}:{number}", _text_of(row, text_field, f"{setting}:{number}")

    return Source(f"'{setting}'", [setting, text_field, len(rows), getattr(rows, "_fingerprint", "")], read)
