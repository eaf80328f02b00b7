"""Replacing a checkpoint at a path, so that a kill leaves either the old or the new one whole.

The one thing to know: the new folder is completed under a temporary name and gets its final name only when all of it is on
disk. Two renames put it in place, and a kill between them leaves both next to the path, where `left_by_a_kill` looks:

    .model.saving/.new.tmp      being written
    .model.saving/new           complete before anything else is changed
    .model.saving/former        what was at the path, until the new one is there

Pure file protocol: no torch, no ranks; one process does this.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from lmcode.files.durable import sync


def is_free(path: Path, mark: str) -> bool:
    """Whether a file may be written here: nothing lies here, or something that holds the mark of this program."""
    return not os.path.lexists(path) or mark.encode() in path.read_bytes()


def beside(path: Path) -> Path:
    """The folder in which something is made ready for `path`."""
    return path.with_name(f".{path.name}.saving")


def left_by_a_kill(path: Path) -> Path | None:
    """What stands in for something that is not at its path: the newer one, which is whole if it has its name."""
    places = [] if os.path.lexists(path) else [beside(path) / "new", beside(path) / "former"]
    return next((place for place in places if place.exists()), None)


def make_way(path: Path) -> None:
    """Finishes or removes what a kill has left at `path` and beside it."""
    if (left := left_by_a_kill(path)) is not None:
        os.rename(left, path)
    clear(path)


def clear(path: Path) -> None:
    """Removes what was made ready beside `path`, and what was kept of the former one."""
    for name in (".new.tmp", "new", "former"):
        if (beside(path) / name).is_dir():
            shutil.rmtree(beside(path) / name)
    if beside(path).is_dir() and not any(beside(path).iterdir()):
        beside(path).rmdir()


def link(source: str | Path, target: str | Path) -> None:
    """The same file under another name; a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def take_place(path: Path) -> None:
    """Puts what was made ready at its path; what was there before is gone after it."""
    if path.exists():
        os.rename(path, beside(path) / "former")
    os.rename(beside(path) / "new", path)
    sync(path.parent)
    clear(path)
