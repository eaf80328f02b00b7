"""Consolidation as pure functions: how far apart entries are, who pairs with whom, what a pair becomes.

The distance of two entries is 1 - the mean over heads of the cosine of their keys, in [0, 2]. Every number here comes
from element by element operations in a fixed order, so that it has the same bits whichever rank computes it and
whatever else is in the batch.
Letters: N entries that look for their nearest one; X links that they find; E pairs or merged entries; vector_E2HD holds key
and value; D is the width of a head's key or, as in unit_ED, of all heads' keys side by side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lmcode.memory.placement import holder_of

BLOCK = 1024  # entries of a rank that look for their neighbours at once, and pairs that are merged at once
MERGED = ("count", "hit_mass", "last_hit", "importance", "chance")  # columns of `entry.METADATA` that merging changes


def sum_last(table: Tensor) -> Tensor:
    """Sum over the last dim by halving it: the order of additions depends on its length alone."""
    while table.shape[-1] > 1:
        table = F.pad(table, (0, table.shape[-1] % 2))
        table = table[..., 0::2] + table[..., 1::2]
    return table.squeeze(-1)


def unit_keys(key_HED: Tensor) -> Tensor:
    """Each head's key scaled to length 1, side by side: fp32 [E, H * D]. An inner product is H times a mean cosine.

    A key of length zero stays zero, at distance 1 from everything in its head.
    """
    key_EHD = key_HED.transpose(0, 1).double()
    length_EH1 = sum_last(key_EHD.square()).sqrt().unsqueeze(-1)
    return (key_EHD / length_EH1.clamp(min=torch.finfo(torch.float64).tiny)).float().flatten(1)


def links_of(id_N: Tensor, score_N2: Tensor, other_N2: Tensor, *, heads: int, threshold: float) -> Tensor:
    """Entries whose nearest other one is closer than the threshold: int64 [X, 3], see `choose_pairs`.

    Args:
        id_N: int64, the entries that searched.
        score_N2, other_N2: the two best hits of each in total order, itself among them unless two others come first.
    """
    at_N1 = (other_N2[:, :1] == id_N[:, None]).long()
    score_N, other_N = score_N2.gather(1, at_N1).squeeze(1), other_N2.gather(1, at_N1).squeeze(1)
    distance_N = (1.0 - score_N.double() / heads).clamp(min=0.0)
    close_N = (other_N >= 0) & (distance_N < threshold)
    return torch.stack([id_N, other_N, distance_N.view(torch.int64)], dim=1)[close_N]


def choose_pairs(link_X3: np.ndarray, threshold: float) -> np.ndarray:
    """Who merges with whom in one round: int64 [E, 2], survivor (the smaller id) and loser, by survivor.

    Greedy in id order: an entry pairs with its nearest other one if both are still free. Where many entries have the
    same nearest one, only one can get it; so those that are left then pair among themselves, again in id order, if the
    triangle inequality of angles puts them within the threshold of each other. Without this, n equal entries would take
    n - 1 rounds.

    Args:
        link_X3: int64, in any order: an id, its nearest other entry's id, and the bits of their fp64 distance.
    """
    links = sorted(zip(link_X3[:, 0].tolist(), link_X3[:, 1].tolist(),
                       np.ascontiguousarray(link_X3[:, 2]).view(np.float64).tolist(), strict=True))
    taken: set[int] = set()
    pairs: list[tuple[int, int]] = []

    def take(one: int, other: int) -> None:
        taken.update((one, other))
        pairs.append((min(one, other), max(one, other)))

    for one, other, _ in links:
        if one not in taken and other not in taken:
            take(one, other)
    waiting: dict[int, tuple[float, int]] = {}  # by the entry they are both nearest to: distance from it, id
    for one, other, distance in links:
        if one in taken:
            continue
        sibling = waiting.pop(other, None)
        if sibling is not None and farthest(distance, sibling[0]) < threshold:
            take(one, sibling[1])
        else:
            waiting[other] = (distance, one) if sibling is None else min((distance, one), sibling)
    return np.array(sorted(pairs), np.int64).reshape(-1, 2)


def farthest(distance: float, other: float) -> float:
    """The greatest distance that two entries can have which are this far from a third; the angles add up."""
    cosine, other_cosine = 1.0 - distance, 1.0 - other
    if cosine <= -other_cosine:
        return 2.0
    sines = math.sqrt(max(0.0, 1.0 - cosine * cosine) * max(0.0, 1.0 - other_cosine * other_cosine))
    return 1.0 - (cosine * other_cosine - sines)


class Route(NamedTuple):
    """How losers get to the ranks of their survivors by one all_to_all of tables of equal height; one rank's view.

    sent_E, arriving_E: bool, pairs whose loser, and whose survivor, is here.
    sent_at, arrived_at: int64 on the CPU, the rows of those pairs in the table that leaves and in the one that arrives.
    rows: height of a table.
    """

    sent_E: np.ndarray
    arriving_E: np.ndarray
    sent_at: Tensor
    arrived_at: Tensor
    rows: int


def route_of(survivor_E: np.ndarray, loser_E: np.ndarray, *, virtual_shards: int, rank: int, ranks: int) -> Route:
    """The route of some pairs of ids, at least one; every rank knows them all and comes to matching places."""
    to_E, from_E = (holder_of(id_E, virtual_shards, ranks) for id_E in (survivor_E, loser_E))
    cell_E = from_E * ranks + to_E
    order_E = np.argsort(cell_E, kind="stable")
    _, start, count = np.unique(cell_E[order_E], return_index=True, return_counts=True)
    place_E, width = np.empty_like(cell_E), int(count.max())
    place_E[order_E] = np.arange(len(cell_E)) - np.repeat(start, count)
    sent_E, arriving_E = from_E == rank, to_E == rank
    sent_at, arrived_at = (to_E * width + place_E)[sent_E], (from_E * width + place_E)[arriving_E]
    return Route(sent_E, arriving_E, torch.from_numpy(sent_at), torch.from_numpy(arrived_at), ranks * width)


def pack_columns(columns: Mapping[str, np.ndarray], slot_E: np.ndarray) -> np.ndarray:
    """The columns `MERGED` of these slots in a form that can travel: int64 [E, 5]."""
    packed = [columns[name][slot_E] for name in MERGED]
    return np.stack([one.astype(np.float64).view(np.int64) if one.dtype == np.float32 else one.astype(np.int64)
                     for one in packed], axis=1)


def merge_columns(mine_E5: np.ndarray, other_E5: np.ndarray) -> dict[str, np.ndarray]:
    """Columns `MERGED` of merged entries from two `pack_columns`.

    Counts and hit masses add up, the last hit is the later one, importance is the count-weighted mean, and a second
    chance that either had is kept.
    """
    importance_E, other_importance_E = (np.ascontiguousarray(one[:, 3]).view(np.float64)
                                        for one in (mine_E5, other_E5))
    count_E, other_count_E = mine_E5[:, 0], other_E5[:, 0]
    mean_E = (count_E * importance_E + other_count_E * other_importance_E) / (count_E + other_count_E)
    return {"count": count_E + other_count_E, "hit_mass": mine_E5[:, 1] + other_E5[:, 1],
            "last_hit": np.maximum(mine_E5[:, 2], other_E5[:, 2]), "importance": mean_E.astype(np.float32),
            "chance": (mine_E5[:, 4] | other_E5[:, 4]).astype(np.bool_)}


def merge_vectors(mine_E2HD: Tensor, other_E2HD: Tensor, count_E: Tensor, other_count_E: Tensor) -> Tensor:
    """Keys and values of merged entries: the count-weighted means, fp64 [E, 2, H, D].

    A mean of keys is shorter than they are, so each head's is scaled to the mean of their lengths (1 for the model's
    keys, which are normalised); where opposite keys cancel out, the survivor's stays.
    """
    weight, other_weight = (one.double()[:, None, None, None] for one in (count_E, other_count_E))
    mine_E2HD, other_E2HD = mine_E2HD.double(), other_E2HD.double()
    mean_E2HD = (weight * mine_E2HD + other_weight * other_E2HD) / (weight + other_weight)
    length_EH1, other_length_EH1, mean_length_EH1 = (
        sum_last(one[:, 0].square()).sqrt().unsqueeze(-1) for one in (mine_E2HD, other_E2HD, mean_E2HD))
    weight, other_weight = weight[:, 0], other_weight[:, 0]
    wanted_EH1 = (weight * length_EH1 + other_weight * other_length_EH1) / (weight + other_weight)
    key_EHD = torch.where(mean_length_EH1 > 0, mean_E2HD[:, 0] * (wanted_EH1 / mean_length_EH1), mine_E2HD[:, 0])
    return torch.stack([key_EHD, mean_E2HD[:, 1]], dim=1)
