"""Which of a shard's rows won a search, and what follows from that: weighted sums of their values, and the gradients.

Pure functions over a shard's tables, keys and values [H, M, D].
Letters: M slots of this rank; Q = G * H bags of winners, bag = query * H + head; W winners; R rows of a table.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


class Ticket(NamedTuple):
    """The winners that this rank holds for all gathered queries, as `Hits.ticket`; valid until the bank changes.

    row_W: int64, head * M + slot: a row of the flattened tables. Winners are ordered by bag, then by the total order.
    bag_W: int64, the bag of each winner.
    offset_Q: int64, where each bag starts.
    weight_W: fp32, share of the softmax over the query's hits.
    step_W: int64, the step that wrote each winner.
    rows_per_rank: queries that each rank contributed, padding included.
    version: of the bank that was searched.
    """

    row_W: Tensor
    bag_W: Tensor
    offset_Q: Tensor
    weight_W: Tensor
    step_W: Tensor
    rows_per_rank: int
    version: int


def weighted_sums(table_RD: Tensor, row_W: Tensor, offset_Q: Tensor, weight_W: Tensor) -> Tensor:
    """fp32 [Q, D], where the weights are: for each bag the weighted sum of its table rows, without a copy of the rows."""
    if table_RD.device != weight_W.device:
        there = (one.to(table_RD.device) for one in (row_W, offset_Q, weight_W))
        return weighted_sums(table_RD, *there).to(weight_W.device)
    if table_RD.dtype != torch.float32:  # the sum must be fp32, so convert the rows in use, each once
        unique_U, row_W = row_W.unique(return_inverse=True)
        table_RD = table_RD[unique_U].float()
    if len(row_W) == 0:
        return table_RD.new_zeros(len(offset_Q), table_RD.shape[1])
    return F.embedding_bag(row_W, table_RD, offset_Q, mode="sum", per_sample_weights=weight_W)


def make_ticket(won_GHK: Tensor, score_GHK: Tensor, slot_GHK: Tensor, lse_GH: Tensor, *, step_M: np.ndarray,
                rows_per_rank: int, version: int) -> Ticket:
    """The ticket for those of a shard's local hits that won.

    Weights are computed in fp64, so that their fp32 value does not depend on how a processor vectorises exp.
    """
    flat_W = won_GHK.flatten().nonzero().squeeze(1)
    bag_W, slot_W = flat_W // won_GHK.shape[-1], slot_GHK.flatten()[flat_W]
    count_Q = won_GHK.sum(-1).flatten()
    weight_W = (score_GHK.flatten()[flat_W].double() - lse_GH.flatten()[bag_W].double()).exp().float()
    step_W = torch.from_numpy(step_M[slot_W.cpu().numpy()]).to(slot_W.device)
    row_W = slot_W + (bag_W % won_GHK.shape[1]) * len(step_M)
    return Ticket(row_W, bag_W, count_Q.cumsum(0) - count_Q, weight_W, step_W, rows_per_rank, version)


def value_sums(value_HMD: Tensor, ticket: Ticket) -> Tensor:
    """For each bag the sum of weight * value over its winners: fp32 [Q, D]."""
    return weighted_sums(value_HMD.flatten(0, 1), ticket.row_W, ticket.offset_Q, ticket.weight_W)


def query_gradients(key_HMD: Tensor, value_HMD: Tensor, ticket: Ticket, grad_QD: Tensor, dot_Q: Tensor,
                    grad_lse_Q: Tensor) -> Tensor:
    """This shard's part of the gradient with respect to the queries, fp32 [Q, D].

    With weights p_j, value o = sum_j p_j v_j, gradient g of o and g_l of the log-sum-exp, a score's gradient is
    ds_j = p_j (g . v_j - g . o + g_l), and the query's is sum_j ds_j k_j.

    Args:
        grad_QD: g.
        dot_Q: g . o.
        grad_lse_Q: g_l.
    """
    with torch.enable_grad():  # the weights' gradient of a weighted sum is g . v_j, without a copy of the rows
        weight_W = ticket.weight_W.detach().requires_grad_()
        sum_QD = weighted_sums(value_HMD.flatten(0, 1), ticket.row_W, ticket.offset_Q, weight_W)
    dot_W = (torch.autograd.grad(sum_QD, weight_W, grad_QD)[0] if len(weight_W)
             else torch.zeros_like(ticket.weight_W))
    score_grad_W = ticket.weight_W * (dot_W + (grad_lse_Q - dot_Q)[ticket.bag_W])
    key_RD = key_HMD.flatten(0, 1)
    return weighted_sums(key_RD, ticket.row_W, ticket.offset_Q, score_grad_W)


def winning_rows(key_HMD: Tensor, value_HMD: Tensor, ticket: Ticket, k: int) -> Tensor:
    """Keys and values of the winners, fp32 [Q, K, 2D]: a bag's first rows are its winners, the rest is zero."""
    D = value_HMD.shape[-1]
    rows_QKD = key_HMD.new_zeros(len(ticket.offset_Q) * k, 2 * D, dtype=torch.float32)
    place_W = torch.arange(len(ticket.row_W), device=ticket.row_W.device) - ticket.offset_Q[ticket.bag_W]
    at_W = ticket.bag_W * k + place_W
    rows_QKD[at_W, :D] = key_HMD.flatten(0, 1)[ticket.row_W].float()
    value_WD = value_HMD.flatten(0, 1)[ticket.row_W.to(value_HMD.device)]
    rows_QKD[at_W, D:] = value_WD.float().to(rows_QKD.device)
    return rows_QKD.view(-1, k, 2 * D)
