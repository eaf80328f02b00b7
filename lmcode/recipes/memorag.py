"""Recipe `memorag`: a compressed memory of every stored text, from which a model draws clues for what to look up.

After MemoRAG (Qian et al., "MemoRAG: Boosting Long Context Processing with Global Memory-Enhanced Retrieval Augmentation",
The Web Conference 2025). Nothing is trained. The one thing to know: a text is kept twice, in the banks as one key and value
for every `ratio` tokens, which any question may attend to, and word for word as an experience, which `ask` looks up.
README.md says what the paper does, what this does, and why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor, nn

from lmcode.memories.experiences import Namespace, Retrieved
from lmcode.protocol import Candidates
from lmcode.recipes import camelot
from lmcode.recipes.camelot import Camelot
from lmcode.recipes.recipe import Left, Pass

Search = Literal["question", "clues", "both"]
RANK_OFFSET = 60  # Cormack, Clarke & Büttcher, "Reciprocal Rank Fusion", SIGIR 2009: their constant
CLUES = "Question: {question}\nFacts that help to answer it:\n1."
ANSWER = "{passages}\n\nQuestion: {question}\nAnswer:"


class Options(camelot.Options):
    """Settings of this recipe beside those of `camelot`."""

    ratio: int = Field(8, ge=1, le=64, description="tokens of a text that become one entry")


class MemoRAG(Camelot):
    """Entries of `camelot`, each the mean of `ratio` neighbouring tokens. See the module."""

    Options = Options

    @staticmethod
    def settings(sizes: Any, options: Any) -> dict[str, Any]:
        """As `camelot`, without its bias: a mean of 8 keys stands for 8 tokens, whose logits together weigh log 8 = 2.1 more
        than one of them."""
        return {**Camelot.settings(sizes, options), "memory_bias": 0.0}

    def offered(self, layer: int, current: Pass, left: Left, known_BT: Tensor) -> Candidates:
        """What has left the row, compressed; the last of the groups may have fewer tokens."""
        return super().offered(layer, current, compress(left, self.options.ratio), known_BT)


def compress(left: Left, ratio: int) -> Left:
    """Means over groups of `ratio` neighbouring tokens, over those of them that are valid: T becomes ceil(T / ratio).

    Keys are those before rotation, so a mean does not depend on where its tokens stood.
    """
    T = left.valid_BT.shape[1]
    groups = -(-T // ratio)

    def mean(x_BXT: Tensor, valid_BXT: Tensor) -> Tensor:
        """Over the valid ones of the last dim."""
        padded, valid = (nn.functional.pad(one, (0, groups * ratio - T)).unflatten(-1, (groups, ratio))
                         for one in (x_BXT.where(valid_BXT, 0), valid_BXT.to(x_BXT.dtype)))
        made: Tensor = padded.sum(-1) / valid.sum(-1).clamp(min=1)
        return made

    def vectors(x_BHTD: Tensor) -> Tensor:
        return mean(x_BHTD.transpose(2, 3), left.valid_BT[:, None, None, :]).transpose(2, 3)

    valid_BT = nn.functional.pad(left.valid_BT, (0, groups * ratio - T)).unflatten(-1, (groups, ratio)).any(-1)
    return Left(vectors(left.key_BHTD), vectors(left.value_BHTD), mean(left.surprise_BT, left.valid_BT), valid_BT)


@dataclass(frozen=True)
class Consultation:
    """What came of a question.

    clues: lines that the model wrote with nothing but its compressed memory before it; none if they were not asked for.
    passages: stored texts, best first.
    text: the answer, written with the passages before the question; empty if it was not asked for.
    """

    clues: tuple[str, ...]
    passages: tuple[Retrieved, ...]
    text: str


@torch.no_grad()
def ask(model: Any, question: str, *, namespace: Namespace = 0, top_k: int = 5, search: Search = "question",
        clue_tokens: int = 48, answer_tokens: int = 48) -> Consultation:
    """Answers a question from what is stored in a namespace. Collective.

    Args:
        model: an attached model with a tokenizer, its texts stored by `store_experience`.
        top_k: passages to find.
        search: what to look up: the question, the clues, or both, whose lists are joined by reciprocal ranks. Clues of a
            small model made it worse: see README.md.
        answer_tokens: of the answer; 0 finds passages only.

    Raises:
        ValueError: for an empty question, another `search`, numbers out of range, a namespace under which nothing is stored.
    """
    if not question.strip():
        raise ValueError("a question must have words: got an empty one")
    if search not in get_args(Search):
        raise ValueError(f"search must be one of {', '.join(get_args(Search))}: got {search!r}")
    memory = getattr(model, "lmcode", model)
    clues = clues_for(memory, [question], namespace=namespace, new=clue_tokens)[0] if search != "question" else ()
    queries = {"question": (question,), "clues": clues, "both": (question, *clues)}[search]
    lists = [memory.query_memory(query, top_k=top_k, namespace=namespace)[0] for query in queries]
    passages = fused(lists)[:top_k]
    text = ""
    if answer_tokens:
        told = [passage.text for passage in passages]
        text, = answers_to(memory, [question], [told], namespace=namespace, new=answer_tokens)
    return Consultation(clues, passages, text)


@torch.no_grad()
def answers_to(model: Any, questions: Sequence[str], passages: Sequence[Sequence[str]], *, namespace: Namespace = 0,
               new: int = 48) -> list[str]:
    """The first line that a model writes behind each question with its passages before it. Collective; one batch.

    Args:
        passages: for each question, as many as there are to be read before it.
        new: tokens for each answer, of which it uses those of one line.
    """
    memory = getattr(model, "lmcode", model)
    prompts = [ANSWER.format(passages="\n\n".join(told), question=question)
               for question, told in zip(questions, passages, strict=True)]
    return [written.strip().split("\n")[0] for written in _written(memory, prompts, namespace, new)]


def fused(lists: Sequence[Sequence[Retrieved]]) -> tuple[Retrieved, ...]:
    """Several lists as one: scores are sums of 1 / (60 + rank), equal ones by id. See `RANK_OFFSET`."""
    score: dict[int, float] = {}
    by_id = {found.id: found for one in lists for found in one}
    for one in lists:
        for rank, found in enumerate(one, start=1):
            score[found.id] = score.get(found.id, 0.0) + 1 / (RANK_OFFSET + rank)
    return tuple(replace(by_id[id], score=score[id]) for id in sorted(score, key=lambda id: (-score[id], id)))


@torch.no_grad()
def clues_for(model: Any, questions: Sequence[str], *, namespace: Namespace = 0, new: int = 48) -> list[tuple[str, ...]]:
    """Lines that a model writes about each question with nothing but its compressed memory before it. Collective.

    A line has letters, and no number before it; none is there twice. The questions are one batch.

    Args:
        new: tokens for each question.
    """
    memory = getattr(model, "lmcode", model)
    clues = []
    for written in _written(memory, [CLUES.format(question=question) for question in questions], namespace, new):
        lines = (line.lstrip(" 0123456789.-*").strip() for line in written.split("\n"))
        clues.append(tuple(dict.fromkeys(line for line in lines if any(map(str.isalpha, line)))))
    return clues


def _written(memory: Any, prompts: Sequence[str], namespace: Namespace, new: int) -> list[str]:
    """What the model most likely writes behind each prompt."""
    rows = [memory.tokenizer.encode(prompt) for prompt in prompts]
    written_BT = memory.generate(rows, max_new_tokens=new, temperature=0.0, namespace=[namespace] * len(rows))
    return [memory.tokenizer.decode(row) for row in written_BT[:, written_BT.shape[1] - new:].tolist()]
