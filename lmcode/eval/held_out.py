"""Held-out loss with the memory on, off and shuffled.

Each evaluation reads held-out documents window by window, as training does, with a bank of its own: forked from the
model's, written as the documents are read, thrown away at the end. The training bank is never touched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from lmcode.backbone import Backbone, forward_batch
from lmcode.data.streams import Batch, StreamSampler
from lmcode.dist import Group
from lmcode.memories.memories import fork_banks
from lmcode.memory.bank import LongTermMemory
from lmcode.model.mode import in_eval_mode
from lmcode.protocol import Hits, NullRetriever, Retriever

APART = 2**62 + 2**61  # from here on namespaces are those of readings that only measure: beyond all that training gives out
MODES = ("on", "off", "shuffled")
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


class ShuffledRetriever:
    """Reads the memory of another document: the control that keeps the mechanism and takes away the content.

    Every stream searches the namespace of the next stream that reads a document (the last one that of the first), so each
    query still gets hits written by the same model from real text, only not from its own document; it finds nothing while
    no other stream reads one.
    """

    def __init__(self, bank: LongTermMemory) -> None:
        self._bank = bank
        self.top_k = bank.top_k
        self.other: dict[int, int] = {}  # see `others`

    def search(self, query_HND: Tensor, namespace_N: Tensor, document_N: Tensor | None = None) -> Hits:
        other = torch.tensor([self.other.get(n, -1) for n in namespace_N.tolist()], dtype=torch.int64,
                             device=namespace_N.device)
        return self._bank.search(query_HND, other, document_N)

    def attend(self, query_HND: Tensor, hits: Hits) -> tuple[Tensor, Tensor]:
        return self._bank.attend(query_HND, hits)


def apart(batch: Batch) -> Batch:
    """The batch with the namespaces of a reading that only measures: other ones than any that the model's banks hold, so
    that what was written from the same text in training is known to be of another reading."""
    own = batch.namespace_B, batch.namespace_BP
    return batch._replace(**{name: torch.where(number >= 0, number + APART, number)
                             for name, number in zip(("namespace_B", "namespace_BP"), own, strict=True)})


def others(namespaces: Sequence[int]) -> dict[int, int]:
    """The namespace that stands in for each stream's own: the next one that is a document; none for a document alone."""
    live = [one for one in namespaces if one >= 0]
    return dict(zip(live, live[1:] + live[:1], strict=True)) if len(live) > 1 else {}


def void_controls(sampler: StreamSampler, *, scope: str, windows: int) -> dict[str, str]:
    """By mode, why it cannot be told from another one, whatever the model: such a loss would be no measurement.

    Args:
        scope: of the banks (`memory.scope`).
        windows: as in `evaluate`.
    """
    steps = range(min(windows, sampler.num_steps or 0))
    batches = [sampler.batch(step) for step in steps]
    if scope == "document" and not any(bool((batch.window_B > 0).any()) for batch in batches):
        reason = "no held-out document was read beyond its first window, so that there is nothing in its memory to read"
        return {"off": reason, "shuffled": reason}
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
        mode: "on", "off" (no retrieval, the rest unchanged) or "shuffled" (another document's memory); `void_controls` says
            which of them tell nothing.
        slots: slots of the evaluation banks; None keeps those of `banks`.
        upkeep: called after each window with its number, from 0, and every evaluation bank; may be a collective.
        between: called before each window; may be a collective, and what it raises ends the evaluation.

    Raises:
        ValueError: for an unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}: got '{mode}'")
    forks = fork_banks(banks, slots) if mode != "off" else {}
    shuffled = {layer: ShuffledRetriever(fork) for layer, fork in forks.items()} if mode == "shuffled" else {}
    retrievers: dict[int, Retriever] = {layer: NullRetriever() for layer in banks}
    retrievers.update(shuffled or forks)
    device = next(model.parameters()).device
    names = sampler.documents.sources or {}
    sums = torch.zeros(4 + 2 * len(names), dtype=torch.float64)
    state = None
    with in_eval_mode(model), model.reading_from(retrievers):
        for step in range(min(windows, sampler.num_steps)):
            if between is not None:
                between()
            if shuffled:
                everyone = apart(sampler.batch(step)).namespace_B.tolist()
                for retriever in shuffled.values():
                    retriever.other = others(everyone)
            batch = apart(sampler.batch(step, rank=group.rank, world_size=group.size)).to(device)
            output = forward_batch(model, batch, state)
            state = output.state
            for layer, fork in forks.items():
                fork.commit([output.memory[layer].candidates], [output.memory[layer].hits], step=step)
                if upkeep is not None:
                    upkeep(step, fork)
            loss_B = output.token_loss.double().sum(1).cpu()
            count_B = (batch.targets_BT >= 0).sum(1).cpu()
            far_B = batch.window_B.cpu() >= FAR
            chosen = [torch.ones_like(far_B), far_B, *(batch.source_BP[:, 0].cpu() == one for one in range(len(names)))]
            sums += torch.stack([column_B[of_B].sum() for of_B in chosen for column_B in (loss_B, count_B)])
    loss, tokens, far_loss, far_tokens, *rest = group.all_reduce(sums.to(device), phase="evaluation").tolist()
    by_source = {name: one / count for name, one, count in zip(names, rest[::2], rest[1::2], strict=True) if count}
    return EvalResult(loss / max(tokens, 1), int(tokens), far_loss / far_tokens if far_tokens else None, int(far_tokens),
                      by_source)


def held_out_sampler(documents: object, config: object) -> StreamSampler:
    """The sampler that every held-out evaluation of a run uses: one pass, document order fixed."""
    return StreamSampler(documents, streams=config.eval.streams, sequence_length=config.train.sequence_length,
                         seed=config.train.seed, epochs=1, shuffle=False)


