"""Pairs of a query and a row, from a table of scores to lists of candidates, and where a list may be cut.

numpy's sort and partition use vector instructions and take a sixth to a twentieth of the time of torch's on a CPU.
Letters: Q or N queries, P rows, W pairs, C candidates of a query.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def largest(score_QP: Tensor, k: int) -> Tensor:
    """The k largest scores of each row in no order, [Q, K]; all of them where there are fewer. May change its argument."""
    if score_QP.shape[1] <= k:
        return score_QP
    if score_QP.device.type != "cpu":
        return score_QP.topk(k, dim=1, sorted=False).values
    table_QP = score_QP.contiguous().numpy()
    table_QP.partition(table_QP.shape[1] - k, axis=1)
    return torch.from_numpy(table_QP[:, -k:])


def kth_largest(score_QP: Tensor, k: int) -> Tensor:
    """The k-th largest score of each row, [Q]; -inf where there are fewer than k. May change its argument."""
    best_QK = largest(score_QP, k)
    return best_QK.amin(dim=1) if best_QK.shape[1] == k else score_QP.new_full((len(score_QP),), -torch.inf)


def where(mask: Tensor) -> Tensor:
    """Positions in the flattened mask, ascending: int64."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.flatten().nonzero().squeeze(1)


def as_lists(query_W: Tensor, row_W: Tensor, queries: int) -> Tensor:
    """The rows of each query side by side, int64 [N, C]; -1 where a list ends."""
    order_W = torch.from_numpy(np.argsort(query_W.cpu().numpy(), kind="stable")).to(query_W.device)
    query_W, count_N = query_W[order_W], query_W.bincount(minlength=queries)
    place_W = torch.arange(len(query_W), device=query_W.device) - (count_N.cumsum(0) - count_N)[query_W]
    row_NC = torch.full((queries, int(count_N.max()) if queries else 0), -1, device=query_W.device)
    row_NC[query_W, place_W] = row_W[order_W]
    return row_NC


def best_places(score_QC: Tensor, k: int) -> Tensor:
    """Where the k largest scores of each row are, and all that equal the last: int64 [Q, L], -1 where a list ends."""
    at_W, C = where(score_QC >= kth_largest(score_QC.clone(), k)[:, None]), max(1, score_QC.shape[1])
    return as_lists(at_W // C, at_W % C, len(score_QC))
