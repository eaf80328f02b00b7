"""The clock sums what happens under a name and hands each second out once."""

from __future__ import annotations

import itertools

import pytest

from lmcode.jobs import clock as module
from lmcode.jobs.clock import Clock


def test_stretches_add_up_and_are_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = itertools.count()
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(seconds)))
    clock = Clock()
    for _ in range(2):
        with clock("stretch"):
            pass
    clock.add("other", 1.5)
    assert clock.take() == {"stretch": 2.0, "other": 1.5}
    assert clock.take() == {}


def test_a_stretch_that_raises_is_counted_too() -> None:
    clock = Clock()
    try:
        with clock("broken"):
            raise ValueError
    except ValueError:
        pass
    assert "broken" in clock.take()
