"""Exact search with torch alone: the oracle of every other tier, and the fastest one for a few thousand rows on a CPU.

Scores come from matrix products of fixed width (rows are padded to a block), so a pair of query and entry gets the same
bits wherever the entry sits and however many ranks share the bank. `torch.topk` gives no order among equals and cuts
ties at the k-th place as it likes; here every row that reaches the k-th score is kept and then put in total order.
Letters: Q queries and P rows of a block; Z = D + 1, the width of a stacked key with its addend.

What is hidden is taken away pair by pair from scores that were computed all the same: every other score keeps its bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lmcode.memory.search.decide import finish, in_order, no_hits
from lmcode.memory.search.tier import Found, Hidden, Rows, Tier
from lmcode.protocol import NO_SCORE

QUERY_BLOCK = 256
LEAST_QUERIES = 16
ROW_BLOCK = 256  # width of a matrix product
CHUNK = 4096  # rows whose scores are held at once
ROUNDING = 4e-6  # more than fp32 products over a few hundred components are off, relative to the lengths


class ExactTier(Tier):
    """`search_exact`; it keeps nothing."""

    def search(self, query_HQD: Tensor, rows: Rows, k: int, *, hidden: Hidden = ()) -> Found:
        return search_exact(query_HQD, rows, k, hidden=hidden)

    def search_alike(self, query_HQD: Tensor, rows: Rows, k: int, *, hidden: Hidden = ()) -> Found:
        """In products of one shape only."""
        return search_exact(query_HQD, rows, k, hidden=hidden, least_queries=QUERY_BLOCK)


def search_exact(query_HND: Tensor, rows: Rows, k: int, *, hidden: Hidden = (),
                 least_queries: int = LEAST_QUERIES) -> Found:
    """The k best rows for each head and query, in total order: (score_HNK, id_HNK, slot_HNK).

    Args:
        query_HND: fp32, finite.
        rows: in any order.
        k: hits wanted; may exceed the number of rows.
        hidden: rows that some queries do not see.
        least_queries: blocks of queries are padded to at least this many; `QUERY_BLOCK` makes products of one shape
            only, for callers whose number of queries depends on the ranks.
    """
    H, N, _ = query_HND.shape
    if N == 0:
        return no_hits((H, 0, k), query_HND.device)
    width = max(1, QUERY_BLOCK // N)  # heads whose few queries are sorted together
    blocks = [[_search_block(query_HND[head:head + width, start:start + QUERY_BLOCK], rows.key_HPD[head:head + width],
                             rows.addend_P, rows.id_P, k, hidden_from(hidden, start, QUERY_BLOCK), least_queries)
               for start in range(0, N, QUERY_BLOCK)] for head in range(0, H, width)]
    found = [[torch.cat(parts, dim=1) for parts in zip(*row, strict=True)] for row in blocks]
    score_HNK, id_HNK, slot_HNK = (torch.cat(parts) for parts in zip(*found, strict=True))
    return score_HNK, id_HNK, slot_HNK


@dataclass
class Stack:
    """The rows that G groups of queries see, side by side for `attend_best`; X = heads x groups.

    key_XZP: fp32, keys in columns, the addend last; a column where a group has no more rows scores below every entry,
        and each unlike the next.
    row_XP: int64, where the row's value is among those of all heads, one after the other.
    empty_G: bool, groups without a row.
    has_empty: whether there are any.
    num_columns: over all groups.
    longest: length of the longest key. largest_addend: the largest size of one.
    """

    key_XZP: Tensor
    row_XP: Tensor
    empty_G: Tensor
    has_empty: bool
    num_columns: int
    longest: float
    largest_addend: float


def stack_rows(key_HMD: Tensor, addend_M: Tensor, slots: Sequence[Tensor]) -> Stack:
    """The rows in each group's slots, int64 [P] each."""
    (H, M, _), P, device = key_HMD.shape, max(1, *map(len, slots)), key_HMD.device
    slot_GP = torch.stack([F.pad(slot_P, (0, P - len(slot_P)), value=-1) for slot_P in slots])
    key_HGPD = key_HMD[:, slot_GP.clamp(min=0)].float()
    filler_P = NO_SCORE * (1 + torch.arange(P, device=device) / 8)
    addend_GP = addend_M[slot_GP.clamp(min=0)].where(slot_GP >= 0, filler_P)
    longest = float(key_HGPD.norm(dim=-1).where(slot_GP >= 0, 0.0).max())
    largest_addend = float(addend_GP.abs().where(slot_GP >= 0, 0.0).max())
    key_HGPZ = torch.cat([key_HGPD, addend_GP.expand(H, -1, -1).unsqueeze(-1)], dim=-1)
    row_HGP = slot_GP.clamp(min=0) + torch.arange(H, device=device).view(-1, 1, 1) * M
    empty_G = (slot_GP < 0).all(dim=1)
    return Stack(key_HGPZ.flatten(0, 1).transpose(1, 2).contiguous(), row_HGP.flatten(0, 1), empty_G,
                 has_empty=bool(empty_G.any()), num_columns=slot_GP.numel(), longest=longest, largest_addend=largest_addend)


def attend_best(query_XQD: Tensor, stack: Stack, value_RD: Tensor, k: int, longest: float) -> tuple[Tensor, ...]:
    """Softmax attention of each query over its k best rows: fp32 value_XQD and logsumexp_XQ, any numbers for empty groups;
    and bool doubtful_XQ, where rounding, or an id, could decide which rows those are.

    Args:
        value_RD: the values of all heads, one after the other.
        longest: length of the longest query.
    """
    Q, k = query_XQD.shape[1], min(k, stack.row_XP.shape[1])
    score_XQL, column_XQL, gap_XQ = best_columns(torch.bmm(F.pad(query_XQD, (0, 1), value=1.0), stack.key_XZP), k)
    row_XQL = stack.row_XP.unsqueeze(1).expand(-1, Q, -1).gather(-1, column_XQL)
    share_XQL = score_XQL.softmax(dim=-1)
    # Indexing by a tensor would take ten times as long.
    value_XQLD = value_RD.index_select(0, row_XQL.flatten()).float().view(*row_XQL.shape, -1)
    mixed_XQD = (share_XQL.unsqueeze(-2) @ value_XQLD).squeeze(-2)
    lse_XQ = score_XQL.amax(dim=-1) - share_XQL.amax(dim=-1).log()  # the largest share is at least 1/k
    return mixed_XQD, lse_XQ, gap_XQ <= 2 * ROUNDING * (longest * stack.longest + stack.largest_addend)


def best_columns(score_XQP: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k <= P best columns of each row, in no order: (score_XQK, column_XQK) and by how much the next one is worse."""
    X, Q, P = score_XQP.shape
    if P == k:
        return score_XQP, torch.arange(P, device=score_XQP.device).expand(X, Q, P), score_XQP.new_full((X, Q), torch.inf)
    if score_XQP.device.type == "cpu":  # numpy's partition, which is vectorised, takes a sixth of the time of topk
        score_LP = score_XQP.view(-1, P).numpy()
        parted_LP = np.partition(score_LP, P - k, axis=1)
        bound_L1, next_L1 = parted_LP[:, P - k, None], parted_LP[:, :P - k].max(axis=1, keepdims=True)
        flat = np.flatnonzero(score_LP >= bound_L1)
        if len(flat) == k * X * Q:  # no equals at the bound
            flat_XQK = torch.from_numpy(flat).view(X, Q, k)
            return score_XQP.take(flat_XQK), flat_XQK % P, torch.from_numpy(bound_L1 - next_L1).view(X, Q)
    score_XQL, column_XQL = score_XQP.topk(k + 1, dim=-1)
    return score_XQL[..., :-1], column_XQL[..., :-1], score_XQL[..., -2] - score_XQL[..., -1]


def search_by_sorting(query_HND: Tensor, rows: Rows, k: int) -> Found:
    """What `search_exact` returns, by scoring and sorting everything in fp64: slow and obvious, for tests."""
    id_M = rows.id_P
    score_HNM = (query_HND.double() @ rows.key_HPD.double().transpose(1, 2) + rows.addend_P).float().numpy()
    order_HNM = np.lexsort((np.broadcast_to(id_M.numpy(), score_HNM.shape), -score_HNM), axis=-1)[..., :k]
    score_HNK = torch.from_numpy(np.take_along_axis(score_HNM, order_HNM, -1))
    return finish(score_HNK, id_M[torch.from_numpy(order_HNM)], torch.from_numpy(order_HNM), k)


def kth_largest(score_QM: Tensor, k: int) -> Tensor:
    """The k-th largest score of each row, [Q, 1]; -inf where there are fewer than k."""
    if score_QM.shape[1] <= k:
        return score_QM.new_full((len(score_QM), 1), -float("inf"))
    if score_QM.device.type != "cpu":
        return score_QM.topk(k, dim=1).values[:, -1:]
    ascending_QM = score_QM.numpy().copy()
    ascending_QM.partition(-k, axis=1)
    return torch.from_numpy(ascending_QM[:, -k][:, None].copy())


def candidates_above(score_QM: Tensor, bound_Q1: Tensor, id_M: Tensor) -> Found:
    """All hits that reach the bound, ties included, as unordered lists padded to the longest."""
    Q, M = score_QM.shape
    keep_QM = score_QM >= bound_Q1
    flat_W = (torch.from_numpy(np.flatnonzero(keep_QM.numpy())) if keep_QM.device.type == "cpu"
              else keep_QM.flatten().nonzero().squeeze(1))
    query_W, slot_W = flat_W // M, flat_W % M
    count_Q = query_W.bincount(minlength=Q)
    width = int(count_Q.max()) if Q else 0
    if len(flat_W) == Q * width:  # no ties: the lists are already as wide as each other
        slot_QL = slot_W.view(Q, width)
        return score_QM.gather(1, slot_QL), id_M[slot_W].view(Q, width), slot_QL
    place_W = torch.arange(len(flat_W), device=flat_W.device) - (count_Q.cumsum(0) - count_Q)[query_W]
    score_QL, id_QL, slot_QL = no_hits((Q, width), score_QM.device)
    score_QL[query_W, place_W] = score_QM[query_W, slot_W]
    id_QL[query_W, place_W] = id_M[slot_W]
    slot_QL[query_W, place_W] = slot_W
    return score_QL, id_QL, slot_QL


def hidden_from(hidden: Hidden, start: int, length: int) -> Hidden:
    """What is hidden from the `length` queries beyond `start`, with their positions among these."""
    inside = [(query_Q[(query_Q >= start) & (query_Q < start + length)] - start, row_P) for query_Q, row_P in hidden]
    return [(query_Q, row_P) for query_Q, row_P in inside if len(query_Q)]


def _hide(score_HQP: Tensor, hidden: Hidden, start: int) -> None:
    """Takes away, in place, the scores of hidden pairs in a chunk of rows that begins at `start`."""
    for query_Q, row_P in hidden:
        first, last = torch.searchsorted(row_P, row_P.new_tensor([start, start + score_HQP.shape[-1]])).tolist()
        if first < last:
            score_HQP[:, query_Q[:, None], row_P[first:last] - start] = NO_SCORE


def _search_block(query_HQD: Tensor, key_HMD: Tensor, addend_M: Tensor, id_M: Tensor, k: int, hidden: Hidden,
                  least_queries: int) -> Found:
    """A block of queries of some heads against all rows, chunk by chunk; the k-th score so far bounds what a chunk may
    add."""
    (H, Q, _), M = query_HQD.shape, key_HMD.shape[1]
    padded = max(least_queries, 1 << (Q - 1).bit_length())  # a function of Q only, not of how rows are spread
    query_HQD = F.pad(query_HQD, (0, 0, 0, padded - Q))
    found = no_hits((H * Q, k), query_HQD.device)
    for start in range(0, M, CHUNK):
        chunk = slice(start, start + CHUNK)
        score_HQP = _scores(query_HQD, key_HMD[:, chunk])[:, :Q].add_(addend_M[chunk])
        _hide(score_HQP, hidden, start)
        score_QP = score_HQP.flatten(0, 1)  # of one head no copy
        bound_Q1 = kth_largest(score_QP, k) if start == 0 else found[0][:, -1:]
        score_QL, id_QL, slot_QL = candidates_above(score_QP, bound_Q1, id_M[chunk])
        slot_QL = slot_QL + start
        if start:
            more = (score_QL, id_QL, slot_QL)
            score_QL, id_QL, slot_QL = (torch.cat([old, new], dim=1) for old, new in zip(found, more, strict=True))
        found = in_order(score_QL, id_QL, slot_QL, k)
    score_HQK, id_HQK, slot_HQK = (part.view(H, Q, -1) for part in found)
    return score_HQK, id_HQK, slot_HQK


def _scores(query_HQD: Tensor, key_HPD: Tensor) -> Tensor:
    """fp32 scores [H, Q, P] from products of fixed width, a head at a time."""
    (H, Q, _), P = query_HQD.shape, key_HPD.shape[1]
    score_HQP = query_HQD.new_empty(H, Q, -(-P // ROW_BLOCK) * ROW_BLOCK)
    for query_QD, key_PD, score_QP in zip(query_HQD, key_HPD, score_HQP, strict=True):
        for block_PD, out_QP in zip(key_PD.split(ROW_BLOCK), score_QP.split(ROW_BLOCK, dim=1), strict=True):
            if len(block_PD) < ROW_BLOCK:
                block_PD = F.pad(block_PD, (0, 0, 0, ROW_BLOCK - len(block_PD)))
            torch.mm(query_QD, block_PD.float().T, out=out_QP)
    return score_HQP[..., :P]
