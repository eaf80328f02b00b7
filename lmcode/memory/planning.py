"""How the ranks agree on a plan of search, `search.plan`: what they measure together, and the training of centroids.

Every number that decides is a sum over the ranks, so all come to the same plan. Centroids are trained on one rank, from
entries that are chosen by id, and sent to all.
Letters: E entries of the sample, X lists.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lmcode.dist import Group
from lmcode.memory.search import faiss_index
from lmcode.memory.search.plan import SAMPLE_PER_LIST, Change, Facts, Plan, lists_for, revise, sampled
from lmcode.memory.shard import Shard

SEED = 1


def review(shard: Shard, group: Group, inside: Group, recall: float | None) -> Change | None:
    """Revises the plan of a bank, on all ranks alike; what has changed, if anything has. Collective.

    Args:
        group, inside: all ranks, and the memory group of this one.
        recall: as measured by all ranks.
    """
    device, probing = shard.key_HMD.device, shard.plan.probing and shard.plan.centroid_HXD is not None
    live = sum(inside.all_gather_int(shard.ledger.tally.live, phase="stats", device=device))
    change = revise(shard.plan, Facts(live, recall, _balance(shard, inside) if probing else 1.0), shard.config)
    if change is None:
        return None
    plan = change.plan
    if change.train:
        plan = replace(plan, centroid_HXD=train(shard, group, inside, live), trained_on=live)
    shard.use(plan)
    return change._replace(plan=plan)


def _balance(shard: Shard, inside: Group) -> float:
    """See `Facts`: the mean length of the list of an entry, over the mean length of a list; of the worst head."""
    length_HX = torch.from_numpy(shard.list_lengths())
    length_HX = inside.all_reduce(length_HX.to(shard.key_HMD.device), phase="stats").double().cpu()
    total_H = length_HX.sum(dim=1).clamp(min=1)
    return float((length_HX.square().sum(dim=1) * length_HX.shape[1] / total_H.square()).max())


def train(shard: Shard, group: Group, inside: Group, live: int) -> Tensor:
    """Centroids for a bank of so many entries, fp32 [H, X, D], the same on every rank. Collective."""
    (H, _, D), X, device = shard.key_HMD.shape, lists_for(live), shard.key_HMD.device
    live_slots = np.flatnonzero(shard.live_M)
    slot_E = live_slots[sampled(shard.columns["id"][live_slots], live, SAMPLE_PER_LIST * X)]
    slots = torch.from_numpy(slot_E).to(device)
    id_E = torch.from_numpy(shard.columns["id"][slot_E]).to(device)
    key_EHD = shard.key_HMD[:, slots].transpose(0, 1).float().contiguous()
    counts = inside.all_gather_int(len(slot_E), phase="stats", device=device)
    key_EHD, id_E = (inside.all_gather_rows(part, counts, phase="stats") for part in (key_EHD, id_E))
    centroid_HXD = torch.zeros(H, X, D)
    if group.rank == 0:
        key_EHD = F.normalize(key_EHD[id_E.argsort()], dim=-1).cpu()
        for head in range(H):
            centroid_HXD[head] = faiss_index.centroids(key_EHD[:, head].contiguous(), X, seed=SEED)
    return group.all_reduce(centroid_HXD.to(device), phase="stats").cpu()


def first_plan(tier: str) -> Plan:
    """The plan of an empty bank whose settings name this tier."""
    return Plan(probing=tier == "ivf")
