"""What a search tier is: one way to find the best of some rows. `config.TIERS` names those that there are.

A shard owns an object of each tier that it is asked for, hands it the rows that a group of queries sees, and tells it which
slots have other keys. Hits are the same in every tier that is not approximate: exact scores, in total order. Importance is
no part of a key but an addend to its score, which changes whenever an entry is read; an index over keys never hears of it.

What a search must not show is hidden pair by pair. `Hidden` says which queries do not see which rows: positions of queries,
each in at most one item, and of rows, both int64 and ascending.
Letters: N queries, M rows.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lmcode.config import TIERS
from lmcode.memory.search.plan import Plan

CONTROLS = {"draw": "lmcode.memory.search.draw:DrawTier"}  # tiers that no setting may name: their hits are not the best
Found = tuple[Tensor, Tensor, Tensor]  # score fp32, id int64, slot int64; (NO_SCORE, -1, -1) where invalid
Hidden = Sequence[tuple[Tensor, Tensor]]


class HeadRows(NamedTuple):
    """The rows of one head: see `Rows`."""

    key_MD: Tensor
    addend_M: Tensor
    id_M: Tensor


@dataclass
class Rows:
    """What a group of queries sees.

    key_HMD: fp32 or bf16.
    addend_M: fp32, added to the scores of a row in every head; `NO_SCORE` in an empty slot.
    id_M: int64; -1 in an empty slot.
    slot_M: int64; None: row p is slot p.
    """

    key_HMD: Tensor
    addend_M: Tensor
    id_M: Tensor
    slot_M: Tensor | None = None

    def __len__(self) -> int:
        return len(self.id_M)

    def of_head(self, head: int) -> HeadRows:
        """What one head sees."""
        return HeadRows(self.key_HMD[head], self.addend_M, self.id_M)


class Tier:
    """One way to search; a subclass has at least `search`.

    Attributes:
        approximate: may miss hits. Those that it returns have exact scores, in total order.
    """

    approximate = False

    @property
    def whole(self) -> bool:
        """Whether a search that sees all rows is to have the shard's whole table, empty slots included."""
        return False

    @staticmethod
    def check(device: torch.device) -> None:
        """Raises ConfigError where this tier cannot search on `device`."""

    def search(self, query_HND: Tensor, rows: Rows, k: int, *, hidden: Hidden = ()) -> Found:
        """The k best rows for each head and query, in total order: (score_HQK, id_HQK, row_HQK), rows by position.

        Args:
            query_HND: fp32, finite.
            rows: at least one.
            k: may exceed M.
            hidden: rows that some queries do not see.
        """
        raise NotImplementedError

    def placed(self, places: Mapping[int, slice]) -> None:
        """Which slots are those of each virtual shard; called once, before anything else."""

    def use(self, plan: Plan) -> None:
        """How all ranks search from now on; the first call comes before the first search."""

    def changed(self, slot_E: np.ndarray) -> None:
        """These slots of the shard, int64, have other keys, other entries or none now. A tier that keeps nothing ignores
        it."""

    def forget(self, slot_E: np.ndarray) -> None:
        """What was in these slots of the shard, int64, is to be gone for good: no copy of a key of theirs may stay."""


def tier_of(name: str) -> type[Tier]:
    """The tier of this name, one of `TIERS` or `CONTROLS`; ValueError if there is none."""
    if name not in TIERS and name not in CONTROLS:
        raise ValueError(f"tier must be one of {', '.join(map(repr, TIERS))}: got '{name}'")
    tier: type[Tier] = pkgutil.resolve_name({**CONTROLS, **TIERS}[name])
    return tier
