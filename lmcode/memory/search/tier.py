"""What a search tier is: one way to find the best of some rows. `config.TIERS` names those that there are.

A shard owns an object of each tier that it is asked for, hands it the rows that a group of queries sees, and tells it which
slots have changed. Hits are the same in every tier: exact scores, in total order. Importance is the last component of a
stored key, an addend to the score that changes whenever an entry is read; a tier that keeps an index is told of that, too.

What a search must not show is hidden pair by pair. `Hidden` says which queries do not see which rows: positions of queries,
each in at most one item, and of rows, both int64 and ascending.
Letters: E = D + 1, the width of a stored key; Q queries and P rows.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lmcode.config import TIERS

CONTROLS = {"draw": "lmcode.memory.search.draw:DrawTier"}  # tiers that no setting may name: their hits are not the best
Found = tuple[Tensor, Tensor, Tensor]  # score fp32, id int64, slot int64; (NO_SCORE, -1, -1) where invalid
Hidden = Sequence[tuple[Tensor, Tensor]]


@dataclass
class Rows:
    """What a group of queries sees: keys [H, P, E], ids int64 [P], slots int64 [P] (None: row p is slot p)."""

    key_HPE: Tensor
    id_P: Tensor
    slot_P: Tensor | None


class Tier:
    """One way to search; a subclass has at least `search`."""

    @staticmethod
    def check(device: torch.device) -> None:
        """Raises ConfigError where this tier cannot search on `device`."""

    def search(self, query_HQE: Tensor, rows: Rows, k: int, *, hidden: Hidden = ()) -> Found:
        """The k best rows for each head and query, in total order: (score_HQK, id_HQK, row_HQK), rows by position.

        Args:
            query_HQE: fp32, finite, trailing component 1.
            rows: at least one; the id of an empty one is -1.
            k: may exceed P.
            hidden: rows that some queries do not see.
        """
        raise NotImplementedError

    def search_alike(self, query_HQE: Tensor, rows: Rows, k: int, *, hidden: Hidden = ()) -> Found:
        """`search`, such that scores have the same bits however many queries there are."""
        return self.search(query_HQE, rows, k, hidden=hidden)

    def changed(self, slot_E: np.ndarray) -> None:
        """These slots of the shard, int64, have other keys, other entries or none now. Who keeps nothing ignores it."""


def tier_of(name: str) -> type[Tier]:
    """The tier of this name, one of `TIERS` or `CONTROLS`; ValueError if there is none."""
    if name not in TIERS and name not in CONTROLS:
        raise ValueError(f"tier must be one of {', '.join(map(repr, TIERS))}: got '{name}'")
    tier: type[Tier] = pkgutil.resolve_name({**CONTROLS, **TIERS}[name])
    return tier
