"""FIFO with a second chance: the vectorised choice against a clock that moves its hand one slot at a time."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch

from lmcode.config import EVICTIONS, ConfigError, MemoryConfig, build
from lmcode.memory import LongTermMemory
from lmcode.memory.evict import Placement, Ring, choose_slots, policy_of
from lmcode.memory.placement import virtual_shard_of
from tests.helpers.slow_clock import choose_slots_slowly


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
        assert result.slot_m.tolist() == taken
        assert result.hand == wanted_hand
        kept = [slot for slot in range(len(live)) if slot not in taken]
        assert [bool(result.spent_C[slot]) for slot in kept] == [slot in spent for slot in kept]


def test_properties() -> None:
    rng = np.random.default_rng(1)
    for _ in range(1000):
        hand, live, chance = random_ring(rng)
        n = int(rng.integers(len(live) + 1))
        result = choose_slots(hand, live, chance, n)
        slots = result.slot_m.tolist()
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
        order += result.slot_m.tolist()
        hand = result.hand
    assert order == [position % 7 for position in range(16)]


def test_a_chance_works_once() -> None:
    live, chance = np.ones(4, bool), np.array([True, False, False, False])
    first = choose_slots(0, live, chance, 1)
    assert first.slot_m.tolist() == [1]
    chance = chance & ~first.spent_C
    assert choose_slots(first.hand, live, chance, 3).slot_m.tolist() == [2, 3, 0]


def test_a_batch_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="must fit its virtual shard of 3 slots: got 4 entries"):
        choose_slots(0, np.ones(3, bool), np.zeros(3, bool), 4)


# --- other policies ----------------------------------------------------------------------------------------------


def keep_the_important(ring: Ring, newcomers: Mapping[str, np.ndarray]) -> Placement:
    """A full ring gives up its least important entries, only for newcomers that are more important; the rest is refused."""
    held_C = np.where(ring.live_C, ring.columns["importance"], 0.0)
    order_N = np.argsort(-np.concatenate([held_C, newcomers["importance"]]), kind="stable")
    best = order_N[:len(held_C)]
    stored = np.sort(best[best >= len(held_C)] - len(held_C))
    slots = np.setdiff1d(np.arange(len(held_C)), best)[:len(stored)]
    return Placement(slots, ring.hand, np.zeros(len(held_C), bool), stored)


@pytest.fixture
def important(monkeypatch: pytest.MonkeyPatch) -> MemoryConfig:
    monkeypatch.setitem(EVICTIONS, "important", f"{__name__}:keep_the_important")
    return MemoryConfig(eviction="important", virtual_shards=3)


def test_a_policy_of_a_few_lines_may_refuse_newcomers(important: MemoryConfig) -> None:
    bank = LongTermMemory(heads=1, head_dim=4, slots=12, top_k=4, config=important)
    importance = torch.rand(60, generator=torch.Generator().manual_seed(0)) + 0.1
    for part in torch.arange(60).split(7):
        ids = bank.write(torch.randn(1, len(part), 4), torch.randn(1, len(part), 4), part % 2, importance[part])
        assert torch.equal(ids, part), "an id is given before the policy is asked"
    home = virtual_shard_of(np.arange(60), 3)
    for shard, place in bank.shard.range_of.items():
        best = np.flatnonzero(home == shard)[np.argsort(-importance.numpy()[home == shard], kind="stable")[:4]]
        assert sorted(bank.shard.columns["id"][place]) == sorted(best)
    assert (bank.stats()["live"], bank.stats()["evicted"], bank.stats()["rejected"]) == (12, 48, 0)
    assert bank.fork(empty=False).content_hash() == bank.content_hash()


def test_clock_is_another_name_of_fifo() -> None:
    assert policy_of("clock") is policy_of("fifo")
    with pytest.raises(ConfigError, match=r"eviction: must be one of 'fifo', 'clock': got 'cloak'. Did you mean 'clock'?"):
        build(MemoryConfig, {"eviction": "cloak"})
