"""What an evaluation task is, and the one way in which all are run.

A case is a document: its context is read window by window, which writes the memory, then the question; the reference answer
is scored where the model would have to say it. So a task needs no generation, and gives the same on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from lmcode.backbone import Backbone, token_losses
from lmcode.data.dataset import MemoryDataset
from lmcode.data.streams import Batch, StreamSampler
from lmcode.eval.reading import Reading
from lmcode.protocol import Output


class Case(NamedTuple):
    """Token ids: what is read, what is asked after it, and the answer that is right."""

    context: tuple[int, ...]
    question: tuple[int, ...]
    reference: tuple[int, ...]


class Answer(NamedTuple):
    """What a model makes of a case's reference, token by token, each after the right ones before it.

    likeliest: the ids that it would have said. nats: the losses of the reference's tokens.
    """

    likeliest: tuple[int, ...]
    nats: tuple[float, ...]


class Task(Protocol):
    """A set of cases, and what an answer is worth."""

    def cases(self, seed: int, *, vocab_size: int) -> Sequence[Case]:
        """The same cases for the same arguments, in ids below `vocab_size`; each context and question at least one token
        together, and the reference at least one."""
        ...

    def metric(self, case: Case, answer: Answer) -> float:
        """From 0 to 1; a function of its arguments alone."""
        ...


class TaskResult(NamedTuple):
    """Means over all cases: of the metric, and of the nats of a reference's token."""

    score: float
    nats: float
    cases: int


def run_task(model: Backbone, task: Task, *, seed: int = 0, mode: str = "on", streams: int = 8, length: int | None = None,
             slots: int | None = None) -> TaskResult:
    """Asks a model all cases of a task. A collective of the model's group; the model and its banks are left as they were.

    Args:
        mode: see `Reading`.
        streams: cases that are read side by side on each rank.
        length: tokens of a window; the model's context when None.
        slots: of the memories that are written; those of the model's banks when None.

    Raises:
        ValueError: for an unknown mode, or a case without an answer.
    """
    cases, group = task.cases(seed, vocab_size=model.config.vocab_size), model.group
    if bad := [number for number, case in enumerate(cases) if not case.reference or not case.context + case.question]:
        raise ValueError(f"a case needs a context or a question, and a reference: case {bad[0]} is {cases[bad[0]]}")
    documents = MemoryDataset([list(case.context + case.question + case.reference) for case in cases]).as_documents()
    sampler = StreamSampler(documents, streams=streams * group.size, seed=0, epochs=1, shuffle=False,
                            sequence_length=length or model.config.context_length)
    reading, device = Reading(model, mode=mode, slots=slots), next(model.parameters()).device
    said: list[tuple[int, int, int, float]] = []
    for step in range(sampler.num_steps or 0):
        batch = sampler.batch(step, rank=group.rank, world_size=group.size).to(device)
        output = reading.read(batch, sampler.batch(step).namespace_B.tolist())
        reading.write(output)
        said += predictions(batch, output, cases)
    by_case: dict[int, list[tuple[int, int, float]]] = {number: [] for number in range(len(cases))}
    for number, *rest in sorted(one for part in group.all_gather_object(said) for one in part):
        by_case[number].append(tuple(rest))
    answers = [Answer(tuple(id for _, id, _ in one), tuple(nats for _, _, nats in one)) for one in by_case.values()]
    scores = [task.metric(case, answer) for case, answer in zip(cases, answers, strict=True)]
    nats = [one for answer in answers for one in answer.nats]
    return TaskResult(sum(scores) / len(scores), sum(nats) / len(nats), len(cases))


def predictions(batch: Batch, output: Output, cases: Sequence[Case]) -> Iterator[tuple[int, int, int, float]]:
    """(case, place in its document, likeliest id, nats) of each token of a reference that is predicted in this window."""
    likeliest_BT, loss_BT = output.logits.argmax(-1).tolist(), token_losses(output).tolist()
    width = batch.input_ids_BT.shape[1]
    for row, (number, window) in enumerate(zip(batch.namespace_B.tolist(), batch.window_B.tolist(), strict=True)):
        if number < 0:  # the stream has run out of cases
            continue
        end = len(cases[number].context) + len(cases[number].question) + len(cases[number].reference)
        for place in range(end - len(cases[number].reference), end):
            column = place - 1 - window * width
            if 0 <= column < width:
                yield number, place, likeliest_BT[row][column], loss_BT[row][column]


def exact(case: Case, answer: Answer) -> float:
    """1 if the model would have said the reference, word for word."""
    return float(answer.likeliest == case.reference)
