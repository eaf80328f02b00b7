"""Attention over several sets of keys in one softmax, as pure functions: a window's own keys and a memory's.

Letters: B rows, Q query heads, H key-value heads, G = Q / H query heads that share one, T queries, N keys, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lmcode.protocol import NO_SCORE


def attend_own(query_BQTD: Tensor, key_BHND: Tensor, value_BHND: Tensor, seen_B1TN: Tensor, *, scaling: float,
               dropout: float = 0.0) -> tuple[Tensor, Tensor]:
    """Softmax attention with its log-sum-exp, which scaled_dot_product_attention does not return.

    Returns:
        fp32 value [B, Q, T, D] and log-sum-exp [B, Q, T].
    """
    H = key_BHND.shape[1]
    query_BHGTD = query_BQTD.float().unflatten(1, (H, -1))
    score_BHGTN = query_BHGTD @ key_BHND.float().unsqueeze(2).transpose(-1, -2) * scaling
    score_BHGTN = score_BHGTN.masked_fill(~seen_B1TN.unsqueeze(2), NO_SCORE)
    lse_BHGT = score_BHGTN.logsumexp(-1)
    weight_BHGTN = (score_BHGTN - lse_BHGT.unsqueeze(-1)).exp()
    if dropout:
        weight_BHGTN = F.dropout(weight_BHGTN, dropout)
    value_BHGTD = weight_BHGTN @ value_BHND.float().unsqueeze(2)
    return value_BHGTD.flatten(1, 2), lse_BHGT.flatten(1, 2)


def queries_of(query_BQTD: Tensor, kv_heads: int) -> Tensor:
    """The queries as a bank takes them: [H, N, D] with N = B * T * G, by row, token and head of the group."""
    query_HBTGD: Tensor = query_BQTD.unflatten(1, (kv_heads, -1)).permute(1, 0, 3, 2, 4)
    return query_HBTGD.flatten(1, 3)


def per_query(of_BT: Tensor, group: int) -> Tensor:
    """A property of tokens for each of these queries: [N]."""
    return of_BT.flatten().repeat_interleave(group)


def answers_of(part_HNX: Tensor, like_BQTD: Tensor) -> Tensor:
    """What came back for `queries_of`, in the model's layout: [B, Q, T, X]."""
    B, Q, T, _ = like_BQTD.shape
    H = part_HNX.shape[0]
    part_BHGTX: Tensor = part_HNX.unflatten(1, (B, T, Q // H)).permute(1, 0, 3, 2, 4)
    return part_BHGTX.reshape(B, Q, T, -1)


def share_per_query(share_BQT: Tensor, kv_heads: int) -> Tensor:
    """From the model's layout to the bank's: [H, N]."""
    return queries_of(share_BQT.unsqueeze(-1), kv_heads).squeeze(-1)


def seen_of(mask: Tensor | None, *, rows: int, queries: int, keys: int, device: torch.device) -> Tensor:
    """Which keys each query sees, bool [B, 1, T, N], from what a model hands its attention."""
    if mask is None:
        seen_TN = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
        return seen_TN.expand(rows, 1, -1, -1)
    seen = mask if mask.dtype == torch.bool else mask >= 0  # an additive mask has the lowest number where nothing is seen
    return seen[:, :, :, :keys].expand(rows, -1, -1, -1)
