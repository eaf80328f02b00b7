"""`Reading`: a model that reads text with memories of its own, which are thrown away, and is left as it was.

The one thing to know: whatever measures a model reads through this. The banks are forks, the namespaces are apart from all
that training gives out, and the mode says what the reads find. A further control is one more function in `MODES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lmcode.backbone import Backbone, forward_batch
from lmcode.data.streams import Batch
from lmcode.memories.memories import fork_banks
from lmcode.memory.bank import LongTermMemory
from lmcode.memory.search.draw import lots
from lmcode.model.mode import in_eval_mode
from lmcode.protocol import NO_SCORE, Hits, InTwoSteps, Output, Retriever, State

APART = 2**62 + 2**61  # from here on namespaces are those of readings that only measure: beyond all that training gives out


class ShuffledRetriever(InTwoSteps):
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

    def fetch(self, hits: Hits) -> tuple[Tensor, ...]:
        return self._bank.fetch(hits)


class RandomRetriever(InTwoSteps):
    """Reads entries drawn by lot from those that a query may see: the control that keeps entries and attention over them,
    and takes away the search.

    A draw follows from the ids, the namespace, the query's place in its window and the number of windows read, so it is the
    same on any number of ranks. What was drawn is weighed by query . key, without importance, and credited evenly.
    """

    def __init__(self, bank: LongTermMemory) -> None:
        self._bank, self._turn = bank, 0
        self.top_k = bank.top_k

    def search(self, query_HND: Tensor, namespace_N: Tensor, document_N: Tensor | None = None) -> Hits:
        lot_HND = torch.zeros_like(query_HND, dtype=torch.float32)
        lot_HN = lots(namespace_N.cpu().numpy(), len(query_HND), self._turn)
        lot_HND[..., 0] = torch.from_numpy(lot_HN).to(lot_HND)
        self._turn += 1
        return self._bank.search(lot_HND, namespace_N, document_N, tier="draw")

    def attend(self, query_HND: Tensor, hits: Hits) -> tuple[Tensor, Tensor]:
        key_HNKD, value_HNKD = self._bank.fetch(hits)
        score_HNK = torch.einsum("hnd,hnkd->hnk", query_HND.float(), key_HNKD).where(hits.valid_HNK, NO_SCORE)
        value_HND = torch.einsum("hnk,hnkd->hnd", score_HNK.softmax(-1), value_HNKD)
        return value_HND.to(query_HND.dtype), score_HNK.logsumexp(-1).where(hits.valid_HNK[..., 0], NO_SCORE)

    def fetch(self, hits: Hits) -> tuple[Tensor, ...]:
        return self._bank.fetch(hits)


Forks = Mapping[int, LongTermMemory]
# From the memories that a reading writes to what its layers read; a layer that is left out finds nothing.
MODES: dict[str, Callable[[Forks], dict[int, Retriever]]] = {
    "on": dict,
    "off": lambda forks: {},
    "shuffled": lambda forks: {layer: ShuffledRetriever(fork) for layer, fork in forks.items()},
    "random": lambda forks: {layer: RandomRetriever(fork) for layer, fork in forks.items()},
}


CLOSING = ("on", "off", "shuffled")  # the modes of the evaluation that ends a job: a draw takes longer than a search


class Reading:
    """One pass of a model over the windows of some streams, in evaluation mode and without gradient.

    Args:
        model: the module itself, not DeepSpeed's wrapper.
        mode: "on", "off" (no retrieval, the rest unchanged), "shuffled" (another document's memory) or "random" (entries
            drawn by lot from those that may be seen).
        banks: what is forked; the model's own when None.
        slots: of the forks; those of `banks` when None.

    Attributes:
        forks: the memories of this reading by layer; none where nothing is read from them.
        state: what the streams carry.

    Raises:
        ValueError: for an unknown mode.
    """

    def __init__(self, model: Backbone, *, mode: str = "on", banks: Forks | None = None, slots: int | None = None) -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}: got '{mode}'")
        self.model = model
        self.forks = fork_banks(model.banks if banks is None else banks, slots) if mode != "off" else {}
        self.state: State | None = None
        self._retrievers, self._windows = MODES[mode](self.forks), 0

    @torch.no_grad()
    def read(self, batch: Batch, side_by_side: Sequence[int]) -> Output:
        """Reads the next window of each stream, and writes nothing. A collective.

        Args:
            batch: this rank's, on the model's device.
            side_by_side: the namespaces of the windows that all ranks read now.
        """
        for retriever in self._retrievers.values():
            if isinstance(retriever, ShuffledRetriever):
                retriever.other = others([number + APART if number >= 0 else number for number in side_by_side])
        with in_eval_mode(self.model), self.model.reading_from(self._retrievers):
            output = forward_batch(self.model, apart(batch), self.state)
        self.state = output.state
        self._windows += 1
        return output

    def write(self, output: Output) -> None:
        """Writes into every fork what the window that was just read offers, and books its hits. A collective."""
        for layer, fork in self.forks.items():
            read = output.memory[layer]
            fork.commit([read.candidates], [read.hits], step=self._windows - 1)


def apart(batch: Batch) -> Batch:
    """The batch with the namespaces of a reading that only measures: other ones than any that the model's banks hold, so
    that what was written from the same text in training is known to be of another reading."""
    number_B, number_BP = (torch.where(number >= 0, number + APART, number)
                           for number in (batch.namespace_B, batch.namespace_BP))
    return batch._replace(namespace_B=number_B, namespace_BP=number_BP)


def others(namespaces: Sequence[int]) -> dict[int, int]:
    """The namespace that stands in for each stream's own: the next one that is a document; none for a document alone."""
    live = [one for one in namespaces if one >= 0]
    return dict(zip(live, live[1:] + live[:1], strict=True)) if len(live) > 1 else {}
