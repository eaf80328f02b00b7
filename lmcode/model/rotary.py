"""Rotary positions: tables made once per forward pass, and the rotation of queries and keys by them.

The tables are handed down, not kept as a buffer: a buffer would be cast to bf16 with the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

Rotation = tuple[Tensor, Tensor]  # fp32 [T, 1, D/2] and [T, 2, D/2]
ROTARY_BASE = 10000.0


def rotary_table(num_tokens: int, head_dim: int, *, device: torch.device | None = None) -> Rotation:
    """Cosine of position x frequency, fp32 [T, 1, D/2], and its sine with both signs, - and +, fp32 [T, 2, D/2] (Su et
    al. 2021, RoFormer, section 3.2)."""
    exponent_X = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    position_T = torch.arange(num_tokens, device=device, dtype=torch.float32)
    angle_TX = torch.outer(position_T, ROTARY_BASE**-exponent_X)
    sin_TX = angle_TX.sin()
    return angle_TX.cos().unsqueeze(1), torch.stack([-sin_TX, sin_TX], dim=1)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turns each pair (d, d + D/2) of `x` [B, T, ..., D] by its position's angle; computed in fp32, dtype kept."""
    between = (1,) * (x.dim() - 3)
    cos, sin = (table.view(*table.shape[:-2], *between, *table.shape[-2:]) for table in rotation)
    pair = x.float().unflatten(-1, (2, -1))
    turned: Tensor = (pair * cos + pair.flip(-2) * sin).flatten(-2).to(x.dtype)
    return turned
