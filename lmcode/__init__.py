"""LMCODE: a transformer that reads and writes one long-term memory, sliced over all ranks, inside the training step.

The public names are loaded when they are first used, so that `lmcode --help` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lmcode.version import __version__ as __version__

if TYPE_CHECKING:
    from lmcode.config import ConfigError, LMCODEConfig, MemoryConfig, RunConfig, TrainConfig
    from lmcode.data.dataset import MemoryDataset, create_synthetic_dataset
    from lmcode.data.tokenizer import BPETokenizer, ByteTokenizer, load_tokenizer
    from lmcode.language_model import LMCODE
    from lmcode.memories.experiences import Retrieved
    from lmcode.memory.bank import LongTermMemory
    from lmcode.model.layer import MemoryAugmentedLayer
    from lmcode.model.lm import LMCODEOutput
    from lmcode.model.short_term import ShortTermMemory
    from lmcode.model.state import StreamState
    from lmcode.presets import load_run_config
    from lmcode.recipes.attach import attach
    from lmcode.report.analysis import analyze_memory_capacity, compute_memory_efficiency
    from lmcode.report.monitor import MemoryMonitor
    from lmcode.report.plots import plot_training_history, visualize_memory_flow
    from lmcode.report.run import generate_memory_report
    from lmcode.train.trainer import MemoryAwareTrainer

__all__ = ["BPETokenizer", "ByteTokenizer", "ConfigError", "LMCODE", "LMCODEConfig", "LMCODEOutput", "LongTermMemory",
           "MemoryAugmentedLayer", "MemoryAwareTrainer", "MemoryConfig", "MemoryDataset", "MemoryMonitor", "Retrieved",
           "RunConfig", "ShortTermMemory", "StreamState", "TrainConfig", "analyze_memory_capacity", "attach",
           "compute_memory_efficiency", "create_synthetic_dataset", "generate_memory_report", "load_run_config",
           "load_tokenizer", "plot_training_history", "visualize_memory_flow"]

_MODULES = {
    "lmcode.config": ("ConfigError", "LMCODEConfig", "MemoryConfig", "RunConfig", "TrainConfig"),
    "lmcode.memories.experiences": ("Retrieved",),
    "lmcode.language_model": ("LMCODE",),
    "lmcode.memory.bank": ("LongTermMemory",),
    "lmcode.model.layer": ("MemoryAugmentedLayer",),
    "lmcode.model.lm": ("LMCODEOutput",),
    "lmcode.model.state": ("StreamState",),
    "lmcode.model.short_term": ("ShortTermMemory",),
    "lmcode.presets": ("load_run_config",),
    "lmcode.recipes.attach": ("attach",),
    "lmcode.report.analysis": ("analyze_memory_capacity", "compute_memory_efficiency"),
    "lmcode.report.monitor": ("MemoryMonitor",),
    "lmcode.report.plots": ("plot_training_history", "visualize_memory_flow"),
    "lmcode.report.run": ("generate_memory_report",),
    "lmcode.data.tokenizer": ("BPETokenizer", "ByteTokenizer", "load_tokenizer"),
    "lmcode.data.dataset": ("MemoryDataset", "create_synthetic_dataset"),
    "lmcode.train.trainer": ("MemoryAwareTrainer",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lmcode' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)
