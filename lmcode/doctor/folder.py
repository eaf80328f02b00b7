"""Where checkpoints will be written: is there room, and does the file system keep what the commit protocol relies on?"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from lmcode.config import RunConfig
from lmcode.doctor.row import Row, State
from lmcode.files import durable

GIB = 2**30
SCRATCH = ".lmcode-doctor-"  # what the names of the doctor's own files begin with


class Space(NamedTuple):
    """Bytes that a run writes: one checkpoint, and the most that it has at the same time."""

    checkpoint: int
    most: int


def space_of(config: RunConfig) -> Space:
    """What checkpoints of `config` take: those that are kept, and one more while it is being written."""
    from lmcode import estimate

    one = sum(estimate.checkpoint_bytes(config, estimate.count_parameters(config)).values())
    kept = config.train.save_total_limit
    return Space(one, (kept + 1) * one)


def file_system_rows(run_dir: Path, space: Space | None = None) -> list[Row]:
    """Space, durability and locks where checkpoints will be written; a scratch folder is made there and removed."""
    folder = nearest_existing(run_dir)
    rows = [free_space_row(shutil.disk_usage(folder).free, folder, space)]
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=folder) as scratch:
        commit_folder(Path(scratch))
        rows.append(Row("rename and fsync", "ok", f"a folder was committed in {folder}"))
        locks = locks_exclude(Path(scratch) / "lock")
        rows.append(Row("file locks", "ok" if locks else "warn",
                        "a second lock is refused" if locks else "locks do not exclude each other on this file system"))
    return rows


def free_space_row(free: int, folder: Path, space: Space | None = None) -> Row:
    """Whether `free` bytes are enough: for the checkpoints of a run, or, where that is not known, for a small one."""
    said = f"{free / GIB:.1f} GiB in {folder}"
    if space is None:
        return Row("free space", "ok" if free >= 5 * GIB else "warn" if free >= GIB / 2 else "fail", said)
    state: State = "ok" if free >= space.most else "warn" if free >= 2 * space.checkpoint else "fail"
    return Row("free space", state, f"{said}; a checkpoint has {space.checkpoint / GIB:.2f} GiB, "
                                    f"with those that are kept {space.most / GIB:.2f}")


def nearest_existing(path: Path) -> Path:
    """`path` itself, or the closest parent that exists."""
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if parent.is_dir())


def commit_folder(scratch: Path) -> None:
    """Writes as a checkpoint is written: file, fsync, rename of the folder, fsync of its parent, read back.

    Raises:
        OSError: if the file system refuses any of it.
    """
    temporary, final = scratch / "commit.tmp", scratch / "commit"
    temporary.mkdir()
    with (temporary / "data").open("wb") as file:
        file.write(b"lmcode")
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(final)
    durable.sync(scratch)
    if (final / "data").read_bytes() != b"lmcode":
        raise OSError(f"a file in {scratch} reads back other bytes than were written")


def locks_exclude(path: Path) -> bool:
    """Whether an exclusive lock keeps a second one out; False also where the file system knows no locks."""
    with path.open("w") as first, path.open("w") as second:
        return try_lock(first.fileno()) and not try_lock(second.fileno())


def try_lock(file: int) -> bool:
    """Takes the lock that a run's only writer holds, if nobody has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
