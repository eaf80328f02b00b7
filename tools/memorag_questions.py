"""python tools/memorag_questions.py QUESTIONS.jsonl.gz [--backbone FOLDER] [--questions N] [--store N]

Are the passages that answer questions found? Each line of the file has a question and its gold passage (`ctxs` with
`isgold`), as in the sets of Liu et al. ("Lost in the Middle", TACL 2024). All gold passages of the first `--store` lines are
stored; for each of the first `--questions` questions, its own is looked for by the question, as `query_memory` does, and by
BM25 (rank_bm25, on the same passages; lower case, words). With a backbone also by the cosine of mean last hidden states, by
clues that the model writes with the compressed passages as its memory (recipe memorag), and by question and clues together.
With `--answers N` the first N questions are answered, too: by the model alone, with the compressed memory, with the passages
that the question found, and with the gold passage. An answer is right if one of the set's is in it (lower case, without
punctuation and articles), the measure of those authors. Nothing here is random.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rank_bm25 import BM25Okapi

from lmcode import LMCODE, LMCODEConfig, MemoryConfig, dist
from lmcode.opening import open_model
from lmcode.recipes.memorag import answers_to, clues_for, fused

SMALLEST = LMCODEConfig(vocab_size=258, hidden_size=16, num_layers=1, num_heads=1, memory_head_dim=8, context_length=128)
AT = (1, 5)
BATCH = 16  # questions about which clues or answers are written at the same time
ANSWER_TOKENS = 24


def read(path: Path, count: int) -> tuple[list[str], list[str], list[list[str]]]:
    """Questions, their gold passages, as far as passages are distinct, and their answers."""
    questions, passages, answers = [], [], []
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            gold = next(one for one in row["ctxs"] if one["isgold"])
            passage = f"{gold['title']}. {gold['text']}"
            if passage not in passages and len(passages) < count:
                questions.append(row["question"])
                passages.append(passage)
                answers.append(row["answers"])
    return questions, passages, answers


def tell(name: str, found: list[list[str]], passages: list[str], seconds: float) -> None:
    shares = [sum(own in best[:k] for own, best in zip(passages, found, strict=False)) / len(found) for k in AT]
    print(f"{name:<28}" + "".join(f"  {share:7.1%} at {k}" for k, share in zip(AT, shares, strict=True))
          + f"  {seconds / len(found) * 1e3:8.1f} ms a question", flush=True)


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def embedding(model: object, text: str) -> torch.Tensor:
    """The mean of the last hidden states of a text, normalised: [C]."""
    ids = torch.tensor([model.tokenizer.encode(text)])  # type: ignore[attr-defined]
    with torch.no_grad(), model.reading_from({}):  # type: ignore[attr-defined]
        hidden = model.backbone.base_model(input_ids=ids).last_hidden_state[0].float().mean(0)  # type: ignore[attr-defined]
    return torch.nn.functional.normalize(hidden, dim=0)


def plain(text: str) -> str:
    """Lower case, without articles and punctuation: what answers are compared as."""
    return " ".join(word for word in words(text) if word not in ("a", "an", "the"))


def tell_answers(model: object, questions: list[str], answers: list[list[str]], gold: list[str],
                 found: list[list[str]]) -> None:
    """How many questions are answered, by what is read before them."""
    nothing: list[list[str]] = [[] for _ in questions]
    ways = {"the model alone": (False, nothing), "compressed memory": (True, nothing),
            "first passage found": (False, [best[:1] for best in found]),
            "three passages found": (False, [best[:3] for best in found]), "gold passage": (False, [[one] for one in gold])}
    for name, (memory, told) in ways.items():
        started, right = time.perf_counter(), 0
        with contextlib.nullcontext() if memory else model.reading_from({}):  # type: ignore[attr-defined]
            for start in range(0, len(questions), BATCH):
                part = slice(start, start + BATCH)
                written = answers_to(model, questions[part], told[part], new=ANSWER_TOKENS)
                right += sum(any(f" {plain(one)} " in f" {plain(answer)} " for one in known)
                             for answer, known in zip(written, answers[part], strict=False))
        print(f"answered with {name:<24}  {right / len(questions):7.1%}  {time.perf_counter() - started:6.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--backbone", help="folder of a transformers model")
    parser.add_argument("--questions", type=int, default=10**6)
    parser.add_argument("--store", type=int, default=10**6)
    parser.add_argument("--clue-tokens", type=int, default=32, help="0 writes no clues")
    parser.add_argument("--answers", type=int, default=0, help="questions to be answered with the backbone")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the backbone (%(default)s)")
    arguments = parser.parse_args()
    questions, passages, answers = read(arguments.file, arguments.store)
    asked = questions[:arguments.questions]
    print(f"{len(passages):,} passages stored, {len(asked):,} questions")
    if arguments.backbone:
        model = open_model(arguments.backbone, ["model.recipe=memorag", f"memory.experience_slots={8 * len(passages)}",
                                                f"model.long_term_memory_slots={128 * len(passages)}"]).model
        model.backbone.to(getattr(torch, arguments.dtype))
    else:
        model = LMCODE(SMALLEST, memory=MemoryConfig(experience_slots=8 * len(passages)), group=dist.Group())
    started = time.perf_counter()
    model.store_experience(passages)
    print(f"stored in {time.perf_counter() - started:.0f} s", flush=True)
    bm25 = BM25Okapi([words(passage) for passage in passages])
    ways: dict[str, Callable[[str], list[str]]] = {
        "question": lambda question: [one.text for one in model.query_memory(question, top_k=max(AT))[0]],
        "BM25": lambda question: bm25.get_top_n(words(question), passages, n=max(AT))}
    if arguments.backbone:
        table = torch.stack([embedding(model, passage) for passage in passages])
        ways["embedding"] = lambda question: [passages[place] for place in
                                              (table @ embedding(model, question)).topk(max(AT)).indices.tolist()]
        started, clues = time.perf_counter(), dict.fromkeys(asked, ())
        for start in range(0, len(asked) if arguments.clue_tokens else 0, BATCH):
            part = asked[start:start + BATCH]
            clues.update(zip(part, clues_for(model, part, new=arguments.clue_tokens), strict=True))
        print(f"clues written in {time.perf_counter() - started:.0f} s", flush=True)
        for question in asked[:3]:
            print(f"  {question!r}: {clues[question]}", flush=True)

        def looked_up(queries: tuple[str, ...]) -> list[str]:
            return [one.text for one in fused([model.query_memory(query, top_k=max(AT))[0] for query in queries])]

        if arguments.clue_tokens:
            ways["clues"] = lambda question: looked_up(clues[question])
            ways["both"] = lambda question: looked_up((question, *clues[question]))
    for name, way in ways.items():
        started = time.perf_counter()
        found = [way(question) for question in asked]
        tell(name, found, passages, time.perf_counter() - started)
        if name == "question" and arguments.backbone and (count := min(arguments.answers, len(asked))):
            tell_answers(model, asked[:count], answers, passages, found)


if __name__ == "__main__":
    main()
