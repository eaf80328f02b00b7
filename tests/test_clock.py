"""The clock sums what happens under a name and hands each second out once."""

from __future__ import annotations

import time

from lmcode.train.clock import Clock


def test_stretches_add_up_and_are_taken_once() -> None:
    clock = Clock()
    for _ in range(2):
        with clock("sleep"):
            time.sleep(0.01)
    clock.add("other", 1.5)
    taken = clock.take()
    assert taken["sleep"] >= 0.02 and taken["other"] == 1.5
    assert clock.take() == {}


def test_a_stretch_that_raises_is_counted_too() -> None:
    clock = Clock()
    try:
        with clock("broken"):
            raise ValueError
    except ValueError:
        pass
    assert "broken" in clock.take()
