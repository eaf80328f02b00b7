"""Held-out loss with the memory on, and with its controls: off, shuffled, random.

Each evaluation reads held-out documents window by window, as training does, with a bank of its own: forked from the
model's, written as the documents are read, thrown away at the end. The training bank is never touched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch

from lmcode.backbone import Backbone, token_losses
from lmcode.config import RunConfig
from lmcode.data.corpus import Documents
from lmcode.data.streams import StreamSampler
from lmcode.dist import Group
from lmcode.eval.reading import Reading, others
from lmcode.memory.bank import LongTermMemory

FAR = 16  # a window this many windows into its document is "far": most of what it could recall is out of reach of attention
NOTHING_FAR = f"no held-out document was read as far as {FAR} windows"


class EvalResult(NamedTuple):
    """Mean loss in nats per token over `tokens` targets; `far_loss` over those at least 16 windows into a document, None
    where there are none; `by_source` where documents come from several, those of which something was read."""

    loss: float
    tokens: int
    far_loss: float | None
    far_tokens: int
    by_source: Mapping[str, float] = MappingProxyType({})


def void_controls(sampler: StreamSampler, *, scope: str, windows: int) -> dict[str, str]:
    """The modes whose loss would say nothing on these documents, whatever the model, each with the reason.

    Args:
        scope: of the banks (`memory.scope`).
        windows: as in `evaluate`.
    """
    steps = range(min(windows, sampler.num_steps or 0))
    batches = [sampler.batch(step) for step in steps]
    if scope == "document" and not any(bool((batch.window_B > 0).any()) for batch in batches):
        reason = "no held-out document was read beyond its first window, so that there is nothing in its memory to read"
        return {"off": reason, "shuffled": reason, "random": reason}
    if not any(others(batch.namespace_B.tolist()) for batch in batches):
        return {"shuffled": f"no two held-out documents are read side by side ({len(sampler.documents)} held out, "
                            f"eval.streams = {sampler.streams}), so that there is no other document's memory"}
    return {}


@torch.no_grad()
def evaluate(model: Backbone, sampler: StreamSampler, *, banks: Mapping[int, LongTermMemory], group: Group,
             mode: str = "on", windows: int = 16, slots: int | None = None,
             upkeep: Callable[[int, LongTermMemory], None] | None = None,
             between: Callable[[], None] | None = None) -> EvalResult:
    """Reads `windows` windows of every held-out stream and returns the mean loss. A collective.

    Args:
        model: the module itself (not DeepSpeed's wrapper); left in the mode it came in.
        sampler: held-out documents, one pass, no shuffling.
        banks: the model's banks; only forked, never written.
        mode: a name in `reading.MODES`; `void_controls` names those that say nothing.
        slots: slots of the evaluation banks; None keeps those of `banks`.
        upkeep: called after each window with its number, from 0, and every evaluation bank; may be a collective.
        between: called before each window; may be a collective, and what it raises ends the evaluation.

    Raises:
        ValueError: for an unknown mode.
    """
    reading = Reading(model, mode=mode, banks=banks, slots=slots)
    device = next(model.parameters()).device
    names = sampler.documents.sources or {}
    sums = torch.zeros(4 + 2 * len(names), dtype=torch.float64)
    for step in range(min(windows, sampler.num_steps or 0)):
        if between is not None:
            between()
        batch = sampler.batch(step, rank=group.rank, world_size=group.size).to(device)
        output = reading.read(batch, sampler.batch(step).namespace_B.tolist())
        reading.write(output)
        if upkeep is not None:
            for fork in reading.forks.values():
                upkeep(step, fork)
        loss_B = token_losses(output).double().sum(1).cpu()
        count_B = (batch.targets_BT >= 0).sum(1).cpu()
        far_B = batch.window_B.cpu() >= FAR
        chosen = [torch.ones_like(far_B), far_B, *(batch.source_BP[:, 0].cpu() == one for one in range(len(names)))]
        sums += torch.stack([column_B[of_B].sum() for of_B in chosen for column_B in (loss_B, count_B)])
    loss, tokens, far_loss, far_tokens, *rest = group.all_reduce(sums.to(device), phase="evaluation").tolist()
    by_source = {name: one / count for name, one, count in zip(names, rest[::2], rest[1::2], strict=True) if count}
    return EvalResult(loss / max(tokens, 1), int(tokens), far_loss / far_tokens if far_tokens else None, int(far_tokens),
                      by_source)


def held_out_sampler(documents: Documents, config: RunConfig) -> StreamSampler:
    """The sampler that every held-out evaluation of a run uses: one pass, document order fixed."""
    return StreamSampler(documents, streams=config.eval.streams, sequence_length=config.train.sequence_length,
                         seed=config.train.seed, epochs=1, shuffle=False)


