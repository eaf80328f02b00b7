"""How many bytes the memories of a stream take, so that a bank and a cache of former windows can be given the same."""

from __future__ import annotations

import math

import numpy as np

from lmcode.config import LMCODEConfig, MemoryConfig, RunConfig
from lmcode.memory.entry import METADATA

NUMBER_BYTES = {"fp32": 4, "bf16": 2}


def cache_bytes(model: LMCODEConfig, precision: str = "fp32") -> int:
    """Bytes of one stream's cache of former windows (`model.cache_windows`): one input of each layer and token.
    (Keys and values, which are made from it, would take twice as many.)"""
    return model.num_layers * model.cache_tokens * model.hidden_size * NUMBER_BYTES[precision]


def slot_bytes(model: LMCODEConfig, memory: MemoryConfig) -> int:
    """Bytes of one slot of one layer's bank: keys, values, the addend to scores, and the columns kept beside them."""
    vectors = model.memory_heads * 2 * model.memory_head_dim * NUMBER_BYTES[memory.dtype]
    return vectors + NUMBER_BYTES["fp32"] + sum(np.dtype(kind).itemsize for kind in METADATA.values())


def bank_bytes(model: LMCODEConfig, memory: MemoryConfig, streams: int) -> float:
    """Bytes of the banks of all layers for each of the streams that share them."""
    return len(model.memory_layer_indices) * model.long_term_memory_slots * slot_bytes(model, memory) / streams


def equal_cache(config: RunConfig) -> int:
    """`model.cache_windows` of the smallest cache that takes at least the bytes of the banks of `config`, per stream.

    Raises:
        ValueError: for a run without a bank.
    """
    bank = bank_bytes(config.model, config.memory, config.train.streams)
    if not bank:
        raise ValueError("a cache of equal bytes needs a bank to be equal to: got long_term_memory_slots = "
                         f"{config.model.long_term_memory_slots}, memory_layers = {config.model.memory_layers}")
    return windows_of(bank, config.model, config.train.precision)


def windows_of(size: float, model: LMCODEConfig, precision: str = "fp32") -> int:
    """`model.cache_windows` of the smallest cache that takes at least so many bytes of a stream."""
    return math.ceil(size / cache_bytes(model.model_copy(update={"cache_windows": 1}), precision))
