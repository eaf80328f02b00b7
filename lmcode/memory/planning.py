"""How the ranks agree on a plan of search, `search.plan`: what they measure together, and the training of centroids.

Every number that decides is a sum over the ranks, so all come to the same plan. Centroids are trained on one rank, from
entries that are chosen by id, and sent to all.
Letters: P live entries of this rank, S entries of the sample, L lists.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lmcode.dist import Group
from lmcode.memory.search import faiss_index, hnsw
from lmcode.memory.search.plan import SAMPLE_PER_LIST, Change, Facts, Plan, lists_for, revise, sampled
from lmcode.memory.shard import Shard

log = logging.getLogger("lmcode")
SEED = 1


def review(shard: Shard, group: Group, inside: Group, recall: float | None) -> Change | None:
    """Revises the plan of a bank, on all ranks alike; what has changed, if anything has. Collective.

    Args:
        group, inside: all ranks, and the memory group of this one.
        recall: as measured by all ranks.
    """
    device, probing = shard.key_HMD.device, shard.plan.probing and shard.plan.centroid_HLD is not None
    live = sum(inside.all_gather_int(shard.ledger.tally.live, phase="stats", device=device))
    change = revise(shard.plan, Facts(live, recall, _balance(shard, inside) if probing else 1.0), shard.config)
    if change is None:
        return None
    plan = change.plan
    if change.train:
        plan = replace(plan, centroid_HLD=train(shard, group, inside, live), trained_on=live)
    shard.use(plan)
    return change._replace(plan=plan)


def _balance(shard: Shard, inside: Group) -> float:
    """See `Facts`: the mean length of the list of an entry, over the mean length of a list; of the worst head."""
    length_HL = torch.from_numpy(shard.list_lengths())
    length_HL = inside.all_reduce(length_HL.to(shard.key_HMD.device), phase="stats").double().cpu()
    total_H = length_HL.sum(dim=1).clamp(min=1)
    return float((length_HL.square().sum(dim=1) * length_HL.shape[1] / total_H.square()).max())


def train(shard: Shard, group: Group, inside: Group, live: int) -> Tensor:
    """Centroids for a bank of so many entries, fp32 [H, L, D], the same on every rank. Collective."""
    (H, _, D), L, device = shard.key_HMD.shape, lists_for(live), shard.key_HMD.device
    id_P = shard.columns["id"][shard.live_M]
    slot_S = np.flatnonzero(shard.live_M)[sampled(id_P, live, SAMPLE_PER_LIST * L)]
    slots = torch.from_numpy(slot_S).to(device)
    id_S = torch.from_numpy(shard.columns["id"][slot_S]).to(device)
    key_SHD = shard.key_HMD[:, slots].transpose(0, 1).float().contiguous()
    counts = inside.all_gather_int(len(slot_S), phase="stats", device=device)
    key_SHD, id_S = (inside.all_gather_rows(part, counts, phase="stats") for part in (key_SHD, id_S))
    centroid_HLD = torch.zeros(H, L, D)
    if group.rank == 0:
        key_SHD = F.normalize(key_SHD[id_S.argsort()], dim=-1).cpu()
        for head in range(H):
            centroid_HLD[head] = faiss_index.centroids(key_SHD[:, head].contiguous(), L, seed=SEED)
    return group.all_reduce(centroid_HLD.to(device), phase="stats").cpu()


def first_plan(tier: str) -> Plan:
    """The plan of an empty bank whose settings name this tier."""
    return Plan(probing=tier in ("ivf", "hnsw"))


def tend_graphs(shard: Shard, group: Group, folder: Path | None = None) -> bool:
    """Begins to make graphs that are due on any rank, or puts those that are made on all ranks into use; whether it did the
    latter. Collective of all ranks; one number travels.

    Args:
        folder: see `HnswTier.begin`.
    """
    tier = shard.graphs
    states = group.all_gather_int(tier.state(shard.columns["id"]), phase="stats", device=shard.key_HMD.device)
    if not tier.building:
        if hnsw.DUE in states:
            tier.begin(shard.all_rows(), folder)
        return False
    if hnsw.BUILDING in states:
        return False
    if failed := hnsw.FAILED in states:
        log.warning("memory.tier = hnsw: graphs could not be made, and search stays exact: %s",
                    tier.problem or "another rank says why")
    tier.finish(use=not failed)
    return not failed


def settle_graphs(shard: Shard, group: Group, folder: Path | None = None) -> bool:
    """`tend_graphs` until no graph is in the making; whether any came into use. Collective of all ranks."""
    came = tend_graphs(shard, group, folder)
    while shard.graphs.building:  # on all ranks or on none
        shard.graphs.wait()
        came = tend_graphs(shard, group) or came
    return came
