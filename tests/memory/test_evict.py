"""Policies of eviction against plain ones that go slot by slot, on rings that live on and lose entries in between."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from lmcode.config import EVICTIONS, ConfigError, MemoryConfig, build
from lmcode.memory import LongTermMemory, lifecycle, ring
from lmcode.memory.entry import METADATA
from lmcode.memory.evict import Placement, policy_of
from lmcode.memory.ledger import Ledger
from lmcode.memory.placement import virtual_shard_of
from lmcode.memory.ring import Ring
from tests.helpers.slow_eviction import place_slowly


def columns_of(entries: list[dict | None]) -> dict[str, np.ndarray]:
    none = {name: kind(-1) if name == "id" else kind(0) for name, kind in METADATA.items()}
    return {name: np.array([(one or none)[name] for one in entries], kind) for name, kind in METADATA.items()}


class Rings:
    """Some virtual shards twice: as a ledger, and as lists of dicts."""

    def __init__(self, rng: np.random.Generator, eviction: str) -> None:
        self.rng, self.eviction, self.policy = rng, eviction, policy_of(eviction)
        self.entries: list[list[dict | None]] = [[None] * int(rng.integers(1, 40)) for _ in range(3)]
        self.ledger = Ledger((0, 1, 2), [len(one) for one in self.entries], favoured_from=1.5)
        self.next_id = self.step = 0

    def newcomers(self) -> list[dict]:
        n = int(self.rng.integers(0, self.rng.choice([2, 10, 60])))
        batch = [{**dict.fromkeys(METADATA, 0), "id": self.next_id + at, "namespace": int(self.rng.integers(3)),
                  "document": -1, "importance": float(self.rng.integers(1, 9)) / 4, "step": self.step, "last_hit": self.step,
                  "count": 1, "chance": bool(self.rng.random() < 0.3)} for at in range(n)]
        self.next_id += n
        return batch

    def write(self, shard: int) -> None:
        batch, entries, place = self.newcomers(), self.entries[shard], self.ledger.range_of[shard]
        columns = columns_of(batch)
        placement = self.policy(self.ledger.ring(shard), columns)
        taken, hand, spent, stored = place_slowly(self.eviction, self.ledger.hand[shard], entries, batch)
        assert (placement.slot_E.tolist(), placement.hand) == (taken, hand)
        assert (range(len(batch)) if placement.stored_E is None else placement.stored_E.tolist()) == stored
        assert {*placement.spent.tolist()} - {*taken} == spent - {*taken}
        for slot in spent:
            entries[slot]["chance"] = False
        for slot, at in zip(taken, stored, strict=True):
            entries[slot] = batch[at]
        self.ledger.hand[shard] = hand
        self.ledger.update(placement.spent + place.start, {"chance": False})
        self.ledger.put(placement.slot_E + place.start, {name: column[stored] for name, column in columns.items()})

    def some(self, shard: int, share: float) -> tuple[np.ndarray, list[dict]]:
        """Slots of the ledger, and the entries in them."""
        slots = [slot for slot, one in enumerate(self.entries[shard]) if one is not None and self.rng.random() < share]
        return np.array(slots, np.int64) + self.ledger.range_of[shard].start, [self.entries[shard][slot] for slot in slots]

    def touch(self, shard: int) -> None:
        slots, entries = self.some(shard, 0.3)
        for one in entries:
            one.update(last_hit=self.step, importance=one["importance"] + float(self.rng.integers(-1, 3)) / 4)
        if entries:
            changed = columns_of(entries)
            self.ledger.update(slots, {name: changed[name] for name in ("last_hit", "importance")})

    def delete(self, shard: int) -> None:
        slots, _ = self.some(shard, self.rng.choice([0.0, 0.1, 1.0]))
        self.ledger.clear(slots)
        for slot in slots - self.ledger.range_of[shard].start:
            self.entries[shard][slot] = None

    def check(self) -> None:
        whole = [one for entries in self.entries for one in entries]
        for name, column in columns_of(whole).items():
            there = self.ledger.columns["id"] >= 0
            assert np.array_equal(column[there], self.ledger.columns[name][there]), name
        live = [one for one in whole if one is not None]
        favoured = [one for one in live if one["importance"] >= 1.5]
        assert self.ledger.tally == (len(live), 0, sum(one["chance"] for one in live),
                                     sum(not one["chance"] for one in favoured))
        for names in ([0], [1, 2], [7]):
            wanted = sorted((one["namespace"], one["id"], slot) for slot, one in enumerate(whole)
                            if one is not None and one["namespace"] in names)
            assert self.ledger.slots_of_namespaces(np.array(names)).tolist() == [slot for *_, slot in wanted]
        ids = self.rng.integers(0, self.next_id + 2, 20)
        where = {one["id"]: slot for slot, one in enumerate(whole) if one is not None}
        assert self.ledger.slots_of_ids(ids).tolist() == [where.get(one, -1) for one in ids.tolist()]


@pytest.mark.parametrize("eviction", EVICTIONS)
def test_a_policy_equals_the_slow_one_through_many_changes(eviction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "BLOCK", 4)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        rings = Rings(rng, eviction)
        for rings.step in range(120):
            action: Callable[[int], Any] = rng.choice([rings.write, rings.write, rings.touch, rings.delete])
            action(int(rng.integers(3)))
            if rng.random() < 0.05:
                rings.ledger.forget()  # as after a load: nothing but the columns counts
            if rng.random() < 0.2:
                rings.check()
        rings.check()


def ring_of(live: list[bool], *, hand: int = 0, chance: list[bool] | None = None) -> Ring:
    columns = columns_of([{**dict.fromkeys(METADATA, 0), "id": slot, "chance": chance is not None and chance[slot]} if one
                          else None for slot, one in enumerate(live)])
    return Ring.of(hand, columns)


def newcomers(n: int) -> dict[str, np.ndarray]:
    return columns_of([{**dict.fromkeys(METADATA, 0), "id": 100 + at, "importance": 1.0} for at in range(n)])


def test_without_chances_a_full_ring_is_first_in_first_out() -> None:
    for policy in (policy_of("clock"), policy_of("fifo")):
        hand, order = 0, []
        for n in (3, 2, 7, 4):
            result = policy(ring_of([True] * 7, hand=hand), newcomers(n))
            order += result.slot_E.tolist()
            hand = result.hand
        assert order == [position % 7 for position in range(16)]


def test_a_chance_works_once_and_for_the_clock_alone() -> None:
    chance = [True, False, False, False]
    first = policy_of("clock")(ring_of([True] * 4, chance=chance), newcomers(1))
    assert (first.slot_E.tolist(), first.spent.tolist()) == ([1], [0])
    assert policy_of("clock")(ring_of([True] * 4, hand=first.hand), newcomers(3)).slot_E.tolist() == [2, 3, 0]
    plain = policy_of("fifo")(ring_of([True] * 4, chance=chance), newcomers(1))
    assert (plain.slot_E.tolist(), plain.spent.tolist()) == ([0], [])


def test_random_spreads_over_the_ring_and_knows_nothing_but_ids() -> None:
    counts = np.zeros(16, int)
    for first in range(0, 4000, 8):
        batch = {**newcomers(8), "id": np.arange(first, first + 8)}
        placed = policy_of("random")(ring_of([True] * 16, hand=first % 16), batch)
        assert placed.slot_E.tolist() == policy_of("random")(ring_of([True] * 16), batch).slot_E.tolist()
        counts[placed.slot_E] += 1
    assert counts.sum() == 4000 and counts.min() > 150


# --- other policies ----------------------------------------------------------------------------------------------


def keep_the_loudest(ring: Ring, newcomers: Mapping[str, np.ndarray]) -> Placement:
    """A full ring gives up its least important entries, only for newcomers that are more important; the rest is refused."""
    held_M = np.where(ring.live_M, ring.columns["importance"], 0.0)
    order_N = np.argsort(-np.concatenate([held_M, newcomers["importance"]]), kind="stable")
    best = order_N[:len(held_M)]
    stored = np.sort(best[best >= len(held_M)] - len(held_M))
    return Placement(np.setdiff1d(np.arange(len(held_M)), best)[:len(stored)], ring.hand, stored_E=stored)


@pytest.mark.parametrize("eviction", ["importance", "loudest"])
def test_a_policy_of_a_few_lines_may_refuse_newcomers(eviction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EVICTIONS, "loudest", f"{__name__}:keep_the_loudest")
    bank = LongTermMemory(heads=1, head_dim=4, slots=12, top_k=4, config=MemoryConfig(eviction=eviction, virtual_shards=3))
    importance = torch.rand(60, generator=torch.Generator().manual_seed(0)) + 0.1
    for part in torch.arange(60).split(7):
        ids = bank.write(torch.randn(1, len(part), 4), torch.randn(1, len(part), 4), part % 2, importance[part])
        assert torch.equal(ids, part), "an id is given before the policy is asked"
    home = virtual_shard_of(np.arange(60), 3)
    for shard, place in bank.shard.range_of.items():
        best = np.flatnonzero(home == shard)[np.argsort(-importance.numpy()[home == shard], kind="stable")[:4]]
        assert sorted(bank.shard.columns["id"][place]) == sorted(best)
    assert (bank.stats()["live"], bank.stats()["evicted"], bank.stats()["rejected"]) == (12, 48, 0)
    assert lifecycle.fork(bank, empty=False).content_hash() == bank.content_hash()


# --- names -------------------------------------------------------------------------------------------------------


def test_an_unknown_name_is_refused_with_the_near_one() -> None:
    with pytest.raises(ConfigError, match=r"eviction: must be one of 'clock', .*: got 'cloak'. Did you mean 'clock'?"):
        build(MemoryConfig, {"eviction": "cloak"})


def test_fifo_in_the_settings_of_an_earlier_version_is_the_clock() -> None:
    saved = MemoryConfig(eviction="fifo").model_dump()
    assert build(MemoryConfig, saved).eviction == "fifo" and MemoryConfig().eviction == "clock"
    del saved["value_store"]  # which every set of settings since then has
    assert build(MemoryConfig, saved).eviction == "clock"
    assert build(MemoryConfig, {"eviction": "fifo"}).eviction == "fifo"
