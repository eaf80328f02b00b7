"""Policies of eviction one newcomer at a time, on a ring of dicts: the oracle of those that look at a few slots only."""

from __future__ import annotations

import numpy as np

from lmcode.memory.evict import SEED
from lmcode.memory.placement import splitmix64

Placed = tuple[list[int], int, set[int], list[int]]  # slots in order, the hand, slots that lost their chance, who is stored


def choose_slots_slowly(hand: int, live: list[bool], chance: list[bool], n: int) -> tuple[list[int], int, set[int]]:
    """A clock that moves its hand slot by slot: victims in order, the new hand, and the slots that lost their chance."""
    C, live, taken, spent = len(live), list(live), [], set()
    for _ in range(n):
        around = [(hand + offset) % C for offset in range(C)]
        free = [slot for slot in around if not live[slot]]
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


def place_slowly(eviction: str, hand: int, entries: list[dict | None], batch: list[dict]) -> Placed:
    """What a policy should do to a ring of dicts, one newcomer at a time."""
    C, live = len(entries), [one is not None for one in entries]
    stored = list(range(max(0, len(batch) - C), len(batch)))
    if eviction in ("clock", "fifo"):
        chance = [one is not None and one["chance"] and eviction == "clock" for one in entries]
        return (*choose_slots_slowly(hand, live, chance, len(stored)), stored)
    free, hand, _ = choose_slots_slowly(hand, live, live, min(live.count(False), len(batch)))
    if eviction == "importance":
        contest = [(one["importance"], one["id"], slot) for slot, one in enumerate(entries) if one is not None]
        contest += [(one["importance"], one["id"], -1 - place) for place, one in enumerate(batch)]
        leaving = [at for *_, at in sorted(contest)[:len(batch) - len(free)]]
        return (free + [at for at in leaving if at >= 0], hand, set(),
                [place for place in range(len(batch)) if -1 - place not in leaving])
    taken = list(free)
    for place in stored[len(free):]:
        if eviction == "random":
            slot = int(splitmix64(np.array([batch[place]["id"]]) ^ SEED)[0]) % C
            while slot in taken:
                slot = (slot + 1) % C
        else:
            name = {"lru": "last_hit", "oldest": "step"}[eviction]
            slot = min((slot for slot in range(C) if live[slot] and slot not in taken),
                       key=lambda slot: (entries[slot][name], entries[slot]["id"]))
        taken.append(slot)
    return taken, hand, set(), stored
