"""Causal self-attention over one window, with rotary positions.

The rotation is a pair of tables made once per forward pass by the model and handed down, not a buffer: a buffer would
be cast to bf16 with the weights. Letters here: A attention heads, D width of one of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmcode.config import LMCODEConfig

if TYPE_CHECKING:
    from lmcode.model.cache import LayerCache

Rotation = tuple[Tensor, Tensor]  # cos and sin, each fp32 [T, D/2], or [B, T, D/2] where streams stand apart
ROTARY_BASE = 10000.0


def rotary_table(num_tokens: int, head_dim: int, *, device: torch.device | None = None) -> Rotation:
    """Cosine and sine of position x frequency, each fp32 [T, D/2] (Su et al. 2021, RoFormer, section 3.2)."""
    exponent_F = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    position_T = torch.arange(num_tokens, device=device, dtype=torch.float32)
    angle_TF = torch.outer(position_T, ROTARY_BASE**-exponent_F)
    return angle_TF.cos(), angle_TF.sin()


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turns each pair (d, d + D/2) of `x` [B, T, ..., D] by its position's angle; computed in fp32, dtype kept."""
    between = (1,) * (x.dim() - 3)
    cos, sin = (table.view(*table.shape[:-1], *between, table.shape[-1]) for table in rotation)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class SelfAttention(nn.Module):
    """Multi-head causal attention without biases: [B, T, C] -> [B, T, C]."""

    def __init__(self, config: LMCODEConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.output = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x_BTC: Tensor, *, rotation: Rotation | None = None, cache: LayerCache | None = None) -> Tensor:
        """Attends to tokens at or before each position; `rotation` is None where positions are learned elsewhere.

        Padding needs no mask: it only ever trails, so no real token can see it. Keys and values go into `cache`, if there
        is one; in a step, T is 1 and the earlier tokens are the cache's.
        """
        B, T, C = x_BTC.shape
        qkv_BTPAD = self.query_key_value(x_BTC).view(B, T, 3, self.num_heads, C // self.num_heads)
        query_key_BTPAD, value_BTAD = qkv_BTPAD[:, :, :2], qkv_BTPAD[:, :, 2]
        if rotation is not None:
            query_key_BTPAD = rotate(query_key_BTPAD, rotation)
        q_BATD, k_BATD = query_key_BTPAD.permute(2, 0, 3, 1, 4)
        v_BATD = value_BTAD.transpose(1, 2)
        if cache is not None and cache.step is not None:
            step = cache.step
            num_seen = step.seen_BT.shape[1]
            key_BATD, value_BATD = (cache.put(name, new_BA1D, step.index_B)[:, :, :num_seen]
                                    for name, new_BA1D in (("attention_key", k_BATD), ("attention_value", v_BATD)))
            mixed_BATD = F.scaled_dot_product_attention(q_BATD, key_BATD, value_BATD,
                                                        attn_mask=step.seen_BT[:, None, None])
            return self.output(mixed_BATD.transpose(1, 2).reshape(B, T, C))
        if cache is not None:
            cache.fill("attention_key", k_BATD)
            cache.fill("attention_value", v_BATD)
        mixed_BATD = F.scaled_dot_product_attention(q_BATD, k_BATD, v_BATD, is_causal=True,
                                                    dropout_p=self.dropout if self.training else 0.0)
        return self.output(mixed_BATD.transpose(1, 2).reshape(B, T, C))
