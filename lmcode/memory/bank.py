"""The bank of one layer: what all ranks of a group do together, reads and writes.

A method that is called collective must be called by all ranks of the group in the same order. Each issues a number of
collectives that depends on settings only, never on data: zero rows take part as padding.
Letters: R ranks of a memory group; n queries of one rank, padded to the same number in all of it; G = R * n gathered
queries; Q = G * H.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lmcode.config import ConfigError, MemoryConfig
from lmcode.dist import Group
from lmcode.memory import entry
from lmcode.memory.merge import logsumexp_of, merge_lists, pack_cuts, unpack_cuts, winners
from lmcode.memory.placement import holder_of, shards_of
from lmcode.memory.read import SCOPES, SumsOverShards, align_rows, attend_rows, check_search, exchange_mode, pad, spread
from lmcode.memory.rounds import consolidate_shards
from lmcode.memory.search.faiss_index import TIERS, check_top_k, choose_tier
from lmcode.memory.shard import Predicate, Scope, Shard, digest_of
from lmcode.memory.ticket import Ticket
from lmcode.precision import without_autocast
from lmcode.protocol import Candidates, ConsolidationReport, Hits, check_threshold

LOOKED_UP = 64  # most queries of a `look_up` that takes the short way
MAX_QUERY = 1e15  # a longer component could overflow a score; such a query finds nothing and is counted
_VERSIONS = itertools.count(1)  # no two states of any two banks in this process share a version


class LongTermMemory:
    """One logical memory over the ranks of a group; a `Retriever`. No module, parameter or buffer.

    Memory groups of `config.group_size` consecutive ranks (by default a single one, of all) each hold it whole, a slice per
    rank. Reads stay inside; between the groups travel candidates and hit statistics, so that all change alike.

    A read, `search` then `attend`, goes through these phases:
      1. all_gather of queries, namespaces and, unless the scope is "document", documents: every rank sees all G queries.
      2. Each rank searches its shard for all of them: its local top K in total order.
      3. The (score, id) lists are exchanged and merged: with `all_gather` all of them by every rank, with `all_to_all`
         each by its query's owner, who then shares the K-th hit and the log-sum-exp, 16 bytes a query. So each rank
         knows where merged lists end, hence which of its own hits won (a prefix), and their weights: the ticket.
      4. `sums`: each rank adds up weight * value over its winners, and a reduce_scatter hands every owner its vector;
         the backward pass gathers D + 2 numbers a query and scatters D back. `rows`: the winners' vectors travel.
    The group counts bytes and seconds as queries, hits, values, gradients, writes and stats. Reads change nothing but
    counters. Whatever changes entries (`commit`, `write`, `delete`, `consolidate`, `load`) makes earlier hits stale:
    attending to those is an error.

    Attributes:
        group, inside, between: all ranks; this rank's memory group; the ranks with the same slice, one of each group.
        owned, to_save: the virtual shards that this rank holds; those that it writes where all ranks save the bank.
        top_k: K of a search that does not say otherwise.
        search_seconds: wall time of phase 2 and of merging since the start; exchange time is the group's.
        blind_queries: own queries that were not finite and therefore found nothing, since the start.
        next_id, rejected, clipped: ids given out, rows refused and rows scaled down so far; the same on every rank.
    """

    def __init__(self, *, heads: int, head_dim: int, slots: int, top_k: int, config: MemoryConfig,
                 group: Group | None = None, device: torch.device | str = "cpu") -> None:
        """Makes an empty bank; every rank of the group makes the same one.

        Raises:
            ConfigError: fewer slots than virtual shards, fewer virtual shards than ranks, K outside 1..2048, or FAISS
                asked for where it cannot search.
        """
        self.group = Group() if group is None else group
        self.heads, self.head_dim, self.slots, self.top_k, self.config = heads, head_dim, slots, top_k, config
        self.device = torch.device(device)
        self.inside, self.between = self.group.split(config.ranks_per_group(self.group.size))
        check_top_k(top_k)
        self._tiers = {scope: choose_tier(config, scope, slots, self.device) for scope in SCOPES}
        try:
            self.owned = shards_of(self.inside.rank, self.inside.size, config.virtual_shards)
            self.to_save = self.owned[self.between.rank::self.between.size]
            self.shard = Shard(heads=heads, head_dim=head_dim, slots=slots, owned=self.owned, config=config,
                               device=self.device)
        except ValueError as error:
            raise ConfigError(f"bank: {error}") from None
        self.next_id = self.rejected = self.clipped = 0
        self.search_seconds, self.blind_queries = 0.0, 0
        nobody_N = torch.zeros(0, dtype=torch.int64)
        self._sample: tuple[tuple[Tensor, ...], Scope] = (torch.zeros(heads, 0, head_dim), nobody_N, nobody_N), config.scope
        self._version = next(_VERSIONS)

    @torch.no_grad()
    @without_autocast()
    def search(self, query_HND: Tensor, namespace_N: Tensor, document_N: Tensor | None = None, *,
               scope: Scope | None = None, top_k: int | None = None, tier: str | None = None,
               ragged: bool = False) -> Hits:
        """Phases 1 to 3: the best entries for each head and query by query . key + weight * log importance. Collective.

        Args:
            query_HND: fp32 or bf16, scaled by the temperature; N may be 0.
            namespace_N: int64; a negative namespace sees nothing.
            document_N: int64; a query does not see entries of its own document that have another namespace. Negative, or
                None: unknown, nothing is hidden.
            scope: "document" (entries of the query's namespace), "global", or the namespaces that every query may see;
                the config's scope when None. The same on every rank, like `top_k` and `tier`.
            tier: "exact" or "faiss-flat"; the config's when None.
            ragged: whether N may differ between ranks; costs one more collective.

        Raises:
            ValueError: shapes that do not fit the bank, an unknown scope, or K outside 1..2048.
        """
        k, N = self.top_k if top_k is None else top_k, query_HND.shape[1]
        scope = self.config.scope if scope is None else scope
        document_N = torch.full_like(namespace_N, entry.UNKNOWN) if document_N is None else document_N
        check_search(query_HND, namespace_N, document_N, scope, k, heads=self.heads, head_dim=self.head_dim)
        started, waited = time.perf_counter(), sum(self.group.seconds.values())
        n = max(1, *self.inside.all_gather_int(N, phase="queries", device=self.device) if ragged else (N,))
        seeing_N = (query_HND.abs() < MAX_QUERY).all(-1).all(0)
        self.blind_queries += N - int(seeing_N.sum())
        query_NHD = query_HND.where(seeing_N[:, None], 0).transpose(0, 1)
        query_GHD = self.inside.all_gather(pad(query_NHD, n), phase="queries")
        names_NX = namespace_N.where(seeing_N, -1)[:, None]
        if scope != "document":
            names_NX = torch.cat([names_NX, document_N[:, None]], dim=1)
        names_GX = self.inside.all_gather(pad(names_NX, n, -1), phase="queries").cpu().numpy()
        query_HGE = F.pad(query_GHD.transpose(0, 1).float(), (0, 1), value=1.0)
        tier = tier or self._tiers["document" if scope == "document" else "global"]
        # In document scope the second column is not there, and nobody looks at it.
        found = self.shard.search(query_HGE, names_GX[:, 0], names_GX[:, -1], k, scope=scope, tier=TIERS[tier])
        score_GHK, id_GHK, slot_GHK = (part.transpose(0, 1).contiguous() for part in found)
        (own_score_NHK, own_id_NHK), (cut_score_GH, cut_id_GH, lse_GH) = self._exchange(score_GHK, id_GHK, n)
        ticket = self.shard.ticket(winners(score_GHK, id_GHK, cut_score_GH, cut_id_GH), score_GHK, slot_GHK, lse_GH,
                                   rows_per_rank=n, version=self._version)
        self._sample = self._sample_of(query_HND, namespace_N, document_N), scope
        self.search_seconds += time.perf_counter() - started - (sum(self.group.seconds.values()) - waited)
        score_HNK, id_HNK = (part[:N].transpose(0, 1).contiguous() for part in (own_score_NHK, own_id_NHK))
        return Hits(score_HNK, id_HNK, ticket)

    def _exchange(self, score_GHK: Tensor, id_GHK: Tensor, n: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Phase 3: this rank's merged hits [n, H, K]; for all queries the cut's score and id and the log-sum-exp."""
        R, k, lists = self.inside.size, score_GHK.shape[-1], (score_GHK, id_GHK)
        if exchange_mode(self.config.exchange, R, k) == "all_gather":
            merged = merge_lists(*(self.inside.all_gather(part[None], phase="hits") for part in lists))
            mine = slice(self.inside.rank * n, (self.inside.rank + 1) * n)
            cuts = merged[0][..., -1], merged[1][..., -1], logsumexp_of(*merged)
            return (merged[0][mine], merged[1][mine]), cuts
        own = merge_lists(*(self.inside.all_to_all(part, phase="hits").view(R, n, -1, k) for part in lists))
        return own, unpack_cuts(self.inside.all_gather(pack_cuts(*own), phase="hits"))

    @torch.no_grad()
    @without_autocast()
    def look_up(self, query_HND: Tensor, namespace_N: Tensor,
                document_N: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`attend` to a fresh `search`, without gradient; faster for few queries on one rank. Collective."""
        document_N = torch.full_like(namespace_N, entry.UNKNOWN) if document_N is None else document_N
        found = self._looked_up(query_HND, namespace_N, document_N)
        if found is None:
            return self.attend(query_HND, self.search(query_HND, namespace_N, document_N))
        value_HND, lse_HN, doubtful_N = found
        if bool(doubtful_N.any()):
            query_HnD = query_HND[:, doubtful_N]
            parts = self.attend(query_HnD, self.search(query_HnD, namespace_N[doubtful_N], document_N[doubtful_N]))
            value_HND[:, doubtful_N], lse_HN[:, doubtful_N] = parts[0].float(), parts[1]
        return value_HND.to(query_HND.dtype), lse_HN

    def _looked_up(self, query_HND: Tensor, namespace_N: Tensor, document_N: Tensor) -> tuple[Tensor, ...] | None:
        """See `Shard.look_up`; None where this is no case for it, as where something might be hidden."""
        if self.inside.size > 1 or not 0 < query_HND.shape[1] <= LOOKED_UP:
            return None
        check_search(query_HND, namespace_N, document_N, self.config.scope, self.top_k, heads=self.heads,
                     head_dim=self.head_dim)
        if self.config.scope != "document" and bool((document_N >= 0).any()):
            return None
        started = time.perf_counter()
        longest = float(torch.linalg.vector_norm(query_HND, dim=-1, dtype=torch.float32).max())
        if not longest < MAX_QUERY:  # it may be NaN
            return None
        found = self.shard.look_up(F.pad(query_HND.float(), (0, 1), value=1.0), namespace_N.cpu().numpy(), self.top_k,
                                   scope=self.config.scope, longest=longest)
        self.search_seconds += time.perf_counter() - started
        return found

    def _ticket_of(self, hits: Hits) -> Ticket:
        if not isinstance(hits.ticket, Ticket) or hits.ticket.version != self._version:
            raise ValueError("hits must come from a search of this bank since it last changed: these do not")
        return hits.ticket

    @without_autocast()
    def attend(self, query_HND: Tensor, hits: Hits) -> tuple[Tensor, Tensor]:
        """Phase 4: softmax attention over `hits`, (value_HND in the query's dtype, logsumexp_HN fp32). Collective.

        Differentiable once with respect to the query; entries are constants. The backward pass is collective, too. A
        query without hits gets value 0, log-sum-exp `NO_SCORE` and gradient 0.

        Args:
            query_HND: the queries that `hits` were searched with.

        Raises:
            ValueError: if the bank has changed since the search.
        """
        if self.config.fetch == "sums":
            parts = (partial(part, self._ticket_of(hits)) for part in (self._values, self._gradients))
            value_HND, lse_HN = SumsOverShards.apply(  # type: ignore[no-untyped-call]  # torch's own is not annotated
                query_HND, hits.score_HNK, hits.id_HNK, *parts)
        else:
            key_HNKD, fetched_HNKD = self.fetch(hits)
            value_HND, lse_HN = attend_rows(query_HND, hits, key_HNKD, fetched_HNKD)
        return value_HND.to(query_HND.dtype), lse_HN

    def _values(self, ticket: Ticket, N: int) -> Tensor:
        sum_GHD = self.shard.sums(ticket).view(-1, self.heads, self.head_dim)
        return self.inside.reduce_scatter(sum_GHD, phase="values")[:N]

    def _gradients(self, ticket: Ticket, sent_NHX: Tensor) -> Tensor:
        if ticket.version != self._version:
            raise ValueError("the backward pass must run before the bank changes: it has changed since the search")
        grad_QX = self.inside.all_gather(pad(sent_NHX, ticket.rows_per_rank), phase="gradients").flatten(0, 1)
        part_QD = self.shard.sums_backward(ticket, grad_QX[:, :-2].contiguous(), grad_QX[:, -2], grad_QX[:, -1])
        part_GHD = part_QD.view(-1, self.heads, self.head_dim)
        return self.inside.reduce_scatter(part_GHD, phase="gradients")[:len(sent_NHX)]

    @torch.no_grad()
    def fetch(self, hits: Hits) -> tuple[Tensor, ...]:
        """Keys and values of the hits, fp32 [H, N, K, D] each, zero where invalid. Collective.

        Meant for inspection: all of [G, H, K, 2D] exists at once, padded, whichever rank holds what.
        """
        ticket, (H, N, k), R = self._ticket_of(hits), hits.score_HNK.shape, self.inside.size
        sent_GHKX = self.shard.rows(ticket, k).view(R * ticket.rows_per_rank, H, k, -1)
        rows_RNHKX = self.inside.all_to_all(sent_GHKX, phase="values").view(R, -1, H, k, 2 * self.head_dim)[:, :N]
        id_NHK = hits.id_HNK.transpose(0, 1)
        rows_NHKX = align_rows(rows_RNHKX, self._holder_of(id_NHK).where(id_NHK >= 0, -1))
        parts: tuple[Tensor, ...] = rows_NHKX.transpose(0, 1).split(self.head_dim, dim=-1)
        return parts

    def _holder_of(self, ids: Tensor) -> Tensor:
        """The rank inside the memory group that holds each id."""
        holder = holder_of(ids.cpu().numpy(), self.config.virtual_shards, self.inside.size)
        return torch.from_numpy(holder).to(ids.device)

    @torch.no_grad()
    def commit(self, candidates: Sequence[Candidates], hits: Sequence[Hits], *, step: int) -> entry.CommitReport:
        """Counts the attention that entries received in this step, then writes what the policy chooses. Collective.

        Called once per optimizer step, with a list item per micro-batch; either list may be empty, `hits` on all ranks
        alike, as every rank took part in every search. A hit is credited with its share of the softmax over its query's
        hits, times the query's `credit_HN`. The global order of
        candidates is rank, list item, position; the policy looks at all valid ones in that order, so its choice does
        not depend on the number of ranks or memory groups.

        Raises:
            ValueError: if any of the hits is stale, or its credit not one number for each query.
        """
        self.shard.touch(*self._count_hits(hits), step)
        evicted, clipped = sum(self.shard.evicted.values()), self.clipped
        offered, batch = self._gather_candidates(candidates)
        id_E = self._store(*batch, step=step)
        written = int((id_E >= 0).sum())
        return entry.CommitReport(offered, written, len(id_E) - written, self.clipped - clipped,
                                  sum(self.shard.evicted.values()) - evicted)

    def _count_hits(self, hits: Sequence[Hits]) -> tuple[np.ndarray, np.ndarray]:
        """What the reads of all memory groups did to each slot of this rank: see `Shard.count_hits`."""
        tickets, groups = [self._ticket_of(one) for one in hits], self.between.size
        counted = self.shard.count_hits(tickets, self._gather_credits(hits, tickets))
        if groups == 1:
            return counted
        packed_M = entry.pack_hits(*counted, parts=groups).to(self.device)
        return entry.unpack_hits(self.between.all_reduce(packed_M, phase="writes"), parts=groups)

    def _gather_credits(self, hits: Sequence[Hits], tickets: Sequence[Ticket]) -> list[Tensor]:
        """What the bags of each read's ticket are to be credited with, fp32 [Q]: winners lie here, their askers anywhere."""
        if not hits:
            return []
        rows = [ticket.rows_per_rank for ticket in tickets]
        own_XH = torch.cat([entry.credit_of(one, n) for one, n in zip(hits, rows, strict=True)])
        everyones_RXH = self.inside.all_gather(own_XH[None], phase="writes")
        return [read_RNH.flatten() for read_RNH in everyones_RXH.split(rows, dim=1)]

    def _gather_candidates(self, candidates: Sequence[Candidates]) -> tuple[int, tuple[Any, ...]]:
        """How many valid candidates there are; keys, values, namespaces, documents and importance of those that are
        chosen."""
        vector_E2HD, facts_E3 = entry.stack_candidates(candidates, heads=self.heads, head_dim=self.head_dim,
                                                       dtype=self.shard.key_HME.dtype, device=self.device)
        counts = self.group.all_gather_int(len(facts_E3), phase="writes", device=self.device)
        # What decides travels first, so that the vectors of candidates that are not chosen never do.
        facts_E3 = self.group.all_gather_rows(facts_E3, counts, phase="writes")
        namespace_E, document_E, surprise_E = entry.unpack_facts(facts_E3)
        chosen_E = entry.choose(surprise_E, self.config)
        chosen_parts = np.split(chosen_E, np.cumsum(counts)[:-1])
        vector_E2HD = vector_E2HD[torch.from_numpy(chosen_parts[self.group.rank]).to(self.device)]
        vector_E2HD = self.group.all_gather_rows(vector_E2HD, [int(one.sum()) for one in chosen_parts], phase="writes")
        return len(chosen_E), (vector_E2HD[:, 0], vector_E2HD[:, 1], namespace_E[chosen_E], document_E[chosen_E],
                               entry.importance_of(surprise_E[chosen_E]))

    @torch.no_grad()
    def write(self, key_HED: Tensor, value_HED: Tensor, namespace_E: Tensor, importance_E: Tensor | None = None,
              step: int = 0, document_E: Tensor | None = None) -> Tensor:
        """Writes entries directly; every rank passes the same batch. Returns their ids, int64 [E], -1 where rejected.

        Args:
            namespace_E: int64; rows with a negative one are rejected.
            importance_E: fp32, cut off at 10; rows where it is not positive are rejected; 1 when None.
            document_E: int64, the text that each entry was written from; -1, or None: unknown.
        """
        E = key_HED.shape[1]
        importance_E = torch.ones(E) if importance_E is None else importance_E
        document_E = torch.full((E,), entry.UNKNOWN) if document_E is None else document_E
        entry.check_batch(key_HED, value_HED, namespace_E, document_E, importance_E, heads=self.heads,
                          head_dim=self.head_dim)
        key_EHD, value_EHD = (part.detach().transpose(0, 1).to(self.device) for part in (key_HED, value_HED))
        names_E, texts_E = (column_E.cpu().long().numpy() for column_E in (namespace_E, document_E))
        return torch.from_numpy(self._store(key_EHD, value_EHD, names_E, texts_E, importance_E.cpu().float().numpy(),
                                            step=step))

    def _store(self, key_EHD: Tensor, value_EHD: Tensor, namespace_E: np.ndarray, document_E: np.ndarray,
               importance_E: np.ndarray, *, step: int) -> np.ndarray:
        """Assigns ids, rejects, clips and writes a batch that is the same on every rank; ids with -1 where rejected."""
        entries, accepted_E, clipped = entry.admit(key_EHD, value_EHD, namespace_E, importance_E, document_E=document_E,
                                                   step=step, first_id=self.next_id, max_norm=self.config.max_norm)
        self.shard.write(entries)
        id_E = np.full(len(accepted_E), -1, np.int64)
        id_E[accepted_E] = entries.id_E
        self.next_id += len(id_E)
        self.rejected += int((~accepted_E).sum())
        self.clipped += clipped
        self._version = next(_VERSIONS)
        return id_E

    def delete(self, *, ids: Sequence[int] | None = None, namespace: int | None = None, before_step: int | None = None,
               predicate: Predicate | None = None) -> int:
        """Removes, for good, the entries that meet all given conditions; returns how many there were. Collective.

        Args:
            predicate: from the columns of `entry.METADATA` (arrays over slots, empty ones included) to a bool array.
        """
        chosen_M = self.shard.matching(ids=ids, namespace=namespace, before_step=before_step, predicate=predicate)
        self._version = next(_VERSIONS)
        return self._totals(self.inside, self.shard.delete(chosen_M))[0]

    def consolidate(self, threshold: float = 0.1) -> ConsolidationReport:
        """Merges pairs of entries of one text whose keys are less than a cosine distance apart. Collective.

        A text is a document in a namespace; entries of unknown document are one text of their namespace. So no entry is a
        mean of what two documents say, and deleting one of them leaves nothing of it. The price is that texts which say the
        same, in one namespace, keep an entry each.

        One call is one round: every entry looks up its nearest other one over all shards, pairs are chosen greedily in
        id order (`choose_pairs`), and nobody is in two; the rest is left to the next call. The survivor is the smaller
        id and keeps namespace and step, its vectors become count-weighted means (`merge_vectors`) and its columns
        change as `merge_columns` says; the loser is deleted for good. A threshold outside (0, 2] is a ValueError.
        """
        check_threshold(threshold)
        report = consolidate_shards(self.shard, self.inside, threshold, tier=self._tiers["global"])
        self._version = next(_VERSIONS)
        return report

    consolidate_memories = consolidate  # the name in the original README

    def _totals(self, group: Group, *numbers: int) -> list[int]:
        return group.all_reduce(torch.tensor(numbers, device=self.device), phase="stats").tolist()

    def stats(self) -> dict[str, Any]:
        """Counts over all ranks: slots, live, fill (live / slots), evicted, merged, ... Collective.

        An entry counts once, however many memory groups hold it; but in `live_by_rank` for each rank that does. `chances`
        are the live entries that eviction will pass over once, `spared` those that it has passed over.
        """
        by_rank = [0] * self.group.size
        by_rank[self.group.rank] = int(self.shard.live_M.sum())
        merged = int((self.shard.columns["count"] - 1)[self.shard.live_M].sum())
        numbers = *by_rank, sum(self.shard.evicted.values()), merged, *self.shard.count_chances(), self.blind_queries
        *by_rank, evicted, merged, chances, spared, blind = self._totals(self.group, *numbers)
        live, evicted, merged, chances, spared = (number // self.between.size for number in (sum(by_rank), evicted, merged,
                                                                                             chances, spared))
        return {"slots": self.slots, "live": live, "live_by_rank": by_rank, "fill": live / self.slots,
                "evicted": evicted, "chances": chances, "spared": spared, "merged": merged, "rejected": self.rejected,
                "clipped": self.clipped, "blind_queries": blind, "next_id": self.next_id}

    def take_search_seconds(self) -> float:
        """`search_seconds` since the last call; starts counting anew."""
        taken, self.search_seconds = self.search_seconds, 0.0
        return taken

    def ages(self, hits: Hits, *, step: int) -> Tensor:
        """Steps since the winners that this rank holds were written, for its group's queries and heads: int64 [W]."""
        age_W: Tensor = step - hits.ticket.step_W
        return age_W

    def shares_by_rank(self, hits: Hits) -> Tensor:
        """How many of these hits each rank's shard supplied, of all ranks: int64 [ranks]."""
        holder = self._holder_of(hits.id_HNK[hits.valid_HNK]) + self.group.rank - self.inside.rank
        return torch.bincount(holder, minlength=self.group.size)

    def recall(self) -> float | None:
        """`check_recall` of this bank as it is now, on queries of the latest search. Collective."""
        sample, scope = self._sample
        query_HND, namespace_N, document_N = sample
        return self.check_recall(query_HND, namespace_N, self.search(*sample, scope=scope), document_N=document_N,
                                 scope=scope)

    def check_recall(self, query_HND: Tensor, namespace_N: Tensor, hits: Hits, *, document_N: Tensor | None = None,
                     scope: Scope | None = None) -> float | None:
        """Recall@K of fresh `hits` against an exact search, on `recall_queries` queries of every rank. Collective.

        None where there was nothing to find. N must be the same on every rank, documents and `scope` those of the search.
        """
        document_N = torch.full_like(namespace_N, entry.UNKNOWN) if document_N is None else document_N
        found_id_HNK, *_ = self._sample_of(hits.id_HNK, namespace_N, document_N)
        sample = self._sample_of(query_HND, namespace_N, document_N)
        exact = self.search(*sample, scope=scope, top_k=hits.id_HNK.shape[-1], tier="exact")
        found_HNK = (exact.id_HNK.unsqueeze(-1) == found_id_HNK.unsqueeze(-2)).any(-1) & exact.valid_HNK
        found, wanted = self._totals(self.group, int(found_HNK.sum()), int(exact.valid_HNK.sum()))
        return found / wanted if wanted else None

    def _sample_of(self, rows_HNX: Tensor, *names: Tensor) -> tuple[Tensor, ...]:
        count = self.config.recall_queries
        return spread(rows_HNX, count), *(spread(name_N[None], count)[0] for name_N in names)

    def like(self, *, slots: int | None = None, config: MemoryConfig | None = None, group: Group | None = None,
             device: torch.device | str | None = None) -> LongTermMemory:
        """An empty bank of this shape; what is given is different. Collective of its group."""
        return LongTermMemory(heads=self.heads, head_dim=self.head_dim, slots=slots or self.slots, top_k=self.top_k,
                              config=config or self.config, group=group or self.group, device=device or self.device)

    def fork(self, *, empty: bool, slots: int | None = None) -> LongTermMemory:
        """An independent bank with the same settings: empty (only then may `slots` differ) or a copy of all entries."""
        if slots not in (None, self.slots) and not empty:
            raise ValueError(f"a copy must have the slots of its original, {self.slots}: got {slots}")
        other = self.like(slots=slots)
        for shard in () if empty else self.owned:
            other.load(shard, self.state(shard))
        return other

    def state(self, shard: int) -> dict[str, Tensor]:
        """A copy of one virtual shard of this rank, with the bank's counters: see `Shard.state`."""
        return {**self.shard.state(shard), **{name: torch.tensor(getattr(self, name)) for name in entry.COUNTERS}}

    def load(self, shard: int, state: Mapping[str, Tensor]) -> None:
        """Replaces one virtual shard of this rank, and the bank's counters, by a `state`.

        Raises:
            ValueError: if the state does not fit this bank; nothing has changed then.
        """
        self.shard.load(shard, state)
        for name in entry.COUNTERS:
            setattr(self, name, int(state[name]))
        self._version = next(_VERSIONS)

    def restore(self, states: Mapping[int, Mapping[str, Tensor]], problem: str | None = None) -> None:
        """Loads all virtual shards of this rank, given checked states, or none on any rank. Collective.

        Raises:
            ValueError: on all ranks, if any has a `problem` or the states are not all of one moment.
        """
        moments = {tuple(int(state[name]) for name in entry.COUNTERS) for state in states.values()}
        entry.check_moments(self.group.all_gather_object((problem, moments)))
        for shard, state in states.items():
            self.load(shard, state)

    def content_hash(self) -> str:
        """blake2b over all virtual shards in order: equal for equal contents, on any number of ranks. Collective."""
        parts = self.inside.all_gather_object([(shard, digest_of(self.state(shard))) for shard in self.owned])
        whole = b"".join(digest for _, digest in sorted(itertools.chain(*parts)))
        return hashlib.blake2b(whole, digest_size=32).hexdigest()
