"""FIFO with a second chance, one slot at a time: the oracle of the vectorised choice."""

from __future__ import annotations


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
