"""What is asked of transformers: models from folders, our attention registered, rooms in its caches. No other file of this
package imports it.

An attached model calls `attend` in every layer (`AttentionInterface`), with a mask that is always there: without a mask
function of the same name transformers would pass none, and causality would be lost without a word.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

from lmcode.config import ConfigError

NAME = "lmcode_memory"
PASS = "lmcode_pass"  # the keyword that takes a pass of the model through its layers, also when they are recomputed


def attend(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
           **settings: Any) -> tuple[Tensor, None]:
    """The attention of an attached model: that of its pass, or plain where there is none."""
    current = settings.pop(PASS, None)
    if current is None:
        return plain(module, query, key, value, mask, **settings)
    result: Tensor = current.attend(module, query, key, value, mask, **settings)
    return result, None


def plain(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
          **settings: Any) -> tuple[Tensor, None]:
    """transformers' own attention by scaled_dot_product_attention."""
    output: Tensor = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **settings)[0]
    return output, None


def mask(*args: Any, **settings: Any) -> Tensor | None:
    """The mask of `attend`: bool [B, 1, T, N], never left out."""
    made: Tensor | None = sdpa_mask(*args, **{**settings, "allow_is_causal_skip": False})
    return made


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, mask)


def load(folder: str, *, dtype: torch.dtype = torch.float32) -> Any:
    """The model in a folder. ConfigError if transformers cannot read it."""
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"the backbone '{folder}' cannot be read: {' '.join(str(error).split())[:200]}") from None


def blank(folder: str) -> Any:
    """A model of the shape of the one in a folder, its weights drawn at random (or none, on the device meta)."""
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))


def is_model(model: Any) -> bool:
    """Whether it is a causal language model of transformers."""
    return isinstance(model, PreTrainedModel) and model.get_output_embeddings() is not None


def recompute(model: Any, on: bool) -> None:
    """Switches the recomputation of layers in the backward pass on or off, by the name that this version has for it."""
    if on:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    else:
        disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
        disable()


def cache_in(values: Iterable[Any]) -> Cache | None:
    """The cache among the arguments of a layer, whatever it is called there."""
    return next((one for one in values if isinstance(one, Cache)), None)


def cache_name(model: Any) -> str:
    """What the model calls its cache: `past_key_values` until transformers 5.23, `cache` from 5.24 on."""
    known = inspect.signature(model.forward).parameters
    return "past_key_values" if "past_key_values" in known else "cache"


def new_cache(model: Any) -> Cache:
    """An empty cache for one generation."""
    return DynamicCache(config=model.config)


def room(cache: Cache, index: int) -> DynamicLayer:
    """Room number `index` behind the cache's own layers, for keys and values of a recipe's own: transformers then reorders,
    repeats and cuts it with the rest. ValueError for a cache that does not grow."""
    if not isinstance(cache, DynamicCache):
        raise ValueError(f"a memory with keys of its own needs a DynamicCache: got {type(cache).__name__}")
    own = [layer for layer in cache.layers if isinstance(layer, Room)]
    while len(own) <= index:
        own.append(Room())  # type: ignore[no-untyped-call]  # transformers' own
        cache.layers.append(own[-1])
    return own[index]


class Room(DynamicLayer):
    """A layer of a cache that holds what is not the model's."""
