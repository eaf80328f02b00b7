"""What is measured of a bank: counts over all ranks, who supplied the hits, and how many of them an exact search finds.

Letters: those of `read`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmcode.dist import Group
from lmcode.memory.read import holders_of
from lmcode.memory.shard import Scope, Shard
from lmcode.protocol import Hits


class Sample(NamedTuple):
    """Some of the queries of one search, and its scope."""

    query_HND: Tensor
    namespace_N: Tensor
    document_N: Tensor
    scope: Scope


def totals(group: Group, device: torch.device, *numbers: int) -> list[int]:
    """Each number's sum over the ranks of a group. Collective."""
    return group.all_reduce(torch.tensor(numbers, device=device), phase="stats").tolist()


def count_entries(shard: Shard, group: Group, groups: int, blind_queries: int) -> tuple[dict[str, Any], int]:
    """What `LongTermMemory.stats` says of entries, and all blind queries. Collective of all ranks, in so many groups."""
    tally, by_rank = shard.ledger.tally, [0] * group.size
    by_rank[group.rank] = tally.live
    numbers = *by_rank, sum(shard.evicted.values()), tally.merged, tally.chances, tally.spared, blind_queries
    *by_rank, evicted, merged, chances, spared, blind = totals(group, shard.key_HMD.device, *numbers)
    once = (number // groups for number in (sum(by_rank), evicted, merged, chances, spared))
    live, evicted, merged, chances, spared = once
    return {"slots": shard.slots, "live": live, "live_by_rank": by_rank, "fill": live / shard.slots, "evicted": evicted,
            "chances": chances, "spared": spared, "merged": merged}, blind


def shares_by_rank(hits: Hits, virtual_shards: int, group: Group, inside: Group) -> Tensor:
    """How many of these hits each rank's shard supplied, of all ranks: int64 [ranks]."""
    holder = holders_of(hits.id_HNK[hits.valid_HNK], virtual_shards, inside.size) + group.rank - inside.rank
    return torch.bincount(holder, minlength=group.size)


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


def sample_of(query_HND: Tensor, namespace_N: Tensor, document_N: Tensor, scope: Scope, count: int) -> Sample:
    """At most `count` of these queries."""
    names_N, documents_N = (spread(one_N[None], count)[0] for one_N in (namespace_N, document_N))
    return Sample(spread(query_HND, count), names_N, documents_N, scope)
