"""One virtual shard as an eviction policy sees it: its columns, where its hand stands, and two questions that it answers.

`free` and `lowest` answer without looking at the whole ring. Slots lie in blocks of `BLOCK`; of a block is known how many
slots are free, exactly, and for a column that a policy orders by a lower bound of the least (value, id) of its entries. A
change updates the count, and lowers the bound if it must; a bound that is too low is corrected when the block
is looked at. So `free` costs O(M / BLOCK + n) and `lowest` O(M / BLOCK + BLOCK n) for n slots of M.
Letters: X blocks; M slots of a virtual shard; E entries that are looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

BLOCK = 64
NONE = complex(np.inf, 0)  # the bound of a block without an entry


def key_of(value_E: np.ndarray, id_E: np.ndarray) -> np.ndarray:
    """Complex numbers that numpy orders as it does (value, id); exact as long as both stay below 2^53 in size."""
    key_E = np.empty(len(id_E), np.complex128)
    key_E.real, key_E.imag = value_E, id_E
    return key_E


class Blocks:
    """What is known of the blocks of several rings, the columns of which lie one behind the other.

    Attributes:
        bounds: by the name of a column, complex128 [X], see `key_of`; made when they are first asked for, as the counts are.
    """

    def __init__(self, columns: Mapping[str, np.ndarray], capacities: list[int]) -> None:
        self._columns = columns
        self._first_slots = np.cumsum([0, *capacities])[:-1]  # slot
        counts = [-(-capacity // BLOCK) for capacity in capacities]
        self._first_blocks = np.cumsum([0, *counts])  # the first block of each ring, and the end
        self._start_X = np.concatenate([first + BLOCK * np.arange(count) for first, count in
                                        zip(self._first_slots.tolist(), counts, strict=True)])
        self.forget()

    def forget(self) -> None:
        """Drops counts and bounds, after a change of whole columns; they are made anew when they are asked for."""
        self._free: np.ndarray | None = None
        self.bounds: dict[str, np.ndarray] = {}

    @property
    def free_X(self) -> np.ndarray:
        """int64, free slots of each block."""
        if self._free is None:
            self._free = np.add.reduceat((self._columns["id"] < 0).astype(np.int64), self._start_X)
        return self._free

    def blocks_of(self, slot_E: np.ndarray) -> np.ndarray:
        """The block of each slot."""
        ring_E = np.searchsorted(self._first_slots, slot_E, side="right") - 1
        block_E: np.ndarray = self._first_blocks[ring_E] + (slot_E - self._first_slots[ring_E]) // BLOCK
        return block_E

    def freed(self, slot_E: np.ndarray, sign: int = 1) -> None:
        """These slots have become free; or, with a sign of -1, are free no more."""
        if self._free is not None:
            np.add.at(self._free, self.blocks_of(slot_E), sign)

    def changed(self, slot_E: np.ndarray, names: Mapping[str, object]) -> None:
        """Entries in these slots have other values now in the columns `names`."""
        for name in self.bounds.keys() & names.keys():
            key_E, block_E = key_of(self._columns[name][slot_E], self._columns["id"][slot_E]), self.blocks_of(slot_E)
            lower_E = key_E < self.bounds[name][block_E]
            np.minimum.at(self.bounds[name], block_E[lower_E], key_E[lower_E])

    def ring(self, number: int, hand: int, place: slice) -> Ring:
        """The `number`-th ring, whose slots are `place`."""
        blocks = slice(*self._first_blocks[number:number + 2])
        return Ring(hand, {name: column[place] for name, column in self._columns.items()}, self.free_X[blocks],
                    lambda name: self._bound(name)[blocks])

    def _bound(self, name: str) -> np.ndarray:
        if name not in self.bounds:
            live_M = self._columns["id"] >= 0
            key_M = np.where(live_M, key_of(self._columns[name], self._columns["id"]), NONE)
            self.bounds[name] = np.minimum.reduceat(key_M, self._start_X)
        return self.bounds[name]


class Ring:
    """One virtual shard of M slots. What it answers follows from its hand and columns alone.

    Attributes:
        hand: in [0, M), where the last placement has left it.
        columns: those of `entry.METADATA`, [M] each; the id of a free slot is -1.
    """

    def __init__(self, hand: int, columns: Mapping[str, np.ndarray], free_X: np.ndarray,
                 bound_of: Callable[[str], np.ndarray]) -> None:
        self.hand, self.columns, self._free_X, self._bound_of = hand, columns, free_X, bound_of

    @staticmethod
    def of(hand: int, columns: Mapping[str, np.ndarray]) -> Ring:
        """A ring that is not part of a bank, for tests."""
        return Blocks(columns, [len(columns["id"])]).ring(0, hand, slice(None))

    def __len__(self) -> int:
        return len(self.columns["id"])

    @property
    def live_M(self) -> np.ndarray:
        """bool, slots that hold an entry; takes time in proportion to M."""
        live_M: np.ndarray = self.columns["id"] >= 0
        return live_M

    def free(self, n: int) -> np.ndarray:
        """The first n free slots, or all if there are fewer, in ring order from the hand."""
        M, first = len(self), self.hand // BLOCK
        some = np.flatnonzero(self._free_X)
        order = some[np.argsort((some - first) % len(self._free_X), kind="stable")]
        # The first block lies on both sides of the hand, so it counts for nothing and is looked at in any case.
        enough = np.searchsorted(np.cumsum(np.where(order == first, 0, self._free_X[order])), n) + 1
        slots = self._slots(order[:enough]).ravel()
        slots = slots[slots < M]
        slots = slots[self.columns["id"][slots] < 0]
        in_order: np.ndarray = slots[np.argsort((slots - self.hand) % M)][:n]
        return in_order

    def lowest(self, name: str, n: int) -> np.ndarray:
        """The n entries, or all if there are fewer, that come first by (value of this column, id)."""
        bound_X = self._bound_of(name)
        looked_at, key_E, slot_E = np.zeros(len(bound_X), bool), np.empty(0, complex), np.empty(0, np.int64)
        last, wanted = NONE, 4
        while n:
            near = np.flatnonzero(bound_X < last)
            near = near[~looked_at[near]]
            if not len(near):
                break
            near = near[np.argpartition(bound_X[near], wanted)[:wanted]] if wanted < len(near) else near
            looked_at[near], wanted = True, 2 * wanted
            keys = self._keys(near, name)
            bound_X[near] = keys.min(axis=1)
            key_E, slot_E = np.append(key_E, keys), np.append(slot_E, self._slots(near))
            if len(key_E) > n:
                best = np.argpartition(key_E, n - 1)[:n]
                key_E, slot_E = key_E[best], slot_E[best]
                last = key_E.max()
        order = np.argsort(key_E)
        return slot_E[order][key_E[order] < NONE][:n]

    def _slots(self, blocks: np.ndarray) -> np.ndarray:
        """[blocks, BLOCK]; the last block of a ring may reach beyond its end."""
        return blocks[:, None] * BLOCK + np.arange(BLOCK)

    def _keys(self, blocks: np.ndarray, name: str) -> np.ndarray:
        slots = self._slots(blocks)
        inside = slots < len(self)
        slot_E = np.where(inside, slots, 0).ravel()
        id_E = self.columns["id"][slot_E]
        key_E = np.where(inside.ravel() & (id_E >= 0), key_of(self.columns[name][slot_E], id_E), NONE)
        return key_E.reshape(slots.shape)
