"""Exact search with torch alone: every row is scored, and no other tier finds more.

Scores come chunk by chunk from fp32 matrix products. Of each group of rows only the best score is looked at first: the K-th
best of those is a bound that K rows reach, and only groups that reach it are looked into. What is left, little more than K
rows a query, goes to `decide`. The rounding of the products is allowed for, so hits, and every bit of their scores, are the
same wherever a row lies, whatever is in the batch and however many ranks share the bank.
Letters: N queries; M rows; X pairs of a query and a row, or, in a `Stack`, heads x groups of queries.

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

    def search(self, query_HND: Tensor, rows: Rows, k: int, *, hidden: Hidden = ()) -> Found:
        return search_exact(query_HND, rows, k, hidden=hidden)


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
    id_M = rows.id_M
    score_HNM = (query_HND.double() @ rows.key_HMD.double().transpose(1, 2) + rows.addend_M).float().numpy()
    order_HNM = np.lexsort((np.broadcast_to(id_M.numpy(), score_HNM.shape), -score_HNM), axis=-1)[..., :k]
    score_HNK = torch.from_numpy(np.take_along_axis(score_HNM, order_HNM, -1))
    return finish(score_HNK, id_M[torch.from_numpy(order_HNM)], torch.from_numpy(order_HNM), k)


def search_head(query_ND: Tensor, rows: HeadRows, k: int, *, hidden: Hidden = ()) -> Found:
    """`search_exact` of one head."""
    N, M = len(query_ND), len(rows.id_M)
    if N == 0 or M == 0:
        return no_hits((N, k), query_ND.device)
    slack_N = rounding(query_ND, rows)
    blocks = []
    for start in range(0, N, QUERY_BLOCK):
        block = slice(start, start + QUERY_BLOCK)
        row_NX = _candidates(query_ND[block], rows, k, hidden_from(hidden, start, QUERY_BLOCK), slack_N[block])
        blocks.append(decide(query_ND[block], rows, row_NX, k))
    score_NK, id_NK, row_NK = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    return score_NK, id_NK, row_NK


def rounding(query_ND: Tensor, rows: HeadRows) -> Tensor:
    """How far from exact, at most, the score of each query and any of these rows is in fp32: [N]."""
    longest = torch.stack([part_MD.norm(dim=1, dtype=torch.float32).max() for part_MD in rows.key_MD.split(CHUNK)]).max()
    addend = rows.addend_M.where(rows.id_M >= 0, 0.0).abs().max()
    slack_N: Tensor = ROUNDING * (query_ND.norm(dim=1) * longest + addend)
    return slack_N


def _candidates(query_ND: Tensor, rows: HeadRows, k: int, hidden: Hidden, slack_N: Tensor) -> Tensor:
    """Rows that can be among the k best of each query, int64 [N, K], -1 where there are fewer; not many more than k."""
    M, best_NK = len(rows.id_M), query_ND.new_empty(len(query_ND), 0)
    size, found, held_N = group_size(M, k), [], torch.zeros(len(query_ND), dtype=torch.int64, device=query_ND.device)
    for start in range(0, M, CHUNK):
        chunk = slice(start, start + CHUNK)
        key_MD, addend_M = rows.key_MD[chunk].float(), rows.addend_M[chunk]
        if short := -len(key_MD) % size:
            key_MD, addend_M = F.pad(key_MD, (0, 0, 0, short)), F.pad(addend_M, (0, short), value=NO_SCORE)
        score_NM = torch.mm(query_ND, key_MD.T).add_(addend_M)
        _hide(score_NM, hidden, start)
        grouped = score_NM.view(len(query_ND), size, -1)  # [N, rows of a group, groups]
        tops = grouped.amax(dim=1)
        best_NK = largest(torch.cat([best_NK, tops], dim=1), k)
        bound_N = kth_largest(best_NK, k) - 2 * slack_N
        query_X, row_X, score_X = _reaching(grouped, tops, bound_N)
        found.append((query_X, row_X + start, score_X))
        held_N = held_N + query_X.bincount(minlength=len(query_ND))
        if int(held_N.max()) > HELD + k:
            found = [_thinned(query_ND, rows, k, found, bound_N)]
            held_N = found[0][0].bincount(minlength=len(query_ND))
    query_X, row_X, score_X = (torch.cat(parts) for parts in zip(*found, strict=True))
    keep_X = (score_X >= bound_N[query_X]) & (score_X > REAL)
    return as_lists(query_X[keep_X], row_X[keep_X], len(query_ND))


def _thinned(query_ND: Tensor, rows: HeadRows, k: int, found: list[tuple[Tensor, Tensor, Tensor]],
             bound_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of pairs that were found so far those that can still be among the k best of a query; the k best of them at most."""
    query_X, row_X, score_X = (torch.cat(parts) for parts in zip(*found, strict=True))
    keep_X = (score_X >= bound_N[query_X]) & (score_X > REAL)
    candidate_NX = as_lists(query_X[keep_X], row_X[keep_X], len(query_ND))
    score_NK, _, row_NK = decide(query_ND, rows, candidate_NX, k)
    at_X = where(row_NK >= 0)
    return at_X // k, row_NK.flatten()[at_X], score_NK.flatten()[at_X]


def group_size(rows: int, k: int) -> int:
    """Rows of a group: a power of two up to `GROUP`, and such that there are 8 groups for each hit."""
    return 1 << max(0, min(GROUP, rows // (8 * k)).bit_length() - 1)


def _reaching(grouped: Tensor, tops: Tensor, bound_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of a query and a row whose score reaches the query's bound: query_X, row_X and score_X.

    Args:
        grouped: scores [N, rows of a group, groups]; row i * groups + j of the chunk is the i-th of group j.
        tops: the best score of each group, [N, groups].
    """
    _, size, groups = grouped.shape
    reached = where(tops >= bound_N[:, None])  # pairs of a query and a group
    query, group = reached // groups, reached % groups
    members = grouped[query, :, group]  # [pairs, rows of a group]
    at_X = where(members >= bound_N[query, None])
    pair_X = at_X // size
    return query[pair_X], at_X % size * groups + group[pair_X], members.flatten()[at_X]


def hidden_from(hidden: Hidden, start: int, length: int) -> Hidden:
    """What is hidden from the `length` queries beyond `start`, with their positions among these."""
    inside = [(queries[(queries >= start) & (queries < start + length)] - start, unseen) for queries, unseen in hidden]
    return [(queries, unseen) for queries, unseen in inside if len(queries)]


def _hide(score_NM: Tensor, hidden: Hidden, start: int) -> None:
    """Takes away, in place, the scores of hidden pairs in a chunk of rows that begins at `start`."""
    for queries, unseen in hidden:
        first, last = torch.searchsorted(unseen, unseen.new_tensor([start, start + score_NM.shape[-1]])).tolist()
        if first < last:
            score_NM[queries[:, None], unseen[first:last] - start] = NO_SCORE


@dataclass
class Stack:
    """The rows that each of some groups of queries sees, side by side for `attend_best`; X = heads x groups.

    key_XDM: fp32, keys in columns, and their addends below them, so D is the width of a key plus one. Columns beyond a
        group's last row have addends so low that they lose against every entry, and all different, so that none are equal.
    row_XM: int64, where the row's value is among those of all heads, one after the other.
    empty: bool, of each group, whether it has no row.
    has_empty: whether there are any.
    num_columns: over all groups.
    longest: length of the longest key. largest_addend: the largest size of one.
    """

    key_XDM: Tensor
    row_XM: Tensor
    empty: Tensor
    has_empty: bool
    num_columns: int
    longest: float
    largest_addend: float


def stack_rows(key_HMD: Tensor, addend_M: Tensor, slots: Sequence[Tensor]) -> Stack:
    """The rows in each group's slots, int64 [M] each."""
    (H, M, _), columns, device = key_HMD.shape, max(1, *map(len, slots)), key_HMD.device
    padded = torch.stack([F.pad(some, (0, columns - len(some)), value=-1) for some in slots])  # [groups, columns]
    keys = key_HMD[:, padded.clamp(min=0)].float()  # [H, groups, columns, D]
    filler = NO_SCORE * (1 + torch.arange(columns, device=device) / 8)
    addends = addend_M[padded.clamp(min=0)].where(padded >= 0, filler)
    longest = float(keys.norm(dim=-1).where(padded >= 0, 0.0).max())
    largest_addend = float(addends.abs().where(padded >= 0, 0.0).max())
    stacked = torch.cat([keys, addends.expand(H, -1, -1).unsqueeze(-1)], dim=-1)
    row = padded.clamp(min=0) + torch.arange(H, device=device).view(-1, 1, 1) * M
    empty = (padded < 0).all(dim=1)
    return Stack(stacked.flatten(0, 1).transpose(1, 2).contiguous(), row.flatten(0, 1), empty,
                 has_empty=bool(empty.any()), num_columns=padded.numel(), longest=longest, largest_addend=largest_addend)


def attend_best(query_XND: Tensor, stack: Stack, values: Tensor, k: int, longest: float) -> tuple[Tensor, ...]:
    """Softmax attention of each query over its k best rows: fp32 value_XND and logsumexp_XN, any numbers for empty groups;
    and bool doubtful_XN, where rounding, or an id, could decide which rows those are.

    Args:
        values: those of all heads, one after the other, [H * slots, D].
        longest: length of the longest query.
    """
    N, k = query_XND.shape[1], min(k, stack.row_XM.shape[1])
    score_XNK, column_XNK, gap_XN = best_columns(torch.bmm(F.pad(query_XND, (0, 1), value=1.0), stack.key_XDM), k)
    row_XNK = stack.row_XM.unsqueeze(1).expand(-1, N, -1).gather(-1, column_XNK)
    share_XNK = score_XNK.softmax(dim=-1)
    # Indexing by a tensor would take ten times as long.
    value_XNKD = values.index_select(0, row_XNK.flatten()).float().view(*row_XNK.shape, -1)
    mixed_XND = (share_XNK.unsqueeze(-2) @ value_XNKD).squeeze(-2)
    lse_XN = score_XNK.amax(dim=-1) - share_XNK.amax(dim=-1).log()  # the largest share is at least 1/k
    return mixed_XND, lse_XN, gap_XN <= 2 * ROUNDING * (longest * stack.longest + stack.largest_addend)


def best_columns(score_XNM: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k <= M best columns of each row, in no order: (score_XNK, column_XNK) and by how much the next one is worse."""
    X, N, M = score_XNM.shape
    if M == k:
        return score_XNM, torch.arange(M, device=score_XNM.device).expand(X, N, M), score_XNM.new_full((X, N), torch.inf)
    if score_XNM.device.type == "cpu":  # numpy's partition, which is vectorised, takes a sixth of the time of topk
        flat_scores = score_XNM.view(-1, M).numpy()
        parted = np.partition(flat_scores, M - k, axis=1)
        bound, next_best = parted[:, M - k, None], parted[:, :M - k].max(axis=1, keepdims=True)
        flat = np.flatnonzero(flat_scores >= bound)
        if len(flat) == k * X * N:  # no equals at the bound
            flat_XNK = torch.from_numpy(flat).view(X, N, k)
            return score_XNM.take(flat_XNK), flat_XNK % M, torch.from_numpy(bound - next_best).view(X, N)
    score_XNK, column_XNK = score_XNM.topk(k + 1, dim=-1)
    return score_XNK[..., :-1], column_XNK[..., :-1], score_XNK[..., -2] - score_XNK[..., -1]
