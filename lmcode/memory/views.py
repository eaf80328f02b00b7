"""The rows of a shard that a search looks through: all of them, those of some namespaces, or those of one text.

Copies of few rows are kept for the searches to come. They hold until a score or a row changes, and whoever changes one must
say so: `rescored` and `regrouped`.
Letters: M slots of the shard; E entries that are seen.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lmcode.memory.consolidate import unit_keys
from lmcode.memory.ledger import Ledger
from lmcode.memory.search.exact import Stack, stack_rows
from lmcode.memory.search.tier import Rows
from lmcode.protocol import NO_SCORE

KEPT_ROWS = 16384  # rows that are copied for searches
STACKED_ROWS = 65536  # rows that are copied for look-ups
Names = tuple[int, ...]  # namespaces


class Views:
    """Rows of one shard, on the device of its keys.

    Args:
        key_HMD, addend_M: the shard's tables, which change in place.
        ledger: the columns of the same slots.
    """

    def __init__(self, key_HMD: Tensor, addend_M: Tensor, ledger: Ledger) -> None:
        self.key_HMD, self._addend_M, self._ledger = key_HMD, addend_M, ledger
        self._texts: tuple[np.ndarray, dict[tuple[int, int], slice]] | None = None
        self._kept: dict[object, Rows] = {}
        self._stacks: dict[object, Stack | None] = {}

    def rescored(self) -> None:
        """Scores or keys have changed: all copies are out of date."""
        self._kept.clear()
        self._stacks.clear()

    def regrouped(self) -> None:
        """Entries have come, gone, or got another document."""
        self._texts = None

    def table(self) -> Rows:
        """All slots, empty ones included."""
        return Rows(self.key_HMD, self._addend_M, on_device(self._ledger.columns["id"], self.key_HMD), None)

    def of_namespaces(self, names: Names | None) -> Rows:
        """The rows of these namespaces; None: of all. Where that costs less, the whole table, in which others are empty."""
        if names in self._kept:
            return self._kept[names]
        slot_E = self._slots_of(names)
        # From half of them on, scores of the other slots cost less than a copy of the rows.
        if 2 * len(slot_E) >= self._ledger.num_slots > 0:
            return self.table() if names is None else self._keep(names, self._table_of(slot_E))
        slots = on_device(slot_E, self.key_HMD)
        id_E = on_device(self._ledger.columns["id"][slot_E], self.key_HMD)
        return self._keep(names, Rows(self.key_HMD.index_select(1, slots), self._addend_M[slots], id_E, slots))

    def _table_of(self, slot_E: np.ndarray) -> Rows:
        """All slots, those that are not among these as if they were empty; no key is copied."""
        slots, id_M = on_device(slot_E, self.key_HMD), np.full(self._ledger.num_slots, -1, np.int64)
        id_M[slot_E] = self._ledger.columns["id"][slot_E]
        addend_M = torch.full_like(self._addend_M, NO_SCORE).index_copy(0, slots, self._addend_M[slots])
        everywhere_M = torch.arange(len(id_M), device=slots.device)  # and not None: these are not the rows of a whole bank
        return Rows(self.key_HMD, addend_M, on_device(id_M, self.key_HMD), everywhere_M)

    def of_text(self, text: tuple[int, int]) -> Rows:
        """The rows of a text (namespace and document), with their `unit_keys` for keys and nothing added to scores."""
        if ("text", text) in self._kept:
            return self._kept["text", text]
        sorted_slots, texts = self.by_text()
        slot_E = sorted_slots[texts.get(text, slice(0))]
        slots = on_device(slot_E, self.key_HMD)
        unit_1ED = unit_keys(self.key_HMD[:, slots]).unsqueeze(0)
        id_E = on_device(self._ledger.columns["id"][slot_E], self.key_HMD)
        return self._keep(("text", text), Rows(unit_1ED, unit_1ED.new_zeros(len(slot_E)), id_E, slots))

    def stack(self, groups: tuple[Names | None, ...]) -> Stack | None:
        """The rows of these namespaces (None: of all), group by group; None if they are too many."""
        if groups not in self._stacks:
            slots = [self._slots_of(names) for names in groups]
            columns = len(slots) * max(map(len, slots))
            if columns + sum(stack.num_columns for stack in self._stacks.values() if stack) > STACKED_ROWS:
                self._stacks.clear()
            self._stacks[groups] = (None if columns > STACKED_ROWS else
                                    stack_rows(self.key_HMD, self._addend_M,
                                               [on_device(slot_E, self.key_HMD) for slot_E in slots]))
        return self._stacks[groups]

    def by_text(self) -> tuple[np.ndarray, dict[tuple[int, int], slice]]:
        """Live slots sorted by (namespace, document, id), and where among them those of each text are."""
        if self._texts is None:
            columns = self._ledger.columns
            live = np.flatnonzero(columns["id"] >= 0)
            text_2E = np.stack([columns[name][live] for name in ("namespace", "document")])
            order_E = np.lexsort((columns["id"][live], text_2E[1], text_2E[0]))
            starts, ends, texts = runs(text_2E.T[order_E])
            self._texts = live[order_E], dict(zip(texts, map(slice, starts, ends), strict=True))
        return self._texts

    def _slots_of(self, names: Names | None) -> np.ndarray:
        """Live slots of these namespaces, or of all."""
        return (np.flatnonzero(self._ledger.columns["id"] >= 0) if names is None
                else self._ledger.slots_of_namespaces(np.array(names)))

    def _keep(self, key: object, rows: Rows) -> Rows:
        if len(rows.id_M) + sum(len(kept.id_M) for kept in self._kept.values()) <= KEPT_ROWS:
            self._kept[key] = rows
        return rows


def on_device(array: np.ndarray, like: Tensor) -> Tensor:
    """An array as a tensor on the device of another one."""
    return torch.from_numpy(array).to(like.device)


def runs(text_X2: np.ndarray) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """Where equal rows of a sorted table start and end, and which they are."""
    changes = np.flatnonzero((text_X2[1:] != text_X2[:-1]).any(axis=1)) + 1
    bounds = [0, *changes.tolist(), len(text_X2)] if len(text_X2) else [0]
    return bounds[:-1], bounds[1:], list(map(tuple, text_X2[bounds[:-1]].tolist()))
