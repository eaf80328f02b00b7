"""Causal self-attention over one window. Letters here: A attention heads, D width of one of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmcode.config import LMCODEConfig
from lmcode.model.cache import LayerCache
from lmcode.model.rotary import Rotation, rotate


class SelfAttention(nn.Module):
    """Multi-head causal attention without biases: [B, T, C] -> [B, T, C]."""

    def __init__(self, config: LMCODEConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.output = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x_BTC: Tensor, *, rotation: Rotation | None = None, cache: LayerCache | None = None,
                seen_BTT: Tensor | None = None, past_BLC: Tensor | None = None,
                seen_past_BTL: Tensor | None = None) -> Tensor:
        """Attends to tokens at or before each position; `rotation` is None where positions are learned elsewhere.

        Padding needs no mask: it only ever trails, so no real token can see it. Keys and values go into `cache`, if there
        is one, for the tokens to come. `seen_BTT`, where documents share a window, says which tokens (last dim) each may
        see. `past_BLC` are the inputs of L tokens before the window, of which `seen_past_BTL` ([B, T or 1, L]) are seen; the
        rotation is then that of L + T positions.
        """
        B, T, C = x_BTC.shape
        if past_BLC is not None and seen_past_BTL is not None:
            seen_BTT = with_past(seen_past_BTL, seen_BTT, T)
            x_BTC = torch.cat([past_BLC.to(x_BTC.dtype), x_BTC], dim=1)
        qkv_BTPAD = self.query_key_value(x_BTC).view(B, -1, 3, self.num_heads, C // self.num_heads)
        query_key_BTPAD, value_BTAD = qkv_BTPAD[:, :, :2], qkv_BTPAD[:, :, 2]
        if rotation is not None:
            query_key_BTPAD = rotate(query_key_BTPAD, rotation)
        q_BATD, k_BATD = query_key_BTPAD.permute(2, 0, 3, 1, 4)
        q_BATD, v_BATD = q_BATD[:, :, -T:], value_BTAD.transpose(1, 2)
        if cache is not None:
            cache.fill("attention", torch.stack([k_BATD, v_BATD]))
        mixed_BATD = F.scaled_dot_product_attention(q_BATD, k_BATD, v_BATD, is_causal=seen_BTT is None,
                                                    attn_mask=None if seen_BTT is None else seen_BTT[:, None],
                                                    dropout_p=self.dropout if self.training else 0.0)
        output_BTC: Tensor = self.output(mixed_BATD.transpose(1, 2).reshape(B, T, C))
        return output_BTC


def with_past(seen_past_BTL: Tensor, seen_BTT: Tensor | None, num_tokens: int) -> Tensor:
    """What a window's tokens see of their past and of their window, side by side: bool [B, T, L + T]."""
    B, _, L = seen_past_BTL.shape
    if seen_BTT is None:
        seen_BTT = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=seen_past_BTL.device).tril()
    return torch.cat([seen_past_BTL.expand(B, num_tokens, L), seen_BTT.expand(B, num_tokens, num_tokens)], dim=2)
