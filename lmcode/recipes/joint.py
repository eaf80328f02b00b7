"""Attention over several sets of keys in one softmax, as pure functions: a window's own keys and a memory's.

Letters: B rows, H key-value heads, T queries, N keys, D width; X behind B are the query heads, X behind H (or T) those that
share one of the H.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lmcode.protocol import NO_SCORE


def attend_own(query_BXTD: Tensor, key_BHND: Tensor, value_BHND: Tensor, seen_B1TN: Tensor, *, scaling: float,
               dropout: float = 0.0) -> tuple[Tensor, Tensor]:
    """Softmax attention with its log-sum-exp, which scaled_dot_product_attention does not return.

    Returns:
        fp32 value [B, X, T, D] and log-sum-exp [B, X, T].
    """
    H = key_BHND.shape[1]
    query_BHXTD = query_BXTD.float().unflatten(1, (H, -1))
    score_BHXTN = query_BHXTD @ key_BHND.float().unsqueeze(2).transpose(-1, -2) * scaling
    score_BHXTN = score_BHXTN.masked_fill(~seen_B1TN.unsqueeze(2), NO_SCORE)
    lse_BHXT = score_BHXTN.logsumexp(-1)
    weight_BHXTN = (score_BHXTN - lse_BHXT.unsqueeze(-1)).exp()
    if dropout:
        weight_BHXTN = F.dropout(weight_BHXTN, dropout)
    value_BHXTD = weight_BHXTN @ value_BHND.float().unsqueeze(2)
    return value_BHXTD.flatten(1, 2), lse_BHXT.flatten(1, 2)


def queries_of(query_BXTD: Tensor, kv_heads: int) -> Tensor:
    """The queries as a bank takes them: [H, N, D] with N = B * T * X, by row, token and head of the group."""
    query_HBTXD: Tensor = query_BXTD.unflatten(1, (kv_heads, -1)).permute(1, 0, 3, 2, 4)
    return query_HBTXD.flatten(1, 3)


def per_query(of_BT: Tensor, group: int) -> Tensor:
    """A property of tokens for each of these queries: [N]."""
    return of_BT.flatten().repeat_interleave(group)


def answers_of(part_HND: Tensor, like_BXTD: Tensor) -> Tensor:
    """What came back for `queries_of`, in the model's layout: [B, X, T, D]."""
    B, X, T, _ = like_BXTD.shape
    H = part_HND.shape[0]
    part_BHXTD: Tensor = part_HND.unflatten(1, (B, T, X // H)).permute(1, 0, 3, 2, 4)
    return part_BHXTD.reshape(B, X, T, -1)


def share_per_query(share_BXT: Tensor, kv_heads: int) -> Tensor:
    """From the model's layout to the bank's: [H, N]."""
    return queries_of(share_BXT.unsqueeze(-1), kv_heads).squeeze(-1)


def seen_of(mask: Tensor | None, *, rows: int, queries: int, keys: int, device: torch.device) -> Tensor:
    """Which keys each query sees, bool [B, 1, T, N], from what a model hands its attention."""
    if mask is None:
        seen_TN = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
        return seen_TN.expand(rows, 1, -1, -1)
    seen = mask if mask.dtype == torch.bool else mask >= 0  # an additive mask has the lowest number where nothing is seen
    return seen[:, :, :, :keys].expand(rows, -1, -1, -1)
