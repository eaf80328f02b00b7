"""Which of a shard's rows won a search, and what follows from that: weighted sums of their values, and the gradients.

Pure functions over a shard's tables, keys and values [H, M, D].
Letters: N queries of all ranks; X = N * H bags of winners, bag = query * H + head; E winners, an entry once for each bag
that it is in; M slots of this rank, or the rows of all heads' tables, one behind the other.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


class Ticket(NamedTuple):
    """The winners that this rank holds for all gathered queries, as `Hits.ticket`; valid until the bank changes.

    row_E: int64, head * M + slot: a row of the flattened tables. Winners are ordered by bag, then by the total order.
    bag_E: int64, the bag of each winner.
    offset_X: int64, where each bag starts.
    weight_E: fp32, share of the softmax over the query's hits.
    step_E: int64, the step that wrote each winner.
    rows_per_rank: queries that each rank contributed, padding included.
    version: of the bank that was searched.
    """

    row_E: Tensor
    bag_E: Tensor
    offset_X: Tensor
    weight_E: Tensor
    step_E: Tensor
    rows_per_rank: int
    version: int


def weighted_sums(table_MD: Tensor, row_E: Tensor, offset_X: Tensor, weight_E: Tensor) -> Tensor:
    """fp32 [X, D], where the weights are: for each bag the weighted sum of its table rows, without a copy of the rows."""
    if table_MD.device != weight_E.device:
        there = (one.to(table_MD.device) for one in (row_E, offset_X, weight_E))
        return weighted_sums(table_MD, *there).to(weight_E.device)
    if table_MD.dtype != torch.float32:  # the sum must be fp32, so convert the rows in use, each once
        used, row_E = row_E.unique(return_inverse=True)
        table_MD = table_MD[used].float()
    if len(row_E) == 0:
        return table_MD.new_zeros(len(offset_X), table_MD.shape[1])
    return F.embedding_bag(row_E, table_MD, offset_X, mode="sum", per_sample_weights=weight_E)


def make_ticket(won_NHK: Tensor, score_NHK: Tensor, slot_NHK: Tensor, lse_NH: Tensor, *, step_M: np.ndarray,
                rows_per_rank: int, version: int) -> Ticket:
    """The ticket for those of a shard's local hits that won.

    Weights are computed in fp64, so that their fp32 value does not depend on how a processor vectorises exp.
    """
    flat_E = won_NHK.flatten().nonzero().squeeze(1)
    bag_E, slot_E = flat_E // won_NHK.shape[-1], slot_NHK.flatten()[flat_E]
    count_X = won_NHK.sum(-1).flatten()
    weight_E = (score_NHK.flatten()[flat_E].double() - lse_NH.flatten()[bag_E].double()).exp().float()
    step_E = torch.from_numpy(step_M[slot_E.cpu().numpy()]).to(slot_E.device)
    row_E = slot_E + (bag_E % won_NHK.shape[1]) * len(step_M)
    return Ticket(row_E, bag_E, count_X.cumsum(0) - count_X, weight_E, step_E, rows_per_rank, version)


def value_sums(value_HMD: Tensor, ticket: Ticket) -> Tensor:
    """For each bag the sum of weight * value over its winners: fp32 [X, D]."""
    return weighted_sums(value_HMD.flatten(0, 1), ticket.row_E, ticket.offset_X, ticket.weight_E)


def query_gradients(key_HMD: Tensor, value_HMD: Tensor, ticket: Ticket, grad_XD: Tensor, dot_X: Tensor,
                    grad_lse_X: Tensor) -> Tensor:
    """This shard's part of the gradient with respect to the queries, fp32 [X, D].

    With weights p_j, value o = sum_j p_j v_j, gradient g of o and g_l of the log-sum-exp, a score's gradient is
    ds_j = p_j (g . v_j - g . o + g_l), and the query's is sum_j ds_j k_j.

    Args:
        grad_XD: g.
        dot_X: g . o.
        grad_lse_X: g_l.
    """
    with torch.enable_grad():  # the weights' gradient of a weighted sum is g . v_j, without a copy of the rows
        weight_E = ticket.weight_E.detach().requires_grad_()
        sum_XD = weighted_sums(value_HMD.flatten(0, 1), ticket.row_E, ticket.offset_X, weight_E)
    dot_E = (torch.autograd.grad(sum_XD, weight_E, grad_XD)[0] if len(weight_E)
             else torch.zeros_like(ticket.weight_E))
    score_grad_E = ticket.weight_E * (dot_E + (grad_lse_X - dot_X)[ticket.bag_E])
    key_MD = key_HMD.flatten(0, 1)
    return weighted_sums(key_MD, ticket.row_E, ticket.offset_X, score_grad_E)


def winning_rows(key_HMD: Tensor, value_HMD: Tensor, ticket: Ticket, k: int) -> Tensor:
    """Keys and values of the winners, fp32 [X, K, 2 D]: a bag's first rows are its winners, the rest is zero."""
    D = value_HMD.shape[-1]
    rows_XKD = key_HMD.new_zeros(len(ticket.offset_X) * k, 2 * D, dtype=torch.float32)
    place_E = torch.arange(len(ticket.row_E), device=ticket.row_E.device) - ticket.offset_X[ticket.bag_E]
    at_E = ticket.bag_E * k + place_E
    rows_XKD[at_E, :D] = key_HMD.flatten(0, 1)[ticket.row_E].float()
    value_ED = value_HMD.flatten(0, 1)[ticket.row_E.to(value_HMD.device)]
    rows_XKD[at_E, D:] = value_ED.float().to(rows_XKD.device)
    return rows_XKD.view(-1, k, 2 * D)
