"""What consolidation does to held-out loss, measured on copies.

In document scope an evaluation starts with an empty bank and a document sees its own entries only, so it is the
evaluation's own bank that is consolidated, after every few windows. In global scope it starts with a consolidated copy
and goes on likewise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from lmcode.backbone import Backbone
from lmcode.config import EvalConfig
from lmcode.data.streams import StreamSampler
from lmcode.eval.held_out import EvalResult, evaluate
from lmcode.memory.bank import LongTermMemory

EVERY = 4  # windows between two consolidations of an evaluation


class Consolidated(NamedTuple):
    """Held-out loss with consolidation, and how many entries of the evaluation's banks were merged."""

    result: EvalResult
    merged: int


def held_out_loss(model: Backbone, sampler: StreamSampler, config: EvalConfig, banks: Mapping[int, LongTermMemory],
                  threshold: float | None, *, every: int = EVERY) -> Consolidated:
    """Held-out loss over `config.final_windows` windows. A collective of the model's group.

    Args:
        banks: what the evaluation forks: the model's own, or consolidated copies of them.
        threshold: cosine distance below which entries merge; None does not consolidate.
        every: windows between two consolidations.
    """
    merged = 0

    def upkeep(window: int, bank: LongTermMemory) -> None:
        nonlocal merged
        if threshold is not None and (window + 1) % every == 0:
            merged += bank.consolidate(threshold).merged

    result = evaluate(model, sampler, banks=banks, group=model.group, windows=config.final_windows, slots=config.slots,
                      upkeep=upkeep)
    return Consolidated(result, merged)
