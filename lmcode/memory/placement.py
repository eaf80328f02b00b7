"""Where an entry lives: pure functions from ids to virtual shards, virtual shards to ranks, slots to capacities.

An id chooses its virtual shard once and for all; only the map from virtual shards to ranks depends on the number of
ranks. Eviction is per virtual shard, so nothing that a bank computes depends on how many ranks hold it.
Letters: E ids.
"""

from __future__ import annotations

import numpy as np


def splitmix64(id_E: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea, Flood 2014): int64 or uint64 in, uint64 out, wrapping."""
    mixed_E: np.ndarray = id_E.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed_E = (mixed_E ^ (mixed_E >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed_E = (mixed_E ^ (mixed_E >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed_E ^= mixed_E >> np.uint64(31)
    return mixed_E


def virtual_shard_of(id_E: np.ndarray, virtual_shards: int) -> np.ndarray:
    """The virtual shard of each id, int64 in [0, virtual_shards)."""
    shard_E: np.ndarray = (splitmix64(np.asarray(id_E)) % np.uint64(virtual_shards)).astype(np.int64)
    return shard_E


def rank_of(shard_E: np.ndarray, ranks: int) -> np.ndarray:
    """The rank that holds each virtual shard, int64 in [0, ranks)."""
    return np.asarray(shard_E) % ranks


def holder_of(id_E: np.ndarray, virtual_shards: int, ranks: int) -> np.ndarray:
    """The rank that holds each id, int64 in [0, ranks)."""
    return rank_of(virtual_shard_of(id_E, virtual_shards), ranks)


def shards_of(rank: int, ranks: int, virtual_shards: int) -> tuple[int, ...]:
    """The virtual shards that `rank` holds, ascending; ranks differ by at most one.

    Raises:
        ValueError: if there are more ranks than virtual shards, or no such rank.
    """
    if not 0 <= rank < ranks:
        raise ValueError(f"rank must lie in 0..{ranks - 1}: got {rank}")
    if ranks > virtual_shards:
        raise ValueError(f"virtual shards must be at least the number of ranks: {virtual_shards} < {ranks}")
    return tuple(range(rank, virtual_shards, ranks))


def capacity_of(shard: int, slots: int, virtual_shards: int) -> int:
    """Slots of one virtual shard: they add up to `slots` and differ by at most one.

    Raises:
        ValueError: if a virtual shard would have no slot, or there is no such virtual shard.
    """
    if slots < virtual_shards:
        raise ValueError(f"slots must be at least the number of virtual shards: {slots} < {virtual_shards}")
    if not 0 <= shard < virtual_shards:
        raise ValueError(f"a virtual shard lies in 0..{virtual_shards - 1}: got {shard}")
    return slots // virtual_shards + (shard < slots % virtual_shards)
