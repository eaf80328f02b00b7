"""What a world asks for is what somebody says who has read its facts in their order, whatever lies between them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lmcode.eval.tasks.task import Case, Ids, Prediction
from lmcode.eval.tasks.worlds import Worlds

VOCAB, HALF = 200, 100
WENT, TOOK, WHERE = 197, 198, 199


def facts_in(case: Case) -> list[Ids]:
    """The facts of a case, by their first words."""
    return [case.context[at:at + 3] for at, token in enumerate(case.context) if token in (WENT, TOOK)]


def read(case: Case) -> tuple[dict[int, list[int]], dict[int, int]]:
    """All places of each person, in turn, and who has each thing."""
    places: dict[int, list[int]] = {}
    holder = {}
    for word, one, other in facts_in(case):
        if word == WENT:
            places.setdefault(one, []).append(other)
        else:
            holder[one] = other
    return places, holder


@pytest.mark.parametrize("hops", [1, 2, None])
@pytest.mark.parametrize("again", [0, 3])
@pytest.mark.parametrize("aloud", [False, True])
def test_answers_are_those_of_a_reader(hops: int | None, again: int, aloud: bool) -> None:
    task = Worlds(count=20, people=6, again=again, length=60, jitter=9, hops=hops, aloud=aloud)
    cases, asked_hops = task.cases(3, vocab_size=VOCAB), set()
    assert cases == task.cases(3, vocab_size=VOCAB) != task.cases(4, vocab_size=VOCAB)
    for case in cases:
        places, holder = read(case)
        assert len(places) == len(holder) == 6 and sum(map(len, places.values())) == 6 + again
        assert len(case.asked()) == (again or 6)
        for (word, name), answer in case.asked():
            person = holder.get(name, name)
            asked_hops.add(1 if person == name else 2)
            assert word == WHERE and len(places[person]) == (2 if again else 1), "who moved again is asked for"
            assert answer == ((person,) if aloud and person != name else ()) + (places[person][-1],)
            assert task.metric(case._replace(reference=answer), Prediction(answer, ())) == 1.0
    assert asked_hops == ({1, 2} if hops is None else {hops})


def test_facts_stand_anywhere_among_as_much_other_text_as_was_asked_for() -> None:
    task = Worlds(count=30, people=2, length=80)
    for case in task.cases(0, vocab_size=VOCAB):
        assert sum(token < HALF for token in case.context) == 80 and len(case.context) == 80 + 4 * 3
    first = {next(at for at, token in enumerate(case.context) if token >= HALF) for case in task.cases(0, vocab_size=VOCAB)}
    assert len(first) > 5
    lengths = {len(case.context) for case in replace(task, jitter=30).cases(0, vocab_size=VOCAB)}
    assert len(lengths) > 10 and min(lengths) >= 92 and max(lengths) <= 122
    (near,), (far,) = (replace(task, count=1, length=length).cases(0, vocab_size=VOCAB) for length in (0, 65536))
    assert len(near.context) == 12 and len(far.context) == 65536 + 12


def test_sentences_of_a_text_are_told_whole() -> None:
    sentences = [(5, 6, 7, 1), (8, 1), (9, 10, 11, 12, 13, 1)]
    asked: list[int] = []

    def told(vocab_size: int) -> list[Ids]:
        asked.append(vocab_size)
        return sentences

    (case,) = Worlds(count=1, people=3, length=50, sentences=told).cases(0, vocab_size=VOCAB)
    assert asked == [HALF]
    words = ",".join(str(token) if token < HALF else "|" for token in case.context)
    parts = [part for part in words.replace("|", "").split(",1,") if part.strip(",")]
    whole = {",".join(map(str, sentence[:-1])) for sentence in sentences}
    assert {part.strip(",") for part in parts[:-1]} == whole, "no fact stands within a sentence"


def test_what_cannot_be_told_is_refused() -> None:
    with pytest.raises(ValueError, match="40 people need a vocabulary of 246 ids: got 200"):
        Worlds(people=40).cases(0, vocab_size=VOCAB)
    with pytest.raises(ValueError, match="hops must be 1, 2 or None: got 3"):
        Worlds(hops=3).cases(0, vocab_size=VOCAB)
