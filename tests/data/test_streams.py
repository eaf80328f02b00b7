"""Streams walk every document once per epoch, in order, and what a step reads depends on the step alone."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcode.data.corpus import Documents
from lmcode.data.streams import IGNORED, Batch, StreamSampler
from tests.helpers.streams import DOCUMENTS, END, G, T, equal, make_documents, make_sampler, read_back, visits


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(2, 30), min_size=1, max_size=12), streams=st.integers(1, 5),
       length=st.integers(1, 9), epochs=st.integers(1, 3), seed=st.integers(0, 5), shuffle=st.booleans())
def test_windows_of_every_visit_give_back_one_document(lengths, streams, length, epochs, seed, shuffle):
    documents = make_documents(lengths)
    sampler = StreamSampler(documents, streams=streams, sequence_length=length, seed=seed, epochs=epochs,
                            shuffle=shuffle)
    found = visits([sampler.batch(step) for step in range(sampler.num_steps)])
    assert sorted(found) == list(range(epochs * len(lengths)))  # one namespace per visit
    originals = [documents.document(i).tolist() for i in range(len(lengths))]
    order = []
    for namespace in sorted(found):
        windows = found[namespace]
        text = read_back(windows)
        order.append(next(i for i, original in enumerate(originals) if original == text))
        assert len(windows) == -(-(len(text) - 1) // length)
        assert {batch.document_B[row].item() for _, batch, row in windows} == {documents.identity(order[-1])}
        steps = [step for step, _, _ in windows]
        assert steps == list(range(steps[0], steps[0] + len(steps)))  # contiguous,
        assert len({row for _, _, row in windows}) == 1  # in one stream
    for epoch in range(epochs):
        texts = [tuple(originals[i]) for i in order[epoch * len(lengths):(epoch + 1) * len(lengths)]]
        assert Counter(texts) == Counter(map(tuple, originals))  # all once per epoch
        assert shuffle or texts == list(map(tuple, originals))


def test_a_document_is_known_by_what_it_says():
    texts = [[0, 5, 6, 0], [0, 5, 7, 0], [0, 5, 6, 0], [0, 6, 5, 0], [0, 5, 6, 0, 0]]
    offsets, tokens = np.cumsum([0, *map(len, texts)]), np.concatenate(texts)
    known = {dtype: [Documents(tokens.astype(dtype), offsets, [str(at) for at in range(5)]).identity(at)
                     for at in range(5)] for dtype in (np.uint16, np.uint32, np.int64)}
    one, other, *rest = known[np.uint16]
    assert rest[0] == one and len({one, other, *rest}) == 4 and min(one, other, *rest) >= 0
    assert known[np.uint32] == known[np.int64] == known[np.uint16], "whatever they are stored in"


def test_batch_is_well_formed_and_counted():
    sampler = make_sampler(DOCUMENTS, epochs=2)
    for step in range(sampler.num_steps):
        batch = sampler.batch(step)
        assert batch.input_ids_BT.dtype == batch.targets_BT.dtype == batch.namespace_B.dtype == torch.int64
        assert batch.window_B.dtype == torch.int64 and batch.valid_BT.dtype == batch.reset_B.dtype == torch.bool
        assert batch.input_ids_BT.shape == batch.targets_BT.shape == batch.valid_BT.shape == (G, T)
        assert torch.equal(batch.valid_BT, batch.targets_BT != IGNORED)
        assert (batch.valid_BT[:, :-1] | ~batch.valid_BT[:, 1:]).all()  # padding only trails
        assert (batch.input_ids_BT[~batch.valid_BT] == END).all()
        assert torch.equal(batch.valid_BT.any(1), batch.namespace_B >= 0)
        assert torch.equal(batch.valid_BT.any(1), batch.document_B >= 0)
        assert torch.equal(batch.reset_B, batch.window_B == 0)
        assert batch.global_tokens == int(batch.valid_BT.sum()) == sampler.global_tokens(step)


def test_targets_follow_inputs_within_and_across_windows():
    sampler = make_sampler(DOCUMENTS)
    batches = [sampler.batch(step) for step in range(60)]
    for before, after in zip(batches, batches[1:], strict=False):
        inner = before.valid_BT[:, 1:]
        assert torch.equal(before.targets_BT[:, :-1][inner], before.input_ids_BT[:, 1:][inner])
        goes_on = before.namespace_B == after.namespace_B
        assert torch.equal(before.targets_BT[goes_on, -1], after.input_ids_BT[goes_on, 0])


def test_reset_and_window_number_follow_the_documents():
    sampler = make_sampler(DOCUMENTS)
    for windows in visits([sampler.batch(step) for step in range(80)]).values():
        assert [int(batch.window_B[row]) for _, batch, row in windows] == list(range(len(windows)))
        assert [bool(batch.reset_B[row]) for _, batch, row in windows] == [True] + [False] * (len(windows) - 1)
        _, batch, row = windows[0]
        assert batch.input_ids_BT[row, 0] == END


@pytest.mark.parametrize("num_micro", [1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6])
def test_ranks_and_micro_batches_are_the_global_batch_in_order(world_size, num_micro):
    whole = make_sampler(DOCUMENTS)
    samplers = [make_sampler(DOCUMENTS) for _ in range(world_size)]  # each rank has its own
    for step in (0, 1, 17, 200):
        parts = [samplers[rank].batch(step, rank=rank, world_size=world_size, micro=micro, num_micro=num_micro)
                 for rank in range(world_size) for micro in range(num_micro)]
        expected = whole.batch(step)
        assert {part.global_tokens for part in parts} == {expected.global_tokens}
        joined = Batch(*(torch.cat(tensors) for tensors in zip(*(part[:-1] for part in parts), strict=True)),
                       expected.global_tokens)
        assert equal(joined, expected)


def test_a_step_is_a_pure_function():
    steps = list(range(120))
    sequential = make_sampler(DOCUMENTS)
    expected = [sequential.batch(step) for step in steps]
    random.Random(1).shuffle(steps)
    jumping = make_sampler(DOCUMENTS)
    for step in steps:
        assert equal(jumping.batch(step), expected[step])
        assert equal(make_sampler(DOCUMENTS).batch(step), expected[step])  # resumed by a new process


def test_finite_and_endless_runs_begin_alike():
    endless, finite = make_sampler(DOCUMENTS), make_sampler(DOCUMENTS, epochs=3)
    full = min(step for step in range(finite.num_steps) if (finite.batch(step).namespace_B < 0).any())
    assert full > 5 and endless.num_steps is None
    assert all(equal(endless.batch(step), finite.batch(step)) for step in range(full))


def test_seed_and_epoch_decide_the_order():
    def order(epochs: slice, **settings: object) -> list[list[int]]:
        sampler = make_sampler(DOCUMENTS, streams=1, epochs=2, **settings)
        found = visits([sampler.batch(step) for step in range(sampler.num_steps)])
        return [read_back(found[namespace]) for namespace in sorted(found)][epochs]

    first, second = slice(0, 50), slice(50, 100)
    assert order(first) == order(first)
    assert order(first) != order(second) != order(second, seed=8)
    assert order(first) != order(first, seed=8)
    assert order(first, shuffle=False) == order(second, shuffle=False)


def test_the_shuffle_never_changes():
    """A run resumed by another version must read the same documents: these numbers are recorded, not computed."""
    sampler = StreamSampler(make_documents([2] * 8), streams=8, sequence_length=1, seed=5)
    assert sampler._schedule._queue._epoch_order(0).tolist() == [7, 4, 3, 5, 6, 2, 0, 1]
    assert sampler._schedule._queue._epoch_order(1).tolist() == [7, 6, 1, 5, 4, 2, 0, 3]


def test_the_stream_that_is_free_first_takes_the_next_document():
    sampler = StreamSampler(make_documents([13, 5, 9, 2, 2, 2]), streams=2, sequence_length=4, seed=0, epochs=1,
                            shuffle=False)
    namespaces = [sampler.batch(step).namespace_B.tolist() for step in range(sampler.num_steps + 1)]
    assert namespaces == [[0, 1], [0, 2], [0, 2], [3, 4], [5, -1], [-1, -1]]
    ties = StreamSampler(make_documents([2] * 8), streams=4, sequence_length=4, seed=0, shuffle=False)
    assert [ties.batch(step).namespace_B.tolist() for step in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert sampler.batch(99).global_tokens == 0 and not sampler.batch(99).reset_B.any()


def test_padding_share_is_what_the_batches_hold():
    finite = make_sampler(DOCUMENTS, epochs=2)
    padding = [~finite.batch(step).valid_BT for step in range(finite.num_steps)]
    assert finite.padding_share == pytest.approx(torch.stack(padding).float().mean().item(), abs=1e-6)
    endless = make_sampler(DOCUMENTS)
    padding = [~endless.batch(step).valid_BT for step in range(2000)]
    assert endless.padding_share == pytest.approx(torch.stack(padding).float().mean().item(), abs=0.01)
    assert make_sampler(make_documents([T + 1] * G)).padding_share == 0.0


def test_a_batch_moves_as_a_whole():
    batch = make_sampler(DOCUMENTS).batch(0)
    moved = batch.to("meta")
    assert all(tensor.device.type == "meta" for tensor in moved[:-1]) and moved.global_tokens == batch.global_tokens


@pytest.mark.parametrize(("settings", "match"), [
    ({"streams": 0}, "streams must be at least 1: got 0"),
    ({"sequence_length": 0}, "sequence_length must be at least 1"),
    ({"epochs": 0}, "epochs must be at least 1"), ({"seed": -1}, "seed must not be negative: got -1")])
def test_impossible_samplers_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        make_sampler(DOCUMENTS, **settings)


def test_impossible_documents_are_refused():
    with pytest.raises(ValueError, match="number of documents must be at least 1"):
        make_sampler(Documents(np.empty(0, np.uint16), np.zeros(1, np.int64), []))
    with pytest.raises(ValueError, match="'d1' has 1"):
        make_sampler(make_documents([5, 1, 5]))


@pytest.mark.parametrize(("arguments", "match"), [
    ({"world_size": 5}, r"24 % \(5 x 1\) != 0"), ({"world_size": 4, "num_micro": 5}, r"24 % \(4 x 5\) != 0"),
    ({"rank": 2, "world_size": 2}, r"rank must lie in 0\.\.1: got 2"), ({"rank": -1}, "rank must lie"),
    ({"micro": 3, "num_micro": 3}, r"micro must lie in 0\.\.2: got 3"), ({"step": -1}, "step must not be negative")])
def test_impossible_batches_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        make_sampler(DOCUMENTS).batch(**{"step": 0, **arguments})
