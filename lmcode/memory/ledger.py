"""What a rank knows of its entries beside their vectors: the columns, and whatever follows from them.

Everything that changes a column goes through here, with the slots that it changes; so counts, lists and blocks are kept up
to date in time that depends on what changed and not on the bank. What follows from the columns is never saved: `forget`
makes it anew. The columns are views of one table with 64 bytes a slot, a cache line: in a large bank every slot that is
touched costs one miss, and not one for each column.
Letters: M slots of this rank; E slots that change; X hits, a slot once for each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from lmcode.memory.directory import Directory
from lmcode.memory.entry import EMPTY, METADATA
from lmcode.memory.ring import Blocks, Ring

LINE = 64  # bytes of a slot's row
_WIDEST_FIRST = sorted(METADATA, key=lambda name: -np.dtype(METADATA[name]).itemsize)
_SIZES = [np.dtype(METADATA[name]).itemsize for name in _WIDEST_FIRST]
ROW = np.dtype({"names": _WIDEST_FIRST, "formats": [METADATA[name] for name in _WIDEST_FIRST],
                "offsets": [sum(_SIZES[:at]) for at in range(len(_SIZES))], "itemsize": LINE})


class Tally(NamedTuple):
    """Sums over entries: how many are live, how many others were merged into them, how many have a second chance, and how
    many are important enough for one but have used it."""

    live: int = 0
    merged: int = 0
    chances: int = 0
    spared: int = 0

    def plus(self, other: Tally, sign: int = 1) -> Tally:
        """The sum, or with a sign of -1 the difference."""
        return Tally(*(mine + sign * yours for mine, yours in zip(self, other, strict=True)))


class Ledger:
    """The columns of the virtual shards `owned`, each a ring in a contiguous range of slots.

    Attributes:
        range_of: the slots of each virtual shard.
        columns: those of `entry.METADATA`, [M] each; nobody else may change them.
        hand, evicted: by virtual shard, where its hand stands and how many entries it has given up or refused.
    """

    def __init__(self, owned: tuple[int, ...], capacities: list[int], *, favoured_from: float) -> None:
        bounds = np.cumsum([0, *capacities]).tolist()
        self.range_of = {shard: slice(*ends) for shard, ends in
                         zip(owned, zip(bounds, bounds[1:], strict=False), strict=True)}
        self.num_slots: int = bounds[-1]
        self._row_M8 = _aligned(self.num_slots)
        self.columns = {name: self._row_M8.view(ROW)[:, 0][name] for name in METADATA}
        for name, column in self.columns.items():
            column[:] = EMPTY[name]
        self.hand, self.evicted = dict.fromkeys(owned, 0), dict.fromkeys(owned, 0)
        self._favoured_from, self._owned = favoured_from, owned
        self._blocks = Blocks(self.columns, capacities)
        self._directory = Directory(self.columns["id"], self.columns["namespace"])
        self._tally: Tally | None = Tally()

    @property
    def tally(self) -> Tally:
        """The sums over all entries of this rank."""
        if self._tally is None:
            self._tally = self._tally_of(self._row_M8.view(ROW)[:, 0])
        return self._tally

    def ring(self, shard: int) -> Ring:
        """A virtual shard as a policy of eviction sees it."""
        return self._blocks.ring(self._owned.index(shard), self.hand[shard], self.range_of[shard])

    def put(self, slot_E: np.ndarray, columns: Mapping[str, np.ndarray]) -> None:
        """Stores new entries, whose ids exceed all earlier ones, and overwrites what is in these slots."""
        self._leave(slot_E)
        self._change(slot_E, columns)
        self._blocks.freed(slot_E, -1)
        self._blocks.changed(slot_E, columns)
        self._directory.added(slot_E, self.tally.live)

    def clear(self, slot_E: np.ndarray) -> None:
        """Empties these slots."""
        self._leave(slot_E)
        self._change(slot_E, EMPTY)

    def update(self, slot_E: np.ndarray, columns: Mapping[str, np.ndarray | int]) -> None:
        """Changes columns of entries that stay where they are: neither their ids nor their namespaces."""
        self._change(slot_E, columns)
        self._blocks.changed(slot_E, columns)

    def _leave(self, slot_E: np.ndarray) -> None:
        """Takes the entries in these slots out of lists and counts, before their columns are overwritten."""
        gone_E = slot_E[self.columns["id"][slot_E] >= 0]
        self._directory.removed(self.columns["namespace"][gone_E])
        self._blocks.freed(gone_E)

    def _change(self, slot_E: np.ndarray, columns: Mapping[str, np.ndarray | int]) -> None:
        row_E8 = self._row_M8.take(slot_E, axis=0)
        row_E = row_E8.view(ROW)[:, 0]
        tally = self.tally.plus(self._tally_of(row_E), -1)
        for name, column_E in columns.items():
            row_E[name] = column_E
        self._tally = tally.plus(self._tally_of(row_E))
        self._row_M8[slot_E] = row_E8

    def forget(self) -> None:
        """Drops all that follows from the columns, after a change of whole columns; it is made anew when it is asked for."""
        self._blocks.forget()
        self._directory.forget()
        self._tally = None

    def _tally_of(self, row_E: np.ndarray) -> Tally:
        live_E, chance_E = row_E["id"] >= 0, row_E["chance"]
        live, favoured_E = int(live_E.sum()), live_E & (row_E["importance"] >= self._favoured_from)
        return Tally(live, int(row_E["count"].sum(where=live_E)) - live, int(chance_E.sum()),
                     int((favoured_E & ~chance_E).sum()))

    # --- looking up ------------------------------------------------------------------------------------------------

    def slots_of_namespaces(self, names: np.ndarray) -> np.ndarray:
        """Live slots of these namespaces, by (namespace, id)."""
        return self._directory.slots_of_namespaces(names)

    def slots_of_ids(self, id_E: np.ndarray) -> np.ndarray:
        """The slot of each entry, -1 where it is not here."""
        return self._directory.slots_of_ids(id_E)

    def add_up(self, slot_X: np.ndarray, mass_X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The slots among these, ascending, and the sum of the masses of each: int64 both."""
        order_X = np.argsort(slot_X)  # and not np.unique, whose hashing takes many times as long
        slot_X = slot_X[order_X]
        first_E = np.flatnonzero(np.append(True, slot_X[1:] != slot_X[:-1])[:len(slot_X)])
        return slot_X[first_E], np.add.reduceat(mass_X[order_X], first_E) if len(first_E) else mass_X


def _aligned(rows: int) -> np.ndarray:
    """An array int64 [rows, LINE / 8] of which each row is a cache line."""
    memory = np.zeros((rows + 1) * LINE, np.uint8)
    skip = -memory.ctypes.data % LINE
    return memory[skip:skip + rows * LINE].view(np.int64).reshape(rows, LINE // 8)
