"""What a read computes between its collectives: the checks, the attention over fetched rows, the autograd function.

No collective is issued from here: the bank hands in what brings the ranks' parts together.
Letters: as in `bank.py`; X is anything that travels with a query.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lmcode.memory.merge import logsumexp_of
from lmcode.memory.search.faiss_index import check_top_k
from lmcode.memory.shard import Scope
from lmcode.precision import without_autocast
from lmcode.protocol import NO_SCORE, Hits

SCOPES = ("document", "global")


def check_search(query_HND: Tensor, namespace_N: Tensor, document_N: Tensor, scope: Scope, k: int, *, heads: int,
                 head_dim: int) -> None:
    """Raises ValueError for shapes that do not fit a bank, an unknown scope, or K outside 1..2048."""
    H, N, D = query_HND.shape
    if (H, D) != (heads, head_dim) or not namespace_N.shape == document_N.shape == (N,):
        raise ValueError(f"queries must be [{heads}, N, {head_dim}], namespaces and documents [N]: got "
                         f"{tuple(query_HND.shape)}, {tuple(namespace_N.shape)} and {tuple(document_N.shape)}")
    if isinstance(scope, str) and scope not in SCOPES:
        raise ValueError(f"scope must be 'document', 'global' or a list of namespaces: got '{scope}'")
    check_top_k(k)


def pad(rows_NX: Tensor, n: int, fill: float = 0) -> Tensor:
    """Appends rows up to n."""
    if len(rows_NX) == n:
        return rows_NX
    return torch.cat([rows_NX, rows_NX.new_full((n - len(rows_NX), *rows_NX.shape[1:]), fill)])


def exchange_mode(mode: str, ranks: int, k: int) -> str:
    """'all_gather' or 'all_to_all' for phase 3: what is asked for, or by `auto` the one that receives fewer bytes."""
    if mode != "auto":
        return mode
    return "all_gather" if ranks * 12 * k <= 12 * k + 16 else "all_to_all"  # bytes per query, head and other rank


def spread(rows_HNX: Tensor, count: int) -> Tensor:
    """At most `count` of the N rows, evenly spread: a sample that needs no random numbers."""
    N = rows_HNX.shape[1]
    if N <= count:
        return rows_HNX
    return rows_HNX[:, torch.arange(count, device=rows_HNX.device) * N // max(1, count)]


def align_rows(rows_RNHKX: Tensor, holder_NHK: Tensor) -> Tensor:
    """Rows [N, H, K, X] in the order of the hits, zero where there is none, from those that each rank sent.

    Args:
        rows_RNHKX: every rank's winners, its own order, padded.
        holder_NHK: the rank that holds each hit; -1 where invalid.
    """
    rows_NHKX = torch.zeros_like(rows_RNHKX[0])
    for rank in range(len(rows_RNHKX)):  # the j-th hit from a rank is its j-th winner: both lists are in total order
        held_NHK = holder_NHK == rank
        place_NHK1 = (held_NHK.cumsum(-1) - 1).clamp(min=0).unsqueeze(-1)
        held_NHKX = rows_RNHKX[rank].gather(2, place_NHK1.expand_as(rows_NHKX))
        rows_NHKX = held_NHKX.where(held_NHK.unsqueeze(-1), rows_NHKX)
    return rows_NHKX


def attend_rows(query_HND: Tensor, hits: Hits, key_HNKD: Tensor, value_HNKD: Tensor) -> tuple[Tensor, Tensor]:
    """Phase 4 by rows: softmax attention over fetched entries, fp32 value_HND and logsumexp_HN."""
    dot_HNK = torch.einsum("hnd,hnkd->hnk", query_HND.float(), key_HNKD)
    moving_HNK = (dot_HNK - dot_HNK.detach()).where(hits.valid_HNK, 0.0)  # zero, with the gradient of q . k
    score_HNK = hits.score_HNK + moving_HNK
    value_HND = torch.einsum("hnk,hnkd->hnd", score_HNK.softmax(-1), value_HNKD)
    return value_HND, score_HNK.logsumexp(-1).where(hits.valid_HNK[..., 0], NO_SCORE)


class SumsOverShards(torch.autograd.Function):
    """Phase 4 by sums as one differentiable step: values and keys stay where they are, forward and backward."""

    @staticmethod
    def forward(ctx: Any, query_HND: Tensor, score_HNK: Tensor, id_HNK: Tensor, values: Callable[[int], Tensor],
                gradients: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Softmax attention over hits, fp32 value_HND and logsumexp_HN.

        Args:
            values: from N to the weighted sums over all shards, [N, H, D].
            gradients: from [N, H, D + 2], for each query the gradient g of its value, g . value and the gradient of its
                log-sum-exp, to the gradient of the query over all shards, [N, H, D].
        """
        value_HND = values(query_HND.shape[1]).transpose(0, 1).contiguous()
        ctx.gradients, ctx.dtype = gradients, query_HND.dtype
        ctx.save_for_backward(value_HND)
        return value_HND, logsumexp_of(score_HNK, id_HNK)

    @staticmethod
    @torch.autograd.function.once_differentiable
    @without_autocast()  # who calls backward inside a region of autocast has it here, too
    def backward(ctx: Any, grad_HND: Tensor, grad_lse_HN: Tensor) -> tuple[Tensor | None, ...]:
        (value_HND,) = ctx.saved_tensors
        dot_HN1 = (grad_HND * value_HND).sum(-1, keepdim=True)
        sent_HNX = torch.cat([grad_HND.float(), dot_HN1, grad_lse_HN.unsqueeze(-1)], dim=-1)
        grad_NHD = ctx.gradients(sent_HNX.transpose(0, 1))
        return grad_NHD.transpose(0, 1).to(ctx.dtype), None, None, None, None
