"""LMCODE: a transformer that reads and writes one long-term memory, sliced over all ranks, inside the training step.

The public names are loaded when they are first used, so that `lmcode --help` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmcode.config import ConfigError, LMCODEConfig, MemoryConfig, RunConfig, TrainConfig
    from lmcode.experience import Retrieved
    from lmcode.lmcode import LMCODE
    from lmcode.memory.bank import LongTermMemory
    from lmcode.model.layer import MemoryAugmentedLayer
    from lmcode.model.lm import LMCODEOutput, StreamState
    from lmcode.model.short_term import ShortTermMemory
    from lmcode.presets import load_run_config
    from lmcode.tokenizer import BPETokenizer, ByteTokenizer, load_tokenizer
    from lmcode.train.dataset import MemoryDataset, create_synthetic_dataset
    from lmcode.train.trainer import MemoryAwareTrainer

__version__ = "0.1.0"
__all__ = ["BPETokenizer", "ByteTokenizer", "ConfigError", "LMCODE", "LMCODEConfig", "LMCODEOutput", "LongTermMemory",
           "MemoryAugmentedLayer", "MemoryAwareTrainer", "MemoryConfig", "MemoryDataset", "Retrieved", "RunConfig",
           "ShortTermMemory", "StreamState", "TrainConfig", "create_synthetic_dataset", "load_run_config", "load_tokenizer"]

_MODULES = {
    "lmcode.config": ("ConfigError", "LMCODEConfig", "MemoryConfig", "RunConfig", "TrainConfig"),
    "lmcode.experience": ("Retrieved",),
    "lmcode.lmcode": ("LMCODE",),
    "lmcode.memory.bank": ("LongTermMemory",),
    "lmcode.model.layer": ("MemoryAugmentedLayer",),
    "lmcode.model.lm": ("LMCODEOutput", "StreamState"),
    "lmcode.model.short_term": ("ShortTermMemory",),
    "lmcode.presets": ("load_run_config",),
    "lmcode.tokenizer": ("BPETokenizer", "ByteTokenizer", "load_tokenizer"),
    "lmcode.train.dataset": ("MemoryDataset", "create_synthetic_dataset"),
    "lmcode.train.trainer": ("MemoryAwareTrainer",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lmcode' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)
