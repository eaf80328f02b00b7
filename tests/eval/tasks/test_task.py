"""Evaluation tasks: a toy task of a few lines is run as any other; and recall asks for what it says it asks for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lmcode.eval.reading import MODES
from lmcode.eval.tasks.recall import KeyValueRecall
from lmcode.eval.tasks.task import Answer, Case, Task, exact, run_task
from tests.helpers.models import model_with


class Echo:
    """After a token, the same again: answers that lie on both sides of a window's end, asked in cases of unequal length."""

    def cases(self, seed: int, *, vocab_size: int) -> list[Case]:
        return [Case(tuple(range(1, 2 + 5 * number)), (seed + number,), (seed + number,) * 3) for number in range(11)]

    def metric(self, case: Case, answer: Answer) -> float:
        return sum(map(int.__eq__, answer.likeliest, case.reference)) / len(case.reference)


def repeating(right: bool) -> nn.Module:
    """A model that says its last token again, or the one after it."""
    model = model_with(256)

    def say(module: nn.Module, inputs: tuple, named: dict, output: object) -> object:
        wanted_BT = inputs[0] + (not right)
        return output._replace(logits=torch.nn.functional.one_hot(wanted_BT, model.config.vocab_size).float())

    model.register_forward_hook(say, with_kwargs=True)
    return model


@pytest.mark.parametrize("length", [4, 5, 16])
@pytest.mark.parametrize("streams", [1, 3])
def test_a_toy_task_is_asked_at_the_right_places(length: int, streams: int) -> None:
    task: Task = Echo()
    assert run_task(repeating(True), task, seed=7, streams=streams, length=length)[::2] == (1.0, 11)
    assert run_task(repeating(False), task, seed=7, streams=streams, length=length).score == 0.0


def test_measuring_changes_nothing_and_modes_differ() -> None:
    model, task = model_with(1024), KeyValueRecall(count=6, pairs=4, between=24)
    before = model.banks[1].content_hash()
    nats = [run_task(model, task, mode=mode).nats for mode in MODES]
    assert nats == [run_task(model, task, mode=mode).nats for mode in MODES]
    assert len(set(nats)) == len(MODES) and model.banks[1].content_hash() == before


def test_recall_asks_for_the_value_that_followed_the_key() -> None:
    task = KeyValueRecall(count=5)
    cases = task.cases(3, vocab_size=257)
    assert cases == task.cases(3, vocab_size=257) != task.cases(4, vocab_size=257)
    for case in cases:
        assert case.context.count(case.question[0]) == 1
        assert case.context[case.context.index(case.question[0]) + 1] == case.reference[0]
        assert exact(case, Answer(case.reference, (0.0,))) == 1.0 and exact(case, Answer((0,), (0.0,))) == 0.0
    with pytest.raises(ValueError, match="16 keys need a vocabulary of 48 ids: got 40"):
        task.cases(0, vocab_size=40)
