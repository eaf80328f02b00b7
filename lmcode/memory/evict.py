"""Which newcomers to a virtual shard are stored, and in which slots: policies, each a pure function of one ring.

`memory.eviction` names the policy (`config.EVICTIONS`). Newcomers have their ids when a policy sees them, for an id decides
the virtual shard. So a newcomer that is refused has had an id, as one that is overwritten at once, and is counted with
those, as evicted. Of a batch larger than the ring, every policy but `importance` stores the last ones; and all fill free
slots first, in ring order from the hand.

    fifo        evicts the next entries in ring order
    clock       the same, but passes an important entry over once (CLOCK, Corbato 1968, for a batch)
    lru         the entries whose last hit (or writing, without a hit) is longest ago
    oldest      the entries with the smallest `step`, that of their writing, which a merge may renew
    importance  the least important entries; a newcomer that is even less important is refused
    random      the entry in the slot that a hash of the newcomer's id names
Of equals the one with the smaller id is evicted. What these cost per batch of n: fifo and random O(n); clock O(n) and what
it passes over, which costs each entry its chance; the others as `Ring.lowest` does.
Letters: N newcomers; E those of them that are stored; M slots of the virtual shard; X slots or entries that are looked at.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from lmcode.config import EVICTIONS
from lmcode.memory.placement import splitmix64
from lmcode.memory.ring import Ring, key_of

SEED = np.int64(0x5EED)  # of `random`; without it a hash would know the virtual shard
_NOBODY = np.zeros(0, np.int64)


class Placement(NamedTuple):
    """What a batch of newcomers does to a ring.

    slot_E: int64, the slots of those that are stored, each once.
    hand: where the next batch starts to look.
    spent: int64, slots of entries that were passed over and have thereby lost their second chance.
    stored_E: int64, positions in the batch of those that are stored, ascending; all when None.
    """

    slot_E: np.ndarray
    hand: int
    spent: np.ndarray = _NOBODY
    stored_E: np.ndarray | None = None


Newcomers = Mapping[str, np.ndarray]  # their columns, as the ring's, in id order
Policy = Callable[[Ring, Newcomers], Placement]


def policy_of(name: str) -> Policy:
    """The policy of this name: from a ring and its newcomers to a placement."""
    policy: Policy = pkgutil.resolve_name(EVICTIONS[name])
    return policy


def clock(ring: Ring, newcomers: Newcomers) -> Placement:
    """Over free slots first, then over entries without a chance, then over those with one, each in ring order from the hand.

    The hand moves past the slots it looked at: past a free slot only if that is where it stands, so that filling a hole
    elsewhere does not reprieve anybody.
    """
    return _in_ring_order(ring, newcomers, chances=True)


def fifo(ring: Ring, newcomers: Newcomers) -> Placement:
    """`clock` without second chances."""
    return _in_ring_order(ring, newcomers, chances=False)


def lru(ring: Ring, newcomers: Newcomers) -> Placement:
    """Over free slots, then over the least recently hit; an entry without a hit counts as hit when it was written."""
    return _over_the_lowest(ring, newcomers, "last_hit")


def oldest(ring: Ring, newcomers: Newcomers) -> Placement:
    """Over free slots, then over those that were written at the earliest step."""
    return _over_the_lowest(ring, newcomers, "step")


def importance(ring: Ring, newcomers: Newcomers) -> Placement:
    """Of the entries and the newcomers together the M most important ones stay; of equals, those with the larger ids."""
    free, n = ring.free(len(newcomers["id"])), len(newcomers["id"])
    lowest = ring.lowest("importance", n - len(free))
    key_X = np.concatenate([key_of(columns["importance"][at], columns["id"][at]) for columns, at in
                            ((ring.columns, lowest), (newcomers, np.arange(n)))])
    leaving_X = np.argsort(key_X)[:n - len(free)]
    stored_E = np.setdiff1d(np.arange(n), leaving_X - len(lowest))
    victims = lowest[np.sort(leaving_X[leaving_X < len(lowest)])]
    return Placement(np.concatenate([free, victims]), _moved(ring, free), stored_E=stored_E)


def random(ring: Ring, newcomers: Newcomers) -> Placement:
    """Over free slots, then each over the slot that its hash names, or the next one that no other newcomer has taken."""
    stored_E = _last(ring, newcomers)
    free = ring.free(len(stored_E))
    taken, slots = set(free.tolist()), free.tolist()
    for at in (splitmix64(newcomers["id"][stored_E[len(free):]] ^ SEED) % np.uint64(len(ring))).tolist():
        while at in taken:
            at = (at + 1) % len(ring)
        taken.add(at)
        slots.append(at)
    return Placement(np.array(slots, np.int64), _moved(ring, free), stored_E=stored_E)


def _last(ring: Ring, newcomers: Newcomers) -> np.ndarray:
    """Positions of the newcomers that fit the ring: the last ones of a batch that is larger."""
    n = len(newcomers["id"])
    return np.arange(max(0, n - len(ring)), n)


def _moved(ring: Ring, slot_N: np.ndarray) -> int:
    """The hand past the run of these slots, in ring order, that begins where it stands."""
    offset_N = (slot_N - ring.hand) % len(ring)
    return (ring.hand + int(np.argmin(np.append(offset_N, -1) == np.arange(len(offset_N) + 1)))) % len(ring)


def _over_the_lowest(ring: Ring, newcomers: Newcomers, name: str) -> Placement:
    stored_E = _last(ring, newcomers)
    free = ring.free(len(stored_E))
    slot_E = np.concatenate([free, ring.lowest(name, len(stored_E) - len(free))])
    return Placement(slot_E, _moved(ring, free), stored_E=stored_E)


def _in_ring_order(ring: Ring, newcomers: Newcomers, *, chances: bool) -> Placement:
    stored_E, M = _last(ring, newcomers), len(ring)
    n = len(stored_E)
    free = ring.free(n)
    if n == len(free):
        return Placement(free, _moved(ring, free), stored_E=stored_E)
    plain, favoured = _entries_from_hand(ring, n - len(free), chances=chances)
    taken_N = np.concatenate([(free - ring.hand) % M, plain, favoured])[:n]
    moved = int(taken_N[-1]) + 1
    looked_at = favoured if n > len(free) + len(plain) else favoured[favoured < moved]
    return Placement((ring.hand + taken_N) % M, (ring.hand + moved) % M, (ring.hand + looked_at) % M, stored_E)


def _entries_from_hand(ring: Ring, wanted: int, *, chances: bool) -> tuple[np.ndarray, np.ndarray]:
    """Offsets from the hand of entries without a chance and of those with one, as far as it takes for `wanted` without."""
    M, reach = len(ring), 2 * wanted
    while True:
        offset_X = np.arange(min(M, reach))
        slot_X = (ring.hand + offset_X) % M
        live_X = ring.columns["id"][slot_X] >= 0
        chance_X = ring.columns["chance"][slot_X] & live_X if chances else np.zeros(len(slot_X), bool)
        plain = offset_X[live_X & ~chance_X]
        if len(plain) >= wanted or reach >= M:
            return plain, offset_X[chance_X]
        reach *= 2
