"""Other numbers of virtual shards: each entry stays what it is, each search finds the same, and nothing is ever dropped."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcode.config import MemoryConfig
from lmcode.memory import LongTermMemory, lifecycle
from lmcode.memory.placement import capacity_of, virtual_shard_of
from lmcode.memory.reshard import check_room, fewest_slots, live_by_shard, reshard
from tests.helpers.banks import plain, states_of, unit

H, D, K = 2, 4, 5
State = dict[str, torch.Tensor]


def make_bank(virtual_shards: int, slots: int, dtype: str = "fp32") -> LongTermMemory:
    config = MemoryConfig(virtual_shards=virtual_shards, importance_weight=1.0, importance_growth=0.5, tier="exact",
                          second_chance_importance=1.2, dtype=dtype)
    return LongTermMemory(heads=H, head_dim=D, slots=slots, top_k=K, config=config)


def used_bank(seed: int, virtual_shards: int, slots: int, dtype: str = "fp32") -> LongTermMemory:
    """A bank with a life behind it: hits, evictions, second chances, rejected and deleted entries."""
    bank, chance = make_bank(virtual_shards, slots, dtype), np.random.default_rng(seed)
    for step in range(int(chance.integers(0, 5))):
        count = int(chance.integers(1, slots))
        key = unit(H, count, D, seed=seed + step)
        key[0, :1] = math.inf if step % 2 else 1.0
        bank.write(key, unit(H, count, D, seed=step) * 3, torch.from_numpy(chance.integers(0, 3, count)), step=step,
                   document_E=torch.from_numpy(chance.integers(-1, 2**62, count)))
        bank.commit([], [bank.search(unit(H, 6, D, seed=step + 9) * 4, torch.arange(6) % 3)], step=step)
        bank.delete(ids=chance.integers(0, bank.next_id, count // 4).tolist())
    return bank


def loaded(states: dict[int, State], like: LongTermMemory) -> LongTermMemory:
    """The bank of these states, which it judges on the way in."""
    bank = make_bank(len(states), int(states[0]["slots"]), like.config.dtype)
    lifecycle.restore(bank, states)
    return bank


def hits_of(bank: LongTermMemory) -> list[Any]:
    query, names = unit(H, 12, D, seed=77) * 4, torch.arange(12) % 4
    found = [bank.search(query, names, scope=scope) for scope in ("document", "global", [0, 2])]
    return [(hits.id_HNK.tolist(), hits.score_HNK.tolist()) for hits in found]


LAYOUTS = st.tuples(st.integers(1, 9), st.integers(9, 40))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), first=LAYOUTS, then=st.lists(LAYOUTS, min_size=1, max_size=3),
       dtype=st.sampled_from(["fp32", "bf16"]))
def test_every_entry_stays_and_every_search_finds_the_same(seed: int, first: tuple[int, int], then: list[tuple[int, int]],
                                                           dtype: str) -> None:
    bank = used_bank(seed, *first, dtype)
    entries, hits, stats, states = plain(states_of(bank)), hits_of(bank), bank.stats(), states_of(bank)
    for virtual_shards, more in then:
        live_S = live_by_shard(np.array([*entries], np.int64), virtual_shards)
        slots = max(fewest_slots(live_S), K) + (more - 9)  # from a bank that is just large enough on
        moved = reshard(states, virtual_shards=virtual_shards, slots=slots)
        assert [*moved] == list(range(virtual_shards)) and plain(moved.values()) == entries
        other = loaded(moved, bank)
        assert hits_of(other) == hits
        now = other.stats()
        assert all(now[name] == stats[name] for name in ("live", "evicted", "merged", "rejected", "clipped", "next_id"))
        for shard, state in moved.items():
            ring = [id for id in state["id"].tolist() if id >= 0]
            assert ring == sorted(ring) == state["id"][:len(ring)].tolist()
            assert all(virtual_shard_of(np.array(ring, np.int64), virtual_shards) == shard)
            assert int(state["hand"]) == len(ring) % len(state["id"])
            assert not state["key"][:, len(ring):].any() and not state["value"][:, len(ring):].any()
        states = list(moved.values())[::-1]
    if bank.slots >= fewest_slots(live_by_shard(np.array([*entries], np.int64), first[0])):
        back = loaded(reshard(states, virtual_shards=first[0], slots=first[1]), bank)
        assert hits_of(back) == hits
        straight = loaded(reshard(states_of(bank), virtual_shards=first[0], slots=first[1]), bank)
        assert back.content_hash() == straight.content_hash(), "the way there does not matter"


@settings(max_examples=100, deadline=None)
@given(live=st.lists(st.integers(0, 12), min_size=1, max_size=12))
def test_the_fewest_slots_are_the_fewest(live: list[int]) -> None:
    live_S = np.array(live)

    def fits(slots: int) -> bool:
        return all(live_S[shard] <= capacity_of(shard, slots, len(live)) for shard in range(len(live)))

    fewest = fewest_slots(live_S)
    assert fewest == next(slots for slots in range(len(live), 200) if fits(slots))
    check_room(live_S, fewest)
    if fewest > len(live):
        with pytest.raises(ValueError, match=f"; {fewest} slots are the fewest") as caught:
            check_room(live_S, fewest - 1)
        shard = int(str(caught.value).split()[2])
        assert live_S[shard] > capacity_of(shard, fewest - 1, len(live))


def test_eviction_goes_on_first_in_first_out() -> None:
    bank = make_bank(4, 40)
    bank.write(unit(H, 40, D, seed=0), unit(H, 40, D, seed=1), torch.zeros(40, dtype=torch.int64))
    entries = plain(states_of(bank))
    slots = fewest_slots(live_by_shard(np.array([*entries]), 3))
    other = loaded(reshard(states_of(bank), virtual_shards=3, slots=slots), bank)
    for first in range(0, 30, 5):  # small writes, so that the hands go round
        other.write(unit(H, 5, D, seed=2), unit(H, 5, D, seed=3), torch.zeros(5, dtype=torch.int64))
        everyone = np.arange(40 + first + 5)
        for shard, state in enumerate(states_of(other)):
            mine = everyone[virtual_shard_of(everyone, 3) == shard]
            ids = sorted(id for id in state["id"].tolist() if id >= 0)
            written = [id for id in mine if id in entries or id >= 40]
            assert ids == written[-len(state["id"]):], "the newest stay"


def test_each_rank_makes_its_own_part() -> None:
    bank = used_bank(5, 6, 60)
    whole = reshard(states_of(bank), virtual_shards=4, slots=80)
    for mine in ((0, 2), (1, 3), (3,), ()):
        part = reshard(states_of(bank), virtual_shards=4, slots=80, shards=mine)
        assert tuple(part) == mine
        for shard, state in part.items():
            assert all(torch.equal(tensor, whole[shard][name]) for name, tensor in state.items())
            assert {*state} == {*bank.state(0)}


def test_no_entry_is_dropped_on_any_rank() -> None:
    bank = make_bank(4, 40)
    bank.write(unit(H, 40, D, seed=0), unit(H, 40, D, seed=1), torch.zeros(40, dtype=torch.int64))
    for mine in (None, (0,), ()):
        with pytest.raises(ValueError, match=r"virtual shard \d of 3 would hold \d+ live entries in \d+ slots; \d+ slots"):
            reshard(states_of(bank), virtual_shards=3, slots=int(bank.stats()["live"]) - 1, shards=mine)
    with pytest.raises(ValueError, match="slots must be at least the number of virtual shards: 5 < 6"):
        reshard(states_of(make_bank(4, 40)), virtual_shards=6, slots=5)


def test_what_is_not_one_bank_is_refused() -> None:
    bank, other = used_bank(5, 6, 60), used_bank(11, 6, 60)
    assert bank.next_id != other.next_id
    for states in (states_of(bank)[1:], [*states_of(bank), bank.state(0)], [*states_of(bank)[:5], other.state(5)]):
        with pytest.raises(ValueError, match="must be all virtual shards of one bank at one moment"):
            reshard(states, virtual_shards=3, slots=200)
