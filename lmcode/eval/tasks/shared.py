"""Shared knowledge: facts that some documents state and others are asked for, the task that needs one bank for all.

A fact is a subject, of several tokens, and what is said of it, one token. Who asks has read nothing itself, so with
`memory.scope=document`, or a memory of its own (`run_task(parts=...)`), an answer is right by chance only: in one case of as
many as there are objects.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from lmcode.eval.tasks.task import Case, Ids, Prediction, exact


@dataclass(frozen=True)
class SharedFacts:
    """How many facts there are, how many a document states or is asked for, and how many tokens a subject has.

    spread: a case is asked for what documents of another part of `parts` private memories have stated: parts must be this,
        or 1, or 2 where this is even.
    """

    facts: int = 1024
    per_text: int = 16
    subject: int = 1
    questions: int = 256
    spread: int = 2

    def stated(self, seed: int, *, vocab_size: int) -> list[Ids]:
        """Each fact once, and a token of neither kind: the last token of a document is read by nobody, so it is no entry."""
        return [(*(token for fact in part for token in fact), vocab_size - 1) for part in self._texts(seed, vocab_size)]

    def cases(self, seed: int, *, vocab_size: int) -> list[Case]:
        """Case i asks for facts of the texts that part i + 1 of the memories has read."""
        draw, texts, cases = random.Random(seed + 1), self._texts(seed, vocab_size), []
        for number in range(max(self.spread, self.questions // self.per_text)):
            known = [fact for text in texts[(number + 1) % self.spread::self.spread] for fact in text]
            first, *more = [(fact[:-1], fact[-1:]) for fact in draw.sample(known, min(self.per_text, len(known)))]
            cases.append(Case((), *first, tuple(more)))
        return cases

    def _texts(self, seed: int, vocab_size: int) -> list[list[Ids]]:
        third = vocab_size // 3  # as in `recall.py`: subjects of the first, objects of the second
        if self.facts > third**self.subject or self.facts < self.spread * self.per_text:
            raise ValueError(f"facts need subjects, here {third}^{self.subject}, and are at least {self.spread} x "
                             f"{self.per_text}: got {self.facts}")
        draw = random.Random(seed)
        subjects = draw.sample(range(third**self.subject), self.facts)
        facts = [(*(one // third**place % third for place in range(self.subject)), draw.randrange(third, 2 * third))
                 for one in subjects]
        return [facts[start:start + self.per_text] for start in range(0, self.facts, self.per_text)]

    def metric(self, case: Case, answer: Prediction) -> float:
        return exact(case, answer)
