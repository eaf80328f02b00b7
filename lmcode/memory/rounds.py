"""One round of consolidation, as the ranks of a memory group go through it together; its rules are those of `consolidate`.

What is merged is known on every rank after the links were gathered; then each loser travels to its survivor's rank.
Letters: P live entries of this rank; n of them that ask at once; L links; E pairs.
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
    """Merges similar entries of the bank that the ranks of `group` hold the shards of. Collective.

    Args:
        tier: of the search for neighbours.
    """
    slot_P, block, device = shard.slots_by_text()[0], consolidate.BLOCK, shard.key_HMD.device
    live_R = group.all_gather_int(len(slot_P), phase="writes", device=device)
    starts = range(0, max(1, *live_R), block)
    link_L3 = torch.cat([_links(shard, group, slot_P[start:start + block], threshold, tier) for start in starts])
    counts = group.all_gather_int(len(link_L3), phase="writes", device=device)
    link_L3 = group.all_gather_rows(link_L3, counts, phase="writes")
    pair_E2 = consolidate.choose_pairs(link_L3.cpu().numpy(), threshold)
    for start in range(0, len(pair_E2), block):
        _merge(shard, group, *pair_E2[start:start + block].T)
    shard.delete(shard.slots_of_ids(pair_E2[:, 1]))
    return ConsolidationReport(threshold, sum(live_R), len(pair_E2))


def _links(shard: Shard, group: Group, slot_n: np.ndarray, threshold: float, tier: str) -> Tensor:
    """Links of the entries in `slot_n`, one block of this rank's slots or less; every rank pads its queries to a whole
    block."""
    id_n, text_n2, unit_nF = shard.questions(slot_n)
    score_n2, other_n2 = nearest_two(shard, group, unit_nF, text_n2, most=consolidate.BLOCK, tier=tier)
    return consolidate.links_of(id_n, score_n2, other_n2, heads=shard.key_HMD.shape[0], threshold=threshold)


def nearest_two(shard: Shard, group: Group, unit_nF: Tensor, text_n2: Tensor, *, most: int,
                tier: str) -> tuple[Tensor, Tensor]:
    """Scores and ids of the two entries of the bank that are nearest to each row in its text, [n, 2]: see `Shard.nearest`.
    Collective; every rank pads its rows to `most`."""
    unit_GF = group.all_gather(pad(unit_nF, most), phase="writes")
    text_G2 = group.all_gather(pad(text_n2, most, -1), phase="writes").cpu().numpy()
    lists = shard.nearest(unit_GF, text_G2, tier=tier)[:2]
    score_R2, other_R2 = (group.all_to_all(part, phase="writes").view(-1, most, 2) for part in lists)
    score_n2, other_n2 = merge_lists(score_R2, other_R2)
    return score_n2[:len(unit_nF)], other_n2[:len(unit_nF)]


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
