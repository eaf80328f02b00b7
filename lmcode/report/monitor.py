"""`MemoryMonitor`: what a memory did from step to step, recorded from the outputs of forward passes.

Recording reads the banks and changes nothing in them. All numbers are over all ranks of the model's group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lmcode.backbone import Backbone
from lmcode.memory import measure
from lmcode.memory.bank import LongTermMemory
from lmcode.protocol import LayerMemory, Output

if TYPE_CHECKING:
    from lmcode.report.plots import Figure

MEASURES = ("fill", "gate_mean", "hit_share", "null_share", "age_p50", "score_mean", "entries", "evicted")


class MemoryMonitor:
    """Follows the banks of a model over time.

        monitor = MemoryMonitor(model)
        monitor.record_step(step, model(input_ids))
        monitor.get_statistics()["overall"]["fill"]["last"]

    Attributes:
        steps: the steps recorded, ascending.
        history: by layer and measure (`MEASURES`), one number for each of them:
            fill: entries / slots, and entries: live ones. evicted: entries given up for newer ones since the bank began.
            gate_mean: mean of the gate (0 closed, 1 open) over tokens.
            hit_share, null_share: mean share of the read's softmax that went to retrieved entries, and to the null slot.
            age_p50: median age of the hits in steps, given that entries were committed with the same count of steps; nan
                without hits.
            score_mean: mean score (a softmax logit) of the hits; nan without hits.

    Raises:
        ValueError: for a model without a bank.
    """

    def __init__(self, model: Backbone) -> None:
        if not getattr(model, "banks", None):
            raise ValueError("a monitor needs a model with a bank: this one has none (long_term_memory_slots is 0)")
        self.model = model
        self.steps: list[int] = []
        self.history: dict[int, dict[str, list[float]]] = {
            layer: {name: [] for name in MEASURES} for layer in model.banks}

    def record_step(self, step: int, outputs: Output) -> None:
        """Records what one forward pass read, and how full the banks are. A collective.

        Raises:
            ValueError: if `step` is not above the last one recorded, or the outputs are not those of a whole pass of this
                model (a step of cached decoding has nothing to tell).
        """
        if self.steps and step <= self.steps[-1]:
            raise ValueError(f"steps must ascend: got {step} after {self.steps[-1]}")
        memory = getattr(outputs, "memory", None)
        if not isinstance(memory, dict) or not self.history.keys() <= memory.keys():
            raise ValueError(f"outputs must be what the model returns, with the memory of layers {list(self.history)}: got "
                             f"{type(outputs).__name__} with {list(memory) if isinstance(memory, dict) else 'none'}")
        rows = {layer: _measure(bank, memory[layer], step) for layer, bank in self.model.banks.items()}
        self.steps.append(step)
        for layer, row in rows.items():
            for name in MEASURES:
                self.history[layer][name].append(row[name])

    def get_statistics(self) -> dict[str, Any]:
        """A summary of everything recorded so far.

        Returns:
            steps: how many were recorded. first_step, last_step.
            layers: by layer, then by measure; overall: by measure, where entries and evicted are summed over layers and the
            rest is their mean. Each measure has last, mean, min, max, and trend: the slope of the least-squares line as
            change per 100 steps. Numbers that are nan are left out; nan where none is left (a trend needs two).

        Raises:
            ValueError: if nothing was recorded.
        """
        self._check_recorded()
        return {"steps": len(self.steps), "first_step": self.steps[0], "last_step": self.steps[-1],
                "layers": {layer: self._summaries(values) for layer, values in self.history.items()},
                "overall": self._summaries(self.overall())}

    def overall(self) -> dict[str, list[float]]:
        """The history over all layers: entries and evicted are summed, of the rest the mean is taken."""
        self._check_recorded()
        return {name: [_over_layers(name, row) for row in
                       zip(*(values[name] for values in self.history.values()), strict=True)] for name in MEASURES}

    def plot_history(self, path: str | Path | None = None) -> Figure:
        """Draws the history, a panel for each measure and a line for each layer; writes it to `path` (png, svg, pdf).

        Raises:
            ValueError: if nothing was recorded, or for a kind of file that matplotlib does not know.
        """
        from lmcode.report.plots import draw_monitor

        self._check_recorded()
        return draw_monitor(self.steps, self.history, path=path)

    def _check_recorded(self) -> None:
        if not self.steps:
            raise ValueError("nothing was recorded yet: call record_step(step, outputs) first")

    def _summaries(self, values: dict[str, list[float]]) -> dict[str, dict[str, float]]:
        return {name: summarise(self.steps, column) for name, column in values.items()}


def summarise(steps: Sequence[int], values: Sequence[float]) -> dict[str, float]:
    """last, mean, min, max and trend (change per 100 steps) of the numbers that are not nan; nan where none is left."""
    kept = [(step, value) for step, value in zip(steps, values, strict=True) if not math.isnan(value)]
    if not kept:
        return dict.fromkeys(("last", "mean", "min", "max", "trend"), math.nan)
    x, y = np.array(kept, float).T
    centred = x - x.mean()
    trend = 100 * float(centred @ y / (centred @ centred)) if len(kept) > 1 else math.nan
    return {"last": float(y[-1]), "mean": float(y.mean()), "min": float(y.min()), "max": float(y.max()), "trend": trend}


def _over_layers(name: str, row: Sequence[float]) -> float:
    numbers = [value for value in row if not math.isnan(value)]
    if not numbers:
        return math.nan
    return sum(numbers) if name in ("entries", "evicted") else sum(numbers) / len(numbers)


def _measure(bank: LongTermMemory, read: LayerMemory, step: int) -> dict[str, float]:
    """All of `MEASURES` for one bank. A collective."""
    stats, score_X = bank.stats(), read.hits.score_HNK[read.hits.valid_HNK]
    parts = (read.gate_BT, read.share_HN, read.null_share_HN, score_X)
    local = torch.tensor([[float(part.double().sum()), part.numel()] for part in parts], dtype=torch.float64,
                         device=bank.device)
    means = [total / count if count else math.nan
             for total, count in bank.group.all_reduce(local, phase="metrics").tolist()]
    return {"fill": stats["fill"], "gate_mean": means[0], "hit_share": means[1], "null_share": means[2],
            "age_p50": _median_age(bank, read, step), "score_mean": means[3], "entries": float(stats["live"]),
            "evicted": float(stats["evicted"])}


def _median_age(bank: LongTermMemory, read: LayerMemory, step: int) -> float:
    """The median age of the hits that all ranks hold, the lower one of two; the same on any number of ranks."""
    ages = np.zeros(0, np.int64) if read.hits.ticket is None else measure.ages(read.hits, step=step).cpu().numpy()
    parts = bank.group.all_gather_object(np.unique(ages, return_counts=True))
    age_X, count_X = (np.concatenate(part) for part in zip(*parts, strict=True))
    if not count_X.sum():
        return math.nan
    order_X = np.argsort(age_X)
    reached_X = np.cumsum(count_X[order_X])
    return float(age_X[order_X][np.searchsorted(reached_X, (reached_X[-1] + 1) // 2)])
