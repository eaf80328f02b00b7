"""One round of consolidation, as the ranks of a memory group go through it together; its rules are those of `consolidate`.

What is merged is known on every rank after the links were gathered; then each loser travels to its survivor's rank.
Letters: N entries of this rank that look for their neighbours at once; X links; E pairs.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lmcode.dist import Group
from lmcode.memory import consolidate
from lmcode.memory.merge import merge_lists
from lmcode.memory.read import pad
from lmcode.memory.shard import Shard
from lmcode.protocol import ConsolidationReport


@torch.no_grad()
def consolidate_shards(shard: Shard, group: Group, threshold: float, *, tier: str) -> ConsolidationReport:
    """One round of merging similar entries of the bank that the ranks of `group` hold. Collective.

    Every entry looks up its nearest other one over all shards. Pairs are chosen greedily in id order (`choose_pairs`), and
    no entry is in two; the rest is left to the next round. The survivor is the one with the smaller id and keeps namespace
    and step, its vectors become count-weighted means (`merge_vectors`), and its columns change as `merge_columns` says; the
    loser is deleted for good.

    Args:
        tier: of the search for neighbours.
    """
    slots, block, device = shard.views.by_text()[0], consolidate.BLOCK, shard.key_HMD.device
    live = group.all_gather_int(len(slots), phase="writes", device=device)
    starts = range(0, max(1, *live), block)
    link_X3 = torch.cat([_links(shard, group, slots[start:start + block], threshold, tier) for start in starts])
    counts = group.all_gather_int(len(link_X3), phase="writes", device=device)
    link_X3 = group.all_gather_rows(link_X3, counts, phase="writes")
    pair_E2 = consolidate.choose_pairs(link_X3.cpu().numpy(), threshold)
    for start in range(0, len(pair_E2), block):
        _merge(shard, group, *pair_E2[start:start + block].T)
    shard.delete(shard.slots_of_ids(pair_E2[:, 1]))
    return ConsolidationReport(threshold, sum(live), len(pair_E2))


def _links(shard: Shard, group: Group, slot_N: np.ndarray, threshold: float, tier: str) -> Tensor:
    """Links of the entries in `slot_N`, one block of this rank's slots or less; every rank pads its queries to a whole
    block."""
    id_N, text_N2, unit_ND = shard.questions(slot_N)
    score_N2, other_N2 = nearest_two(shard, group, unit_ND, text_N2, most=consolidate.BLOCK, tier=tier)
    return consolidate.links_of(id_N, score_N2, other_N2, heads=shard.key_HMD.shape[0], threshold=threshold)


def nearest_two(shard: Shard, group: Group, unit_ND: Tensor, text_N2: Tensor, *, most: int,
                tier: str) -> tuple[Tensor, Tensor]:
    """Scores and ids of the two entries of the bank nearest to each row in its text, [N, 2]: see `Searcher.nearest`.
    Collective; every rank pads its rows to `most`."""
    units = group.all_gather(pad(unit_ND, most), phase="writes")  # those of all ranks
    texts = group.all_gather(pad(text_N2, most, -1), phase="writes").cpu().numpy()
    lists = shard.searcher.nearest(units, texts, tier=tier)[:2]
    scores, others = (group.all_to_all(part, phase="writes").view(-1, most, 2) for part in lists)  # [ranks, N, 2]
    score_N2, other_N2 = merge_lists(scores, others)
    return score_N2[:len(unit_ND)], other_N2[:len(unit_ND)]


def _merge(shard: Shard, group: Group, survivor_E: np.ndarray, loser_E: np.ndarray) -> None:
    """Sends each loser to its survivor's rank, which takes it in."""
    route = consolidate.route_of(survivor_E, loser_E, virtual_shards=shard.config.virtual_shards, rank=group.rank,
                                 ranks=group.size)
    arrived = []
    for rows in shard.take(loser_E[route.sent_E]):
        table = rows.new_zeros(route.rows, *rows.shape[1:])
        table[route.sent_at] = rows
        arrived.append(group.all_to_all(table, phase="writes")[route.arrived_at])
    shard.absorb(survivor_E[route.arriving_E], *arrived)
