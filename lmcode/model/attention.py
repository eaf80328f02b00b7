"""Causal self-attention over one window. Letters here: X tokens before the window."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmcode.config import LMCODEConfig
from lmcode.model.cache import LayerCache
from lmcode.model.rotary import Rotation, rotate


class SelfAttention(nn.Module):
    """Multi-head causal attention without biases: [B, T, D] -> [B, T, D]."""

    def __init__(self, config: LMCODEConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.output = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, *, rotation: Rotation | None = None, cache: LayerCache | None = None,
                seen_BTT: Tensor | None = None, past_BXD: Tensor | None = None,
                seen_past_BTX: Tensor | None = None) -> Tensor:
        """Attends to tokens at or before each position; `rotation` is None where positions are learned elsewhere.

        Padding needs no mask: it only ever trails, so no real token can see it. Keys and values go into `cache`, if there
        is one, for the tokens to come. `seen_BTT`, where documents share a window, says which tokens (last dim) each may
        see. `past_BXD` are the inputs of X tokens before the window, of which `seen_past_BTX` ([B, T or 1, X]) are seen; the
        rotation is then that of X + T positions.
        """
        B, T, width = x_BTD.shape
        if past_BXD is not None and seen_past_BTX is not None:
            seen_BTT = with_past(seen_past_BTX, seen_BTT, T)
            x_BTD = torch.cat([past_BXD.to(x_BTD.dtype), x_BTD], dim=1)
        qkv_BT3HD = self.query_key_value(x_BTD).view(B, -1, 3, self.num_heads, width // self.num_heads)
        query_key_BT2HD, value_BTHD = qkv_BT3HD[:, :, :2], qkv_BT3HD[:, :, 2]
        if rotation is not None:
            query_key_BT2HD = rotate(query_key_BT2HD, rotation)
        q_BHTD, k_BHTD = query_key_BT2HD.permute(2, 0, 3, 1, 4)
        q_BHTD, v_BHTD = q_BHTD[:, :, -T:], value_BTHD.transpose(1, 2)
        if cache is not None:
            cache.fill("attention", torch.stack([k_BHTD, v_BHTD]))
        mixed_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=seen_BTT is None,
                                                    attn_mask=None if seen_BTT is None else seen_BTT[:, None],
                                                    dropout_p=self.dropout if self.training else 0.0)
        output_BTD: Tensor = self.output(mixed_BHTD.transpose(1, 2).reshape(B, T, width))
        return output_BTD


def with_past(seen_past_BTX: Tensor, seen_BTT: Tensor | None, num_tokens: int) -> Tensor:
    """What a window's tokens see of their past and of their window, side by side: bool [B, T, X + T]."""
    B, _, X = seen_past_BTX.shape
    if seen_BTT is None:
        seen_BTT = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=seen_past_BTX.device).tril()
    return torch.cat([seen_past_BTX.expand(B, num_tokens, X), seen_BTT.expand(B, num_tokens, num_tokens)], dim=2)
