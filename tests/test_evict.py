"""FIFO with a second chance: the vectorised choice against a clock that moves its hand one slot at a time."""

from __future__ import annotations

import numpy as np
import pytest

from lmcode.memory.evict import choose_slots


def choose_slots_slowly(hand: int, live: list[bool], chance: list[bool], n: int) -> tuple[list[int], int, set[int]]:
    """Victims in order, the new hand, and the slots that lost their chance."""
    C, live, taken, spent = len(live), list(live), [], set()
    for _ in range(n):
        ring = [(hand + offset) % C for offset in range(C)]
        free = [slot for slot in ring if not live[slot]]
        if free:
            slot = free[0]
            live[slot] = True
            taken.append(slot)
            if hand == slot:
                hand = (hand + 1) % C
            continue
        while True:
            slot, hand = hand, (hand + 1) % C
            if slot in taken:
                continue
            if chance[slot] and slot not in spent:
                spent.add(slot)
                continue
            taken.append(slot)
            break
    return taken, hand, spent


def random_ring(rng: np.random.Generator) -> tuple[int, np.ndarray, np.ndarray]:
    C = int(rng.integers(1, 12))
    live = rng.random(C) < rng.choice([0.0, 0.5, 0.9, 1.0])
    return int(rng.integers(C)), live, live & (rng.random(C) < rng.choice([0.0, 0.3, 1.0]))


def test_equals_the_slow_clock() -> None:
    rng = np.random.default_rng(0)
    for _ in range(3000):
        hand, live, chance = random_ring(rng)
        n = int(rng.integers(len(live) + 1))
        result = choose_slots(hand, live, chance, n)
        taken, wanted_hand, spent = choose_slots_slowly(hand, live.tolist(), chance.tolist(), n)
        assert result.slot_n.tolist() == taken
        assert result.hand == wanted_hand
        kept = [slot for slot in range(len(live)) if slot not in taken]
        assert [bool(result.spent_C[slot]) for slot in kept] == [slot in spent for slot in kept]


def test_properties() -> None:
    rng = np.random.default_rng(1)
    for _ in range(1000):
        hand, live, chance = random_ring(rng)
        n = int(rng.integers(len(live) + 1))
        result = choose_slots(hand, live, chance, n)
        slots = result.slot_n.tolist()
        assert len(slots) == n == len(set(slots))
        assert 0 <= result.hand < len(live)
        if live[slots].any():
            assert set(np.flatnonzero(~live)) <= set(slots)  # free slots first
        if chance[slots].any():
            assert set(np.flatnonzero(~chance)) <= set(slots)  # favoured entries last
        assert not result.spent_C[~chance].any()
        if n <= (~live).sum():
            assert not result.spent_C.any()


def test_without_chances_a_full_ring_is_first_in_first_out() -> None:
    live, hand, order = np.ones(7, bool), 0, []
    for n in (3, 2, 7, 4):
        result = choose_slots(hand, live, np.zeros(7, bool), n)
        order += result.slot_n.tolist()
        hand = result.hand
    assert order == [position % 7 for position in range(16)]


def test_a_chance_works_once() -> None:
    live, chance = np.ones(4, bool), np.array([True, False, False, False])
    first = choose_slots(0, live, chance, 1)
    assert first.slot_n.tolist() == [1]
    chance = chance & ~first.spent_C
    assert choose_slots(first.hand, live, chance, 3).slot_n.tolist() == [2, 3, 0]


def test_a_batch_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="must fit its virtual shard of 3 slots: got 4 entries"):
        choose_slots(0, np.ones(3, bool), np.zeros(3, bool), 4)
