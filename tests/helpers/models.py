"""Small models, with something in memory or ready to remember."""

from __future__ import annotations

from typing import Any

import torch

from lmcode import dist
from lmcode.config import LMCODEConfig, MemoryConfig
from lmcode.data.tokenizer import ByteTokenizer
from lmcode.dist import Group
from lmcode.language_model import LMCODE
from lmcode.model.lm import MemoryLM

SHAPE = {"vocab_size": 257, "hidden_size": 32, "num_layers": 3, "num_heads": 2, "context_length": 32,
         "memory_layers": (0, 2), "short_term_memory_size": 4, "short_term_dim": 8, "short_term_segment": 8,
         "memory_head_dim": 16, "memory_top_k": 4, "memory_bias": 2.0, "long_term_memory_slots": 240}
TEXTS = [f"The {one} of document {number} is {number * 37}; " * 6 for number, one in enumerate(("key", "word", "name"))]


def small_model(group: Group | None = None, *, memory: dict[str, Any] | None = None, **changes: Any) -> LMCODE:
    """A model with random weights and empty banks, the same on every rank; sharp heads, so that its hits differ."""
    torch.manual_seed(0)
    model = LMCODE(LMCODEConfig(**{**SHAPE, **changes}), memory=MemoryConfig(virtual_shards=12, **(memory or {})),
                   group=group)
    with torch.no_grad():
        for layer in model.config.memory_layer_indices:
            model.layers[layer].long_term_read.query_key_value.weight.mul_(8)
    return model


def far_from_initial(model: MemoryLM) -> MemoryLM:
    """The model with weights far from its small initial values and retrieval let in, so that every path carries weight."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3)
            if name.endswith("retrieved_bias_H"):
                parameter.zero_()
    return model


def ids_of(text: str) -> list[int]:
    return ByteTokenizer().encode(text)


def remember(model: LMCODE, texts: list[str], *, steps: int = 3, count_hits: bool = True) -> Any:
    """Reads the texts window by window as documents and commits what they offer; returns the last output.

    All ranks read the same and rank 0's candidates are written, so the content does not depend on how many there are; but
    hits, if they are counted, count once for each rank.
    """
    output = state = None
    rows = torch.tensor([ids_of(text)[:96] for text in texts])
    with torch.no_grad():
        for step in range(steps):
            output = model(rows[:, step * 32:(step + 1) * 32], state=state, reset_B=torch.full((len(texts),), step == 0))
            state = output.state
            for layer, bank in model.banks.items():
                candidates = output.memory[layer].candidates
                mine_N = candidates.valid_N & (bank.group.rank == 0)
                hits = [output.memory[layer].hits] if count_hits else []
                bank.commit([candidates._replace(valid_N=mine_N)], hits, step=step)
    return output


def model_of(*, slots: int = 4000, memory: dict[str, Any] | None = None, group: dist.Group | None = None,
             **changes: Any) -> LMCODE:
    """A model of random weights that has room for texts."""
    torch.manual_seed(0)
    config = LMCODEConfig(**{**dict(vocab_size=300, hidden_size=16, num_layers=2, num_heads=2, context_length=32,
                                    short_term_memory_size=2, short_term_dim=8, long_term_memory_slots=slots,
                                    memory_head_dim=8, memory_top_k=4), **changes})
    settings = MemoryConfig(**{"virtual_shards": 6, "experience_slots": 600, **(memory or {})})
    return LMCODE(config, memory=settings, group=group)


TWO_LAYERS = {"vocab_size": 257, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "context_length": 16,
              "memory_layers": (1,), "short_term_memory_size": 4, "short_term_dim": 8, "short_term_segment": 8,
              "memory_head_dim": 8, "memory_top_k": 4, "memory_bias": 2.0}


def model_with(slots: int, **memory: object) -> LMCODE:
    """A model of two layers whose second has a memory of so many slots that shows in the loss."""
    torch.manual_seed(0)
    model = LMCODE(LMCODEConfig(**TWO_LAYERS, long_term_memory_slots=slots), memory=MemoryConfig(virtual_shards=4, **memory))
    with torch.no_grad():  # sharp heads and open gates, so that what is retrieved shows in the loss
        for parameter in model.layers[1].long_term_read.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)
    return model
