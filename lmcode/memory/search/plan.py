"""What all ranks agree on about how a bank is searched: the tier, for `ivf` the centroids and how many lists are probed, for
`hnsw` how far a search of a graph looks.

A plan is the same on every rank, and only `planning.review` changes it, on all at once. Centroids are kept in checkpoints,
since hits depend on them; which list an entry is in follows from its key, so lists are a cache. `revise` decides by numbers
of the whole bank only, never by a rank's, so that every number of ranks decides alike.
Letters: X lists, E entries.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lmcode.config import MemoryConfig
from lmcode.memory.placement import splitmix64

FORMAT = 1
FIRST_PROBES = 8
FIRST_WIDTH, MOST_WIDTH = 64, 512
MOST_SHARE = 4  # a query that must probe more than 1 / MOST_SHARE of all lists takes longer than an exact search
GROWN = 4.0  # a bank that has grown by this factor since its centroids were trained gets new ones
CHANGED = 1.25  # and by this one has changed enough for new ones to help
UNBALANCED = 4.0  # times the rows that equal lists would make a query score
LEAST_ENTRIES = 4096  # of a bank with centroids
AUTO_ENTRIES = 1_000_000  # from here on tier = auto probes: at half as many FAISS flat was faster (tools/README.md)
SAMPLE_PER_LIST = 48  # entries that k-means sees


@dataclass(frozen=True)
class Plan:
    """How searches of the whole bank go.

    probing: by lists, so approximately; otherwise by a tier that misses nothing.
    probes: lists that a query looks into.
    trained_on: live entries when the centroids were trained; 0: there are none yet.
    centroid_HXD: fp32 on the CPU; None: there are none, and a search is exact.
    width: of `hnsw`, entries that a search of a graph keeps in view, and proposes (efSearch). Not saved.
    """

    probing: bool = False
    probes: int = FIRST_PROBES
    trained_on: int = 0
    centroid_HXD: Tensor | None = None
    width: int = FIRST_WIDTH

    @property
    def lists(self) -> int:
        """Of each head; 0 without centroids."""
        return 0 if self.centroid_HXD is None else self.centroid_HXD.shape[1]

    def without_centroids(self) -> Plan:
        """The plan once entries are gone of which centroids are means; this one if it has none."""
        return self if self.centroid_HXD is None else Plan(self.probing)


def first_plan(tier: str) -> Plan:
    """The plan of an empty bank whose settings name this tier."""
    return Plan(probing=tier in ("ivf", "hnsw"))


class Measurements(NamedTuple):
    """What a revision looks at, of the whole bank.

    live: entries. recall: measured on live queries; None where nothing was.
    balance: rows that queries score beyond what equal lists would make them, a factor of at least 1; 1 without lists.
    """

    live: int
    recall: float | None = None
    balance: float = 1.0


class Change(NamedTuple):
    """The plan from now on, whether it needs new centroids, and why; `alarming` if a person should know."""

    plan: Plan
    train: bool
    reason: str
    alarming: bool = False


def lists_for(live: int) -> int:
    """A power of two near 4 sqrt(live): a query then scores about as many centroids as it scores rows."""
    return 1 << max(4, round(math.log2(4 * math.sqrt(max(1, live)))))


def revise(plan: Plan, measured: Measurements, config: MemoryConfig) -> Change | None:
    """The change that these measurements call for; None: the plan stays.

    In this order: a bank that has no centroids yet, or has outgrown them, gets some, and so does one with uneven lists; a
    recall below `memory.recall_target` is answered by twice the probes as long as that is less work than exact search, then
    by new centroids if the bank has grown since, at last by exact search, until the bank is `GROWN` times as large. Graphs
    are searched twice as wide up to `MOST_WIDTH`, then not any more.
    """
    if config.tier == "hnsw":
        return _revise_graphs(plan, measured, config)
    if measured.live < (AUTO_ENTRIES if config.tier == "auto" else LEAST_ENTRIES) or config.tier not in ("ivf", "auto"):
        return None
    grown = measured.live / max(1, plan.trained_on)
    if grown >= GROWN:
        return Change(replace(plan, probing=True, probes=FIRST_PROBES), True,
                      f"{measured.live:,} entries, and centroids of {plan.trained_on:,}")
    if not plan.probing or plan.centroid_HXD is None:
        return None
    if measured.balance > UNBALANCED and grown >= CHANGED:
        return Change(plan, True, f"uneven lists, {measured.balance:.1f} times the work of even ones")
    if measured.recall is None or measured.recall >= config.recall_target:
        return None
    lists, missed = plan.centroid_HXD.shape[1], f"recall {measured.recall:.4f} is below {config.recall_target}"
    if 2 * plan.probes * MOST_SHARE <= lists:
        return Change(replace(plan, probes=2 * plan.probes), False, missed)
    if grown >= CHANGED:
        return Change(replace(plan, probes=FIRST_PROBES), True, missed, alarming=True)
    return Change(replace(plan, probing=False), False, f"{missed} with {plan.probes} of {lists} lists", alarming=True)


def _revise_graphs(plan: Plan, measured: Measurements, config: MemoryConfig) -> Change | None:
    if not plan.probing or measured.recall is None or measured.recall >= config.recall_target:
        return None
    missed = f"recall {measured.recall:.4f} is below {config.recall_target}"
    if 2 * plan.width <= MOST_WIDTH:
        return Change(replace(plan, width=2 * plan.width), False, missed)
    return Change(replace(plan, probing=False), False, f"{missed} with {plan.width} entries in view", alarming=True)


def sampled(id_E: np.ndarray, live: int, count: int) -> np.ndarray:
    """Which of these entries are in a sample of about `count` of `live`, bool [E]: chosen by id, so by nothing else."""
    share = min(1.0, count / max(1, live))
    # Mixed once more, as the first mix chooses the virtual shard.
    mixed_E = splitmix64(splitmix64(id_E) ^ np.uint64(0x5851F42D4C957F2D))
    chosen_E: np.ndarray = (mixed_E >> np.uint64(11)) < share * 2.0**53
    return chosen_E


def save_plan(path: Path | str, plan: Plan) -> None:
    """Writes a plan with centroids as safetensors. Not atomic: a commit of several files is the caller's."""
    from safetensors.torch import save_file

    assert plan.centroid_HXD is not None
    header = {"format": FORMAT, "probing": int(plan.probing), "probes": plan.probes, "trained_on": plan.trained_on}
    save_file({"centroids": plan.centroid_HXD.contiguous()}, path, metadata={"lmcode": json.dumps(header)})


def load_plan(path: Path | str, *, heads: int, head_dim: int) -> Plan:
    """Reads what `save_plan` wrote.

    Raises:
        ValueError: if it is not of this format, does not fit the bank or holds what no plan can.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("lmcode", "null"))
            centroid_HXD = file.get_tensor("centroids")
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a readable search plan: {error}") from None
    whole = isinstance(header, dict) and {*header} == {"format", "probing", "probes", "trained_on"} and all(
        type(number) is int for number in header.values())
    if not whole or header["format"] != FORMAT or min(header["probes"], header["trained_on"]) < 1:
        raise ValueError(f"{path}: the header entry 'lmcode' must be that of a search plan of format {FORMAT}, with at "
                         f"least 1 for probes and trained_on: got {header}")
    H, X, D = centroid_HXD.shape if centroid_HXD.ndim == 3 else (0, 0, 0)
    if (H, D) != (heads, head_dim) or X < 1 or centroid_HXD.dtype != torch.float32 or not centroid_HXD.isfinite().all():
        raise ValueError(f"{path}: centroids must be finite and fp32 [{heads}, L, {head_dim}]: got "
                         f"{tuple(centroid_HXD.shape)} {centroid_HXD.dtype}")
    return Plan(header["probing"] != 0, header["probes"], header["trained_on"], centroid_HXD)
