"""Exact search with torch alone: every row is scored, and no other tier finds more.

Scores come chunk by chunk from fp32 matrix products. Of each group of rows only the best score is looked at first: the K-th
best of those is a bound that K rows reach, and only groups that reach it are looked into. What is left, little more than K
rows a query, goes to `decide`. The rounding of the products is allowed for, so hits, and every bit of their scores, are the
same wherever a row lies, whatever is in the batch and however many ranks share the bank.
Letters: Q queries and P rows of a block; G rows of a group, g groups; Z = D + 1, the width of a stacked key with its addend;
W pairs of a query and a group, V of a query and a row.

What is hidden is taken away pair by pair from scores that were computed all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lmcode.memory.search.decide import REAL, decide, finish, no_hits
from lmcode.memory.search.pairs import as_lists, kth_largest, largest, where
from lmcode.memory.search.tier import Found, HeadRows, Hidden, Rows, Tier
from lmcode.protocol import NO_SCORE

QUERY_BLOCK = 256
CHUNK = 2048  # rows whose scores are held at once: 2 MB of them with a block of queries, which stay in a cache
GROUP = 16  # most rows of a group
HELD = 4096  # candidates of a query, beyond k, from which on they are decided at once, so that equals do not pile up
ROUNDING = 4e-6  # more than fp32 products over a few hundred components are off, relative to the lengths


class ExactTier(Tier):
    """`search_exact`; it keeps nothing."""

    def search(self, query_HQD: Tensor, rows: Rows, k: int, *, hidden: Hidden = ()) -> Found:
        return search_exact(query_HQD, rows, k, hidden=hidden)


def search_exact(query_HND: Tensor, rows: Rows, k: int, *, hidden: Hidden = ()) -> Found:
    """The k best rows for each head and query, in total order: (score_HNK, id_HNK, row_HNK).

    Args:
        query_HND: fp32, finite.
        rows: in any order.
        k: hits wanted; may exceed the number of rows.
        hidden: rows that some queries do not see.
    """
    found = [search_head(query_ND, rows.of_head(head), k, hidden=hidden) for head, query_ND in enumerate(query_HND)]
    score_HNK, id_HNK, row_HNK = (torch.stack(parts) for parts in zip(*found, strict=True))
    return score_HNK, id_HNK, row_HNK


def search_by_sorting(query_HND: Tensor, rows: Rows, k: int) -> Found:
    """What `search_exact` returns, by scoring and sorting everything in fp64: slow and obvious, for tests."""
    id_M = rows.id_P
    score_HNM = (query_HND.double() @ rows.key_HPD.double().transpose(1, 2) + rows.addend_P).float().numpy()
    order_HNM = np.lexsort((np.broadcast_to(id_M.numpy(), score_HNM.shape), -score_HNM), axis=-1)[..., :k]
    score_HNK = torch.from_numpy(np.take_along_axis(score_HNM, order_HNM, -1))
    return finish(score_HNK, id_M[torch.from_numpy(order_HNM)], torch.from_numpy(order_HNM), k)


def search_head(query_ND: Tensor, rows: HeadRows, k: int, *, hidden: Hidden = ()) -> Found:
    """`search_exact` of one head."""
    N, P = len(query_ND), len(rows.id_P)
    if N == 0 or P == 0:
        return no_hits((N, k), query_ND.device)
    slack_N = rounding(query_ND, rows)
    blocks = []
    for start in range(0, N, QUERY_BLOCK):
        block = slice(start, start + QUERY_BLOCK)
        row_QC = _candidates(query_ND[block], rows, k, hidden_from(hidden, start, QUERY_BLOCK), slack_N[block])
        blocks.append(decide(query_ND[block], rows, row_QC, k))
    score_NK, id_NK, row_NK = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    return score_NK, id_NK, row_NK


def rounding(query_ND: Tensor, rows: HeadRows) -> Tensor:
    """How far from exact, at most, the score of each query and any of these rows is in fp32: [N]."""
    longest = torch.stack([part_PD.norm(dim=1, dtype=torch.float32).max() for part_PD in rows.key_PD.split(CHUNK)]).max()
    addend = rows.addend_P.where(rows.id_P >= 0, 0.0).abs().max()
    slack_N: Tensor = ROUNDING * (query_ND.norm(dim=1) * longest + addend)
    return slack_N


def _candidates(query_QD: Tensor, rows: HeadRows, k: int, hidden: Hidden, slack_Q: Tensor) -> Tensor:
    """Rows that can be among the k best of each query, int64 [Q, C], -1 where there are fewer; not many more than k."""
    P, best_QX = len(rows.id_P), query_QD.new_empty(len(query_QD), 0)
    size, found, held_N = group_size(P, k), [], torch.zeros(len(query_QD), dtype=torch.int64, device=query_QD.device)
    for start in range(0, P, CHUNK):
        chunk = slice(start, start + CHUNK)
        score_QP = torch.mm(query_QD, rows.key_PD[chunk].float().T).add_(rows.addend_P[chunk])
        _hide(score_QP, hidden, start)
        if short := -score_QP.shape[1] % size:
            score_QP = F.pad(score_QP, (0, short), value=NO_SCORE)
        score_QGg = score_QP.view(len(query_QD), size, -1)
        top_Qg = score_QGg.amax(dim=1)
        best_QX = largest(torch.cat([best_QX, top_Qg], dim=1), k)
        bound_Q = kth_largest(best_QX, k) - 2 * slack_Q
        query_W, row_W, score_W = _reaching(score_QGg, top_Qg, bound_Q)
        found.append((query_W, row_W + start, score_W))
        held_N = held_N + query_W.bincount(minlength=len(query_QD))
        if int(held_N.max()) > HELD + k:
            found = [_thinned(query_QD, rows, k, found, bound_Q)]
            held_N = found[0][0].bincount(minlength=len(query_QD))
    query_W, row_W, score_W = (torch.cat(parts) for parts in zip(*found, strict=True))
    keep_W = (score_W >= bound_Q[query_W]) & (score_W > REAL)
    return as_lists(query_W[keep_W], row_W[keep_W], len(query_QD))


def _thinned(query_ND: Tensor, rows: HeadRows, k: int, found: list[tuple[Tensor, Tensor, Tensor]],
             bound_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of pairs that were found so far those that can still be among the k best of a query; the k best of them at most."""
    query_X, row_X, score_X = (torch.cat(parts) for parts in zip(*found, strict=True))
    keep_X = (score_X >= bound_N[query_X]) & (score_X > REAL)
    row_NX = as_lists(query_X[keep_X], row_X[keep_X], len(query_ND))
    score_NK, _, row_NK = decide(query_ND, rows, row_NX, k)
    at_X = where(row_NK >= 0)
    return at_X // k, row_NK.flatten()[at_X], score_NK.flatten()[at_X]


def group_size(rows: int, k: int) -> int:
    """Rows of a group: a power of two up to `GROUP`, and such that there are 8 groups for each hit."""
    return 1 << max(0, min(GROUP, rows // (8 * k)).bit_length() - 1)


def _reaching(score_QGg: Tensor, top_Qg: Tensor, bound_Q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of a query and a row whose score reaches the query's bound: query_W, row_W and score_W.

    Args:
        score_QGg: row i * g + j is the i-th of group j.
        top_Qg: the best score of each group.
    """
    _, size, groups = score_QGg.shape
    at_W = where(top_Qg >= bound_Q[:, None])
    query_W, group_W = at_W // groups, at_W % groups
    member_WG = score_QGg[query_W, :, group_W]
    at_V = where(member_WG >= bound_Q[query_W, None])
    from_V = at_V // size
    return query_W[from_V], at_V % size * groups + group_W[from_V], member_WG.flatten()[at_V]


def hidden_from(hidden: Hidden, start: int, length: int) -> Hidden:
    """What is hidden from the `length` queries beyond `start`, with their positions among these."""
    inside = [(query_Q[(query_Q >= start) & (query_Q < start + length)] - start, row_P) for query_Q, row_P in hidden]
    return [(query_Q, row_P) for query_Q, row_P in inside if len(query_Q)]


def _hide(score_QP: Tensor, hidden: Hidden, start: int) -> None:
    """Takes away, in place, the scores of hidden pairs in a chunk of rows that begins at `start`."""
    for query_Q, row_P in hidden:
        first, last = torch.searchsorted(row_P, row_P.new_tensor([start, start + score_QP.shape[-1]])).tolist()
        if first < last:
            score_QP[query_Q[:, None], row_P[first:last] - start] = NO_SCORE


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
