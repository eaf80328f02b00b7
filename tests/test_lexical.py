"""Keys from text alone: the same everywhere, of length 1, close where texts share words."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcode.memories.lexical import features_of, text_key

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60).filter(lambda text: text.strip())
WORDS = "red green blue one two three north south east west up down in out left right".split()


def sentence(rng: np.random.Generator, words: int = 12) -> str:
    return " ".join(rng.choice(WORDS, words))


@settings(max_examples=100, deadline=None)
@given(TEXT, st.sampled_from([1, 7, 64, 256]))
def test_a_key_has_length_one_and_depends_on_the_text_alone(text: str, dim: int) -> None:
    key = text_key(text, dim)
    assert key.dtype == np.float32 and key.shape == (dim,)
    assert abs(np.linalg.norm(key) - 1) < 1e-6
    assert (key == text_key(f"  {text}\n", dim)).all()


def test_keys_are_pinned() -> None:
    """Saved keys must mean the same for ever: a change of the hash is a change of the file format."""
    key = text_key("This is important information to remember", 256)
    assert np.flatnonzero(key)[:5].tolist() == [7, 19, 27, 36, 38]
    assert np.sign(key[[7, 19, 27, 36, 38]]).tolist() == [1, 1, 1, 1, -1]


def test_the_score_estimates_the_share_of_features_in_common() -> None:
    rng = np.random.default_rng(0)
    differences = []
    for _ in range(200):
        one, other = sentence(rng), sentence(rng)
        first, second = features_of(one), features_of(other)
        cosine = len(np.intersect1d(first, second)) / np.sqrt(len(first) * len(second))
        differences.append(float(text_key(one, 256) @ text_key(other, 256)) - cosine)
    assert abs(np.mean(differences)) < 0.02 and np.std(differences) < 0.1


def test_half_a_sentence_finds_the_whole() -> None:
    rng = np.random.default_rng(1)
    sentences = [sentence(rng) for _ in range(500)]
    keys = np.stack([text_key(one, 256) for one in sentences])
    asked = np.stack([text_key(" ".join(one.split()[:6]), 256) for one in sentences])
    assert ((asked @ keys.T).argmax(1) == np.arange(500)).mean() > 0.95


def test_the_order_of_words_counts() -> None:
    assert (text_key("dog bites man", 256) != text_key("man bites dog", 256)).any()


@pytest.mark.parametrize("text", ["", " \n\t", "\u2028"])
def test_white_space_has_no_key(text: str) -> None:
    with pytest.raises(ValueError, match="must hold more than white space"):
        text_key(text, 256)
