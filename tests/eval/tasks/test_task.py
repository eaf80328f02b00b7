"""Evaluation tasks: a toy task of a few lines is run as any other; and recall asks for what it says it asks for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lmcode.eval.reading import MODES, Reading
from lmcode.eval.tasks.needles import Needles
from lmcode.eval.tasks.recall import KeyValueRecall
from lmcode.eval.tasks.shared import SharedFacts
from lmcode.eval.tasks.task import Case, Prediction, Task, documents_of, exact, read_all, run_task
from tests.helpers.models import model_with


class Echo:
    """After a token, the same again: answers that lie on both sides of a window's end, asked in cases of unequal length."""

    def cases(self, seed: int, *, vocab_size: int) -> list[Case]:
        return [Case(tuple(range(1, 2 + 5 * number)), (seed + number,), (seed + number,) * 3) for number in range(11)]

    def metric(self, case: Case, answer: Prediction) -> float:
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
        assert exact(case, Prediction(case.reference, (0.0,))) == 1.0 and exact(case, Prediction((0,), (0.0,))) == 0.0
    with pytest.raises(ValueError, match="16 keys need a vocabulary of 48 ids: got 40"):
        task.cases(0, vocab_size=40)


class Several(Echo):
    """Several questions of one case, each answered by the tokens that were asked for it."""

    def cases(self, seed: int, *, vocab_size: int) -> list[Case]:
        return [Case(tuple(range(number)), (9,), (9, 9), (((7, 8), (8,)), ((3,), (3, 3, 3)))) for number in range(7)]


@pytest.mark.parametrize("length", [3, 4, 16])
def test_every_question_of_a_case_is_answered_at_its_place(length: int) -> None:
    result = run_task(repeating(True), Several(), length=length)
    assert (result.score, result.cases) == (1.0, 7) and run_task(repeating(False), Several(), length=length).score == 0.0
    for case in Several().cases(0, vocab_size=257):
        tokens = case.tokens()
        assert [tuple(tokens[place] for place in span) for span in case.spans()] == [one for _, one in case.asked()]


def test_lessons_count_answers_and_nothing_else() -> None:
    cases = KeyValueRecall(count=4, pairs=5, between=3, questions=5).cases(0, vocab_size=90)
    documents = documents_of(cases)
    for number, case in enumerate(cases):
        place = slice(*documents.offsets[number:number + 2].tolist())
        assert documents.tokens[place].tolist() == case.tokens()
        counted = documents.tokens[place][documents.counted[place] == 1].tolist()
        assert counted == [token for _, answer in case.asked() for token in answer]


def test_the_last_value_of_a_key_is_right() -> None:
    for case in KeyValueRecall(count=6, pairs=8, between=0, questions=8, again=5).cases(1, vocab_size=300):
        assert len(case.asked()) == 5, "only keys with two values are asked for"
        for (key,), (value,) in case.asked():
            places = [place for place in range(0, len(case.context), 2) if case.context[place] == key]
            assert len(places) == 2 and case.context[places[-1] + 1] == value


def test_pairs_are_read_again_after_a_pause_and_questions_stand_anywhere_in_a_window() -> None:
    task = KeyValueRecall(count=30, pairs=4, between=10, questions=4, rehearsed=4, between_readings=20, jitter=15)
    cases = task.cases(1, vocab_size=300)
    for case in cases:
        first, again = case.context[:8], case.context[28:36]
        assert {*zip(first[::2], first[1::2], strict=True)} == {*zip(again[::2], again[1::2], strict=True)}
        assert all(token >= 200 for token in case.context[8:28] + case.context[36:])
    assert len({len(case.context) for case in cases}) > 8 and {len(case.context) for case in cases} <= {*range(46, 62)}


def test_needles_stand_once_in_the_text_at_their_depth() -> None:
    task = Needles(count=5, needles=3, length=200, width=2, depth=0.25)
    cases = task.cases(0, vocab_size=64)
    assert cases == task.cases(0, vocab_size=64) != task.cases(1, vocab_size=64)
    for case in cases:
        assert len(case.context) == 200 + 3 * 4 and len(case.asked()) == 3
        assert all(token >= 32 for token in case.context[50:62]) and all(token < 32 for token in case.context[:50])
        for question, answer in case.asked():
            needle, context = question + answer, case.context
            assert any(context[at:at + 4] == needle for at in range(50, 60, 4))
    anywhere = Needles(count=20, needles=2, length=100, width=2).cases(0, vocab_size=64)
    assert len({next(at for at, token in enumerate(case.context) if token >= 32) for case in anywhere}) > 10


@pytest.mark.parametrize("subject", [1, 2])
def test_shared_facts_are_stated_once_and_asked_of_another_part(subject: int) -> None:
    task = SharedFacts(facts=64, per_text=4, subject=subject, questions=32, spread=4)
    texts, cases = task.stated(3, vocab_size=256), task.cases(3, vocab_size=256)
    assert cases == task.cases(3, vocab_size=256) and len(texts) == 16 and len(cases) == 8
    stated = {text[at:at + subject]: (text[at + subject], number % 4) for number, text in enumerate(texts)
              for at in range(0, len(text) - 1, subject + 1)}
    assert len(stated) == 64 and {text[-1] for text in texts} == {255}, "the last token of a document is never an entry"
    for number, case in enumerate(cases):
        for question, (answer,) in case.asked():
            assert stated[question] == (answer, (number + 1) % 4), "what part i asks, part i + 1 has read"
    with pytest.raises(ValueError, match="facts need subjects, here 85.1, and are at least 2 x 16: got 300"):
        SharedFacts(facts=300).cases(0, vocab_size=256)


def test_one_memory_holds_what_other_documents_state_and_private_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the namespaces that each reading is given: what is stated comes before all questions, in memories of their own."""
    read: list[list[tuple[int, ...]]] = []

    def noted(reading: Reading, texts: list[list[int]], **settings: object) -> object:
        read.append([tuple(text) for text in texts])
        yield from read_all(reading, texts, **settings)

    monkeypatch.setattr("lmcode.eval.tasks.task.read_all", noted)
    model, task = model_with(256, scope="global"), SharedFacts(facts=32, per_text=4, questions=16)
    texts = task.stated(0, vocab_size=257)
    cases = [tuple(case.tokens()) for case in task.cases(0, vocab_size=257)]
    run_task(model, task)
    assert read == [texts, cases]
    read.clear()
    run_task(model, task, parts=2)
    assert read == [texts[::2], cases[::2], texts[1::2], cases[1::2]]
