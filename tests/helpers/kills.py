"""Kills an action at one of the calls that change the file system, in this process: what would be left behind then?"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CHANGES = ("open", "mkdir", "link", "rename", "unlink", "rmdir", "write", "fsync")


class Killed(BaseException):
    """Passes every handler, as a kill does."""


def is_killed(action: Callable[[], Any], after: int, names: tuple[str, ...] = CHANGES) -> bool:
    """Performs an action, of which no more than `after` calls of these functions of `os` happen; whether there were more."""
    calls = itertools.count()

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            if next(calls) >= after:
                raise Killed
            return real(*args, **more)
        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(os, name, counted(getattr(os, name)))
        try:
            action()
        except Killed:
            return True
    return False


def kills(place: Path, action: Callable[[], Any], numbers: Iterator[int]) -> Iterator[tuple[int, bool]]:
    """Performs an action on `place` again and again, from the same state on, killed after so many calls; yields after each
    that number, and whether it was killed, until it was not."""
    start, killed = place.with_name("start"), True
    shutil.copytree(place, start, symlinks=True)
    while killed:
        shutil.rmtree(place)
        shutil.copytree(start, place, symlinks=True)
        after = next(numbers)
        killed = is_killed(action, after)
        yield after, killed


def growing(step: int = 1) -> Iterator[int]:
    """0, step, ..., farther and farther apart: by an eighth of what has gone by, besides."""
    calls = 0
    while True:
        yield calls
        calls += step + calls // 8
