"""Recipe `lmcode`: the read of our own model beside chosen layers of a backbone, opened by an output that begins at zero.

A layer's hidden states are normalised and read as in `model.long_term`: queries, keys and values of the read's own, one
softmax over the window's own past, the bank's hits and a null slot, a gate; what is recalled is added to what the layer
hands on. As the output's weights are zero at first, step 0 is the plain model. The read is trained, the backbone if one
wants.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lmcode.config import LMCODEConfig
from lmcode.model.layer import norm
from lmcode.model.lm import INITIAL_STD, begin_read
from lmcode.model.long_term import LongTermRead, Window
from lmcode.protocol import Candidates
from lmcode.recipes import foreign, recipe
from lmcode.recipes.anatomy import Anatomy
from lmcode.recipes.recipe import LayerCall, Left, Pass


def new_read(config: LMCODEConfig) -> LongTermRead:
    """A read as our own model begins with it, but for its output, which is zero."""
    read = LongTermRead(config)
    nn.init.normal_(read.query_key_value.weight, std=INITIAL_STD)
    nn.init.normal_(read.gate.weight, std=INITIAL_STD)
    nn.init.zeros_(read.gate.bias)
    nn.init.zeros_(read.output.weight)
    begin_read(read, config)
    return read


class OwnRead(recipe.Recipe):
    """A norm and a `LongTermRead` for each memory layer."""

    changes_layers = True
    offers_by_token = True

    def __init__(self, anatomy: Anatomy, config: LMCODEConfig, options: Any) -> None:
        super().__init__(anatomy, config, options)
        layers = [str(layer) for layer in config.memory_layer_indices]
        self.norms = nn.ModuleDict({layer: norm(config.hidden_size) for layer in layers})
        self.reads = nn.ModuleDict({layer: new_read(config) for layer in layers})

    @staticmethod
    def settings(sizes: Mapping[str, int], options: Any) -> dict[str, Any]:
        """One memory at two thirds of the depth, two heads of 64: as in the presets of our own model."""
        return {"memory_layers": (2 * sizes["num_layers"] // 3,), "memory_heads": 2, "memory_head_dim": 64}

    def after_layer(self, layer: int, hidden_BTD: Tensor, current: Pass, call: LayerCall) -> Tensor:
        B, T, _ = hidden_BTD.shape
        state, own_BTN = current.state, call.seen_B1TN[:, 0]
        pending_BHD = None if state is None else state.recipe[self._number(layer)]
        pending_valid_B = (torch.zeros(B, dtype=torch.bool, device=hidden_BTD.device) if state is None
                           else state.pending_valid_B)
        with_past = None if call.cache is None else partial(self._with_past, call.cache, layer, own_BTN.shape[-1])
        window = Window(current.namespace_B, pending_valid_B, current.reset_B, current.valid_BT, seen_BTT=own_BTN,
                        pending_key_BHD=pending_BHD, document_B=current.document_B, with_past=with_past)
        read: Any = self.reads[str(layer)]
        own_BTD = hidden_BTD.to(read.output.weight.dtype)  # the backbone may be bf16, and the read's weights are not
        recalled_BTD: Tensor = read(self.norms[str(layer)](own_BTD), window=window, retriever=current.retrievers[layer],
                                    tape=current.tape(layer))
        return hidden_BTD + recalled_BTD.to(hidden_BTD.dtype)

    def _number(self, layer: int) -> int:
        return self.config.memory_layer_indices.index(layer)

    def _with_past(self, cache: Any, layer: int, count: int, key_HBTD: Tensor,
                   value_HBTD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the last `count` tokens that transformers' cache has seen: those that the layer's mask is of,
        fewer than all where the model has a sliding window. They live in a room of the cache."""
        room = foreign.room(cache, self._number(layer))
        key_BHND, value_BHND = room.update(key_HBTD.transpose(0, 1), value_HBTD.transpose(0, 1))
        return key_BHND[:, :, -count:].transpose(0, 1), value_BHND[:, :, -count:].transpose(0, 1)

    def offered(self, layer: int, current: Pass, left: Left, known_BT: Tensor) -> Candidates:
        """One of each token of the window, as in our own model."""
        candidates = current.tape(layer).candidates
        if candidates is None:
            raise ValueError(f"layer {layer} has not read its memory in this pass")
        return candidates._replace(surprise_N=known_BT.flatten())

    def learned_numbers(self, layer: int) -> dict[str, list[float]]:
        read: Any = self.reads[str(layer)]
        numbers = {"temperature": read.log_temperature_H.exp(), "bias": read.retrieved_bias_H, "null": read.null_logit_H}
        return {name: number_H.detach().tolist() for name, number_H in numbers.items()}

    def blank_state(self, num_streams: int, device: torch.device | None) -> tuple[Tensor, ...]:
        key_BHD = torch.zeros(num_streams, self.config.memory_heads, self.config.memory_head_dim, device=device)
        return (key_BHD,) * len(self.config.memory_layer_indices)

    def next_state(self, current: Pass) -> tuple[Tensor, ...]:
        keys = [current.tape(layer).pending_key_BHD for layer in self.config.memory_layer_indices]
        return tuple(key for key in keys if key is not None)
