"""The read protocol, from top to bottom: ask, search, agree, attend (and its backward pass).

Phases 1 to 3 are `Reader.search`, phase 4 is `Reader.attend`. Everything here has one layout: queries first, [N, H, ...] for
those of this rank and [X, H, ...] for those of all; so a collective, which joins ranks along axis 0, needs no turning. The
bank turns what comes in and goes out.
Letters: N queries of this rank; X queries of all ranks of a memory group, each rank's padded to the same number; at last, in
`align_rows` and `pad`, X numbers of a row.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lmcode.dist import Group
from lmcode.memory.entry import UNKNOWN
from lmcode.memory.merge import logsumexp_of, merge_lists, pack_cuts, unpack_cuts, winners
from lmcode.memory.placement import holder_of
from lmcode.memory.search.faiss_index import check_top_k
from lmcode.memory.searcher import Scope
from lmcode.memory.shard import Shard
from lmcode.memory.ticket import Ticket, make_ticket, query_gradients, value_sums, winning_rows
from lmcode.precision import without_autocast
from lmcode.protocol import NO_SCORE, Hits

SCOPES = ("document", "global")
LOOKED_UP = 64  # most queries of a `look_up` that takes the short way
MAX_QUERY = 1e15  # a longer component could overflow a score; such a query finds nothing and is counted


class Asked(NamedTuple):
    """The queries of all ranks, in rank order: query_XHD fp32, namespace_X and document_X int64,
    and how many each rank contributed, padding included."""

    query_XHD: Tensor
    namespace_X: np.ndarray
    document_X: np.ndarray
    rows_per_rank: int


class Agreed(NamedTuple):
    """This rank's merged hits, score_NHK and id_NHK; and where the merged list of each of all queries ends: the score and id
    of its last hit, and its log-sum-exp."""

    score_NHK: Tensor
    id_NHK: Tensor
    cut_score_XH: Tensor
    cut_id_XH: Tensor
    lse_XH: Tensor


class Reader:
    """Reads one bank: what the ranks of a memory group do together, each with its shard.

    A read, `search` then `attend`, goes through these phases:
      1. all_gather of queries, namespaces and, unless the scope is "document", documents: every rank sees all X queries.
      2. Each rank searches its shard for all of them: its local top K in total order.
      3. The (score, id) lists are exchanged and merged: with `all_gather` all of them by every rank, with `all_to_all`
         each by its query's owner, who then shares the K-th hit and the log-sum-exp, 16 bytes a query. So each rank
         knows where merged lists end, hence which of its own hits won (a prefix), and their weights: the ticket.
      4. `sums`: each rank adds up weight * value over its winners, and a reduce_scatter hands every owner its vector;
         the backward pass gathers D + 2 numbers a query and scatters D back. `rows`: the winners' vectors travel.

    Attributes:
        stopwatch: measures phase 2 and the merging of phase 3.
        blind_queries: own queries that were not finite and therefore found nothing, since the start.
    """

    def __init__(self, shard: Shard, group: Group, inside: Group) -> None:
        self.shard, self.inside, self.config = shard, inside, shard.config
        self.stopwatch, self.blind_queries = Stopwatch(group), 0

    def search(self, query_NHD: Tensor, namespace_N: Tensor, document_N: Tensor, *, scope: Scope, k: int, tier: str,
               ragged: bool) -> Hits:
        """Phases 1 to 3; see `LongTermMemory.search`."""
        with self.stopwatch.running():
            asked = self.ask(query_NHD, namespace_N, document_N, scope, ragged=ragged)
            score_XHK, id_XHK, slot_XHK = self.shard.searcher.search(asked.query_XHD, asked.namespace_X, asked.document_X, k,
                                                            scope=scope, tier=tier)
            agreed = self.agree(score_XHK, id_XHK)
            won_XHK = winners(score_XHK, id_XHK, agreed.cut_score_XH, agreed.cut_id_XH)
            ticket = make_ticket(won_XHK, score_XHK, slot_XHK, agreed.lse_XH, step_M=self.shard.columns["step"],
                                 rows_per_rank=asked.rows_per_rank, version=self.shard.version)
        score_HNK, id_HNK = (turned(part[:len(query_NHD)]) for part in agreed[:2])
        return Hits(score_HNK, id_HNK, ticket)

    def ask(self, query_NHD: Tensor, namespace_N: Tensor, document_N: Tensor, scope: Scope, *, ragged: bool) -> Asked:
        """Phase 1: every rank sees all queries. In document scope nobody looks at documents, and they do not travel."""
        N = len(query_NHD)
        n = max(1, *self.inside.all_gather_int(N, phase="queries", device=query_NHD.device) if ragged else (N,))
        seeing_N = (query_NHD.abs() < MAX_QUERY).all(-1).all(1)
        self.blind_queries += N - int(seeing_N.sum())
        query_NHD = query_NHD.where(seeing_N[:, None, None], 0)
        own_names = namespace_N.where(seeing_N, -1)[:, None]  # [N, 1 or 2]
        if scope != "document":
            own_names = torch.cat([own_names, document_N[:, None]], dim=1)
        query_XHD = self.inside.all_gather(pad(query_NHD, n), phase="queries")
        names = self.inside.all_gather(pad(own_names, n, -1), phase="queries").cpu().numpy()
        return Asked(query_XHD.float(), names[:, 0], names[:, -1], n)

    def agree(self, score_XHK: Tensor, id_XHK: Tensor) -> Agreed:
        """Phase 3: the local lists of all ranks are merged, by every rank or by each query's owner."""
        ranks, (X, _, k), lists = self.inside.size, score_XHK.shape, (score_XHK, id_XHK)
        n = X // ranks
        if exchange_mode(self.config.exchange, ranks, k) == "all_gather":
            merged = merge_lists(*(self.inside.all_gather(part[None], phase="hits") for part in lists))
            mine = slice(self.inside.rank * n, (self.inside.rank + 1) * n)
            score_XHK, id_XHK = merged
            return Agreed(score_XHK[mine], id_XHK[mine], score_XHK[..., -1], id_XHK[..., -1],
                          logsumexp_of(score_XHK, id_XHK))
        own = merge_lists(*(self.inside.all_to_all(part, phase="hits").view(ranks, n, -1, k) for part in lists))
        return Agreed(*own, *unpack_cuts(self.inside.all_gather(pack_cuts(*own), phase="hits")))

    def ticket_of(self, hits: Hits) -> Ticket:
        """The ticket of hits of this bank; ValueError if it has changed since the search."""
        if not isinstance(hits.ticket, Ticket) or hits.ticket.version != self.shard.version:
            raise ValueError("hits must come from a search of this bank since it last changed: these do not")
        return hits.ticket

    def attend(self, query_NHD: Tensor, hits: Hits) -> tuple[Tensor, Tensor]:
        """Phase 4: softmax attention over hits, fp32 value_NHD and logsumexp_NH; by sums over the shards or by rows."""
        ticket, (score_NHK, id_NHK) = self.ticket_of(hits), (part.transpose(0, 1) for part in hits[:2])
        if self.config.fetch == "sums":
            value_NHD, lse_NH = SumsOverShards.apply(  # type: ignore[no-untyped-call]  # torch's own is not annotated
                query_NHD, score_NHK, id_NHK, ticket, self.shard, self.inside)
            return value_NHD, lse_NH
        return attend_rows(query_NHD, score_NHK, id_NHK, *self.fetch(ticket, id_NHK))

    @torch.no_grad()
    def fetch(self, ticket: Ticket, id_NHK: Tensor) -> tuple[Tensor, ...]:
        """Keys and values of the hits, fp32 [N, H, K, D] each, zero where invalid."""
        ranks, (N, H, k), shard = self.inside.size, id_NHK.shape, self.shard
        sent = winning_rows(shard.key_HMD, shard.value_HMD, ticket, k).view(ranks * ticket.rows_per_rank, H, k, -1)
        by_rank = self.inside.all_to_all(sent, phase="values").view(ranks, -1, *sent.shape[1:])[:, :N]
        holder_NHK = holders_of(id_NHK, self.config.virtual_shards, ranks).where(id_NHK >= 0, -1)
        parts: tuple[Tensor, ...] = align_rows(by_rank, holder_NHK).split(shard.value_HMD.shape[-1], dim=-1)
        return parts

    def look_up(self, query_NHD: Tensor, namespace_N: Tensor, document_N: Tensor, *, k: int,
                tier: str) -> tuple[Tensor, Tensor]:
        """`attend` to a `search` of the config's scope, fp32 value_NHD and logsumexp_NH; the short way where that leads to
        the same hits without a doubt."""

        def long_way(some: Tensor | slice) -> tuple[Tensor, Tensor]:
            hits = self.search(query_NHD[some], namespace_N[some], document_N[some], scope=self.config.scope, k=k, tier=tier,
                               ragged=False)
            return self.attend(query_NHD[some], hits)

        found = self.short_way(query_NHD, namespace_N, document_N, k)
        if found is None:
            return long_way(slice(None))
        value_NHD, lse_NH, doubtful_N = found
        if bool(doubtful_N.any()):
            value, lse_NH[doubtful_N] = long_way(doubtful_N)
            value_NHD[doubtful_N] = value.float()
        return value_NHD, lse_NH

    def short_way(self, query_NHD: Tensor, namespace_N: Tensor, document_N: Tensor, k: int) -> tuple[Tensor, ...] | None:
        """`Searcher.look_up`, for few queries on one rank, from which nothing is hidden. None where that is not so."""
        if self.inside.size > 1 or not 0 < len(query_NHD) <= LOOKED_UP:
            return None
        if self.config.scope != "document" and bool((document_N >= 0).any()):
            return None
        with self.stopwatch.running():
            longest = float(torch.linalg.vector_norm(query_NHD, dim=-1, dtype=torch.float32).max())
            if not longest < MAX_QUERY:  # it may be NaN
                return None
            return self.shard.searcher.look_up(query_NHD.float(), namespace_N.cpu().numpy(), k, scope=self.config.scope,
                                      longest=longest)


class SumsOverShards(torch.autograd.Function):
    """Phase 4 by sums as one differentiable step: values and keys stay where they are, forward and backward."""

    @staticmethod
    def forward(ctx: Any, query_NHD: Tensor, score_NHK: Tensor, id_NHK: Tensor, ticket: Ticket, shard: Shard,
                group: Group) -> tuple[Tensor, Tensor]:
        """Each rank adds up weight * value over the winners it holds; every owner gets the sum of all ranks."""
        N, H, D = query_NHD.shape
        sums = value_sums(shard.value_HMD, ticket)  # [X * H, D]
        value_NHD = group.reduce_scatter(sums.view(-1, H, D), phase="values")[:N]
        ctx.ticket, ctx.shard, ctx.group, ctx.dtype = ticket, shard, group, query_NHD.dtype
        ctx.save_for_backward(value_NHD)
        return value_NHD, logsumexp_of(score_NHK, id_NHK)

    @staticmethod
    @torch.autograd.function.once_differentiable
    @without_autocast()  # who calls backward inside a region of autocast has it here, too
    def backward(ctx: Any, grad_NHD: Tensor, grad_lse_NH: Tensor) -> tuple[Tensor | None, ...]:
        """Each owner sends the gradient g of its value, g . value and that of its log-sum-exp; each rank adds up what its
        winners make of them."""
        (value_NHD,), ticket, shard, group = ctx.saved_tensors, ctx.ticket, ctx.shard, ctx.group
        if ticket.version != shard.version:
            raise ValueError("the backward pass must run before the bank changes: it has changed since the search")
        dot_NH1 = (grad_NHD * value_NHD).sum(-1, keepdim=True)
        sent = torch.cat([grad_NHD.float(), dot_NH1, grad_lse_NH.unsqueeze(-1)], dim=-1)
        grads = group.all_gather(pad(sent, ticket.rows_per_rank), phase="gradients").flatten(0, 1)
        parts = query_gradients(shard.key_HMD, shard.value_HMD, ticket, grads[:, :-2].contiguous(), grads[:, -2],
                                grads[:, -1])
        grad_NHD = group.reduce_scatter(parts.view(-1, *value_NHD.shape[1:]), phase="gradients")[:len(value_NHD)]
        return grad_NHD.to(ctx.dtype), None, None, None, None, None


def attend_rows(query_NHD: Tensor, score_NHK: Tensor, id_NHK: Tensor, key_NHKD: Tensor,
                value_NHKD: Tensor) -> tuple[Tensor, Tensor]:
    """Phase 4 by rows: softmax attention over fetched entries, fp32 value_NHD and logsumexp_NH."""
    dot_NHK = torch.einsum("nhd,nhkd->nhk", query_NHD.float(), key_NHKD)
    moving_NHK = (dot_NHK - dot_NHK.detach()).where(id_NHK >= 0, 0.0)  # zero, with the gradient of q . k
    score_NHK = score_NHK + moving_NHK
    value_NHD = torch.einsum("nhk,nhkd->nhd", score_NHK.softmax(-1), value_NHKD)
    return value_NHD, score_NHK.logsumexp(-1).where(id_NHK[..., 0] >= 0, NO_SCORE)


def align_rows(by_rank: Tensor, holder_NHK: Tensor) -> Tensor:
    """Rows [N, H, K, X] in the order of the hits, zero where there is none, from those that each rank sent.

    Args:
        by_rank: [ranks, N, H, K, X], every rank's winners in its own order, padded.
        holder_NHK: the rank that holds each hit; -1 where invalid.
    """
    rows_NHKX = torch.zeros_like(by_rank[0])
    for rank in range(len(by_rank)):  # the j-th hit from a rank is its j-th winner: both lists are in total order
        held_NHK = holder_NHK == rank
        place_NHK1 = (held_NHK.cumsum(-1) - 1).clamp(min=0).unsqueeze(-1)
        held_NHKX = by_rank[rank].gather(2, place_NHK1.expand_as(rows_NHKX))
        rows_NHKX = held_NHKX.where(held_NHK.unsqueeze(-1), rows_NHKX)
    return rows_NHKX


def holders_of(ids: Tensor, virtual_shards: int, ranks: int) -> Tensor:
    """The rank of a memory group that holds each id, int64 on the device of the ids."""
    return torch.from_numpy(holder_of(ids.cpu().numpy(), virtual_shards, ranks)).to(ids.device)


def checked(query_HND: Tensor, namespace_N: Tensor, document_N: Tensor | None, scope: Scope, k: int, *,
            shard: Shard) -> tuple[Tensor, Tensor]:
    """Namespaces and documents of queries, unknown ones where none are given, on the shard's device wherever they were.

    Raises:
        ValueError: shapes that do not fit the shard, an unknown scope, or K outside 1..2048.
    """
    (heads, _, head_dim), (H, N, D) = shard.key_HMD.shape, query_HND.shape
    document_N = torch.full_like(namespace_N, UNKNOWN) if document_N is None else document_N
    if (H, D) != (heads, head_dim) or not namespace_N.shape == document_N.shape == (N,):
        raise ValueError(f"queries must be [{heads}, N, {head_dim}], namespaces and documents [N]: got "
                         f"{tuple(query_HND.shape)}, {tuple(namespace_N.shape)} and {tuple(document_N.shape)}")
    if isinstance(scope, str) and scope not in SCOPES:
        raise ValueError(f"scope must be 'document', 'global' or a list of namespaces: got '{scope}'")
    check_top_k(k)
    return namespace_N.to(shard.device), document_N.to(shard.device)


def exchange_mode(mode: str, ranks: int, k: int) -> str:
    """'all_gather' or 'all_to_all' for phase 3: what is asked for, or by `auto` the one that receives fewer bytes."""
    if mode != "auto":
        return mode
    return "all_gather" if ranks * 12 * k <= 12 * k + 16 else "all_to_all"  # bytes per query, head and other rank


def pad(rows_NX: Tensor, n: int, fill: float = 0) -> Tensor:
    """Appends rows up to n."""
    if len(rows_NX) == n:
        return rows_NX
    return torch.cat([rows_NX, rows_NX.new_full((n - len(rows_NX), *rows_NX.shape[1:]), fill)])


def turned(part: Tensor) -> Tensor:
    """From the layout of the model, [H, N, ...], to that of this file, [N, H, ...], or back; contiguous."""
    return part.transpose(0, 1).contiguous()


class Stopwatch:
    """Counts the wall time of blocks, without what passes inside a group's collectives."""

    def __init__(self, group: Group) -> None:
        self._group, self._seconds = group, 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Counts the block; one that raises does not count."""
        started, exchanged = time.perf_counter(), sum(self._group.seconds.values())
        yield
        self._seconds += time.perf_counter() - started - (sum(self._group.seconds.values()) - exchanged)

    def take(self) -> float:
        """Seconds since the last call; starts counting anew."""
        taken, self._seconds = self._seconds, 0.0
        return taken
