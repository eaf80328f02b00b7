"""One commit in progress: the files of many ranks, written by threads while training continues.

`advance` moves it from one stage to the next, on all ranks alike:
  1. Making a `Commit` copies everything to host memory. Training waits for this stage only.
  2. A thread of each rank writes its files, forces them to disk and hashes them.
  3. When all ranks are done, a thread of rank 0 publishes the commit and removes old ones. Only then does the commit exist.
A kill in between leaves the older commits and a temporary folder, which the next commit removes.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lmcode.dist import Group
from lmcode.files import durable
from lmcode.files.durable import CommitFacts, Parts, Seals

log = logging.getLogger("lmcode")


class SaveFailed(RuntimeError):
    """A checkpoint that could not be written; raised on every rank alike."""


class Commit:
    """A commit in progress. Making one is a collective; when it returns, training may continue.

    Args:
        final: the folder that the commit will be.
        needed: about how many bytes it takes; checked first.
        folders: to make in it.
        snapshot: gives this rank's files, each with a copy of what goes into it; may be a collective.
        facts: what the manifest says.
        keep: older commits beside `final` to keep, it included.

    Raises:
        SaveFailed: if there is no room, or rank 0's file system refuses.
    """

    def __init__(self, group: Group, final: Path, *, needed: int, folders: Iterable[str],
                 snapshot: Callable[[], Parts], facts: CommitFacts, keep: int) -> None:
        self.final, self.facts, self._group, self._keep = final, facts, group, keep
        self._temporary = durable.temporary_of(final)
        with _failing_alike(group):
            if group.rank == 0:
                self._prepare(needed, folders)
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._writing: Future[Seals] = self._thread.submit(self._write, snapshot())
        self._publishing: Future[None] | None = None

    def _prepare(self, needed: int, folders: Iterable[str]) -> None:
        durable.make_folder(self.final.parent)
        durable.check_space(self.final.parent, needed)
        temporary = durable.begin(self.final)
        for name in folders:
            (temporary / name).mkdir(parents=True)

    def advance(self, *, wait: bool) -> bool:
        """Goes on to the next stage if all ranks are through with this one; True when all is done. A collective.

        Args:
            wait: until it is.

        Raises:
            SaveFailed: what any rank's file system has refused.
        """
        if self._publishing is None:
            if not (wait or self._all(self._writing)):
                return False
            with _failing_alike(self._group):
                seals = self._writing.result()
            everyones = self._group.all_gather_object(seals)
            self._publishing = self._thread.submit(self._publish, {k: v for part in everyones for k, v in part.items()})
        if not (wait or self._all(self._publishing)):
            return False
        with _failing_alike(self._group):
            self._publishing.result()
        self._thread.shutdown()
        return True

    def sweep(self) -> None:
        """Removes what a failed commit has left."""
        self._thread.shutdown()
        if self._group.rank == 0:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _all(self, task: Future[Any]) -> bool:
        return all(self._group.all_gather_object(task.done()))

    def _write(self, parts: Parts) -> Seals:
        for name, write in parts.items():
            write(self._temporary / name)
        return durable.seal(self._temporary, [name for name in parts if (self._temporary / name).is_file()])

    def _publish(self, seals: Seals) -> None:
        if self._group.rank == 0:
            durable.publish(self._temporary, self.final, self.facts, seals)
            drop_old(self.final.parent, keep=self._keep)


@contextmanager
def _failing_alike(group: Group) -> Iterator[None]:
    """Turns what any rank's file system refuses inside the block into a `SaveFailed` on all. A collective."""
    problem = None
    try:
        yield
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:  # torch and safetensors wrap OSErrors
        problem = f"rank {group.rank}: {' '.join(str(error).split())}"
    problems = [one for one in group.all_gather_object(problem) if one]
    if problems:
        raise SaveFailed("; ".join(problems))


def drop_old(folder: Path, *, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints, unless none of those verifies; what holds other files stays."""
    found = durable.steps(folder)
    old, kept = found[:-keep], found[-keep:]
    try:
        if old and durable.newest_verified(folder)[0] not in kept:
            log.warning("kept %d old checkpoint(s): none of the newer ones verifies", len(old))
            return
        for path in old:
            _drop(path)
    except OSError as error:
        log.warning("an old checkpoint was not removed: %s", error)


def _drop(path: Path) -> None:
    try:
        durable.discard(path)
    except durable.DamagedCheckpoint as error:
        log.warning("kept '%s', which is not (only) a checkpoint of this program: %s", path, error)
