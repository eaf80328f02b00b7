"""From what a step offers to what is stored: hits are counted and credited, candidates gathered, chosen, admitted.

Everything that the ranks do together in a commit is here. The columns that decide travel first, to all ranks; so every rank
knows which candidates get which ids, and vectors travel only to the ranks that will hold them.
Letters: N queries or candidates of this rank; E chosen candidates or entries; X bags of winners of a read (`ticket`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lmcode.dist import Group
from lmcode.memory import entry
from lmcode.memory.joining import join_nearest, superseded
from lmcode.memory.placement import holder_of
from lmcode.memory.shard import Shard
from lmcode.memory.ticket import Ticket
from lmcode.protocol import Candidates, Hits

if TYPE_CHECKING:
    from lmcode.memory.bank import LongTermMemory


class Admitted(NamedTuple):
    """A batch of rows, each with its id.

    id_E: int64, -1 where rejected; the same on every rank.
    clipped: how many of the others have a vector that was scaled down; the same on every rank.
    entries: of those that are not rejected at least the ones that this rank holds.
    """

    id_E: np.ndarray
    clipped: int
    entries: entry.Entries


def count_hits(hits: Sequence[Hits], tickets: Sequence[Ticket], shard: Shard, inside: Group,
               between: Group) -> tuple[np.ndarray, np.ndarray]:
    """What the reads of all memory groups did to the slots of this rank: see `Shard.count_hits`. Collective."""
    counted = shard.count_hits(tickets, gather_credits(hits, tickets, inside))
    if between.size == 1:
        return counted
    counted_E2 = torch.from_numpy(np.stack(counted, axis=1)).to(shard.device)
    counts = between.all_gather_int(len(counted_E2), phase="writes", device=counted_E2.device)
    return shard.ledger.add_up(*between.all_gather_rows(counted_E2, counts, phase="writes").cpu().numpy().T)


def gather_credits(hits: Sequence[Hits], tickets: Sequence[Ticket], inside: Group) -> list[Tensor]:
    """What the bags of each read's ticket are to be credited with, fp32 [X]: the winners are on this rank, their queries on
    any."""
    if not hits:
        return []
    rows = [ticket.rows_per_rank for ticket in tickets]
    own_NH = torch.cat([entry.credit_of(one, n) for one, n in zip(hits, rows, strict=True)])
    all_credits = inside.all_gather(own_NH[None], phase="writes")  # [ranks, N, H]
    return [of_read.flatten() for of_read in all_credits.split(rows, dim=1)]


def gather_candidates(candidates: Sequence[Candidates], shard: Shard, group: Group, inside: Group, *, first_id: int,
                      step: int) -> tuple[int, Admitted]:
    """How many valid candidates all ranks offer, and those that the policy chooses, here where they belong. Collective.

    The ranks that will hold a vector are one in each memory group.
    """
    heads, _, head_dim = shard.value_HMD.shape
    config, device = shard.config, shard.device
    vector_N2HD, criteria_N3 = entry.stack_candidates(candidates, heads=heads, head_dim=head_dim, device=device,
                                                      dtype=shard.value_HMD.dtype, max_norm=config.max_norm)
    if (above := config.newest_above) is not None:
        kept_N = torch.from_numpy(~superseded(vector_N2HD[:, 0], criteria_N3[:, :2].cpu().numpy(), above=above))
        vector_N2HD, criteria_N3 = vector_N2HD[kept_N.to(device)], criteria_N3[kept_N.to(device)]
    counts = group.all_gather_int(len(criteria_N3), phase="writes", device=device)
    criteria = entry.unpack_criteria(group.all_gather_rows(criteria_N3, counts, phase="writes"))
    chosen = np.flatnonzero(entry.choose(criteria.surprise_E, config))
    criteria, offered = entry.Criteria(*(column[chosen] for column in criteria)), len(criteria.surprise_E)
    importance_E, id_E = entry.importance_of(criteria.surprise_E), first_id + np.arange(len(chosen), dtype=np.int64)
    accepted_E = entry.acceptable(criteria.finite_E, criteria.namespace_E, importance_E)

    starts = np.cumsum([0, *counts])
    from_E, place_E = np.searchsorted(starts, chosen, side="right") - 1, holder_of(id_E, config.virtual_shards, inside.size)
    mine = [np.flatnonzero(accepted_E & (from_E == group.rank) & (place_E == rank)) for rank in range(inside.size)]
    sent = np.concatenate(mine * (group.size // inside.size))
    here = np.flatnonzero(accepted_E & (place_E == inside.rank))
    rows = torch.from_numpy(chosen[sent] - starts[group.rank]).to(device)
    vector_E2HD = group.all_to_all_rows(vector_N2HD[rows], [len(one) for one in mine] * (group.size // inside.size),
                                        np.bincount(from_E[here], minlength=group.size).tolist(), phase="writes")
    entries = entry.Entries(vector_E2HD[:, 0], vector_E2HD[:, 1], id_E[here], criteria.namespace_E[here],
                            criteria.document_E[here], importance_E[here], np.full(len(here), step, np.int64))
    return offered, Admitted(np.where(accepted_E, id_E, -1), int((criteria.long_E & accepted_E).sum()), entries)


def batch_of(key_HED: Tensor, value_HED: Tensor, namespace_E: Tensor, importance_E: Tensor | None,
             document_E: Tensor | None, shard: Shard, *, first_id: int, step: int) -> Admitted:
    """The batch of a direct write; ValueError for shapes that do not fit. See `LongTermMemory.write`."""
    (heads, _, head_dim), E = shard.value_HMD.shape, key_HED.shape[1]
    importance_E = torch.ones(E) if importance_E is None else importance_E
    document_E = torch.full((E,), entry.UNKNOWN) if document_E is None else document_E
    entry.check_batch(key_HED, value_HED, namespace_E, document_E, importance_E, heads=heads, head_dim=head_dim)
    key_EHD, value_EHD = (part.detach().transpose(0, 1).to(shard.device) for part in (key_HED, value_HED))
    names_E, documents_E = (column_E.cpu().long().numpy() for column_E in (namespace_E, document_E))
    if (above := shard.config.newest_above) is not None:
        names_E = np.where(superseded(key_EHD, np.stack([names_E, documents_E], axis=1), above=above), -1, names_E)
    entries, accepted_E, clipped = entry.admit(key_EHD, value_EHD, names_E, importance_E.cpu().float().numpy(),
                                               document_E=documents_E, step=step, first_id=first_id,
                                               max_norm=shard.config.max_norm)
    return Admitted(np.where(accepted_E, first_id + np.arange(E), -1), clipped, entries)


def store(bank: LongTermMemory, batch: Admitted) -> tuple[int, np.ndarray]:
    """Puts a batch into a bank, joined with what is there if `memory.merge_above` says so, and counts it. Collective.

    Returns how many entries of this rank had to go for it, and the ids of its rows, int64 [E], -1 where rejected.
    """
    entries, shard = batch.entries, bank.shard
    if bank.config.merge_above is not None:
        entries = join_nearest(entries, shard, bank.inside, above=bank.config.merge_above, tier=bank.choice.tiers["global"])
    before = sum(shard.evicted.values())
    shard.write(entries)
    bank.next_id += len(batch.id_E)
    bank.rejected += int((batch.id_E < 0).sum())
    bank.clipped += batch.clipped
    return sum(shard.evicted.values()) - before, batch.id_E
