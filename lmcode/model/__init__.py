"""The model: plain `nn.Module`s that are built and tested with torch alone and know nothing of ranks or banks."""

from __future__ import annotations

from lmcode.model.layer import MemoryAugmentedLayer
from lmcode.model.lm import LMCODEOutput, MemoryLM
from lmcode.model.long_term import LongTermRead, ReadTape, Window, merge_partials
from lmcode.model.short_term import ShortTermMemory
from lmcode.model.state import StreamState
from lmcode.protocol import LayerMemory

__all__ = ["LMCODEOutput", "LayerMemory", "LongTermRead", "MemoryAugmentedLayer", "MemoryLM", "ReadTape",
           "ShortTermMemory", "StreamState", "Window", "merge_partials"]
