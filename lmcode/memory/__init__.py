"""The bank: one logical long-term memory, sliced over the ranks of a group. It knows no model and no training."""

from __future__ import annotations

from lmcode.memory.bank import LongTermMemory
from lmcode.memory.entry import CommitReport
from lmcode.memory.store import load_bank, load_shard, save_bank, save_shard
from lmcode.protocol import ConsolidationReport

__all__ = ["CommitReport", "ConsolidationReport", "LongTermMemory", "load_bank", "load_shard", "save_bank",
           "save_shard"]
