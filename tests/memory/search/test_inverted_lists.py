"""Inverted lists against a plain array, through random changes; and that a change costs what it changes."""

from __future__ import annotations

import numpy as np
import pytest

from lmcode.memory.search.inverted_lists import InvertedLists


@pytest.mark.parametrize(("lists", "slots"), [(1, 5), (7, 200), (64, 3000)])
def test_members_follow_every_change(lists: int, slots: int) -> None:
    chance, made, wanted_M = np.random.default_rng(lists), InvertedLists(lists, slots), np.full(slots, -1)
    for round_ in range(150):
        most = slots if round_ % 5 == 0 else min(slots, 9)
        slot_E = chance.choice(slots, chance.integers(0, most + 1), replace=False)
        list_E = chance.integers(-1, lists if round_ % 7 else 1, len(slot_E))  # now and then all into one list
        made.move(slot_E, list_E)
        wanted_M[slot_E] = list_E
        assert np.array_equal(made.list_M, wanted_M)
        for number in range(lists):
            assert sorted(made.members(number)) == np.flatnonzero(wanted_M == number).tolist()
        assert np.array_equal(made.length_X, np.bincount(wanted_M[wanted_M >= 0], minlength=lists))


def test_the_pool_stays_in_proportion() -> None:
    chance, made = np.random.default_rng(0), InvertedLists(16, 2000)
    for _ in range(300):
        made.move(chance.choice(2000, 500, replace=False), chance.integers(-1, 16, 500))
    assert len(made._pool) < 4 * 2000


def test_members_of_several_lists_side_by_side() -> None:
    made = InvertedLists(5, 40)
    made.move(np.arange(40), np.arange(40) % 4)  # list 4 is empty
    rows = made.members_of(np.array([[0, 3], [4, 1], [4, 4]]).reshape(3, 2)[:2])
    assert rows.shape == (2, 20) and set(rows[0]) == {slot for slot in range(40) if slot % 4 in (0, 3)}
    assert set(rows[1][:10]) == {slot for slot in range(40) if slot % 4 == 1} and (rows[1][10:] == -1).all()
    assert made.members_of(np.array([[4]])).shape == (1, 0)
