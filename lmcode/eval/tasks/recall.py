"""Key-value recall: pairs of random tokens, a stretch of others, and the keys again (MQAR; Arora et al. 2023, "Zoology").

With a stretch that is longer than a window, only a memory can know the answers; guessing is right in one case of as many as
there are ids for values. Where keys are given a second value, the last one is right.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from lmcode.eval.tasks.task import Case, Prediction, exact


@dataclass(frozen=True)
class KeyValueRecall:
    """How many cases, how many pairs each has, how many tokens lie between the pairs and the questions, how many of the keys
    are asked for, how many are given another value after all have one, and how many pairs are read once more after another
    `between_readings` tokens. Up to `jitter` tokens more, drawn for each case, lie before the questions, so that they stand
    anywhere in a window."""

    count: int = 64
    pairs: int = 16
    between: int = 256
    questions: int = 1
    again: int = 0
    rehearsed: int = 0
    between_readings: int = 0
    jitter: int = 0

    def cases(self, seed: int, *, vocab_size: int) -> list[Case]:
        """Keys, values and what lies between are of three different parts of the vocabulary.

        Raises:
            ValueError: for a vocabulary with too few ids for the keys.
        """
        third = vocab_size // 3
        if third < self.pairs:
            raise ValueError(f"{self.pairs} keys need a vocabulary of {3 * self.pairs} ids: got {vocab_size}")
        draw = random.Random(seed)
        return [self._case(draw, third) for _ in range(self.count)]

    def _case(self, draw: random.Random, third: int) -> Case:
        keys = draw.sample(range(third), self.pairs)
        given = [(key, draw.randrange(third, 2 * third)) for key in [*keys, *draw.sample(keys, self.again)]]
        last = dict(given)
        # Asked are those with a second value, if there are any.
        asked = draw.sample([key for key, _ in given[self.pairs:]] or keys, min(self.questions, self.again or self.pairs))
        between, pause = ([draw.randrange(2 * third, 3 * third) for _ in range(length)]
                          for length in (self.between + draw.randrange(self.jitter + 1), self.between_readings))
        first, *more = [((key,), (last[key],)) for key in asked]
        again = draw.sample(given, self.rehearsed)
        read = [*(token for pair in given for token in pair), *pause, *(token for pair in again for token in pair)]
        return Case((*read, *between), *first, tuple(more))

    def metric(self, case: Case, answer: Prediction) -> float:
        return exact(case, answer)
