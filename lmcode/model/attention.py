"""Causal self-attention over one window. D is the width of the model or of one head."""

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
                seen_BTT: Tensor | None = None) -> Tensor:
        """Attends to tokens at or before each position; `rotation` is None where positions are learned elsewhere.

        Padding needs no mask: it only ever trails, so no real token can see it. Keys and values go into `cache`, if there
        is one, for the tokens to come. `seen_BTT`, where documents share a window, says which tokens (last dim) each may
        see.
        """
        B, T, width = x_BTD.shape
        qkv_BTXHD = self.query_key_value(x_BTD).view(B, T, 3, self.num_heads, width // self.num_heads)
        query_key_BTXHD, value_BTHD = qkv_BTXHD[:, :, :2], qkv_BTXHD[:, :, 2]
        if rotation is not None:
            query_key_BTXHD = rotate(query_key_BTXHD, rotation)
        q_BHTD, k_BHTD = query_key_BTXHD.permute(2, 0, 3, 1, 4)
        v_BHTD = value_BTHD.transpose(1, 2)
        if cache is not None:
            cache.fill("attention", torch.stack([k_BHTD, v_BHTD]))
        mixed_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=seen_BTT is None,
                                                    attn_mask=None if seen_BTT is None else seen_BTT[:, None],
                                                    dropout_p=self.dropout if self.training else 0.0)
        output_BTD: Tensor = self.output(mixed_BHTD.transpose(1, 2).reshape(B, T, width))
        return output_BTD
