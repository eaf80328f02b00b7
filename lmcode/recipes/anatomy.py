"""The parts of one transformers model, whatever its family: layers, attention modules, the rotation of positions, a hash.

The names are those of `backbone_config.FAMILIES`; rotating is done by the model's own functions.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lmcode.backbone_config import family_of, sizes_of

SAMPLED = 4096  # numbers of each parameter that the backbone's hash is made of
Tables = tuple[Tensor, Tensor]  # cosines and sines


class Anatomy:
    """The parts of one transformers model.

    Attributes:
        base: the model without its head. layers: its decoder layers. norm: what normalises the last one's output.
        sizes: those of `backbone_config.NAMES`.
    """

    def __init__(self, model: Any) -> None:
        self.family = family_of(model.config.model_type)
        self.base: nn.Module = model.base_model
        self.layers: list[nn.Module] = list(getattr(self.base, self.family.layers))
        self.norm: nn.Module = getattr(self.base, self.family.norm)
        self.sizes = sizes_of(model.config.to_dict())

    def attention(self, layer: int) -> nn.Module:
        """The attention module of a layer."""
        module: nn.Module = getattr(self.layers[layer], self.family.attention)
        return module

    @property
    def rotary(self) -> Any:
        """The module that makes tables of rotation, or None."""
        return getattr(self.base, "rotary_emb", None) if self.family.rotates else None

    def tables(self, position_BT: Tensor, like: Tensor) -> Tables | None:
        """Cosines and sines of positions, as the model makes them; None where it does not rotate."""
        if self.rotary is None:
            return None
        cos, sin = self.rotary.forward(like, position_BT)  # past its hooks, since this is no pass of the model
        return cos, sin

    def rotate(self, x_BHTD: Tensor, tables: Tables | None, *, back: bool = False) -> Tensor:
        """Vectors turned to their positions by the model's own function, or `back` from them."""
        if tables is None:
            return x_BHTD
        cos, sin = tables
        turn: Callable[..., Any] = sys.modules[type(self.attention(0)).__module__].apply_rotary_pos_emb
        turned: Tensor = turn(x_BHTD, x_BHTD, cos, -sin if back else sin)[0]
        scale, part = getattr(self.rotary, "attention_scaling", 1.0), cos.shape[-1]
        if back and scale != 1.0:  # some ways to extend a context scale the tables, too
            turned = torch.cat([turned[..., :part] / scale**2, turned[..., part:]], dim=-1)
        return turned

    def at_distance(self, query_BXTD: Tensor, distance: int) -> Tensor:
        """Queries, given as they are before their rotation, turned so that keys before theirs lie `distance` positions
        behind them; which is as good as turning every key back by it."""
        return self.rotate(query_BXTD, self.tables(torch.full((1, 1), distance, device=query_BXTD.device), query_BXTD))


def hash_of(model: nn.Module) -> str:
    """A hash of a model's weights: names, shapes and some `SAMPLED` evenly spaced numbers of each parameter, so that a large
    model costs as little as a small one. Weights that differ nowhere in the sample have the same."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in sorted(model.named_parameters()):
        flat_N = parameter.detach().flatten()
        step = max(1, flat_N.numel() // SAMPLED)
        digest.update(f"{name} {tuple(parameter.shape)};".encode())
        digest.update(flat_N[::step][:SAMPLED].float().cpu().numpy().tobytes())
    return digest.hexdigest()
