"""Where text comes from: the standard library, files or a Hugging Face dataset, as named documents.

A `Source` is found without being read, can be read more than once, and yields the same documents in the same order on
every machine.
"""

from __future__ import annotations

import logging
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmcode.config import ConfigError, TextConfig
from lmcode.data import formats
from lmcode.data import text_files as files
from lmcode.data.formats import Document
from lmcode.data.text_files import PassedOver, TextFile

log = logging.getLogger("lmcode")

SHARE = "share"  # the value of `held_out` that names no files
SHOWN_FILES = 3


@dataclass(frozen=True)
class Source:
    """Where documents come from.

    title: what a person calls it.
    identity: JSON values that change whenever the documents do.
    read: yields every document; its name is the relative path, with ':line' where a file may hold several.
    passed_over: what is not read, and why; complete after a reading.
    is_text: whether it is one file of text, whose end can be held out.
    """

    title: str
    identity: list[Any]
    read: Callable[[], Iterator[Document]]
    passed_over: PassedOver = field(default_factory=PassedOver)
    is_text: bool = False


def open_source(config: TextConfig, *, whole: bool = False) -> Source:
    """The documents that `config` names to train on, found but not yet read: reading raises ConfigError for what is no text.

    Args:
        whole: everything, whatever is held out or called as if it were.

    Raises:
        ConfigError: if there is no such path, nothing matches, files look as if they were to be held out and no setting
            says so, or the package that reads it is not installed.
    """
    if config.hf is not None:
        return _hugging_face(config.hf, config.text_field)
    passed_over = PassedOver()
    if config.path is None:
        return _of_files("the Python standard library", _standard_library(), config, passed_over, lenient=True)
    place = f"{config.place}.path"
    found = _readable(files.find(place, config.path, passed_over), f"{place} '{config.path}'", config, passed_over)
    return _of_files(f"'{config.path}'", found if whole else _to_train_on(found, config), config, passed_over)


def open_held_out(config: TextConfig) -> Source | None:
    """The documents that `config.held_out` names; None if it names none.

    Raises:
        ConfigError: if there is no such path, or nothing matches.
    """
    passed_over = PassedOver()
    found = _held_out_files(config, passed_over)
    return _of_files(f"'{config.held_out}'", found, config, passed_over) if found else None


def _held_out_files(config: TextConfig, passed_over: PassedOver) -> list[TextFile]:
    if config.held_out is None or config.held_out == SHARE:
        return []
    place = f"{config.place}.held_out"
    found = files.find(place, config.held_out, passed_over)
    return _readable(found, f"{place} '{config.held_out}'", config, passed_over)



def _to_train_on(found: list[TextFile], config: TextConfig) -> list[TextFile]:
    """`found` without the files that are held out by name; refuses those that look as if they should be."""
    held_out = _held_out_files(config, PassedOver())
    if held_out:
        found = files.without_files(found, held_out)
        if not found:
            raise ConfigError(f"{config.place}.held_out '{config.held_out}' takes every file of path '{config.path}': "
                              "nothing is left to train on")
    odd = [file.name for file in found if files.looks_held_out(file.name) and formats.format_of(file.name).kind != "code"]
    if not odd or len(odd) == len(found) or config.held_out == SHARE:
        return found
    names = ", ".join(odd[:SHOWN_FILES]) + (f" and {len(odd) - SHOWN_FILES} more" if len(odd) > SHOWN_FILES else "")
    if not held_out:
        raise ConfigError(f"{config.place}.path '{config.path}' holds files that look held out beside files to train on: "
                          f"{names}; name them in {config.place}.held_out, leave them out by {config.place}.exclude, or "
                          f"train on them like any other by {config.place}.held_out={SHARE}")
    log.warning("trained on, though they look held out, since %s.held_out names others: %s", config.place, names)
    return found


def _readable(found: list[TextFile], place: str, config: TextConfig, passed_over: PassedOver) -> list[TextFile]:
    """`found` without what is excluded, and without what a folder holds of other kinds."""
    kept = []
    for file in found:
        if files.excluded(file.name, config.exclude):
            passed_over.add("excluded", file.name)
        elif not file.chosen and formats.format_of(file.name).kind == "other":
            passed_over.add("of a kind that is not read", file.name)
        else:
            kept.append(file)
    if not kept:
        reason = f": {passed_over.describe()}" if len(passed_over) else ""
        raise ConfigError(f"{place} has no file to read ({', '.join(formats.READ_IN_FOLDERS)}){reason}")
    return kept


def _of_files(title: str, found: Sequence[TextFile], config: TextConfig, passed_over: PassedOver, *,
              lenient: bool = False) -> Source:
    """The documents of these files. lenient: pass over files that are not text, instead of refusing them."""
    stats = [(file.name, file.path.stat()) for file in found]
    identity = [config.text_field, config.document_separator,
                *([name, stat.st_size, stat.st_mtime_ns] for name, stat in stats)]
    is_text = len(found) == 1 and formats.format_of(found[0].name).kind in ("text", "code", "other")
    return Source(title, identity, lambda: _read(found, config, passed_over, lenient), passed_over, is_text)


def _read(found: Sequence[TextFile], config: TextConfig, passed_over: PassedOver, lenient: bool) -> Iterator[Document]:
    for file in found:
        documents = formats.read_documents(file, config)
        try:
            first = next(documents, None)
        except formats.LacksText:
            if file.chosen or formats.format_of(file.name).kind != "json":
                raise
            passed_over.add(f"JSON without the field '{config.text_field}'", file.name)  # settings, say, beside source code
            continue
        except ConfigError:
            if not lenient:
                raise
            passed_over.add("not UTF-8 text", file.name)
            continue
        if first is not None:
            yield first
            yield from documents


def _standard_library() -> list[TextFile]:
    """The running Python's own source: tens of megabytes of real text that every machine has."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = files.walk(root, PassedOver(), without=("site-packages", "dist-packages"))
    return [file for file in found if file.name.lower().endswith(".py")]


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
            yield f"{split}:{number}", formats.text_of(row, text_field, f"{setting}:{number}")

    return Source(f"'{setting}'", [setting, text_field, len(rows), getattr(rows, "_fingerprint", "")], read)
