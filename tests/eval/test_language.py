"""Losses by position and of returning words, against a slow and obvious account of the same tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lmcode.data.dataset import MemoryDataset
from lmcode.eval.language import EDGES, profile, returning, words_of
from tests.helpers.models import model_with

LENGTH = 16


def texts() -> list[list[int]]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(0, 40, (length,), generator=draw).tolist() for length in (90, 17, 300)]


def slowly(document: list[int], words: np.ndarray) -> list[bool]:
    found = []
    for place, token in enumerate(document):
        before = [at for at in range(place) if document[at] == token]
        found.append(bool(words[token]) and bool(before) and place - before[-1] > LENGTH)
    return found


def test_returning_words_are_those_last_seen_more_than_a_window_ago() -> None:
    words = np.arange(257) % 3 == 0
    for document in texts():
        assert returning(document, words, LENGTH).tolist() == slowly(document, words)


@pytest.mark.parametrize("streams", [1, 2])
def test_losses_are_shared_out_as_a_slow_count_does(streams: int) -> None:
    model, words = model_with(256), np.arange(257) % 3 == 0
    documents = MemoryDataset(texts()).as_documents()
    found = profile(model, documents, words=words, streams=streams, length=LENGTH, windows=100)
    expected = [0] * (2 + len(EDGES) + 1)
    for document in texts():
        for place, back in enumerate(slowly(document, words)[1:], start=1):
            band = sum(place >= edge for edge in EDGES)
            expected[0] += 1
            expected[1] += back
            expected[2 + band] += 1
    assert list(found.tokens) == expected
    assert found.by_position[-1] is None and all(loss is not None for loss in found.by_position[:3])
    whole = sum(loss * count for loss, count in zip(found.by_position, found.tokens[2:], strict=True) if loss is not None)
    assert whole / found.tokens[0] == pytest.approx(found.loss)
    off = profile(model, documents, words=words, streams=streams, length=LENGTH, windows=100, mode="off")
    assert off.tokens == found.tokens and off.loss != found.loss


def test_words_are_letters() -> None:
    assert words_of(["the", " name", "a", "__init__", "x1y", "...", "  ", "ab_c"]).tolist() == [
        True, True, False, True, False, False, False, True]
