"""How the ranks agree on a plan of search, `search.plan`: what they measure together, and the training of centroids.

Every number that decides is a sum over the ranks, so all come to the same plan. Centroids are trained on one rank, from
entries that are chosen by id, and sent to all.
Letters: E entries of the sample, X lists.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lmcode.dist import Group
from lmcode.memory import measure
from lmcode.memory.search import faiss_index, hnsw
from lmcode.memory.search.plan import SAMPLE_PER_LIST, Measurements, lists_for, revise, sampled
from lmcode.memory.shard import Shard
from lmcode.precision import without_autocast

if TYPE_CHECKING:
    from lmcode.memory.bank import LongTermMemory
    from lmcode.memory.searcher import Scope

log = logging.getLogger("lmcode")

SEED = 1


@without_autocast()
def review(bank: LongTermMemory) -> float | None:
    """`measure.recall` of a bank, and what follows from it for how the bank is searched from now on. Collective.

    Only the tiers `ivf`, `hnsw` and `auto` have anything to decide: see `search.plan.revise`.
    """
    recall = measure.recall(bank)
    if bank.config.tier in ("ivf", "hnsw", "auto"):
        _revise(bank, recall if bank.sample.scope != "document" else None)
    return recall


@without_autocast()
def prepare(bank: LongTermMemory, *, graphs: Path | None = None) -> None:
    """What `review` does before anything was measured: a bank that was filled gets its centroids, or graphs are begun. These
    come into use when a search finds that all ranks have theirs; `build_graphs` waits for it. Collective.

    Args:
        graphs: a folder in which graphs are kept for the next process.
    """
    if bank.config.tier in ("ivf", "auto") and bank.config.scope != "document":
        _revise(bank, None)
    if makes_graphs(bank):
        bank.shard.searcher.graphs.try_again()
        bank.unmeasured |= tend_graphs(bank.shard, bank.group, graphs)


@without_autocast()
def build_graphs(bank: LongTermMemory, *, graphs: Path | None = None) -> None:
    """Makes the graphs that reads by the tier `hnsw` go through, whatever `memory.tier` says, and waits for them.
    Collective.

    Args:
        graphs: as in `prepare`.
    """
    bank.shard.searcher.graphs.try_again()
    came = tend_graphs(bank.shard, bank.group, graphs)
    while bank.shard.searcher.graphs.building:  # on all ranks or on none
        bank.shard.searcher.graphs.wait()
        came = tend_graphs(bank.shard, bank.group) or came
    bank.unmeasured |= came and makes_graphs(bank)


def before_search(bank: LongTermMemory, scope: Scope) -> None:
    """What a search does for graphs first: lets them come into use, and measures once what they find. Collective."""
    if not makes_graphs(bank) or scope != "global" or not bank.plan.probing:
        return
    bank.unmeasured |= tend_graphs(bank.shard, bank.group)
    if not bank.unmeasured or not bank.config.recall_queries:
        return
    bank.unmeasured = False
    while (recall := measure.recall(bank)) is not None and _revise(bank, recall):
        pass  # each change is measured again
    bank.unmeasured = recall is None
    if recall is not None:
        log.info("memory.tier = hnsw: graphs of %d entries of this rank are in use; recall@%d %.4f",
                 bank.shard.searcher.graphs.nodes, bank.top_k, recall)


def makes_graphs(bank: LongTermMemory) -> bool:
    """Whether searches of a bank are to go through graphs."""
    return bank.config.tier == "hnsw" and bank.config.scope == "global"


def tend_graphs(shard: Shard, group: Group, folder: Path | None = None) -> bool:
    """Begins to make graphs that are due on any rank, or puts those that are made on all ranks into use; whether it did the
    latter. Collective of all ranks; one number travels.

    Args:
        folder: see `HnswTier.begin`.
    """
    tier = shard.searcher.graphs
    states = group.all_gather_int(tier.state(shard.columns["id"]), phase="stats", device=shard.key_HMD.device)
    if not tier.building:
        if hnsw.DUE in states:
            tier.begin(shard.views.table(), folder)
        return False
    if hnsw.BUILDING in states:
        return False
    if failed := hnsw.FAILED in states:
        log.warning("memory.tier = hnsw: graphs could not be made, and search stays exact: %s",
                    tier.problem or "another rank says why")
    tier.finish(use=not failed)
    return not failed


def _revise(bank: LongTermMemory, recall: float | None) -> bool:
    """Revises the plan, on all ranks alike, with a line in the log if it has changed; whether it has."""
    shard, inside, plan = bank.shard, bank.inside, bank.plan
    live = sum(inside.all_gather_int(shard.ledger.tally.live, phase="stats", device=shard.key_HMD.device))
    balance = _balance(shard, inside) if plan.probing and plan.centroid_HXD is not None else 1.0
    change = revise(plan, Measurements(live, recall, balance), bank.config)
    if change is None:
        return False
    plan = change.plan
    if change.train:
        plan = replace(plan, centroid_HXD=train(shard, bank.group, inside, live), trained_on=live)
    bank.use(plan)
    how = f"{plan.probes} of {plan.lists} lists" if plan.probing else "exactly"
    if bank.config.tier == "hnsw" and plan.probing:
        how = f"by graphs with {plan.width} entries in view"
    say = log.warning if change.alarming else log.info
    say("memory.tier = %s: the bank is searched %s from now on%s: %s", bank.config.tier, how,
        ", with new centroids" if change.train else "", change.reason)
    return True


def _balance(shard: Shard, inside: Group) -> float:
    """See `Measurements`: the mean length of the list of an entry, over the mean length of a list; of the worst head."""
    length_HX = torch.from_numpy(shard.searcher.list_lengths())
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
