"""The bank of one layer: the face of what all ranks of a group do together, reads and writes.

How a read goes is in `read`, how a write does in `write`, what is measured in `measure`. A method that is called collective
must be called by all ranks of the group in the same order. Each issues a number of collectives that depends on settings
only, never on data: zero rows take part as padding.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmcode.config import ConfigError, MemoryConfig
from lmcode.dist import Group
from lmcode.memory import entry, measure, planning
from lmcode.memory.joining import join_nearest
from lmcode.memory.placement import shards_of
from lmcode.memory.read import SCOPES, Reader, check_search, turned
from lmcode.memory.rounds import consolidate_shards
from lmcode.memory.search.choice import choose_tier, reason_of
from lmcode.memory.search.faiss_index import check_top_k
from lmcode.memory.search.plan import Plan
from lmcode.memory.search.tier import tier_of
from lmcode.memory.shard import Predicate, Scope, Shard, digest_of
from lmcode.memory.write import Batch, batch_of, count_hits, gather_candidates
from lmcode.precision import without_autocast
from lmcode.protocol import Candidates, ConsolidationReport, Hits, check_threshold

log = logging.getLogger("lmcode")


class LongTermMemory:
    """One logical memory over the ranks of a group; a `Retriever`. No module, parameter or buffer.

    Memory groups of `config.group_size` consecutive ranks (by default a single one, of all) each hold it whole, a slice per
    rank. Reads stay inside; between the groups travel candidates and hit statistics, so that all change alike.

    A read is `search`, then `attend`: the phases are those of `read.Reader`.
    The group counts bytes and seconds as queries, hits, values, gradients, writes and stats. Reads change nothing but
    counters. Whatever changes entries (`commit`, `write`, `delete`, `consolidate`, `load`) makes earlier hits stale:
    attending to those is an error.

    Attributes:
        group, inside, between: all ranks; this rank's memory group; the ranks with the same slice, one of each group.
        owned, to_save: the virtual shards that this rank holds; those that it writes where all ranks save the bank.
        top_k: K of a search that does not say otherwise.
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
        self._reader = Reader(self.shard, self.group, self.inside)
        self.shard.use(planning.first_plan(config.tier))
        self.next_id = self.rejected = self.clipped = 0
        nobody_N = torch.zeros(0, dtype=torch.int64)
        self._sample = measure.Sample(torch.zeros(heads, 0, head_dim), nobody_N, nobody_N, config.scope)
        self._picked: dict[str, str] = {}  # by kind of scope, what `auto` was last said to search with
        self._unmeasured = False  # graphs have come into use, and no query has shown yet what they find

    @property
    def blind_queries(self) -> int:
        """Own queries that were not finite and therefore found nothing, since the start."""
        return self._reader.blind_queries

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
            tier: a name in `config.TIERS`; that of `tier_for` when None.
            ragged: whether N may differ between ranks; costs one more collective.

        Raises:
            ValueError: shapes that do not fit the bank, an unknown scope, or K outside 1..2048.
        """
        k = self.top_k if top_k is None else top_k
        scope = self.config.scope if scope is None else scope
        namespace_N, document_N = self._names(namespace_N, document_N)
        self._check(query_HND, namespace_N, document_N, scope, k)
        self._sample = measure.sample_of_all(query_HND, namespace_N, document_N, scope, self.config.recall_queries,
                                             group=self.group)
        if tier is None:
            self._tend_graphs(scope)
            tier = self.tier_for(scope)
            self._say_pick(tier, scope, k, query_HND.shape[1])
        return self._reader.search(query_HND.transpose(0, 1), namespace_N, document_N, scope=scope, k=k, tier=tier,
                                   ragged=ragged)

    def tier_for(self, scope: Scope) -> str:
        """The tier of a search with this scope, as things are now."""
        if scope == "document":
            return self._tiers["document"]
        if self.config.tier == "auto" and self.plan.probing:
            return "ivf"
        if self.config.tier in ("ivf", "hnsw") and not self.plan.probing:
            return "exact"
        return self._tiers["global"]

    @property
    def plan(self) -> Plan:
        """How searches of the whole bank go: the same on every rank, and changed by `review` only."""
        return self.shard.plan

    def use(self, plan: Plan) -> None:
        """Searches by this plan from now on; every rank must be given the same."""
        self.shard.use(plan)

    def _say_pick(self, tier: str, scope: Scope, k: int, queries: int) -> None:
        """What `auto` searches with, the first time and whenever that changes."""
        kind = "document" if scope == "document" else "global"
        if self.config.tier == "auto" and self._picked.get(kind) != tier:
            self._picked[kind] = tier
            log.info("memory.tier = auto: '%s' for reads of scope '%s' (%d entries of this rank, K = %d, %d queries of each "
                     "rank and head): %s", tier, kind, self.shard.ledger.tally.live, k, queries,
                     reason_of(kind, self.slots, self.device, self.plan))

    def _names(self, namespace_N: Tensor, document_N: Tensor | None) -> tuple[Tensor, Tensor]:
        """Namespaces and documents on the device of the bank, wherever the caller has them."""
        document_N = torch.full_like(namespace_N, entry.UNKNOWN) if document_N is None else document_N
        return namespace_N.to(self.device), document_N.to(self.device)

    def _check(self, query_HND: Tensor, namespace_N: Tensor, document_N: Tensor, scope: Scope, k: int) -> None:
        check_search(query_HND, namespace_N, document_N, scope, k, heads=self.heads, head_dim=self.head_dim)

    @torch.no_grad()
    @without_autocast()
    def look_up(self, query_HND: Tensor, namespace_N: Tensor,
                document_N: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`attend` to a fresh `search`, without gradient; faster for few queries on one rank. Collective."""
        namespace_N, document_N = self._names(namespace_N, document_N)
        self._check(query_HND, namespace_N, document_N, self.config.scope, self.top_k)
        self._say_pick(tier := self.tier_for(self.config.scope), self.config.scope, self.top_k, query_HND.shape[1])
        approximate = tier_of(tier).approximate
        found = None if approximate else self._reader.look_up(query_HND.transpose(0, 1), namespace_N, document_N, self.top_k)
        if found is None:
            return self.attend(query_HND, self.search(query_HND, namespace_N, document_N))
        value_HND, lse_HN, doubtful_N = turned(found[0]), turned(found[1]), found[2]
        if bool(doubtful_N.any()):
            query_HnD = query_HND[:, doubtful_N]
            parts = self.attend(query_HnD, self.search(query_HnD, namespace_N[doubtful_N], document_N[doubtful_N]))
            value_HND[:, doubtful_N], lse_HN[:, doubtful_N] = parts[0].float(), parts[1]
        return value_HND.to(query_HND.dtype), lse_HN

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
        value_NHD, lse_NH = self._reader.attend(query_HND.transpose(0, 1), hits)
        return turned(value_NHD).to(query_HND.dtype), turned(lse_NH)

    @torch.no_grad()
    def fetch(self, hits: Hits) -> tuple[Tensor, ...]:
        """Keys and values of the hits, fp32 [H, N, K, D] each, zero where invalid. Collective.

        All of [G, H, K, 2D] exists at once, padded, whichever rank holds what.
        """
        parts = self._reader.fetch(self._reader.ticket_of(hits), hits.id_HNK.transpose(0, 1))
        return tuple(part_NHKD.transpose(0, 1) for part_NHKD in parts)

    @torch.no_grad()
    @without_autocast()
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
        tickets = [self._reader.ticket_of(one) for one in hits]
        self.shard.touch(*count_hits(hits, tickets, self.shard, self.inside, self.between), step)
        evicted, clipped = sum(self.shard.evicted.values()), self.clipped
        offered, batch = gather_candidates(candidates, self.shard, self.group, self.inside, first_id=self.next_id, step=step)
        id_E = self._store(batch)
        written = int((id_E >= 0).sum())
        return entry.CommitReport(offered, written, len(id_E) - written, self.clipped - clipped,
                                  sum(self.shard.evicted.values()) - evicted)

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
        return torch.from_numpy(self._store(batch_of(key_HED, value_HED, namespace_E, importance_E, document_E, self.shard,
                                                     first_id=self.next_id, step=step)))

    def _store(self, batch: Batch) -> np.ndarray:
        entries = batch.entries
        if self.config.merge_above is not None:
            entries = join_nearest(entries, self.shard, self.inside, above=self.config.merge_above,
                                   tier=self._tiers["global"])
        self.shard.write(entries)
        self.next_id += len(batch.id_E)
        self.rejected += int((batch.id_E < 0).sum())
        self.clipped += batch.clipped
        return batch.id_E

    def delete(self, *, ids: Sequence[int] | None = None, namespace: int | None = None, before_step: int | None = None,
               predicate: Predicate | None = None) -> int:
        """Removes, for good, the entries that meet all given conditions; returns how many there were. Collective.

        Centroids go with them, and the next `review` or `prepare` trains new ones; until then a search is exact.

        Args:
            predicate: from the columns of `entry.METADATA` (arrays over slots, empty ones included) to a bool array.
        """
        slot_E = self.shard.matching(ids=ids, namespace=namespace, before_step=before_step, predicate=predicate)
        deleted = measure.totals(self.inside, self.device, self.shard.delete(slot_E))[0]
        if deleted:
            self.shard.forget(slot_E)
        if deleted and self.plan.centroid_HLD is not None:  # they are means of what is to be gone
            self.use(Plan(self.plan.probing))
        return deleted

    @without_autocast()
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
        return consolidate_shards(self.shard, self.inside, threshold, tier=self._tiers["global"])

    consolidate_memories = consolidate  # the name in the original README

    def stats(self) -> dict[str, Any]:
        """Counts over all ranks: slots, live, fill (live / slots), evicted, merged, ... Collective.

        An entry counts once, however many memory groups hold it; but in `live_by_rank` for each rank that does. `chances`
        are the live entries that eviction will pass over once, `spared` those that it has passed over.
        """
        counts, blind = measure.count_entries(self.shard, self.group, self.between.size, self.blind_queries)
        return {**counts, "rejected": self.rejected, "clipped": self.clipped, "blind_queries": blind,
                "next_id": self.next_id}

    def take_search_seconds(self) -> float:
        """Wall time of searching and merging since the last call; exchange time is the group's."""
        return self._reader.clock.take()

    def ages(self, hits: Hits, *, step: int) -> Tensor:
        """Steps since the winners that this rank holds were written, for its group's queries and heads: int64 [W]."""
        age_W: Tensor = step - hits.ticket.step_W
        return age_W

    def shares_by_rank(self, hits: Hits) -> Tensor:
        """How many of these hits each rank's shard supplied, of all ranks: int64 [ranks]."""
        return measure.shares_by_rank(hits, self.config.virtual_shards, self.group, self.inside)

    def recall(self) -> float | None:
        """`check_recall` of this bank as it is now, on queries of the latest search. Collective."""
        sample = self._sample
        hits = self.search(*sample[:3], scope=sample.scope, ragged=True)
        share = self.check_recall(sample.query_HND, sample.namespace_N, hits, document_N=sample.document_N,
                                  scope=sample.scope)
        self._sample = sample
        return share

    @without_autocast()
    def review(self) -> float | None:
        """`recall`, and what follows from it for how the bank is searched from now on, with a line in the log. Collective.

        Only the tiers `ivf`, `hnsw` and `auto` have anything to decide: see `search.plan.revise`.
        """
        recall = self.recall()
        if self.config.tier in ("ivf", "hnsw", "auto"):
            self._revise(recall if self._sample.scope != "document" else None)
        return recall

    @without_autocast()
    def prepare(self, *, graphs: Path | None = None) -> None:
        """What `review` does before anything was measured: a bank that was filled gets its centroids, or graphs are begun.
        These come into use when a search finds that all ranks have theirs; `build_graphs` waits for it. Collective.

        Args:
            graphs: a folder in which graphs are kept for the next process.
        """
        if self.config.tier in ("ivf", "auto") and self.config.scope != "document":
            self._revise(None)
        if self._makes_graphs:
            self.shard.graphs.try_again()
            self._unmeasured |= planning.tend_graphs(self.shard, self.group, graphs)

    @without_autocast()
    def build_graphs(self, *, graphs: Path | None = None) -> None:
        """Makes the graphs that reads by the tier `hnsw` go through, whatever `memory.tier` says, and waits for them.
        Collective. `graphs` is as in `prepare`."""
        self.shard.graphs.try_again()
        self._unmeasured |= planning.settle_graphs(self.shard, self.group, graphs) and self._makes_graphs

    @property
    def _makes_graphs(self) -> bool:
        return self.config.tier == "hnsw" and self.config.scope == "global"

    def _tend_graphs(self, scope: Scope) -> None:
        """What a search does for graphs first: lets them come into use, and measures once what they find. Collective."""
        if not self._makes_graphs or scope != "global" or not self.plan.probing:
            return
        self._unmeasured |= planning.tend_graphs(self.shard, self.group)
        if not self._unmeasured or not self.config.recall_queries:
            return
        self._unmeasured = False
        while (recall := self.recall()) is not None and self._revise(recall):
            pass  # each change is measured again
        self._unmeasured = recall is None
        if recall is not None:
            log.info("memory.tier = hnsw: graphs of %d entries of this rank are in use; recall@%d %.4f",
                     self.shard.graphs.nodes, self.top_k, recall)

    def _revise(self, recall: float | None) -> bool:
        """Whether anything changes."""
        change = planning.review(self.shard, self.group, self.inside, recall)
        if change is None:
            return False
        plan = change.plan
        how = f"{plan.probes} of {plan.lists} lists" if plan.probing else "exactly"
        if self.config.tier == "hnsw" and plan.probing:
            how = f"by graphs with {plan.width} entries in view"
        say = log.warning if change.alarming else log.info
        say("memory.tier = %s: the bank is searched %s from now on%s: %s", self.config.tier, how,
            ", with new centroids" if change.train else "", change.reason)
        return True

    def check_recall(self, query_HND: Tensor, namespace_N: Tensor, hits: Hits, *, document_N: Tensor | None = None,
                     scope: Scope | None = None) -> float | None:
        """Recall@K of fresh `hits` against an exact search, on `recall_queries` queries of every rank. Collective.

        None where there was nothing to find. Documents and `scope` are those of the search.
        """
        scope, count = self.config.scope if scope is None else scope, self.config.recall_queries
        sample = measure.sample_of(query_HND, *self._names(namespace_N, document_N), scope, count)
        exact = self.search(*sample[:3], scope=scope, top_k=hits.id_HNK.shape[-1], tier="exact", ragged=True)
        counts = measure.found_of(measure.spread(hits.id_HNK, count), exact)
        found, wanted = measure.totals(self.group, self.device, *counts)
        return found / wanted if wanted else None

    def like(self, *, slots: int | None = None, config: MemoryConfig | None = None, group: Group | None = None,
             device: torch.device | str | None = None) -> LongTermMemory:
        """An empty bank of this shape, searched by the same plan; what is given is different. Collective of its group."""
        other = LongTermMemory(heads=self.heads, head_dim=self.head_dim, slots=slots or self.slots, top_k=self.top_k,
                               config=config or self.config, group=group or self.group, device=device or self.device)
        other.use(self.plan)
        other._picked = dict(self._picked)
        return other

    @without_autocast()
    def fork(self, *, empty: bool, slots: int | None = None) -> LongTermMemory:
        """An independent bank with the same settings: empty (only then may `slots` differ) or a copy of all entries.

        With memory.tier=hnsw a copy waits for graphs, shares them and makes none of its own: what it finds must not hang on
        the clock. Collective then.
        """
        if slots not in (None, self.slots) and not empty:
            raise ValueError(f"a copy must have the slots of its original, {self.slots}: got {slots}")
        other = self.like(slots=slots)
        for shard in () if empty else self.owned:
            other.load(shard, self.state(shard))
        if self._makes_graphs and not empty:
            self.build_graphs()
            other.shard.graphs.share(self.shard.graphs)
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
