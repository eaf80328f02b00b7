"""Changing the memory of a saved run.

The one thing to know: a saved memory is never changed in place. `amend` writes a revision of the newest checkpoint (the
same step, everything but the memory linked to the old files) as a commit of its own, and only then removes the old one,
so that a kill leaves one or the other. `--resume auto` and `load_model` take the revision, since it counts as newer.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from lmcode.config import ConfigError
from lmcode.lmcode import LMCODE
from lmcode.memory_files import BANKS, EXPERIENCES, make_folders, save_memory
from lmcode.train import durable

log = logging.getLogger("lmcode")


class Amended(NamedTuple):
    """What `amend` did: the result of the change, the new commit, and older checkpoints, which hold the former memory."""

    result: Any
    folder: Path
    older: list[Path]


@contextmanager
def writing(run_folder: Path) -> Iterator[None]:
    """The right to write into a run folder, for the length of a block.

    Raises:
        ConfigError: if another process holds it, or the folder cannot be written.
    """
    try:
        lock = durable.Lock(run_folder)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from None
    try:
        yield
    finally:
        lock.close()


def amend(folder: Path, model: LMCODE, change: Callable[[LMCODE], Any]) -> Amended:
    """Changes the memory of `model`, loaded from the checkpoint `folder`, and commits it as the next revision.

    One process alone; the caller holds the run folder's lock (`writing`). If `change` raises, nothing is written.

    Raises:
        OSError: if the disk refuses; the old checkpoint is as it was.
    """
    result = change(model)
    step, revision = durable.step_of(folder)
    final = durable.step_folder(folder.parent, step, revision + 1)
    manifest = durable.read_manifest(folder)
    durable.check_space(folder.parent, manifest.total_bytes)
    with durable.commit(final, manifest.facts) as place:
        for name in manifest.files:
            if name.split("/")[0] not in (BANKS, EXPERIENCES):
                _link(folder / name, place / name)
        make_folders(place, model)
        save_memory(place, model)
    try:
        durable.discard(folder)
    except OSError as error:
        log.warning("'%s' was not removed, though '%s' takes its place: %s", folder, final.name, error)
    return Amended(result, final, [path for path in durable.steps(folder.parent) if path != final])


def _link(source: Path, target: Path) -> None:
    """The same file under another name; a copy where the file system has no links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
