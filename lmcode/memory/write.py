"""From what a step offers to what is stored: hits are counted and credited, candidates gathered, chosen, admitted.

Everything that the ranks do together in a commit is here. What decides travels first, and only then the vectors of what was
chosen; every rank then holds the same batch in the same order, and its shard keeps what belongs there.
Letters: Q bags of winners of a read; M slots of this rank; E candidates or entries; R ranks of a memory group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lmcode.dist import Group
from lmcode.memory import entry
from lmcode.memory.shard import Shard
from lmcode.memory.ticket import Ticket
from lmcode.protocol import Candidates, Hits


class Batch(NamedTuple):
    """Rows that are to become entries, the same on every rank. Vectors are on the bank's device, the rest is on the CPU."""

    key_EHD: Tensor
    value_EHD: Tensor
    namespace_E: np.ndarray
    document_E: np.ndarray
    importance_E: np.ndarray


def count_hits(hits: Sequence[Hits], tickets: Sequence[Ticket], shard: Shard, inside: Group,
               between: Group) -> tuple[np.ndarray, np.ndarray]:
    """What the reads of all memory groups did to each slot of this rank: see `Shard.count_hits`. Collective."""
    counted, groups = shard.count_hits(tickets, gather_credits(hits, tickets, inside)), between.size
    if groups == 1:
        return counted
    packed_M = entry.pack_hits(*counted, parts=groups).to(shard.key_HMD.device)
    return entry.unpack_hits(between.all_reduce(packed_M, phase="writes"), parts=groups)


def gather_credits(hits: Sequence[Hits], tickets: Sequence[Ticket], inside: Group) -> list[Tensor]:
    """What the bags of each read's ticket are to be credited with, fp32 [Q]: winners lie here, their askers anywhere."""
    if not hits:
        return []
    rows = [ticket.rows_per_rank for ticket in tickets]
    own_XH = torch.cat([entry.credit_of(one, n) for one, n in zip(hits, rows, strict=True)])
    everyones_RXH = inside.all_gather(own_XH[None], phase="writes")
    return [read_RNH.flatten() for read_RNH in everyones_RXH.split(rows, dim=1)]


def gather_candidates(candidates: Sequence[Candidates], shard: Shard, group: Group) -> tuple[int, Batch]:
    """How many valid candidates all ranks offer, and those that the policy chooses. Collective."""
    heads, _, head_dim = shard.value_HMD.shape
    device = shard.key_HMD.device
    vector_E2HD, facts_E3 = entry.stack_candidates(candidates, heads=heads, head_dim=head_dim, dtype=shard.key_HMD.dtype,
                                                   device=device)
    counts = group.all_gather_int(len(facts_E3), phase="writes", device=device)
    # What decides travels first, so that the vectors of candidates that are not chosen never do.
    facts_E3 = group.all_gather_rows(facts_E3, counts, phase="writes")
    namespace_E, document_E, surprise_E = entry.unpack_facts(facts_E3)
    chosen_E = entry.choose(surprise_E, shard.config)
    chosen_parts = np.split(chosen_E, np.cumsum(counts)[:-1])
    vector_E2HD = vector_E2HD[torch.from_numpy(chosen_parts[group.rank]).to(device)]
    vector_E2HD = group.all_gather_rows(vector_E2HD, [int(one.sum()) for one in chosen_parts], phase="writes")
    return len(chosen_E), Batch(vector_E2HD[:, 0], vector_E2HD[:, 1], namespace_E[chosen_E], document_E[chosen_E],
                                entry.importance_of(surprise_E[chosen_E]))


def batch_of(key_HED: Tensor, value_HED: Tensor, namespace_E: Tensor, importance_E: Tensor | None,
             document_E: Tensor | None, shard: Shard) -> Batch:
    """The batch of a direct write; ValueError for shapes that do not fit. See `LongTermMemory.write`."""
    (heads, _, head_dim), E = shard.value_HMD.shape, key_HED.shape[1]
    importance_E = torch.ones(E) if importance_E is None else importance_E
    document_E = torch.full((E,), entry.UNKNOWN) if document_E is None else document_E
    entry.check_batch(key_HED, value_HED, namespace_E, document_E, importance_E, heads=heads, head_dim=head_dim)
    key_EHD, value_EHD = (part.detach().transpose(0, 1).to(shard.key_HMD.device) for part in (key_HED, value_HED))
    names_E, documents_E = (column_E.cpu().long().numpy() for column_E in (namespace_E, document_E))
    return Batch(key_EHD, value_EHD, names_E, documents_E, importance_E.cpu().float().numpy())


def store(batch: Batch, shard: Shard, *, first_id: int, step: int) -> tuple[np.ndarray, int]:
    """Assigns ids from `first_id`, rejects, clips and writes; ids with -1 where rejected, and how many were clipped."""
    entries, accepted_E, clipped = entry.admit(batch.key_EHD, batch.value_EHD, batch.namespace_E, batch.importance_E,
                                               document_E=batch.document_E, step=step, first_id=first_id,
                                               max_norm=shard.config.max_norm)
    shard.write(entries)
    id_E = np.full(len(accepted_E), -1, np.int64)
    id_E[accepted_E] = entries.id_E
    return id_E, clipped
