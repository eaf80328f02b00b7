"""Which newcomers to a virtual shard are stored, and in which slots: policies, each a pure function of one ring.

`memory.eviction` names the policy (`config.EVICTIONS`). Newcomers have their ids when a policy sees them, for an id decides
the virtual shard. So whom it refuses has had an id like one that was overwritten at once, and is counted with those, as
evicted. The policy there is, `second_chance`, is FIFO with a second chance: CLOCK (Corbato 1968) for a batch, where a hand
walks round the ring and passes an important entry over once.
Letters: C slots of the virtual shard, n newcomers, m of them that are stored.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from lmcode.config import EVICTIONS


class Ring(NamedTuple):
    """One virtual shard as a policy sees it.

    hand: in [0, C), where the last placement has left it.
    columns: those of `entry.METADATA`, [C] each; the id of a free slot is -1.
    """

    hand: int
    columns: Mapping[str, np.ndarray]

    @property
    def live_C(self) -> np.ndarray:
        """bool, slots that hold an entry."""
        return self.columns["id"] >= 0


class Placement(NamedTuple):
    """What a batch of newcomers does to a ring.

    slot_m: int64, the slots of those that are stored, each once.
    hand: where the next batch starts to look.
    spent_C: bool, entries that were passed over and have thereby lost their second chance.
    stored_m: int64, positions in the batch of those that are stored, ascending; all when None.
    """

    slot_m: np.ndarray
    hand: int
    spent_C: np.ndarray
    stored_m: np.ndarray | None = None


Policy = Callable[[Ring, Mapping[str, np.ndarray]], Placement]


def policy_of(name: str) -> Policy:
    """The policy of this name: from a ring and the newcomers' columns, as the ring's and in id order, to a placement."""
    policy: Policy = pkgutil.resolve_name(EVICTIONS[name])
    return policy


def second_chance(ring: Ring, newcomers: Mapping[str, np.ndarray]) -> Placement:
    """Every newcomer is stored, as far as there are slots: of a batch larger than the ring its last ones."""
    n = len(newcomers["id"])
    lost = max(0, n - len(ring.live_C))
    placement = choose_slots(ring.hand, ring.live_C, ring.columns["chance"], n - lost)
    return placement._replace(stored_m=np.arange(lost, n))


def choose_slots(hand: int, live_C: np.ndarray, chance_C: np.ndarray, n: int) -> Placement:
    """Places n entries: in free slots first, then over entries without a chance, then over those with one.

    Each of the three is taken in ring order from the hand. The hand moves past the slots it looked at: past a free slot
    only if that is where it stands, so that filling a hole elsewhere does not reprieve anybody.

    Args:
        hand: position in [0, C).
        live_C: bool, slots that hold an entry.
        chance_C: bool, entries that are passed over once; ignored where not live.
        n: entries of the batch, at most C (of a larger batch only the last C entries can survive: pass C).

    Raises:
        ValueError: if n exceeds C.
    """
    C = len(live_C)
    if not 0 <= n <= C:
        raise ValueError(f"a batch must fit its virtual shard of {C} slots: got {n} entries")
    ring_C = (hand + np.arange(C)) % C
    live_ring_C, chance_ring_C = live_C[ring_C], chance_C[ring_C]
    free, plain, favoured = (np.flatnonzero(mask) for mask in (
        ~live_ring_C, live_ring_C & ~chance_ring_C, live_ring_C & chance_ring_C))
    taken_n = np.concatenate([free, plain, favoured])[:n]
    spent_C = np.zeros(C, dtype=bool)
    if n <= len(free):
        moved = int(np.argmin(np.append(taken_n, -1) == np.arange(n + 1)))  # length of the leading run of free slots
    else:
        moved = int(taken_n[-1]) + 1
        looked_at = favoured if n > len(free) + len(plain) else favoured[favoured < moved]
        spent_C[ring_C[looked_at]] = True
    return Placement(ring_C[taken_n], (hand + moved) % C, spent_C)
