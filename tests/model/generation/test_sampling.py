"""Sampling stays inside what was asked for, and settings out of range are refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmcode.model.generation.sampling import (
    DEFAULT_NEW_TOKENS,
    Decoding,
    completions,
    forbid_repeats,
    next_token,
    penalise_repetition,
)

ROWS = st.lists(st.integers(0, 3), min_size=1, max_size=12)


@given(st.integers(0, 2**31), st.integers(0, 12), st.floats(0.05, 1.0), st.floats(0.1, 3.0))
def test_draws_come_from_the_top_k_and_the_nucleus(seed: int, top_k: int, top_p: float, temperature: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_BV = torch.randn(3, 10, generator=generator)
    drawn_B = next_token(logits_BV, [[]] * 3, Decoding(temperature=temperature, top_k=top_k, top_p=top_p), generator)
    for logits_V, drawn in zip(logits_BV / temperature, drawn_B.tolist(), strict=True):
        order = logits_V.argsort(descending=True)[:top_k or None]
        probability = logits_V[order].softmax(0)
        needed = int((probability.cumsum(0) - probability < top_p + 1e-6).sum())
        assert drawn in order[:needed].tolist()


def test_draws_have_the_probabilities_of_what_is_left() -> None:
    logits_V, generator = torch.tensor([2.0, 0.0, 1.0, -1.0]), torch.Generator().manual_seed(0)
    for decoding, kept in ((Decoding(temperature=2.0, top_k=0, top_p=1.0), [0, 1, 2, 3]),
                           (Decoding(temperature=2.0, top_k=3, top_p=1.0), [0, 1, 2]),
                           (Decoding(temperature=2.0, top_k=3, top_p=0.8), [0, 2])):
        drawn_N = next_token(logits_V.expand(20000, -1), [[]] * 20000, decoding, generator)
        expected_V = torch.zeros(4)
        expected_V[kept] = (logits_V[kept] / 2).softmax(0)
        torch.testing.assert_close(drawn_N.bincount(minlength=4) / 20000, expected_V, rtol=0, atol=0.015)


def test_temperature_zero_takes_the_most_likely() -> None:
    logits_BV = torch.randn(5, 9)
    assert torch.equal(next_token(logits_BV, [[]] * 5, Decoding(temperature=0)), logits_BV.argmax(-1))


@given(ROWS, st.floats(0.5, 3.0))
def test_the_penalty_moves_tokens_that_are_there_and_no_others(row: list[int], penalty: float) -> None:
    logits_BV = torch.randn(1, 6)
    moved_V, logits_V = penalise_repetition(logits_BV, [row], penalty)[0], logits_BV[0]
    for token in range(6):
        scale = (1 / penalty if logits_V[token] > 0 else penalty) if token in row else 1.0
        assert float(moved_V[token]) == pytest.approx(float(logits_V[token]) * scale, rel=1e-5)


@given(ROWS, st.integers(1, 4))
def test_only_tokens_that_would_repeat_an_ngram_are_ruled_out(row: list[int], size: int) -> None:
    ngrams = [tuple(row[i:i + size]) for i in range(len(row) - size + 1)]
    expected = {token for token in range(5) if len(row) >= size - 1
                and tuple([*row, token][len(row) + 1 - size:]) in ngrams}
    assert completions(row, size) == expected
    assert set(forbid_repeats(torch.zeros(1, 5), [row], size)[0].isinf().nonzero().flatten().tolist()) == expected


def test_when_no_token_is_left_it_says_so() -> None:
    with pytest.raises(ValueError, match="no_repeat_ngram_size=1 leaves no token: a row holds all 3"):
        next_token(torch.zeros(1, 3), [[0, 1, 2]], Decoding(no_repeat_ngram_size=1))


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0},
                                 {"top_p": 1.5}, {"repetition_penalty": 0}, {"repetition_penalty": float("inf")},
                                 {"no_repeat_ngram_size": -1}, {"max_new_tokens": 0}])
def test_settings_out_of_range_are_refused(bad: dict) -> None:
    (name, value), = bad.items()
    with pytest.raises(ValueError, match=f"{name} must be .*: got {value}"):
        Decoding(**bad)


def test_the_length_is_given_one_way() -> None:
    assert Decoding(max_length=12).num_new_tokens(10) == 2
    assert Decoding(max_new_tokens=3).num_new_tokens(10) == 3
    assert Decoding().num_new_tokens(10) == DEFAULT_NEW_TOKENS
    with pytest.raises(ValueError, match="not both: got 5 and 6"):
        Decoding(max_length=5, max_new_tokens=6)
    with pytest.raises(ValueError, match="must exceed its length: got max_length=10 for 10 tokens"):
        Decoding(max_length=10).num_new_tokens(10)
