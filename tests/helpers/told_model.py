"""A model with a tokenizer of its own that was told two texts, one of them secret."""

from __future__ import annotations

import torch

from lmcode import LMCODE, BPETokenizer, LMCODEConfig, MemoryConfig
from lmcode.dist import Group

CONFIG = LMCODEConfig(vocab_size=300, hidden_size=32, num_layers=3, num_heads=2, context_length=32, short_term_memory_size=4,
                      short_term_dim=8, long_term_memory_slots=256, memory_head_dim=8, memory_top_k=4, memory_layers=(0, 2))
MEMORY = MemoryConfig(virtual_shards=4, experience_slots=64)
SECRET = "the xylophone is hidden under the bridge"


def make_model(*, group: Group | None = None, slots: int = 256) -> LMCODE:
    torch.manual_seed(3)
    model = LMCODE(CONFIG.model_copy(update={"long_term_memory_slots": slots}), memory=MEMORY, group=group)
    model.tokenizer = BPETokenizer.train([SECRET, "what comes next"], 280)
    return model


def tell(model: LMCODE) -> None:
    model.store_experience([SECRET, "a second text"], namespace=["zebras", 7], importance=2.0, stored_at=1_700_000_000)
