"""The bank of one layer: the face of what all ranks of a group do together, reads and writes.

How a read goes is in `read`, how a write does in `write`; what is measured is in `measure`, and how banks are copied and
restored in `lifecycle`. A method that is called collective must be called by all ranks of the group in the same order. Each
issues a number of collectives that depends on settings only, never on data: zero rows take part as padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lmcode.config import ConfigError, MemoryConfig
from lmcode.dist import Group
from lmcode.memory import entry, measure, planning, write
from lmcode.memory.placement import shards_of
from lmcode.memory.read import Reader, checked, turned
from lmcode.memory.rounds import consolidate_shards
from lmcode.memory.search.choice import TierChoice
from lmcode.memory.search.faiss_index import check_top_k
from lmcode.memory.search.plan import Plan, first_plan
from lmcode.memory.search.tier import tier_of
from lmcode.memory.searcher import Scope
from lmcode.memory.shard import Predicate, Shard
from lmcode.memory.states import COUNTERS
from lmcode.precision import without_autocast
from lmcode.protocol import Candidates, ConsolidationReport, Hits, check_threshold


class LongTermMemory:
    """One logical memory over the ranks of a group; a `Retriever`. No module, parameter or buffer.

    Memory groups of `config.group_size` consecutive ranks (by default a single one, of all) each hold it whole, a slice per
    rank. Reads stay inside; between the groups travel candidates and hit statistics, so that all change alike. Reads change
    nothing but counters. Whatever changes entries makes earlier hits stale: attending to those is an error.

    Attributes:
        group, inside, between: all ranks; this rank's memory group; the ranks with the same slice, one of each group.
        owned, to_save: the virtual shards that this rank holds; those that it writes where all ranks save the bank.
        top_k: K of a search that does not say otherwise.
        next_id, rejected, clipped: ids given out, rows refused and rows scaled down so far; the same on every rank.
        choice: by which tier a search goes.
        reader: goes through the phases of a read, and counts its seconds and the queries that were not finite.
        sample: some queries of the latest search, on which `measure.recall` measures.
        unmeasured: whether graphs have come into use, and no query has shown yet what they find.
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
        self.choice = TierChoice(config, slots, self.device)
        try:
            self.owned = shards_of(self.inside.rank, self.inside.size, config.virtual_shards)
            self.to_save = self.owned[self.between.rank::self.between.size]
            self.shard = Shard(heads=heads, head_dim=head_dim, slots=slots, owned=self.owned, config=config,
                               device=self.device)
        except ValueError as error:
            raise ConfigError(f"bank: {error}") from None
        self.reader = Reader(self.shard, self.group, self.inside)
        self.use(first_plan(config.tier))
        self.next_id = self.rejected = self.clipped = 0
        self.sample, self.unmeasured = measure.no_sample(heads, head_dim, config.scope), False

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
            tier: a name in `config.TIERS`; that of `choice` when None.
            ragged: whether N may differ between ranks; costs one more collective.

        Raises:
            ValueError: shapes that do not fit the bank, an unknown scope, or K outside 1..2048.
        """
        k = self.top_k if top_k is None else top_k
        scope = self.config.scope if scope is None else scope
        names = checked(query_HND, namespace_N, document_N, scope, k, shard=self.shard)
        self.sample = measure.sample_of_all(query_HND, *names, scope, self.config.recall_queries, group=self.group)
        if tier is None:
            planning.before_search(self, scope)
            tier = self._tier(scope, k, query_HND.shape[1])
        return self.reader.search(query_HND.transpose(0, 1), *names, scope=scope, k=k, tier=tier, ragged=ragged)

    @without_autocast()
    def attend(self, query_HND: Tensor, hits: Hits) -> tuple[Tensor, Tensor]:
        """Phase 4: softmax attention over `hits`, (value_HND in the query's dtype, logsumexp_HN fp32). Collective.

        Differentiable once with respect to the query, `query_HND` of the search; entries are constants. The backward pass is
        collective, too. A query without hits gets value 0, log-sum-exp `NO_SCORE` and gradient 0.

        Raises:
            ValueError: if the bank has changed since the search.
        """
        value_NHD, lse_NH = self.reader.attend(query_HND.transpose(0, 1), hits)
        return turned(value_NHD).to(query_HND.dtype), turned(lse_NH)

    @torch.no_grad()
    def fetch(self, hits: Hits) -> tuple[Tensor, ...]:
        """Keys and values of the hits, fp32 [H, N, K, D] each, zero where invalid. Collective.

        The rows of all queries of all ranks, [queries, H, K, 2 D], exist at once, padded, whichever rank holds what.
        """
        parts = self.reader.fetch(self.reader.ticket_of(hits), hits.id_HNK.transpose(0, 1))
        return tuple(part_NHKD.transpose(0, 1) for part_NHKD in parts)

    @torch.no_grad()
    @without_autocast()
    def look_up(self, query_HND: Tensor, namespace_N: Tensor,
                document_N: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`attend` to a fresh `search`, without gradient; faster for few queries on one rank. Collective."""
        names = checked(query_HND, namespace_N, document_N, self.config.scope, self.top_k, shard=self.shard)
        tier = self._tier(self.config.scope, self.top_k, query_HND.shape[1])
        if tier_of(tier).approximate:
            return self.attend(query_HND, self.search(query_HND, *names))
        value_NHD, lse_NH = self.reader.look_up(query_HND.transpose(0, 1), *names, k=self.top_k, tier=tier)
        return turned(value_NHD).to(query_HND.dtype), turned(lse_NH)

    def _tier(self, scope: Scope, k: int, queries: int) -> str:
        return self.choice.pick(scope, self.plan, live=self.shard.ledger.tally.live, k=k, queries=queries)

    @property
    def plan(self) -> Plan:
        """How searches of the whole bank go: the same on every rank, and changed by `planning` only."""
        return self.shard.searcher.plan

    def use(self, plan: Plan) -> None:
        """Searches by this plan from now on; every rank must be given the same."""
        self.shard.searcher.use(plan)

    @torch.no_grad()
    def commit(self, candidates: Sequence[Candidates], hits: Sequence[Hits], *, step: int) -> entry.CommitReport:
        """Counts the attention that entries received in this step, then writes what the policy chooses. Collective.

        Called once per optimizer step, with a list item per micro-batch; either list may be empty, `hits` on all ranks
        alike. A hit is credited with its share of the softmax over its query's hits, times the query's `credit_HN`. The
        global order of candidates is rank, list item, position; the policy looks at all valid ones in that order, so its
        choice does not depend on the number of ranks or memory groups.

        Raises:
            ValueError: if any of the hits is stale, or its credit not one number for each query.
        """
        tickets = [self.reader.ticket_of(one) for one in hits]
        self.shard.touch(*write.count_hits(hits, tickets, self.shard, self.inside, self.between), step)
        offered, batch = write.gather_candidates(candidates, self.shard, self.group, self.inside, first_id=self.next_id,
                                                 step=step)
        evicted, id_E = write.store(self, batch)
        written = int((id_E >= 0).sum())
        return entry.CommitReport(offered, written, len(id_E) - written, batch.clipped, evicted)

    @torch.no_grad()
    @without_autocast()
    def write(self, key_HED: Tensor, value_HED: Tensor, namespace_E: Tensor, importance_E: Tensor | None = None,
              step: int = 0, document_E: Tensor | None = None) -> Tensor:
        """Writes entries directly; every rank passes the same batch. Returns their ids, int64 [E], -1 where rejected.

        Args:
            namespace_E: int64; rows with a negative one are rejected.
            importance_E: fp32, cut off at 10; rows where it is not positive are rejected; 1 when None.
            document_E: int64, the text that each entry was written from; -1, or None: unknown.
        """
        batch = write.batch_of(key_HED, value_HED, namespace_E, importance_E, document_E, self.shard, first_id=self.next_id,
                               step=step)
        return torch.from_numpy(write.store(self, batch)[1])

    def delete(self, *, ids: Sequence[int] | None = None, namespace: int | None = None, before_step: int | None = None,
               predicate: Predicate | None = None) -> int:
        """Removes, for good, the entries that meet all given conditions; returns how many there were. Collective.

        Centroids go with them, since they are means of what is gone; until `planning` trains new ones, searches are exact.

        Args:
            predicate: from the columns of `entry.METADATA` (arrays over slots, empty ones included) to a bool array.
        """
        slot_E = self.shard.matching(ids=ids, namespace=namespace, before_step=before_step, predicate=predicate)
        deleted = measure.totals(self.inside, self.device, self.shard.delete(slot_E))[0]
        if deleted:
            self.shard.searcher.forget(slot_E)
            self.use(self.plan.without_centroids())
        return deleted

    @without_autocast()
    def consolidate(self, threshold: float = 0.1) -> ConsolidationReport:
        """Merges pairs of entries of one text whose keys are less than a cosine distance apart. Collective.

        A text is a document in a namespace; entries of unknown document are one text of their namespace. So no entry is a
        mean of what two documents say, and deleting one of them leaves nothing of it. One call is one round, see `rounds`.
        A threshold outside (0, 2] is a ValueError.
        """
        check_threshold(threshold)
        return consolidate_shards(self.shard, self.inside, threshold, tier=self.choice.tiers["global"])

    consolidate_memories = consolidate  # the name in the original README

    def stats(self) -> dict[str, Any]:
        """Counts over all ranks: slots, live, fill (live / slots), evicted, merged, ... Collective.

        An entry counts once, however many memory groups hold it; but in `live_by_rank` for each rank that does. `chances`
        are the live entries that eviction will pass over once, `spared` those that it has passed over.
        """
        return measure.count_entries(self)

    def state(self, shard: int) -> dict[str, Tensor]:
        """A copy of one virtual shard of this rank, with the bank's counters: see `Shard.state`."""
        return {**self.shard.state(shard), **{name: torch.tensor(getattr(self, name)) for name in COUNTERS}}

    def load(self, shard: int, state: Mapping[str, Tensor]) -> None:
        """Replaces one virtual shard of this rank, and the bank's counters, by a `state`; ValueError, and nothing has
        changed, if it does not fit this bank."""
        self.shard.load(shard, state)
        for name in COUNTERS:
            setattr(self, name, int(state[name]))

    def content_hash(self) -> str:
        """blake2b over all virtual shards in order: equal for equal contents, on any number of ranks. Collective."""
        return measure.content_hash(self)
