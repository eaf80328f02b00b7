"""What is measured of a bank: counts over all ranks, which ranks supplied the hits, and how many an exact search finds.

The share of hits that an exact search finds as well (`recall`) is measured on a few queries of the latest search.
Letters: N queries; X those of them that are in a sample.
"""

from __future__ import annotations

import hashlib
import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lmcode.dist import Group
from lmcode.memory.read import holders_of
from lmcode.memory.searcher import Scope
from lmcode.memory.states import digest_of
from lmcode.protocol import Hits

if TYPE_CHECKING:
    from lmcode.memory.bank import LongTermMemory


class Sample(NamedTuple):
    """Some of the queries of one search, and its scope."""

    query_HND: Tensor
    namespace_N: Tensor
    document_N: Tensor
    scope: Scope


def no_sample(heads: int, head_dim: int, scope: Scope) -> Sample:
    """The sample of a bank that nobody has asked yet."""
    nobody_N = torch.zeros(0, dtype=torch.int64)
    return Sample(torch.zeros(heads, 0, head_dim), nobody_N, nobody_N, scope)


def totals(group: Group, device: torch.device, *numbers: int) -> list[int]:
    """Each number's sum over the ranks of a group. Collective."""
    return group.all_reduce(torch.tensor(numbers, device=device), phase="stats").tolist()


def count_entries(bank: LongTermMemory) -> dict[str, Any]:
    """What `LongTermMemory.stats` returns. Collective."""
    shard, group, tally = bank.shard, bank.group, bank.shard.ledger.tally
    by_rank = [0] * group.size
    by_rank[group.rank] = tally.live
    numbers = *by_rank, sum(shard.evicted.values()), tally.merged, tally.chances, tally.spared, bank.reader.blind_queries
    *by_rank, evicted, merged, chances, spared, blind = totals(group, bank.device, *numbers)
    once = (number // bank.between.size for number in (sum(by_rank), evicted, merged, chances, spared))
    live, evicted, merged, chances, spared = once
    return {"slots": shard.slots, "live": live, "live_by_rank": by_rank, "fill": live / shard.slots, "evicted": evicted,
            "chances": chances, "spared": spared, "merged": merged, "rejected": bank.rejected, "clipped": bank.clipped,
            "blind_queries": blind, "next_id": bank.next_id}


def content_hash(bank: LongTermMemory) -> str:
    """What `LongTermMemory.content_hash` returns. Collective."""
    parts = bank.inside.all_gather_object([(shard, digest_of(bank.state(shard))) for shard in bank.owned])
    whole = b"".join(digest for _, digest in sorted(itertools.chain(*parts)))
    return hashlib.blake2b(whole, digest_size=32).hexdigest()


def ages(hits: Hits, *, step: int) -> Tensor:
    """Steps since the winners that this rank holds were written, for its group's queries and heads: int64 [E]."""
    age_E: Tensor = step - hits.ticket.step_E
    return age_E


def shares_by_rank(bank: LongTermMemory, hits: Hits) -> Tensor:
    """How many of these hits each rank's shard supplied, of all ranks: int64 [ranks]."""
    group, inside = bank.group, bank.inside
    holder = holders_of(hits.id_HNK[hits.valid_HNK], bank.config.virtual_shards, inside.size) + group.rank - inside.rank
    return torch.bincount(holder, minlength=group.size)


def recall(bank: LongTermMemory) -> float | None:
    """`check_recall` of a bank as it is now, on queries of its latest search. Collective."""
    sample = bank.sample
    hits = bank.search(*sample[:3], scope=sample.scope, ragged=True)
    share = check_recall(bank, sample, hits)
    bank.sample = sample
    return share


def check_recall(bank: LongTermMemory, asked: Sample, hits: Hits) -> float | None:
    """Recall@K of fresh `hits` against an exact search, on `recall_queries` queries of every rank. Collective.

    None where there was nothing to find.

    Args:
        asked: the queries of the search that found the hits, and its scope.
    """
    count = bank.config.recall_queries
    some = sample_of(asked, count)
    exact = bank.search(*some[:3], scope=some.scope, top_k=hits.id_HNK.shape[-1], tier="exact", ragged=True)
    found, wanted = totals(bank.group, bank.device, *found_of(spread(hits.id_HNK, count), exact))
    return found / wanted if wanted else None


def found_of(id_HNK: Tensor, exact: Hits) -> tuple[int, int]:
    """How many hits of an exact search are among these, and how many it has."""
    found_HNK = (exact.id_HNK.unsqueeze(-1) == id_HNK.unsqueeze(-2)).any(-1) & exact.valid_HNK
    return int(found_HNK.sum()), int(exact.valid_HNK.sum())


def spread(rows_HNX: Tensor, count: int) -> Tensor:
    """At most `count` of the N rows, evenly spread: a sample that needs no random numbers."""
    N = rows_HNX.shape[1]
    if N <= count:
        return rows_HNX
    return rows_HNX[:, torch.arange(count, device=rows_HNX.device) * N // max(1, count)]


def sample_of_all(query_HND: Tensor, namespace_N: Tensor, document_N: Tensor, scope: Scope, count: int, *,
                  group: Group) -> Sample:
    """This rank's part of at most `count` queries, evenly spread over those of all ranks, if all have as many."""
    N = len(namespace_N)
    total = N * group.size
    place_X = torch.arange(min(count, total)) * total // max(1, min(count, total)) - group.rank * N
    at_X = place_X[(place_X >= 0) & (place_X < N)].to(query_HND.device)
    return Sample(query_HND[:, at_X], namespace_N[at_X], document_N[at_X], scope)


def sample_of(asked: Sample, count: int) -> Sample:
    """At most `count` of these queries."""
    names_N, documents_N = (spread(one_N[None], count)[0] for one_N in asked[1:3])
    return Sample(spread(asked.query_HND, count), names_N, documents_N, asked.scope)
