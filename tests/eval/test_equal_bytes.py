"""The bytes that are said of a bank and of a cache are those that tensors take."""

from __future__ import annotations

import pytest
import torch

from lmcode import LMCODE, presets
from lmcode.config import LMCODEConfig, MemoryConfig, build
from lmcode.eval.equal_bytes import bank_bytes, cache_bytes, equal_cache

SHAPE = {"vocab_size": 40, "hidden_size": 32, "num_layers": 3, "num_heads": 2, "context_length": 8, "memory_layers": (0, 2),
         "short_term_memory_size": 0, "long_term_memory_slots": 64, "memory_head_dim": 8, "memory_top_k": 4,
         "cache_windows": 2}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_bytes_are_those_of_the_tensors(dtype: str) -> None:
    memory = MemoryConfig(virtual_shards=4, dtype=dtype)
    model = LMCODE(LMCODEConfig(**SHAPE), memory=memory)
    ids_BT = torch.zeros(2, 8, dtype=torch.int64)
    past = model(ids_BT).state.past
    assert cache_bytes(model.config) == sum(one[0].nbytes for one in past)
    held = sum(table.nbytes for shard in (bank.shard for bank in model.banks.values())
               for table in (shard.key_HMD, shard.value_HMD, shard.addend_M, *shard.columns.values()))
    assert bank_bytes(model.config, memory, streams=5) == held / 5


def test_an_equal_cache_is_the_smallest_that_is_no_smaller() -> None:
    config = presets.tiny()
    windows = equal_cache(config)
    sizes = [cache_bytes(config.model.model_copy(update={"cache_windows": one})) for one in (windows - 1, windows)]
    assert sizes[0] < bank_bytes(config.model, config.memory, config.train.streams) <= sizes[1]
    with pytest.raises(ValueError, match="needs a bank to be equal to"):
        equal_cache(build(type(config), {**config.model_dump(), "model": {**config.model.model_dump(),
                                                                          "long_term_memory_slots": 0}}))
