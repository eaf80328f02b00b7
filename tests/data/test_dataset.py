"""Samples in memory: given back as they came, refused when they cannot be trained on; the synthetic language."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from lmcode.config import ConfigError
from lmcode.data.dataset import PHRASE_TOKENS, MemoryDataset, as_dataset, create_synthetic_dataset
from lmcode.data.streams import StreamSampler
from lmcode.data.tokenizer import ByteTokenizer

SAMPLES = st.lists(st.lists(st.integers(0, 999), min_size=2, max_size=20), min_size=1, max_size=8)


@settings(max_examples=40, deadline=None)
@given(samples=SAMPLES)
def test_samples_come_back_whatever_holds_them(samples: list[list[int]]) -> None:
    forms = [samples, [torch.tensor(one) for one in samples], [np.array(one, np.uint16) for one in samples]]
    made = [MemoryDataset(form) for form in forms]
    for dataset in made:
        assert [one.tolist() for one in (dataset[i] for i in range(len(dataset)))] == samples
        assert dataset[-1].dtype == torch.int64 and dataset[-1].tolist() == samples[-1]
        assert dataset.digest() == made[0].digest()
        assert (dataset.longest, dataset.largest_id) == (max(map(len, samples)), max(map(max, samples)))
        assert [dataset.as_documents().document(i).tolist() for i in range(len(dataset))] == samples
    assert MemoryDataset([*samples, [1, 2]]).digest() != made[0].digest()


def test_the_cut_between_samples_is_part_of_the_digest() -> None:
    assert MemoryDataset([[1, 2, 3], [4, 5]]).digest() != MemoryDataset([[1, 2], [3, 4, 5]]).digest()


def test_it_is_a_torch_dataset() -> None:
    dataset = MemoryDataset(create_synthetic_dataset(8, 10))
    assert isinstance(dataset, torch.utils.data.Dataset)
    assert torch.cat(list(DataLoader(dataset, batch_size=4))).equal(create_synthetic_dataset(8, 10))
    dataset[0].zero_()
    assert dataset[0].equal(create_synthetic_dataset(8, 10)[0])  # an item is a copy
    for index in (8, -9):
        with pytest.raises(IndexError, match=r"-8\.\.7"):
            dataset[index]


def test_texts_stand_between_end_marks() -> None:
    tokenizer = ByteTokenizer()
    dataset = MemoryDataset(["ab", "c"], tokenizer=tokenizer)
    assert dataset[0].tolist() == [256, 97, 98, 256] and tokenizer.decode(dataset[1].tolist()) == "c"


def test_streams_read_every_sample_once_an_epoch() -> None:
    dataset = MemoryDataset([[i, i + 100, i + 200] for i in range(7)])
    sampler = StreamSampler(dataset.as_documents(), streams=2, sequence_length=2, seed=0, epochs=1)
    firsts = [int(i) for step in range(sampler.num_steps) for i in sampler.batch(step).input_ids_BT[:, 0] if i < 7]
    assert sorted(set(firsts)) == list(range(7))


def test_a_dataset_is_taken_as_it_is() -> None:
    dataset = MemoryDataset([[1, 2]], 0.5)
    assert as_dataset(dataset, memory_sample_ratio=0.1) is dataset
    assert as_dataset([[1, 2]], memory_sample_ratio=0.1).memory_sample_ratio == 0.1


@pytest.mark.parametrize(("data", "match"), [
    ([], "at least one sample"), ([[1]], "sample 0 needs at least 2 tokens"), ([[1, 2], []], "sample 1 needs at least 2"),
    ([[1.0, 2.0]], "must be one-dimensional and of integers: got float64"),
    (torch.zeros(2, 3), "of integers: got float32"), (torch.ones(2, 3, dtype=torch.bool), "got bool"),
    (torch.ones(4, dtype=torch.int64), r"one-dimensional and of integers: got int64 \[\]"),
    ([[[1, 2], [3]]], "one-dimensional"), ([[1, -2]], r"0\.\.2147483647: sample 0 has -2\.\.1"),
    ([[1, 2**31]], "sample 0 has 1"), (["text"], "needs a tokenizer"), ("text", "got str"), (7, "got int")])
def test_what_cannot_be_trained_on_is_refused(data: object, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        MemoryDataset(data)


def test_bad_settings_and_texts_are_refused() -> None:
    with pytest.raises(ConfigError, match="all texts or all ids: got 1 texts among 2"):
        MemoryDataset(["text", [1, 2]], tokenizer=ByteTokenizer())
    with pytest.raises(ConfigError, match="needs at least 2 tokens"):
        MemoryDataset(["text", ""], tokenizer=ByteTokenizer())
    with pytest.raises(ConfigError, match="Did you mean 'importance'"):
        MemoryDataset([[1, 2]], sampler="important")
    for ratio in (1.0, -0.1, float("nan")):
        with pytest.raises(ConfigError, match="memory_sample_ratio"):
            MemoryDataset([[1, 2]], ratio)
    with pytest.raises(ConfigError, match="replay_slots"):
        MemoryDataset([[1, 2]], slots=0)


def test_the_synthetic_language_is_reproducible_and_shared_by_seeds() -> None:
    one, again, other = (create_synthetic_dataset(200, 40, seed=seed) for seed in (1, 1, 2))
    assert one.shape == (200, 40) and one.dtype == torch.int64 and 0 <= one.min() and one.max() < 256
    assert one.equal(again) and not one.equal(other)

    def pairs(data: torch.Tensor) -> set[tuple[int, int]]:
        return set(map(tuple, torch.stack([data[:, :-1], data[:, 1:]], -1).flatten(0, 1).tolist()))

    assert len(pairs(one)) < 0.1 * 256 * 256, "few pairs of tokens occur, so there is something to learn"
    assert len(pairs(one) & pairs(other)) > 0.5 * len(pairs(one)), "two seeds speak one language"


def test_a_synthetic_sample_repeats_itself() -> None:
    data = create_synthetic_dataset(100, 60)
    window = PHRASE_TOKENS
    repeated = [len(set(map(tuple, row.unfold(0, window, 1).tolist()))) < 60 - window + 1 for row in data]
    assert np.mean(repeated) > 0.9


@pytest.mark.parametrize(("arguments", "match"), [
    ({"num_samples": 0}, "num_samples must be at least 1"), ({"seq_len": 1}, "seq_len must be at least 2"),
    ({"vocab_size": 1}, "vocab_size must be at least 2"), ({"seed": -1}, "seed must be at least 0")])
def test_impossible_synthetic_data_is_refused(arguments: dict[str, int], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        create_synthetic_dataset(**arguments)
