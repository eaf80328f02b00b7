"""Stored texts by their words: BM25 as it is defined, the same however texts came, went and are spread over ranks."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcode.memories.lexical import words_and_runs
from lmcode.memories.lexicon import LENGTH, SATURATION, WEIGHTS, Entry, Lexicon, Question, question_of, summed

WORDS = "red green blue one two three north south east west up down in out left right a".split()
TEXT = st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map(" ".join)


def scored(lexicon: Lexicon, asked: Question, namespace: int | None = None) -> dict[int, float]:
    ids, scores = lexicon.scores(asked, lexicon.rarity(asked, namespace), namespace)
    return dict(zip(ids.tolist(), scores.tolist(), strict=True))


def entries(texts: list[str], *, first: int = 0) -> list[Entry]:
    return [Entry(id, text, id % 2, 0.25 * (id % 3)) for id, text in enumerate(texts, start=first)]


def by_hand(query: str, texts: list[str]) -> list[float]:
    """The score of each text, as the formula says it, over dicts."""
    def total(text: str) -> float:
        amount = 0.0
        for kind, weight in enumerate(WEIGHTS):
            known = [Counter(words_and_runs(one)[kind].tolist()) for one in texts]
            mean = sum(counts.total() for counts in known) / len(known)
            counts = Counter(words_and_runs(text)[kind].tolist())
            for term in {*words_and_runs(query)[kind].tolist()}:
                found = sum(term in one for one in known)
                rarity = math.log(1 + (len(texts) - found + 0.5) / (found + 0.5))
                amount += weight * rarity * counts[term] / (
                    counts[term] + SATURATION * (1 - LENGTH + LENGTH * counts.total() / max(mean, 1 / len(texts))))
        return amount

    return [total(text) / total(query) for text in texts]


@settings(max_examples=50, deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=8), TEXT)
def test_scores_are_those_of_the_formula(texts: list[str], query: str) -> None:
    lexicon = Lexicon()
    lexicon.add([Entry(id, text, 0, 0.0) for id, text in enumerate(texts)])
    found = scored(lexicon, question_of(query))
    np.testing.assert_allclose([found[id] for id in range(len(texts))], by_hand(query, texts), rtol=1e-9)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.lists(TEXT, max_size=4), st.sets(st.integers(0, 30), max_size=6)), max_size=8), TEXT)
def test_what_came_and_went_leaves_no_trace(steps: list[tuple[list[str], set[int]]], query: str) -> None:
    """To the bit, also over two ranks, as a lexicon that was made at once of what is left."""
    grown, ranks, live, first = Lexicon(), (Lexicon(), Lexicon()), {}, 0
    for texts, gone in steps:
        new = entries(texts, first=first)
        live.update({one.id: one for one in new})
        first += len(new)
        grown.add(new)
        for rank, lexicon in enumerate(ranks):
            lexicon.add([one for one in new if one.id % 3 % 2 == rank])
        for lexicon in (grown, *ranks):
            lexicon.remove(gone)
        live = {id: one for id, one in live.items() if id not in gone}
    fresh, asked = Lexicon(), question_of(query)
    fresh.add(list(live.values()))
    for namespace in (None, 0, 1):
        wanted = scored(fresh, asked, namespace)
        assert set(wanted) == {id for id, one in live.items() if namespace in (None, one.namespace)}
        assert scored(grown, asked, namespace) == wanted
        rarity = summed([one.rarity(asked, namespace) for one in ranks])
        spread = [lexicon.scores(asked, rarity, namespace) for lexicon in ranks]
        assert {id: score for part in spread for id, score in zip(*map(list, part), strict=True)} == wanted


def test_postings_of_removed_texts_are_given_back() -> None:
    lexicon = Lexicon()
    for start in range(0, 64, 8):
        lexicon.add(entries([f"text {number} of many" for number in range(start, start + 8)], first=start))
    assert len(lexicon._parts) == 1, "parts of one size are put together"
    lexicon.remove(range(40))
    assert [len(part.id_E) for part in lexicon._parts] == [24]
    lexicon.remove(range(64))
    assert lexicon._parts == [] and scored(lexicon, question_of("text")) == {}


def test_a_text_itself_scores_one_and_what_shares_nothing_none() -> None:
    lexicon = Lexicon()
    lexicon.add([Entry(0, "The key is under the mat", 0, 0.0), Entry(1, "Nobody knows", 0, 0.0), Entry(2, "a", 0, 0.0)])
    assert scored(lexicon, question_of("the KEY is under the mat")) == {0: 1.0, 1: 0.0, 2: 0.0}


def test_rare_words_weigh_most() -> None:
    lexicon = Lexicon()
    lexicon.add([Entry(0, "who got the part of the king in the play", 0, 0.0),
                 Entry(1, "a prize was given to Curie", 0, 0.0),
                 *(Entry(id, f"who got the part number {id} in the play", 0, 0.0) for id in range(2, 9))])
    found = scored(lexicon, question_of("who got the prize in the end"))
    assert max(found, key=lambda id: found[id]) == 1


def test_a_question_must_have_words() -> None:
    with pytest.raises(ValueError, match="must hold more than white space"):
        question_of(" \n")
