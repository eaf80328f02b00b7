"""Pairs of a query and a row, from a table of scores to lists of candidates, and where a list may be cut.

numpy's sort and partition use vector instructions and take a sixth to a twentieth of the time of torch's on a CPU.
Letters: N queries, M rows or candidates, X pairs.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def largest(score_NM: Tensor, k: int) -> Tensor:
    """The k largest scores of each row in no order, [N, K]; all of them where there are fewer. May change its argument."""
    if score_NM.shape[1] <= k:
        return score_NM
    if score_NM.device.type != "cpu":
        return score_NM.topk(k, dim=1, sorted=False).values
    table_NM = score_NM.contiguous().numpy()
    table_NM.partition(table_NM.shape[1] - k, axis=1)
    return torch.from_numpy(table_NM[:, -k:])


def kth_largest(score_NM: Tensor, k: int) -> Tensor:
    """The k-th largest score of each row, [N]; -inf where there are fewer than k. May change its argument."""
    best_NK = largest(score_NM, k)
    return best_NK.amin(dim=1) if best_NK.shape[1] == k else score_NM.new_full((len(score_NM),), -torch.inf)


def where(mask: Tensor) -> Tensor:
    """Positions in the flattened mask, ascending: int64."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.flatten().nonzero().squeeze(1)


def as_lists(query_X: Tensor, row_X: Tensor, queries: int) -> Tensor:
    """The rows of each query side by side, int64 [N, K]; -1 where a list ends."""
    order_X = torch.from_numpy(np.argsort(query_X.cpu().numpy(), kind="stable")).to(query_X.device)
    query_X, count_N = query_X[order_X], query_X.bincount(minlength=queries)
    place_X = torch.arange(len(query_X), device=query_X.device) - (count_N.cumsum(0) - count_N)[query_X]
    row_NK = torch.full((queries, int(count_N.max()) if queries else 0), -1, device=query_X.device)
    row_NK[query_X, place_X] = row_X[order_X]
    return row_NK


def best_places(score_NM: Tensor, k: int) -> Tensor:
    """Where the k largest scores of each row are, and all that equal the last: int64 [N, K], -1 where a list ends."""
    at_X, M = where(score_NM >= kth_largest(score_NM.clone(), k)[:, None]), max(1, score_NM.shape[1])
    return as_lists(at_X // M, at_X % M, len(score_NM))
