"""`LMCODE`: the language model together with its banks, as users know it.

The joint between two packages that do not know each other: `model/` (a plain module that asks a retriever) and `memory/`
(banks that know no model). Everything public about a model with memory is reached from here.
"""

from __future__ import annotations

import torch

from lmcode.config import LMCODEConfig, MemoryConfig
from lmcode.dist import Group
from lmcode.memory.bank import LongTermMemory
from lmcode.model.lm import MemoryLM


class LMCODE(MemoryLM):
    """A `MemoryLM` that owns one bank per memory layer, sliced over the ranks of `group`.

    Args:
        config: shape of the model; `long_term_memory_slots` = 0 leaves the banks out (the read keeps its local part).
        memory: how the banks store, search and exchange.
        group: the ranks that share the banks; this process alone by default.
        device: where the banks' rows live; the CPU by default.

    The banks are plain attributes, neither parameters nor buffers: `state_dict`, casts and ZeRO leave them alone.
    """

    def __init__(self, config: LMCODEConfig, *, memory: MemoryConfig | None = None, group: Group | None = None,
                 device: torch.device | str = "cpu") -> None:
        self.memory_config = memory or MemoryConfig()
        banks = {}
        if config.long_term_memory_slots:
            for layer in config.memory_layer_indices:
                banks[layer] = LongTermMemory(
                    heads=config.memory_heads, head_dim=config.memory_head_dim, slots=config.long_term_memory_slots,
                    top_k=config.memory_top_k, config=self.memory_config, group=group or Group(),
                    device=torch.device(device))
        super().__init__(config, banks)
        self.banks: dict[int, LongTermMemory] = banks
