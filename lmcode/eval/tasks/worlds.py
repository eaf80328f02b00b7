"""Worlds: people go somewhere and take things, told among other sentences; asked is where a person is (one hop), or where a
thing is (two: who has it, and where that person is). Simulated facts as in bAbI (Weston et al. 2015), among text as in
BABILong (Kuratov et al. 2024).

Names are drawn for each case, so nothing can be learned by heart; a guess is right in one of as many cases as places.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lmcode.eval.tasks.task import Case, Ids, Prediction, exact


@dataclass(frozen=True)
class Worlds:
    """How many cases, people (each takes one thing), how many of these go somewhere again, which makes only the last place
    right, and tokens of other sentences, up to `jitter` more, drawn for each case.

    hops: 1, 2, or for each question either: None. aloud: the answer to two hops says who has it first.
    sentences: those of a vocabulary of so many ids, to tell the facts among; None: of random ids.
    """

    count: int = 16
    people: int = 8
    again: int = 0
    length: int = 1024
    jitter: int = 0
    hops: int | None = 2
    aloud: bool = False
    sentences: Callable[[int], Sequence[Ids]] | None = None

    def cases(self, seed: int, *, vocab_size: int) -> list[Case]:
        """Other sentences are of the lower half of the vocabulary; facts of the upper one: people, things, places, and the
        words went, took and where. Asked for are all, or those who went somewhere again, if anybody did.

        Raises:
            ValueError: for a vocabulary with too few ids for the people, or another number of hops.
        """
        if self.hops not in (1, 2, None):
            raise ValueError(f"hops must be 1, 2 or None: got {self.hops}")
        third = (vocab_size - vocab_size // 2 - 3) // 3
        if third < self.people:
            raise ValueError(f"{self.people} people need a vocabulary of {2 * (3 * self.people + 3)} ids: got {vocab_size}")
        draw, told = random.Random(seed), None if self.sentences is None else self.sentences(vocab_size // 2)
        return [self._case(draw, vocab_size, third, told) for _ in range(self.count)]

    def _case(self, draw: random.Random, vocab_size: int, third: int, told: Sequence[Ids] | None) -> Case:
        half, (went, took, where) = vocab_size // 2, range(vocab_size - 3, vocab_size)
        people, things = (draw.sample(range(start, start + third), self.people) for start in (half, half + third))
        again = draw.sample(people, self.again)
        takes: list[tuple[int, int | None]] = [*zip(people, things, strict=True)]
        events = [*takes, *((person, None) for person in [*people, *again])]
        facts: list[Ids] = []
        place: dict[int, int] = {}
        for person, thing in draw.sample(events, len(events)):
            if thing is None:
                place[person] = half + 2 * third + draw.randrange(third)
                facts.append((went, person, place[person]))
            else:
                facts.append((took, thing, person))
        asked: list[tuple[Ids, Ids]] = []
        for person, thing in zip(people, things, strict=True):
            if person in (again or people):
                one = (self.hops or draw.choice((1, 2))) == 1
                said = (person, place[person]) if self.aloud and not one else (place[person],)
                asked.append(((where, person if one else thing), said))
        first, *more = draw.sample(asked, len(asked))
        return Case(self._among(facts, draw, half, told), *first, tuple(more))

    def _among(self, facts: Sequence[Ids], draw: random.Random, half: int, told: Sequence[Ids] | None) -> Ids:
        """The facts, in their order, among other sentences."""
        others: list[Ids] = []
        left = self.length + draw.randrange(self.jitter + 1)
        while left > 0:
            others.append((draw.choice(told) if told else tuple(draw.randrange(half) for _ in range(8)))[:left])
            left -= len(others[-1])
        places = sorted(draw.randrange(len(others) + 1) for _ in facts)
        text = [*((at, 0, fact) for at, fact in zip(places, facts, strict=True)),
                *((at, 1, other) for at, other in enumerate(others))]
        return tuple(token for _, _, sentence in sorted(text, key=lambda one: one[:2]) for token in sentence)

    def metric(self, case: Case, answer: Prediction) -> float:
        return exact(case, answer)
