"""Key-value recall: pairs of random tokens, a stretch of others, and one of the keys again (Arora et al. 2023, "Zoology").

With a stretch that is longer than a window, nothing but memory can know the answer; by chance it is right in one case of
as many as there are ids.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from lmcode.eval.tasks.task import Answer, Case, exact


@dataclass(frozen=True)
class KeyValueRecall:
    """How many cases, how many pairs each has, and how many tokens lie between the pairs and the question."""

    count: int = 64
    pairs: int = 16
    between: int = 256

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
        values = [draw.randrange(third, 2 * third) for _ in keys]
        asked = draw.randrange(self.pairs)
        pairs = [token for pair in zip(keys, values, strict=True) for token in pair]
        between = [draw.randrange(2 * third, 3 * third) for _ in range(self.between)]
        return Case((*pairs, *between), (keys[asked],), (values[asked],))

    def metric(self, case: Case, answer: Answer) -> float:
        return exact(case, answer)
