"""What an evaluation task is, and the one way in which all are run.

A case is a document: its context is read window by window, which writes the memory, then its questions, each with the answer
that is right; an answer is scored where the model would have to say it. So a task needs no generation, and gives the same on
any number of ranks. A task may have texts stated first, as documents of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from lmcode.backbone import Backbone, token_losses
from lmcode.data.corpus import Documents
from lmcode.data.dataset import MemoryDataset
from lmcode.data.streams import Batch, StreamSampler
from lmcode.eval.reading import Reading
from lmcode.memory import lifecycle
from lmcode.protocol import Output

Ids = tuple[int, ...]


class Case(NamedTuple):
    """Token ids: what is read, what is asked after it, and the answer that is right; and what is asked after that, with its
    answer, in turn."""

    context: Ids
    question: Ids
    reference: Ids
    more: tuple[tuple[Ids, Ids], ...] = ()

    def tokens(self) -> list[int]:
        """The whole document."""
        return [*self.context, *(token for pair in self.asked() for part in pair for token in part)]

    def asked(self) -> tuple[tuple[Ids, Ids], ...]:
        """All questions and answers."""
        return ((self.question, self.reference), *self.more)

    def spans(self) -> list[range]:
        """Where in the document each answer stands."""
        spans, place = [], len(self.context)
        for question, reference in self.asked():
            spans.append(range(place + len(question), place + len(question) + len(reference)))
            place = spans[-1].stop
        return spans


class Prediction(NamedTuple):
    """What a model makes of a case's reference, token by token, each after the right ones before it.

    likeliest: at each place the id with the highest logit. nats: the losses of the reference's tokens.
    """

    likeliest: Ids
    nats: tuple[float, ...]


class Task(Protocol):
    """A set of cases, and what an answer is worth."""

    def cases(self, seed: int, *, vocab_size: int) -> Sequence[Case]:
        """The same cases for the same arguments, in ids below `vocab_size`; each context and question at least one token
        together, and the reference at least one."""
        ...

    def metric(self, case: Case, answer: Prediction) -> float:
        """What an answer to a case's (first) question is worth, from 0 to 1; a function of its arguments alone."""
        ...


@runtime_checkable
class Stating(Protocol):
    """A task whose texts are read before its cases, as documents of their own; a case may ask for what another document
    states."""

    def stated(self, seed: int, *, vocab_size: int) -> Sequence[Ids]:
        """The same texts for the same arguments, at least two tokens each."""
        ...


class TaskResult(NamedTuple):
    """Means over all questions: of the metric, and of the nats of a reference's token."""

    score: float
    nats: float
    cases: int


def run_task(model: Backbone, task: Task, *, seed: int = 0, mode: str = "on", streams: int = 8, length: int | None = None,
             slots: int | None = None, parts: int = 1) -> TaskResult:
    """Asks a model all cases of a task. A collective of the model's group; the model and its banks are left as they were.

    Args:
        mode: see `Reading`.
        streams: cases that are read side by side on each rank.
        length: tokens of a window; the model's context when None.
        slots: of the memories that are written; those of the model's banks when None.
        parts: private memories, empty at first, of that size together: each takes every n-th text and case.

    Raises:
        ValueError: for an unknown mode, or a case without an answer.
    """
    cases = task.cases(seed, vocab_size=model.config.vocab_size)
    if bad := [number for number, case in enumerate(cases) if not case.reference or not case.context + case.question]:
        raise ValueError(f"a case needs a context or a question, and a reference: case {bad[0]} is {cases[bad[0]]}")
    stated = task.stated(seed, vocab_size=model.config.vocab_size) if isinstance(task, Stating) else ()
    length, scores, nats = length or model.config.context_length, [], []
    for part in range(parts):
        own = {layer: lifecycle.like(bank, slots=(slots or bank.slots) // parts) for layer, bank in model.banks.items()}
        reading = Reading(model, mode=mode, slots=slots) if parts == 1 else Reading(model, mode=mode, banks=own)
        mine = cases[part::parts]
        if texts := stated[part::parts]:
            for _ in read_all(reading, [list(text) for text in texts], streams=streams, length=length):
                pass
        for case, answers in zip(mine, answers_to(reading, mine, streams=streams, length=length, first=len(stated)),
                                 strict=True):
            scores += [task.metric(Case(case.context, *pair), one) for pair, one in zip(case.asked(), answers, strict=True)]
            nats += [loss for one in answers for loss in one.nats]
    return TaskResult(sum(scores) / len(scores), sum(nats) / len(nats), len(cases))


def read_all(reading: Reading, texts: Sequence[list[int]], *, streams: int, length: int,
             first: int = 0) -> Iterator[tuple[Batch, Output]]:
    """Reads texts side by side, each as a document, and writes what they offer; hands out this rank's windows.

    Args:
        first: the namespace of the first text, apart from those of texts that this reading has read before.
    """
    group, device = reading.model.group, next(reading.model.parameters()).device
    sampler = StreamSampler(MemoryDataset(texts).as_documents(), streams=streams * group.size, seed=0, epochs=1,
                            shuffle=False, sequence_length=length, first_namespace=first)
    for step in range(sampler.num_steps or 0):
        batch = sampler.batch(step, rank=group.rank, world_size=group.size).to(device)
        output = reading.read(batch, sampler.batch(step).namespace_B.tolist())
        reading.write(output)
        yield batch, output


def answers_to(reading: Reading, cases: Sequence[Case], *, streams: int, length: int,
               first: int = 0) -> list[list[Prediction]]:
    """What a model makes of the questions of each case. A collective."""
    places = [frozenset(place for span in case.spans() for place in span) for case in cases]
    said: list[tuple[int, int, int, float]] = []
    for batch, output in read_all(reading, [case.tokens() for case in cases], streams=streams, length=length, first=first):
        said += predictions(batch, output, places, first)
    found = {(number, place): (id, nats) for part in reading.model.group.all_gather_object(said)
             for number, place, id, nats in part}
    return [[Prediction(*zip(*(found[number, place] for place in span), strict=True)) for span in case.spans()]
            for number, case in enumerate(cases)]


def predictions(batch: Batch, output: Output, places: Sequence[frozenset[int]],
                first: int = 0) -> Iterator[tuple[int, int, int, float]]:
    """(case, place in its document, likeliest id, nats) of each token at those places that is predicted in this window."""
    likeliest_BT, loss_BT = output.logits.argmax(-1).tolist(), token_losses(output).tolist()
    width = batch.input_ids_BT.shape[1]
    for row, (number, window) in enumerate(zip(batch.namespace_B.tolist(), batch.window_B.tolist(), strict=True)):
        if number < 0:  # the stream has run out of cases
            continue
        for column in range(width):
            if window * width + column + 1 in places[number - first]:
                yield number - first, window * width + column + 1, likeliest_BT[row][column], loss_BT[row][column]


def documents_of(cases: Sequence[Case]) -> Documents:
    """Cases to learn from, of which only answers are targets."""
    documents = MemoryDataset([case.tokens() for case in cases]).as_documents()
    counted = np.zeros(len(documents.tokens), np.uint8)
    for case, start in zip(cases, documents.offsets.tolist(), strict=False):
        for span in case.spans():
            counted[start + span.start:start + span.stop] = 1
    return replace(documents, counted=counted)


def exact(case: Case, answer: Prediction) -> float:
    """1 if the model would have said the reference, word for word."""
    return float(answer.likeliest == case.reference)
