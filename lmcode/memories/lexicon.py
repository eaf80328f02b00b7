"""Which stored texts say what is asked: BM25 over words and runs of letters, which weighs each by how rare it is.

After Robertson & Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond" (2009), with Lucene's constants. The one
thing to know: nothing here is saved. A rank's lexicon is made from the texts that it holds; how rare a term is is counted
over all ranks in whole numbers, and a text's score is summed up term by term, whatever texts lie beside it. So the answers
are the same on any number of ranks, after any save, load and reshard, and whatever is deleted counts no more.

Why not one of the libraries (bm25s, rank_bm25): they make an index once, of all texts, and can neither take one out nor
count over several.

Letters: E texts, T terms of a question, X terms of a part or their postings, as the line says.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from lmcode.memories.lexical import words_and_runs

SATURATION, LENGTH = 1.2, 0.75  # k1 and b
WEIGHTS = np.array([1.0, 0.2])  # of words and of runs of letters: in a word of usual length begin about five runs
DEAD = 0.25  # share of removed texts from which a part is made anew


class Question(NamedTuple):
    """The distinct terms of a text, ascending: uint64 [T]; how often each is there; which are runs of letters (1) and which
    words (0); how many words and runs there are in all, int64 [2]."""

    term_T: np.ndarray
    count_T: np.ndarray
    kind_T: np.ndarray
    length_2: np.ndarray


class Rarity(NamedTuple):
    """What is counted over texts, whole numbers, so that the sum over ranks is exact.

    texts: how many. length_2: their words and runs in all. found_T: how many of them have each term of a question.
    """

    texts: int
    length_2: np.ndarray
    found_T: np.ndarray


class Entry(NamedTuple):
    """A text to index. bonus: what is added to its score."""

    id: int
    text: str
    namespace: int
    bonus: float


class Part(NamedTuple):
    """Some texts, [E], and the postings of their terms, [X]: distinct terms ascending, where the postings of each begin (and
    the last end), and of each posting its text's place in [E] and how often the term is there."""

    id_E: np.ndarray
    namespace_E: np.ndarray
    bonus_E: np.ndarray
    length_E2: np.ndarray
    live_E: np.ndarray
    term_X: np.ndarray
    start_X: np.ndarray
    place_X: np.ndarray
    count_X: np.ndarray


def question_of(text: str) -> Question:
    """The terms of a text. ValueError for white space only, which has none."""
    kinds = words_and_runs(text)
    if not len(kinds[0]):
        raise ValueError(f"text must hold more than white space: got {text[:40]!r}")
    counted = [np.unique(units, return_counts=True) for units in kinds]
    term_T, count_T = (np.concatenate(parts) for parts in zip(*counted, strict=True))
    kind_T = np.repeat([0, 1], [len(terms) for terms, _ in counted])
    order_T = term_T.argsort()
    return Question(term_T[order_T], count_T[order_T], kind_T[order_T], np.array([len(units) for units in kinds]))


def summed(parts: Sequence[Rarity]) -> Rarity:
    """What several ranks have counted."""
    return Rarity(sum(one.texts for one in parts), np.sum([one.length_2 for one in parts], axis=0),
                  np.sum([one.found_T for one in parts], axis=0))


def gains(asked: Question, rarity: Rarity, at_X: np.ndarray, count_X: np.ndarray, length_X2: np.ndarray) -> np.ndarray:
    """What each posting adds to the score of its text, fp64 [X].

    Args:
        at_X: which term of the question it is of. length_X2: of its text.
    """
    rare_T = np.log1p((rarity.texts - rarity.found_T + 0.5) / (rarity.found_T + 0.5)) * WEIGHTS[asked.kind_T]
    kind_X = asked.kind_T[at_X]
    usual_2 = np.maximum(rarity.length_2, 1) / max(rarity.texts, 1)
    long_X = length_X2[np.arange(len(at_X)), kind_X] / usual_2[kind_X]
    gain_X: np.ndarray = rare_T[at_X] * count_X / (count_X + SATURATION * (1 - LENGTH + LENGTH * long_X))
    return gain_X


class Lexicon:
    """The texts of one rank by their terms. Texts are added in parts, which are put together when they are as many as those
    before them: so each posting is moved a logarithmic number of times."""

    def __init__(self) -> None:
        self._parts: list[Part] = []

    def add(self, entries: Sequence[Entry]) -> None:
        """Indexes texts; their ids must be new."""
        if not entries:
            return
        self._parts.append(_part_of(entries))
        while len(self._parts) > 1 and len(self._parts[-2].id_E) <= len(self._parts[-1].id_E):
            self._parts[-2:] = [_together(self._parts[-2:])]

    def remove(self, ids: Collection[int]) -> None:
        """Takes out the texts with these ids, as far as they are here."""
        for number, part in enumerate(self._parts):
            part.live_E[np.isin(part.id_E, list(ids))] = False
            if (~part.live_E).mean() > DEAD:
                self._parts[number] = _together([part])
        self._parts = [part for part in self._parts if len(part.id_E)]

    def rarity(self, asked: Question, namespace: int | None) -> Rarity:
        """What is counted over the texts of this rank that are in a namespace, or over all."""
        texts, length_2, found_T = 0, np.zeros(2, np.int64), np.zeros(len(asked.term_T), np.int64)
        for part in self._parts:
            seen_E = _seen(part, namespace)
            at_X, posting_X = _postings(part, asked)
            texts += int(seen_E.sum())
            length_2 = length_2 + part.length_E2[seen_E].sum(axis=0)
            found_T = found_T + np.bincount(at_X[seen_E[part.place_X[posting_X]]], minlength=len(found_T))
        return Rarity(texts, length_2, found_T)

    def scores(self, asked: Question, rarity: Rarity, namespace: int | None) -> tuple[np.ndarray, np.ndarray]:
        """The ids of the texts in a namespace, or of all, and their scores: the share of what the question itself would
        score if it were stored, and the text's bonus. int64 and fp64 [E]."""
        one_T = np.arange(len(asked.term_T))
        whole_T = gains(asked, rarity, one_T, asked.count_T, np.repeat(asked.length_2[None], len(one_T), axis=0))
        whole = np.bincount(np.zeros_like(one_T), whole_T)[0]  # summed up in the same order as a text's
        ids, scores = [np.zeros(0, np.int64)], [np.zeros(0)]
        for part in self._parts:
            seen_E = _seen(part, namespace)
            at_X, posting_X = _postings(part, asked)
            place_X = part.place_X[posting_X]
            gain_X = gains(asked, rarity, at_X, part.count_X[posting_X], part.length_E2[place_X])
            score_E = np.bincount(place_X, gain_X, minlength=len(seen_E)) / whole + part.bonus_E
            ids.append(part.id_E[seen_E])
            scores.append(score_E[seen_E])
        return np.concatenate(ids), np.concatenate(scores)


def _seen(part: Part, namespace: int | None) -> np.ndarray:
    """Which texts of a part are looked at: bool [E]."""
    seen_E: np.ndarray = part.live_E if namespace is None else part.live_E & (part.namespace_E == namespace)
    return seen_E


def _postings(part: Part, asked: Question) -> tuple[np.ndarray, np.ndarray]:
    """The postings of a question's terms, in the order of the terms: which term each is of, and its number. [X] both."""
    at_T = np.searchsorted(part.term_X, asked.term_T).clip(max=len(part.term_X) - 1)
    known_T = np.flatnonzero(part.term_X[at_T] == asked.term_T)
    first_T, end_T = part.start_X[at_T[known_T]], part.start_X[at_T[known_T] + 1]
    return (np.repeat(known_T, end_T - first_T),
            np.concatenate([np.zeros(0, np.int64), *map(np.arange, first_T, end_T)]))


def _part_of(entries: Sequence[Entry]) -> Part:
    asked = [question_of(entry.text) for entry in entries]
    terms, counts = (np.concatenate(parts) for parts in zip(*((one.term_T, one.count_T) for one in asked), strict=True))
    return _sorted(np.array([entry.id for entry in entries]), np.array([entry.namespace for entry in entries]),
                   np.array([entry.bonus for entry in entries]), np.stack([one.length_2 for one in asked]), terms,
                   np.repeat(np.arange(len(asked)), [len(one.term_T) for one in asked]), counts)


def _together(parts: Sequence[Part]) -> Part:
    """Several parts as one, without the texts that were removed."""
    id_E, namespace_E, bonus_E, length_E2 = (np.concatenate([getattr(part, name)[part.live_E] for part in parts])
                                             for name in ("id_E", "namespace_E", "bonus_E", "length_E2"))
    terms, places, counts, before = [], [], [], 0
    for part in parts:
        live_X = part.live_E[part.place_X]
        terms.append(np.repeat(part.term_X, np.diff(part.start_X))[live_X])
        places.append((part.live_E.cumsum() - 1 + before)[part.place_X[live_X]])
        counts.append(part.count_X[live_X])
        before += int(part.live_E.sum())
    return _sorted(id_E, namespace_E, bonus_E, length_E2,
                   *(np.concatenate(postings) for postings in (terms, places, counts)))


def _sorted(id_E: np.ndarray, namespace_E: np.ndarray, bonus_E: np.ndarray, length_E2: np.ndarray, term_X: np.ndarray,
            place_X: np.ndarray, count_X: np.ndarray) -> Part:
    """A part, given its postings in any order."""
    order_X = term_X.argsort(kind="stable")
    distinct, first = np.unique(term_X[order_X], return_index=True)
    return Part(id_E, namespace_E, bonus_E, length_E2, np.ones(len(id_E), bool), distinct, np.append(first, len(term_X)),
                place_X[order_X].astype(np.int32), count_X[order_X].astype(np.int32))
