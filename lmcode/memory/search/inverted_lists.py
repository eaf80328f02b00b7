"""Inverted lists that change in place: which slots are in each list, at a cost that follows what changes.

A list is a run of a pool with room behind it. A slot that leaves is replaced by the last one of its list, a slot that comes
is appended, and a list without room moves to the end of the pool and gets more. So there are no tombstones, and the order
inside a list means nothing: whoever needs an order sorts hits.
Letters: X lists, or those of a query; M slots; E slots that change; N queries.
"""

from __future__ import annotations

import numpy as np

ROOM = 8  # free places of a list that moves, beside a quarter of its length


class InvertedLists:
    """The members of X lists among M slots; a slot is in one list at most.

    Attributes:
        list_M: int32, the list of each slot; -1: none.
        length_X: int64.
    """

    def __init__(self, lists: int, slots: int) -> None:
        self.list_M = np.full(slots, -1, np.int32)
        self.length_X = np.zeros(lists, np.int64)
        self._start_X, self._room_X = np.zeros(lists, np.int64), np.zeros(lists, np.int64)
        self._place_M = np.zeros(slots, np.int32)  # within its list
        self._pool, self._used = np.zeros(0, np.int32), 0

    def members(self, number: int) -> np.ndarray:
        """The slots of a list, int32; valid until something changes."""
        start = self._start_X[number]
        return self._pool[start:start + self.length_X[number]]

    def members_of(self, number_NX: np.ndarray) -> np.ndarray:
        """The slots of several lists for each query, no list twice, side by side: int64 [N, slots]; -1 where they end."""
        length_NX = self.length_X[number_NX]
        count_N = length_NX.sum(axis=1)
        slots = np.full((len(number_NX), int(count_N.max(initial=0))), -1)
        starts, lengths = self._start_X[number_NX].reshape(-1), length_NX.reshape(-1)
        # In row-major order the places of a query's slots follow each other, and so do its lists.
        at = np.repeat(starts, lengths) + _within(lengths)
        slots[np.arange(slots.shape[1]) < count_N[:, None]] = self._pool[at]
        return slots

    def move(self, slot_E: np.ndarray, list_E: np.ndarray) -> None:
        """Puts slots into lists (-1: none), from wherever they were.

        Args:
            slot_E: int64, each once.
            list_E: int.
        """
        moving_E = self.list_M[slot_E] != list_E
        slot_E, list_E = slot_E[moving_E], list_E[moving_E]
        self._take_out(slot_E[self.list_M[slot_E] >= 0])
        self.list_M[slot_E] = list_E
        coming_E = list_E >= 0
        self._append(slot_E[coming_E], list_E[coming_E].astype(np.int64))

    def _take_out(self, slot_E: np.ndarray) -> None:
        if len(slot_E) == 0:
            return
        slot_E = slot_E[np.lexsort((self._place_M[slot_E], self.list_M[slot_E]))]
        lists, count = np.unique(self.list_M[slot_E], return_counts=True)
        short = self.length_X[lists] - count  # their lengths when all have left
        at_E = self._start_X[self.list_M[slot_E]] + self._place_M[slot_E]
        tail_E = np.repeat(self._start_X[lists] + short, count) + _within(count)
        # Of the last places of each list, those who stay move into the holes before them; both are ordered by list.
        movers = tail_E[~np.isin(tail_E, at_E, assume_unique=True)]
        holes = at_E[~np.isin(at_E, tail_E, assume_unique=True)]
        moved = self._pool[movers]
        self._pool[holes] = moved
        self._place_M[moved] = holes - self._start_X[self.list_M[moved]]
        self.length_X[lists] = short
        self.list_M[slot_E] = -1

    def _append(self, slot_E: np.ndarray, list_E: np.ndarray) -> None:
        if len(slot_E) == 0:
            return
        order_E = np.argsort(list_E, kind="stable")
        slot_E, list_E = slot_E[order_E], list_E[order_E]
        lists, count = np.unique(list_E, return_counts=True)
        full = lists[self.length_X[lists] + count > self._room_X[lists]]
        self._give_room(full, (self.length_X[lists] + count)[np.isin(lists, full, assume_unique=True)])
        place_E = self.length_X[list_E] + _within(count)
        self._pool[self._start_X[list_E] + place_E] = slot_E
        self._place_M[slot_E] = place_E
        self.length_X[lists] += count

    def _give_room(self, lists: np.ndarray, length: np.ndarray) -> None:
        """Moves these lists to the end of the pool, with room for more than `length`; or all to a new pool."""
        room = length + length // 4 + ROOM
        if self._used + int(room.sum()) > len(self._pool):
            self._room_X[lists] = room
            self._repack()
            return
        for number, size in zip(lists.tolist(), room.tolist(), strict=True):
            members = self.members(number)
            self._pool[self._used:self._used + len(members)] = members
            self._start_X[number], self._room_X[number] = self._used, size
            self._used += size

    def _repack(self) -> None:
        """Copies all lists into another pool, one behind the other, each with its room; a quarter of that stays free."""
        self._used = int(self._room_X.sum())
        start_X, pool = np.cumsum(self._room_X) - self._room_X, np.zeros(self._used * 5 // 4, np.int32)
        within = _within(self.length_X)
        pool[np.repeat(start_X, self.length_X) + within] = self._pool[np.repeat(self._start_X, self.length_X) + within]
        self._pool, self._start_X = pool, start_X


def _within(count: np.ndarray) -> np.ndarray:
    """[2, 3] -> [0, 1, 0, 1, 2]."""
    within: np.ndarray = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
    return within
