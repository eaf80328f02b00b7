"""Asking a running job to save and end: SIGTERM, SIGUSR2, or a file SAVE_NOW in the run folder.

One process notices a request, and all ranks agree on it: the training step carries it in the all_reduce of its loss, and
other phases call `agreed` before they continue. This module only records requests; the loop saves a checkpoint and exits
with `REQUEUE`. It imports no torch, so that a signal is noticed from the first second of a process.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

REQUEUE = 75  # exit code: saved, start me again (EX_TEMPFAIL of sysexits.h)
SIGNALS = (signal.SIGTERM, signal.SIGUSR2)  # not USR1, which NCCL and several MPIs use
FILE = "SAVE_NOW"
LOOK_EVERY_S = 1.0  # a look at the file is a round trip on a network file system

_listening: list[Request] = []  # the request that the process's signal handlers fill in, if any


class Preempted(Exception):
    """Raised on every rank alike, at a place where the job can be saved and ended."""


class Gatherer(Protocol):
    """What `agreed` needs of a `dist.Group`."""

    def all_gather_object(self, value: Any) -> list[Any]: ...


class Request:
    """Whether this process was asked to save and end. It never takes back what it once said.

    reason: what asked, "SIGTERM", "SIGUSR2" or the path of the file; None so far.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._file: Path | None = None
        self._looked = 0.0

    def look_for(self, file: Path) -> None:
        """From now on the existence of `file` is a request, too; one left over from before is removed. For one rank."""
        file.unlink(missing_ok=True)
        self._file = file

    def asked(self) -> bool:
        """Whether somebody asked; looks at the file at most once a second."""
        now = time.monotonic()
        if self.reason is None and self._file is not None and now - self._looked >= LOOK_EVERY_S:
            self._looked = now
            if self._file.exists():
                self.reason = str(self._file)
        return self.reason is not None

    def raise_if_asked(self, *_progress: object) -> None:
        """Raises `Preempted` in this process alone, for work that one rank does while the others wait for its result."""
        if self.asked():
            raise Preempted

    def honoured(self) -> None:
        """Removes the file, after what it asked for was done."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)


def agreed(request: Request, group: Gatherer) -> None:
    """Returns if no rank was asked. A collective.

    Raises:
        Preempted: on every rank, if any was asked; `request` has a reason then.
    """
    reasons = [reason for reason in group.all_gather_object(request.reason if request.asked() else None) if reason]
    if reasons:
        request.reason = request.reason or reasons[0]
        raise Preempted


@contextmanager
def noticing() -> Iterator[Request]:
    """The request that signals to this process fill in during the block; an inner block shares that of the outer one.

    Outside the main thread, where Python allows no signal handlers, nothing is noticed.
    """
    if _listening:
        yield _listening[0]
        return
    request = Request()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def remember(number: int, _frame: object) -> None:
        request.reason = request.reason or signal.Signals(number).name

    before = {number: signal.signal(number, remember) for number in SIGNALS}
    _listening.append(request)
    try:
        yield request
    finally:
        _listening.clear()
        for number, handler in before.items():
            signal.signal(number, handler)
