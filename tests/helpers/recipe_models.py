"""Tiny random models of every family that a recipe can be attached to, made from configs: no download."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

import lmcode
from lmcode.config import RECIPES

VOCAB = 300
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
         "max_position_embeddings": 256, "intermediate_size": 48}
GROUPED = {**SIZES, "num_key_value_heads": 2}
FAMILIES: dict[str, functools.partial[PretrainedConfig]] = {
    "llama": functools.partial(LlamaConfig, **GROUPED),
    "mistral": functools.partial(MistralConfig, **GROUPED, sliding_window=48),
    "qwen2": functools.partial(Qwen2Config, **GROUPED),
    "qwen3": functools.partial(Qwen3Config, **GROUPED, head_dim=8),
    "gpt2": functools.partial(GPT2Config, vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=256),
    "gpt_neox": functools.partial(GPTNeoXConfig, **SIZES),
}
# What differs between recipes in a test: a new recipe joins by a line.
OPTIONS: dict[str, dict[str, Any]] = {"camelot": {"memory_bias": 0.0}, "knn": {"memory_bias": -2.0},
                                     "lmcode": {"memory_bias": 0.0},
                                     "longmem": {}, "memorag": {"ratio": 3},
                                     "mplus": {"memory_bias": 0.0, "pool": 8, "compressed": 4}}
assert set(OPTIONS) == set(RECIPES)


def plain(family: str, *, seed: int = 0) -> Any:
    """A model of a family, as transformers makes it, with weights that matter more than its own initialisation's."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return model


def attached(family: str, recipe: str, *, seed: int = 0, opened: bool = True, **options: Any) -> Any:
    """The same model with a memory. opened: what the recipe has of its own weights are drawn at random, none is zero."""
    model = plain(family, seed=seed)
    lmcode.attach(model, recipe, memory=options.pop("memory", {"virtual_shards": 4}),
                  **{"long_term_memory_slots": 256, "sinks": 2, "cache": 6, **OPTIONS[recipe], **options})
    if opened:
        torch.manual_seed(seed + 1)
        with torch.no_grad():
            for parameter in model.lmcode.recipe.parameters():
                if parameter.dim() > 1 or not bool(parameter.any()):
                    parameter.normal_(std=0.2)
    return model


def tokens(rows: int, length: int, *, seed: int = 0) -> torch.Tensor:
    """Random ids [B, T]."""
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def read(model: Any, ids_BT: torch.Tensor, *, window: int, write: bool = True) -> tuple[torch.Tensor, list[Any]]:
    """The losses [B, T-1] of texts that are read window by window in our way, each window's entries being written before
    the next; and the outputs."""
    backbone, state, outputs = model.lmcode, None, []
    targets_BT = torch.cat([ids_BT[:, 1:], torch.full_like(ids_BT[:, :1], -100)], dim=1)
    with torch.no_grad():
        for start in range(0, ids_BT.shape[1], window):
            part = slice(start, start + window)
            outputs.append(backbone(ids_BT[:, part], targets_BT=targets_BT[:, part], state=state))
            state = outputs[-1].state
            if write:
                backbone.memories.commit({layer: [one] for layer, one in outputs[-1].memory.items()}, step=start)
    return torch.cat([output.token_loss for output in outputs], dim=1)[:, :-1], outputs
