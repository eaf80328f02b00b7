"""Needles: names of several tokens and what they stand for, of several tokens too, somewhere in a long text of random
tokens; asked for at its end (the uuid task of "Lost in the Middle", Liu et al. 2023).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from lmcode.eval.tasks.task import Case, Prediction, exact


@dataclass(frozen=True)
class Needles:
    """How many cases, needles in each, tokens of the text around them, and tokens of a name and of what it stands for.

    depth: where the needles stand, from 0, the text's start, to 1, its end; None: anywhere.
    """

    count: int = 32
    needles: int = 4
    length: int = 1024
    width: int = 4
    depth: float | None = None

    def cases(self, seed: int, *, vocab_size: int) -> list[Case]:
        """Needles are made of the upper half of the vocabulary, the text of the lower one. Every needle is asked for."""
        draw = random.Random(seed)
        return [self._case(draw, vocab_size // 2) for _ in range(self.count)]

    def _case(self, draw: random.Random, half: int) -> Case:
        needles = [tuple(draw.randrange(half, 2 * half) for _ in range(2 * self.width)) for _ in range(self.needles)]
        places = sorted(draw.randrange(self.length + 1) if self.depth is None else int(self.depth * self.length)
                        for _ in needles)
        context: list[int] = []
        for start, end, needle in zip([0, *places], [*places, self.length], [*needles, ()], strict=True):
            context += [*(draw.randrange(half) for _ in range(end - start)), *needle]
        first, *more = [(needle[:self.width], needle[self.width:]) for needle in draw.sample(needles, self.needles)]
        return Case(tuple(context), *first, tuple(more))

    def metric(self, case: Case, answer: Prediction) -> float:
        return exact(case, answer)
