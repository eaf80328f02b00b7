"""The files of a saved model, in a folder that may hold other people's files too, replaced whole or not at all.

The one thing to know: a file is ours if `lmcode_files.json`, the record that the last save left, names it with its size and
hash; a `config.json` is ours if its model_type says so. Nothing else is ever replaced or removed. A save that would have to
is refused before anything changes, with two exceptions: a file that has the wanted content already, and a model card that
somebody else wrote or edited, stay as they are.

A new state is made ready inside the folder, and only then put in place, file by file:

    .lmcode-saving/lock        held by the one process that saves
    .lmcode-saving/.new.tmp    being written; a kill leaves the old state as it was
    .lmcode-saving/new         whole, with a plan.json that says which files it replaces and removes; from here on this is
                               the model, and `whole` leads every reader of ours to it
    config.json                is removed before the first other file is touched, and linked back as the last one

So a crash leaves the old state; or `new` whole, beside the old or the new config.json or none, which other programs refuse
to read; or the new state. The next save first puts in place what is still in `new`, and sweeps what is left of an attempt.

Pure file protocol: no torch, no ranks. Several writers may fill `draft`; one process does all else.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from lmcode.config import ConfigError
from lmcode.files import durable
from lmcode.files.durable import Seals
from lmcode.files.replace import link

log = logging.getLogger("lmcode")
CONFIG, CARD, RECORD, PLAN = "config.json", "README.md", "lmcode_files.json", "plan.json"
MODEL_TYPE = "lmcode"
WORK = ".lmcode-saving"
SCHEMA = 1


class FolderChange(NamedTuple):
    """What a new state changes in its folder: files to put and files to remove, each with the size and the hash of the file
    that it may find in its place (None: there is none)."""

    put: dict[str, dict[str, Any] | None]
    remove: dict[str, dict[str, Any] | None]


def whole(place: Path) -> Path:
    """Where the files of the model saved at `place` lie: there, or where a kill has left its newer state."""
    new = place / WORK / "new"
    return new if new.is_dir() else place


def draft(place: Path) -> Path:
    """The folder that the files of a new state are written into."""
    return place / WORK / ".new.tmp"


@contextmanager
def replacing(place: Path) -> Iterator[None]:
    """The right to change the model saved at `place`, with an empty `draft` to fill; `put_in_place` then makes that the
    model. If it was not called, or something was refused, all is as it was.

    Raises:
        ConfigError: if `place` is no folder, or its config.json is not ours.
        Locked: if another process changes it.
        OSError: whatever the file system says.
    """
    work, made = place / WORK, not os.path.lexists(place)
    _check_place(place)
    durable.make_folder(place)
    work.mkdir(exist_ok=True)
    os.close(os.open(work / "lock", os.O_RDWR | os.O_CREAT, 0o666))
    with durable.held(work / "lock"):
        try:
            _finish(place)
            _sweep(work)
            draft(place).mkdir()
            yield
        except Exception:
            _give_back(place, made)
            raise
        _give_back(place, made)


def put_in_place(place: Path, card: str | None, rewritten: Collection[str] = ()) -> None:
    """Makes the files in `draft`, and this model card (None: leave it), the model saved at `place`.

    Args:
        rewritten: files of the last save that are replaced even if somebody has changed them since.

    Raises:
        ConfigError: if that would replace or remove a file that is not ours; nothing has changed then.
        OSError: whatever the file system says.
    """
    new = draft(place)
    if card is not None:
        durable.write_text(new / CARD, card)
    seals = durable.seal(new, sorted(path.relative_to(new).as_posix() for path in new.rglob("*") if path.is_file()))
    former = read_record(place)
    plan = _plan(place, seals, former, rewritten)
    ours = {name: seal for name, seal in seals.items() if name in plan.put or former.get(name) == seal}
    ours.pop(CONFIG)
    durable.write_text(new / RECORD, json.dumps({"schema": SCHEMA, "files": ours}, indent=1, sort_keys=True) + "\n")
    plan.put[RECORD] = _seal_of(place / RECORD)
    durable.write_text(new / PLAN, json.dumps(plan._asdict()))
    for folder, _, _ in os.walk(new, topdown=False):
        durable.sync(Path(folder))
    os.rename(new, new.with_name("new"))
    durable.sync(place / WORK)
    durable.sync(place)
    _finish(place)


def read_record(place: Path) -> Seals:
    """The files that the last save wrote, with size and hash; none without a record.

    Raises:
        ConfigError: if a file of that name is no record.
    """
    path = place / RECORD
    if not os.path.lexists(path):
        return {}
    content = _read_json(path)
    files = content.get("files") if isinstance(content, dict) and content.get("schema") == SCHEMA else None
    if not isinstance(files, dict) or not all(map(durable.stays_inside, files)):
        raise _not_ours(path)
    return files


def _check_place(place: Path) -> None:
    """Refuses what can never be saved into."""
    if os.path.lexists(place) and not place.is_dir():
        raise ConfigError(f"a model is saved as a folder: '{place}' is none")
    config = place / CONFIG
    if os.path.lexists(config):
        content = _read_json(config)
        if not isinstance(content, dict) or content.get("model_type") != MODEL_TYPE:
            raise ConfigError(f"'{config}' is not ours (its model_type must be '{MODEL_TYPE}') and is not replaced: give "
                              "another folder")
    if (place / WORK).is_symlink():
        raise _not_ours(place / WORK)


def _read_json(path: Path) -> Any:
    """The content of a regular file; None for anything that is none, or no JSON."""
    try:
        return None if path.is_symlink() else json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _not_ours(path: Path) -> ConfigError:
    return ConfigError(f"'{path}' was not written by the last save there, or has been changed since, and is not replaced: "
                       "move it away or give another folder")


def _plan(place: Path, seals: Seals, former: Seals, rewritten: Collection[str]) -> FolderChange:
    """What has to change so that the files of `seals` are in place.

    Raises:
        ConfigError: if that includes a file that is not ours.
    """
    plan = FolderChange({CONFIG: _seal_of(place / CONFIG)}, {})  # ours, says _check_place, even if somebody has edited it
    for name, seal in seals.items():
        path = place / name
        _check_parents(place, name)
        found = _seal_of(path)
        if name == CONFIG or found == seal:
            continue
        expected = found if name in rewritten and name in former else former.get(name)
        if not os.path.lexists(path) or found is not None and found == expected:
            plan.put[name] = found
        elif name == CARD and path.is_file():
            log.warning("kept '%s', which somebody has written or edited: what it says of the memory may be old", path)
        else:
            raise _not_ours(path)
    for name in former.keys() - seals.keys():
        if os.path.lexists(place / name):
            _check_parents(place, name)
            plan.remove[name] = _seal_of(place / name)
            if plan.remove[name] != former[name]:
                raise _not_ours(place / name)
    return plan


def _check_parents(place: Path, name: str) -> None:
    """Refuses a path to a file on which something is no folder, or a link."""
    for part in [*Path(name).parents][:-1]:
        if os.path.lexists(place / part) and ((place / part).is_symlink() or not (place / part).is_dir()):
            raise _not_ours(place / part)


def _seal_of(path: Path) -> dict[str, Any] | None:
    """Size and hash of a regular file; None for anything else."""
    if path.is_symlink() or not path.is_file():
        return None
    return {"bytes": os.stat(path).st_size, "blake2b": durable.digest(path)}


def _finish(place: Path) -> None:
    """Puts the files of a whole new state in place, if there is one; can be done again after a kill at any point.

    Raises:
        ConfigError: if somebody has changed a file that it replaces or removes, since a kill; nothing changes then.
    """
    new = place / WORK / "new"
    if not new.is_dir():
        return
    plan = _read_plan(new / PLAN)
    for name, expected in {**plan.put, **plan.remove}.items():
        _check_parents(place, name)
        found = _seal_of(place / name)
        if os.path.lexists(place / name) and (found is None or found != expected and found != _seal_of(new / name)):
            raise _not_ours(place / name)
    (place / CONFIG).unlink(missing_ok=True)
    durable.sync(place)
    for name in plan.put.keys() - {RECORD, CONFIG}:
        _put(place, name)
    for name in plan.remove:
        _remove(place, name)
    for name in (RECORD, CONFIG):
        _put(place, name)
    done = new.with_name("done.tmp")
    os.rename(new, done)
    durable.sync(place / WORK)
    shutil.rmtree(done)


def _read_plan(path: Path) -> FolderChange:
    """The plan of a new state, which somebody else may have put there.

    Raises:
        ConfigError: if it is none, or leads out of the folder.
    """
    content = _read_json(path)
    fine = isinstance(content, dict) and {*content} == {*FolderChange._fields} and all(
        isinstance(part, dict) and all(map(durable.stays_inside, part)) for part in content.values())
    if not fine or not {CONFIG, RECORD} <= content["put"].keys():
        raise ConfigError(f"'{path}' is not what a save has left there: move '{path.parents[1]}' away")
    return FolderChange(**content)


def _put(place: Path, name: str) -> None:
    """Gives a file of the new state its place, at once, and forces that to disk."""
    source, target, moving = place / WORK / "new" / name, place / name, place / WORK / "moving"
    durable.make_folder(target.parent)
    if not (target.exists() and target.samefile(source)):  # two names of one file: a rename would do nothing
        moving.unlink(missing_ok=True)
        link(source, moving)
        durable.sync(moving)
        os.rename(moving, target)
    durable.sync(target.parent)


def _remove(place: Path, name: str) -> None:
    """Removes a file, and the folders that are empty without it."""
    (place / name).unlink(missing_ok=True)
    for part in [*Path(name).parents][:-1]:
        if (place / part).is_dir() and not any((place / part).iterdir()):
            (place / part).rmdir()
            durable.sync((place / part).parent)


def _sweep(work: Path) -> None:
    """Removes what is left of an attempt to save."""
    for name in (".new.tmp", "done.tmp"):
        if (work / name).is_dir():
            shutil.rmtree(work / name)
    (work / "moving").unlink(missing_ok=True)


def _give_back(place: Path, made: bool) -> None:
    """Leaves nothing of the work behind, nor a folder that was made for nothing; `new`, if it is still there, stays."""
    _sweep(place / WORK)
    (place / WORK / "lock").unlink(missing_ok=True)
    for folder in (place / WORK, *([place] if made else [])):
        if not any(folder.iterdir()):
            folder.rmdir()
