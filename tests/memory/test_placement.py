"""Placement: ids spread evenly, the ranks partition the virtual shards, capacities add up."""

from __future__ import annotations

import numpy as np
import pytest

from lmcode.memory.placement import capacity_of, holder_of, rank_of, shards_of, splitmix64, virtual_shard_of

MASK = 2**64 - 1


def splitmix64_slowly(value: int) -> int:
    mixed = (value + 0x9E3779B97F4A7C15) & MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & MASK
    return mixed ^ (mixed >> 31)


def test_splitmix64_is_the_published_function() -> None:
    assert int(splitmix64(np.array([0]))[0]) == 0xE220A8397B1DCDAF  # first output of the reference code with seed 0


def test_hash_is_safe_over_the_whole_range_of_int64() -> None:
    ids = np.concatenate([np.array([0, 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1]),
                          np.random.default_rng(0).integers(0, 2**63 - 1, 200)])
    wanted = [splitmix64_slowly(int(one)) for one in ids]
    assert splitmix64(ids).tolist() == wanted
    for S in (1, 3, 16, 1000):
        assert virtual_shard_of(ids, S).tolist() == [one % S for one in wanted]


def test_consecutive_ids_fill_virtual_shards_evenly() -> None:
    counts = np.bincount(virtual_shard_of(np.arange(160_000), 16), minlength=16)
    assert np.abs(counts - 10_000).max() < 5 * np.sqrt(10_000)


@pytest.mark.parametrize("S", [1, 2, 5, 16, 17])
def test_ranks_partition_the_virtual_shards(S: int) -> None:
    for R in range(1, S + 1):
        parts = [shards_of(rank, R, S) for rank in range(R)]
        assert sorted(sum(parts, ())) == list(range(S))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        for rank, part in enumerate(parts):
            assert (rank_of(np.array(part), R) == rank).all()
            assert list(part) == sorted(part)


def test_holder_is_the_rank_of_the_virtual_shard() -> None:
    ids = np.arange(1000)
    holder = holder_of(ids, 7, 3)
    for rank in range(3):
        assert set(virtual_shard_of(ids[holder == rank], 7).tolist()) <= set(shards_of(rank, 3, 7))


@pytest.mark.parametrize(("slots", "S"), [(16, 16), (17, 16), (10_000, 16), (31, 16), (5, 1)])
def test_capacities_add_up_and_differ_by_at_most_one(slots: int, S: int) -> None:
    capacities = [capacity_of(shard, slots, S) for shard in range(S)]
    assert sum(capacities) == slots
    assert max(capacities) - min(capacities) <= 1


def test_refusals() -> None:
    with pytest.raises(ValueError, match="at least the number of ranks: 3 < 4"):
        shards_of(0, 4, 3)
    with pytest.raises(ValueError, match=r"rank must lie in 0\.\.1: got 2"):
        shards_of(2, 2, 8)
    with pytest.raises(ValueError, match="at least the number of virtual shards: 7 < 8"):
        capacity_of(0, 7, 8)
    with pytest.raises(ValueError, match=r"lies in 0\.\.7: got 8"):
        capacity_of(8, 80, 8)
