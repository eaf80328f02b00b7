"""Which tier searches: what `memory.tier` names, or what `auto` takes, and why; and which one stands in for `ivf` without
lists and `hnsw` without graphs.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch

from lmcode.config import MemoryConfig
from lmcode.memory.search import faiss_index
from lmcode.memory.search.plan import AUTO_ENTRIES, Plan
from lmcode.memory.search.tier import tier_of

log = logging.getLogger("lmcode")

AUTO_FAISS_SLOTS = 5_000  # from here on tier = auto leaves a global search to FAISS (measured, see README)


class TierChoice:
    """By which tier the searches of one bank go, read by read.

    Attributes:
        tiers: by scope, "document" or "global", the tier of a bank of this size.
    """

    def __init__(self, config: MemoryConfig, slots: int, device: torch.device) -> None:
        """Raises ConfigError where `choose_tier` does."""
        self.config, self.slots, self.device = config, slots, device
        self.tiers = {scope: choose_tier(config, scope, slots, device) for scope in ("document", "global")}
        self._logged: dict[str, str] = {}  # by scope, what `auto` was last said to search with

    def pick(self, scope: str | Sequence[int], plan: Plan, *, live: int, k: int, queries: int) -> str:
        """The tier of a search with this scope, as things are now; what `auto` picks is logged the first time and whenever
        that changes.

        Args:
            live: entries of this rank.
            queries: of each rank and head.
        """
        tier = tier_now(self.tiers, scope, self.config, plan)
        kind = "document" if scope == "document" else "global"
        if self.config.tier == "auto" and self._logged.get(kind) != tier:
            self._logged[kind] = tier
            log.info("memory.tier = auto: '%s' for reads of scope '%s' (%d entries of this rank, K = %d, %d queries of each "
                     "rank and head): %s", tier, kind, live, k, queries, reason_of(kind, self.slots, self.device, plan))
        return tier

    def log_like(self, other: TierChoice) -> None:
        """Leaves unsaid what the other has said already."""
        self._logged = dict(other._logged)


def choose_tier(config: MemoryConfig, scope: str, slots: int, device: torch.device) -> str:
    """The tier of searches with this scope. `auto` looks at settings only, so that every number of ranks decides alike.

    Raises:
        ConfigError: if the tier that is asked for cannot search on `device`.
    """
    if config.tier != "auto":
        tier_of(config.tier).check(device)
        return config.tier
    if scope != "global" or slots < AUTO_FAISS_SLOTS:
        return "exact"
    usable = faiss_index.available(device)
    if not usable and config.scope == "global":
        log.warning("memory.tier = auto: no FAISS build for %s, so torch searches %d slots", device.type, slots)
    return "faiss-flat" if usable else "exact"


def tier_now(chosen: Mapping[str, str], scope: str | Sequence[int], config: MemoryConfig, plan: Plan) -> str:
    """The tier of a search with this scope by the present plan.

    Args:
        chosen: what `choose_tier` says, by scope.
    """
    if scope == "document":
        return chosen["document"]
    if config.tier == "auto" and plan.probing:
        return "ivf"
    if config.tier in ("ivf", "hnsw") and not plan.probing:
        return "exact"
    return chosen["global"]


def reason_of(scope: str, slots: int, device: torch.device, plan: Plan) -> str:
    """Why `auto` takes the tier that it takes, for a line in the log."""
    if scope == "document":
        return "each query sees the entries of one document only"
    if plan.probing and plan.lists:
        return f"{plan.trained_on:,} entries or more; {plan.probes} of {plan.lists} lists are probed"
    if slots < AUTO_FAISS_SLOTS:
        return f"fewer than {AUTO_FAISS_SLOTS:,} slots"
    if not faiss_index.available(device):
        return f"no FAISS build for {device.type}"
    return (f"{AUTO_FAISS_SLOTS:,} slots or more, and at the last review fewer than {AUTO_ENTRIES:,} entries, or a recall "
            "that lists did not reach")
