"""Recipe memorag: compression against a loop, deletion of single documents, and questions that find stored passages."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lmcode.data.tokenizer import ByteTokenizer
from lmcode.dist import Group
from lmcode.memories.experiences import Retrieved
from lmcode.recipes.memorag import answers_to, ask, clues_for, compress, fused
from lmcode.recipes.recipe import Left
from tests.helpers.ranks import run_on_ranks
from tests.helpers.recipe_models import attached

DOCUMENTS = ["The harbour of Olden freezes in January.", "Marta keeps nine grey geese behind the mill.",
             "The night train to Varn leaves from platform four."]
QUESTION = "When does the train to Varn leave, and from which platform?"


def model_with(documents: list[str], *, group: Group | None = None) -> Any:
    model = attached("llama", "memorag", group=group, ratio=4)
    model.lmcode.tokenizer = ByteTokenizer()
    model.lmcode.store_experience(documents, namespace="docs", stored_at=1)
    return model


@pytest.mark.parametrize("ratio", [1, 3, 8, 16])
def test_groups_are_means_of_their_valid_tokens(ratio: int) -> None:
    torch.manual_seed(ratio)
    key, value, surprise = torch.randn(2, 3, 11, 4), torch.randn(2, 3, 11, 4), torch.rand(2, 11)
    valid = torch.arange(11) < torch.tensor([[11], [5]])
    made = compress(Left(key, value, surprise, valid), ratio)
    for row in range(2):
        tokens = [token for token in range(11) if valid[row, token]]
        groups = [tokens[start:start + ratio] for start in range(0, len(tokens), ratio)]
        assert made.valid_BT[row].tolist() == [place < len(groups) for place in range(-(-11 // ratio))]
        for place, group in enumerate(groups):
            torch.testing.assert_close(made.key_BHTD[row, :, place], key[row, :, group].mean(1))
            torch.testing.assert_close(made.value_BHTD[row, :, place], value[row, :, group].mean(1))
            torch.testing.assert_close(made.surprise_BT[row, place], surprise[row, group].mean())


def test_a_document_that_is_deleted_leaves_what_was_never_told_of_it_would() -> None:
    model = model_with(DOCUMENTS)
    entries = {layer: bank.stats()["live"] for layer, bank in model.lmcode.banks.items()}
    expected = sum(-(-len(text.encode()) // 4) for text in DOCUMENTS)
    assert all(abs(live - expected) <= len(DOCUMENTS) for live in entries.values()), "one entry for every four bytes"
    found, _ = model.lmcode.query_memory(DOCUMENTS[1], top_k=1, namespace="docs")
    gone = model.lmcode.delete_experiences(ids=[found[0].id])
    assert gone.experiences == 1
    others = model_with([DOCUMENTS[0], DOCUMENTS[2]])
    for layer, bank in model.lmcode.banks.items():
        values = [bank.state(shard)["value"][:, bank.state(shard)["id"] >= 0] for shard in bank.owned]
        wanted = [others.lmcode.banks[layer].state(shard)["value"][:, others.lmcode.banks[layer].state(shard)["id"] >= 0]
                  for shard in bank.owned]
        norms = [torch.cat(one, dim=1).norm(dim=(0, 2)).sort().values for one in (values, wanted)]
        torch.testing.assert_close(*norms)
    assert DOCUMENTS[1] not in [passage.text for passage in ask(model, "Marta's grey geese", namespace="docs",
                                                                answer_tokens=0).passages]


def test_lists_are_joined_by_reciprocal_ranks() -> None:
    made = {id: Retrieved("t", 0.5, id, (1,), 0, 1.0, 0) for id in range(4)}
    lists = [[made[0], made[1], made[2]], [made[2], made[3]], [made[3]]]
    assert [one.id for one in fused(lists)] == [3, 2, 0, 1]
    assert fused(lists)[0].score == pytest.approx(1 / 62 + 1 / 61)


def test_clues_are_lines_with_letters_and_do_not_depend_on_other_questions() -> None:
    model = model_with(DOCUMENTS)
    questions = [QUESTION, "Geese?"]
    together = clues_for(model, questions, namespace="docs", new=24)
    assert together == [clues_for(model, [one], namespace="docs", new=24)[0] for one in questions]
    told = {0: "Olden\n2. 3.\n - 4. Varn\nVarn\n12\n", 1: "\n\n"}
    model.lmcode.generate = lambda rows, **_: torch.tensor([[*row, *told[at].ljust(32).encode()][-32:]
                                                            for at, row in enumerate(rows)])
    assert clues_for(model, questions, new=32) == [("Olden", "Varn"), ()]


def test_what_cannot_be_asked_is_refused() -> None:
    model = model_with(DOCUMENTS[:1])
    with pytest.raises(ValueError, match="a question must have words"):
        ask(model, "  ")
    with pytest.raises(ValueError, match="search must be one of question, clues, both: got 'all'"):
        ask(model, QUESTION, search="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nothing is stored"):
        ask(model, QUESTION, namespace="elsewhere", search="question")


def _answers() -> list[tuple[tuple[str, ...], list[str], str]]:
    model = model_with(DOCUMENTS, group=Group.world())
    made = [ask(model, QUESTION, namespace="docs", top_k=2, search=search, clue_tokens=6, answer_tokens=4)
            for search in ("question", "both")]
    return [(one.clues, [passage.text for passage in one.passages], one.text) for one in made]


def test_a_question_finds_its_passage_on_any_number_of_ranks() -> None:
    alone, (one, other) = _answers(), run_on_ranks(_answers, 2)
    assert alone == one == other
    assert alone[0][0] == () and alone[0][1][0] == DOCUMENTS[2]


def test_answers_of_a_batch_are_those_of_each_question_alone() -> None:
    model = model_with(DOCUMENTS)
    questions, told = [QUESTION, "What?"], [DOCUMENTS[:2], []]
    alone = [answers_to(model, [one], [passages], namespace="docs", new=6)[0]
             for one, passages in zip(questions, told, strict=True)]
    assert answers_to(model, questions, told, namespace="docs", new=6) == alone and alone[0] != alone[1]
