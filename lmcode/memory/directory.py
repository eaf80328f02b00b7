"""Which slots hold the entries of a namespace, or those of some ids: kept up to date by what changed.

Ids are given out in ascending order and never again. So a list of (id, slot) that is only ever appended to stays in id
order, and whether an item still holds can be seen from the column of ids: it is stale once its slot has another one. Nothing
is taken out of a list when an entry goes; it is swept when it has grown too stale. A change costs time in proportion to what
changed (a sweep included, on average), a look-up to what it finds.
Letters: M slots of a rank; E entries that change; X items of a list.
"""

from __future__ import annotations

import numpy as np

GROWTH = 1.25  # by this factor a list grows when it is full
STALE = 0.5  # stale items for each that holds, and SPARE more, before a list is swept
SPARE = 64


class SlotList:
    """Slots in the order of their entries' ids."""

    def __init__(self, id_X: np.ndarray, slot_X: np.ndarray) -> None:
        self._item_2X, self._length = np.stack([id_X, slot_X]), len(id_X)

    def __len__(self) -> int:
        """Items, stale ones included."""
        return self._length

    def append(self, id_E: np.ndarray, slot_E: np.ndarray) -> None:
        """Adds entries whose ids ascend and lie above all that are here."""
        end = self._length + len(id_E)
        if end > self._item_2X.shape[1]:
            larger_2X = np.empty((2, int(GROWTH * end) + 1), np.int64)
            larger_2X[:, :self._length] = self._item_2X[:, :self._length]
            self._item_2X = larger_2X
        self._item_2X[0, self._length:end], self._item_2X[1, self._length:end] = id_E, slot_E
        self._length = end

    def slots(self, id_M: np.ndarray) -> np.ndarray:
        """The slots of those items that hold, given the column of ids."""
        id_X, slot_X = self._item_2X[:, :self._length]
        live: np.ndarray = slot_X[id_M[slot_X] == id_X]
        return live

    def find(self, id_E: np.ndarray, id_M: np.ndarray) -> np.ndarray:
        """The slot of each id, -1 where it is not here, given the column of ids."""
        id_X, slot_X = self._item_2X[:, :self._length]
        if self._length == 0:
            return np.full(len(id_E), -1)
        at_E = np.searchsorted(id_X, id_E).clip(max=self._length - 1)
        slot_E = slot_X[at_E]
        return np.where((id_X[at_E] == id_E) & (id_M[slot_E] == id_E), slot_E, -1)

    def sweep(self, id_M: np.ndarray, live: int) -> None:
        """Drops stale items if there are too many, given the column of ids and how many items hold."""
        if self._length > (1 + STALE) * live + SPARE:
            slot_X = self.slots(id_M)
            self._item_2X, self._length = np.stack([id_M[slot_X], slot_X]), len(slot_X)


class Directory:
    """Where the entries of one rank are: a list of slots for each namespace, and one of all ids, made when first asked for.

    Args:
        id_M, namespace_M: the columns, which others change; `added` and `removed` must be called for every change.
    """

    def __init__(self, id_M: np.ndarray, namespace_M: np.ndarray) -> None:
        self._id_M, self._namespace_M = id_M, namespace_M
        self.forget()

    def forget(self) -> None:
        """Drops all lists, after a change of whole columns; they are made anew when they are asked for."""
        self._all: SlotList | None = None
        self._of: dict[int, SlotList] | None = None
        self._live: dict[int, int] = {}

    def removed(self, namespace_E: np.ndarray) -> None:
        """Live entries of these namespaces leave: one namespace for each entry."""
        if self._of is None:
            return
        for name, count in zip(*_counts(namespace_E), strict=True):
            self._live[name] -= count
            if not self._live[name]:
                del self._live[name], self._of[name]

    def added(self, slot_E: np.ndarray, live: int) -> None:
        """These slots have new entries; `live` is how many entries the rank holds in all."""
        id_E = self._id_M[slot_E]
        order_E = np.argsort(id_E)
        id_E, slot_E = id_E[order_E], slot_E[order_E]
        if self._all is not None:
            self._all.append(id_E, slot_E)
            self._all.sweep(self._id_M, live)
        if self._of is None or not len(slot_E):
            return
        name_E = self._namespace_M[slot_E]
        order_E = np.argsort(name_E, kind="stable")
        names, counts = _counts(name_E)
        for name, part in zip(names, np.split(order_E, np.cumsum(counts)[:-1]), strict=True):
            self._live[name] = self._live.get(name, 0) + len(part)
            if name in self._of:
                self._of[name].append(id_E[part], slot_E[part])
                self._of[name].sweep(self._id_M, self._live[name])
            else:
                self._of[name] = SlotList(id_E[part], slot_E[part])

    def slots_of_namespaces(self, names: np.ndarray) -> np.ndarray:
        """Live slots of these namespaces, by (namespace, id)."""
        if self._of is None:
            self._of = self._by_namespace()
            self._live = {name: len(one) for name, one in self._of.items()}
        found = [self._of[name].slots(self._id_M) for name in np.unique(names).tolist() if name in self._of]
        return np.concatenate([np.zeros(0, np.int64), *found])

    def slots_of_ids(self, id_E: np.ndarray) -> np.ndarray:
        """The slot of each entry, -1 where it is not here."""
        if self._all is None:
            slot_X = np.flatnonzero(self._id_M >= 0)
            slot_X = slot_X[np.argsort(self._id_M[slot_X])]
            self._all = SlotList(self._id_M[slot_X], slot_X)
        return self._all.find(id_E, self._id_M)

    def _by_namespace(self) -> dict[int, SlotList]:
        slot_X = np.flatnonzero(self._id_M >= 0)
        slot_X = slot_X[np.lexsort((self._id_M[slot_X], self._namespace_M[slot_X]))]
        names, counts = _counts(self._namespace_M[slot_X])
        return {name: SlotList(self._id_M[part], part) for name, part in
                zip(names, np.split(slot_X, np.cumsum(counts)[:-1]), strict=False)}  # no name has one empty part


def _counts(name_E: np.ndarray) -> tuple[list[int], list[int]]:
    """The values that there are, ascending, and how often each."""
    names, counts = np.unique(name_E, return_counts=True)
    return names.tolist(), counts.tolist()
