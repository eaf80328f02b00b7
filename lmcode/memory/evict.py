"""Which slots the next entries of one virtual shard take: FIFO with a second chance, as a pure function.

This is CLOCK (Corbato 1968) for a batch: a hand walks round the ring and passes an important entry over once.
Letters: C slots of the virtual shard, n entries to place.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Placement(NamedTuple):
    """What a batch of n entries does to a ring.

    slot_n: int64, the slot of each entry, in batch order.
    hand: where the next batch starts to look.
    spent_C: bool, entries that were passed over and have thereby lost their second chance.
    """

    slot_n: np.ndarray
    hand: int
    spent_C: np.ndarray


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
