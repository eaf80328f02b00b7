"""Documents that share a window are read as if each had one of its own; sources are mixed by weight, in one order."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcode import dist
from lmcode.config import DataConfig, LMCODEConfig, MemoryConfig, RunConfig, build
from lmcode.data.corpus import Documents, prepare_corpus
from lmcode.data.replay import Replay, ReplaySampler
from lmcode.data.streams import Batch, Pauses, StreamSampler, _Queue
from lmcode.language_model import LMCODE
from lmcode.model.lm import MemoryLM
from lmcode.train import loop
from lmcode.train.start import set_up
from tests.helpers.ranks import run_on_ranks
from tests.helpers.small_run import settings as job_settings
from tests.helpers.small_run import write_corpus
from tests.helpers.streams import DOCUMENTS, equal, make_documents, make_sampler

SEGMENT = 4
SHAPE = {"vocab_size": 40, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "context_length": 32, "memory_layers": (1,),
         "short_term_memory_size": 3, "short_term_dim": 8, "short_term_segment": SEGMENT, "memory_head_dim": 8,
         "memory_top_k": 4, "memory_bias": 2.0, "memory_update_rate": 0.9, "long_term_memory_slots": 256}


# The model


def make_model(**changes: object) -> LMCODE:
    torch.manual_seed(0)
    model = LMCODE(LMCODEConfig(**{**SHAPE, **changes}), memory=MemoryConfig(virtual_shards=4))
    with torch.no_grad():  # weights so large that everything a token could see shows
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    key = torch.nn.functional.normalize(torch.randn(2, 64, 8), dim=-1)
    model.banks[1].write(key, torch.randn(2, 64, 8), torch.arange(64) % 4)
    return model.eval()


def window(lengths: list[int], *, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, targets and pieces of rows of documents of these lengths."""
    ids_BT = torch.randint(40, (rows, sum(lengths)), generator=torch.Generator().manual_seed(1))
    piece_BT = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).expand(rows, -1)
    return ids_BT, ids_BT.roll(3, dims=1), piece_BT


@pytest.mark.parametrize("changes", [{}, {"positions": "learned"}, {"retrieval_stride": 2}, {"retrieval_stride": SEGMENT},
                                     {"successor_values": False}, {"short_term_memory_size": 0},
                                     {"memory_values": "token", "memory_key_tokens": 3}],
                         ids=["plain", "learned", "stride 2", "stride 4", "own values", "no slots", "tokens"])
def test_documents_in_one_window_are_read_as_if_alone(changes) -> None:
    """Where a document begins with a short-term segment, nothing at all differs."""
    model, lengths = make_model(**changes), [8, 4, 12]
    ids_BT, target_BT, piece_BT = window(lengths)
    namespace_BP = torch.tensor([[0, 1, 2], [3, 2, 1]])
    first = model(ids_BT[:, :6], targets_BT=target_BT[:, :6], namespace_B=namespace_BP[:, 0])  # the state that is carried in
    whole = model(ids_BT, targets_BT=target_BT, state=first.state, namespace_B=namespace_BP, document_B=namespace_BP + 10,
                  piece_BT=piece_BT)
    parts, start = [], 0
    for piece, length in enumerate(lengths):
        part = slice(start, start + length)
        parts.append(model(ids_BT[:, part], targets_BT=target_BT[:, part], state=first.state,
                           reset_B=torch.tensor([piece > 0] * 2), namespace_B=namespace_BP[:, piece],
                           document_B=namespace_BP[:, piece] + 10))
        start += length
    torch.testing.assert_close(whole.token_loss, torch.cat([part.token_loss for part in parts], dim=1))
    for name in ("slots", "pending_key"):
        for one, other in zip(getattr(whole.state, name), getattr(parts[-1].state, name), strict=True):
            torch.testing.assert_close(one, other)
    for name in ("key_HND", "value_HND", "namespace_N", "document_N", "surprise_N", "valid_N"):
        columns = [getattr(output.memory[1].candidates, name) for output in (whole, *parts)]
        rows = [column.unflatten(-2 if "HND" in name else -1, (2, -1)) for column in columns]
        one, other = rows[0], torch.cat(rows[1:], dim=-2 if "HND" in name else -1)
        valid_BT = whole.memory[1].candidates.valid_N.view(2, -1)
        where = (slice(None), valid_BT) if "HND" in name else valid_BT
        if name == "valid_N":
            where = ...
        torch.testing.assert_close(one[where], other[where])


@pytest.mark.parametrize("changes", [{}, {"retrieval_stride": 3}, {"memory_values": "token", "memory_key_tokens": 4}])
def test_no_document_sees_another_or_its_own_future(changes) -> None:
    """By perturbation, at boundaries that fit nothing; padding trails."""
    lengths = [5, 7, 1, 6, 5]
    model = make_model(**changes)
    ids_BT, target_BT, piece_BT = window(lengths, rows=1)
    valid_BT = torch.arange(24)[None] < 22
    namespaces_BP = torch.tensor([[0, 1, 2, 3, 0]])

    def losses(ids_BT: torch.Tensor) -> torch.Tensor:
        return model(ids_BT, targets_BT=target_BT, namespace_B=namespaces_BP, piece_BT=piece_BT,
                     valid_BT=valid_BT).token_loss[0]

    before = losses(ids_BT)
    for place in range(22):
        changed_BT = ids_BT.clone()
        changed_BT[0, place] = (changed_BT[0, place] + 7) % 40
        differs_T = (losses(changed_BT) - before).abs() > 1e-6
        may_differ_T = (piece_BT[0] == piece_BT[0, place]) & (torch.arange(24) >= place) & valid_BT[0]
        assert differs_T[place] and not (differs_T & ~may_differ_T).any()
        assert torch.equal(losses(changed_BT)[~may_differ_T], before[~may_differ_T])


def test_every_parameter_is_trained_and_a_document_gets_no_gradient_from_another() -> None:
    model = make_model().train()
    ids_BT, target_BT, piece_BT = window([6, 9, 9])
    ids_BT = ids_BT % 10 + 10 * piece_BT  # each document has words of its own
    loss_BT = model(ids_BT, targets_BT=target_BT, namespace_B=torch.tensor([[0, 1, 2]] * 2), piece_BT=piece_BT).token_loss
    loss_BT.sum().backward(retain_graph=True)
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    model.zero_grad()
    x_BTC = []
    handle = model.dropout.register_forward_hook(lambda *_: x_BTC.append(_[2].retain_grad() or _[2]))
    model(ids_BT, targets_BT=target_BT, namespace_B=torch.tensor([[0, 1, 2]] * 2),
          piece_BT=piece_BT).token_loss[piece_BT == 1].sum().backward()
    handle.remove()
    assert torch.equal(x_BTC[0].grad.abs().sum(-1) > 0, piece_BT == 1)


def test_one_document_in_every_window_is_the_same_bit_for_bit() -> None:
    model = make_model()
    ids_BT, target_BT, piece_BT = window([24])
    plain = model(ids_BT, targets_BT=target_BT, namespace_B=torch.tensor([1, 2]))
    batch = Batch(ids_BT, target_BT, ids_BT >= 0, *[torch.tensor([1, 2])] * 5, piece_BT, *[torch.tensor([[1], [2]])] * 3, 48)
    assert {*batch.reading()} == {"namespace_B", "document_B"}, "the way without masks is taken"
    assert torch.equal(model(ids_BT, targets_BT=target_BT, **batch.reading()).token_loss, plain.token_loss)


@pytest.mark.parametrize(("piece", "namespaces", "match"), [
    ([0, 1, 0, 1], [[0, 1]], "must ascend from 0"), ([1, 1, 1, 1], [[0, 1]], "must ascend from 0"),
    ([0, 2, 2, 2], [[0, 1, 2]], "must ascend from 0"), ([0, 1, 2, 3], [[0, 1, 2]], "within the P documents"),
    ([0, 1, 1, 1], None, "need their namespaces")])
def test_impossible_pieces_are_refused(piece, namespaces, match) -> None:
    model = MemoryLM(LMCODEConfig(**SHAPE))
    namespace_B = None if namespaces is None else torch.tensor(namespaces)
    with pytest.raises(ValueError, match=match):
        model(torch.zeros(1, 4, dtype=torch.int64), namespace_B=namespace_B, piece_BT=torch.tensor([piece]))


# The streams


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(2, 30), min_size=1, max_size=12), streams=st.integers(1, 4), length=st.integers(1, 9),
       epochs=st.integers(1, 3), seed=st.integers(0, 3))
def test_pieces_give_back_every_document_once_an_epoch(lengths, streams, length, epochs, seed) -> None:
    documents = make_documents(lengths)
    sampler = StreamSampler(documents, streams=streams, sequence_length=length, seed=seed, epochs=epochs, packed=True)
    found: dict[int, tuple[list[int], list[int]]] = {}
    for step in range(sampler.num_steps):
        batch = sampler.batch(step)
        for row in range(streams):
            pieces = batch.piece_BT[row][batch.valid_BT[row]]
            assert pieces.tolist() == sorted(pieces.tolist()) and {*pieces.tolist()} == {*range(len({*pieces.tolist()}))}
            for piece in {*pieces.tolist()}:
                here = (batch.piece_BT[row] == piece) & batch.valid_BT[row]
                namespace = int(batch.namespace_BP[row, piece])
                inputs, targets = found.setdefault(namespace, ([], []))
                starts = not inputs
                assert starts == (bool(batch.reset_B[row]) if piece == 0 else True)
                inputs += batch.input_ids_BT[row][here].tolist()
                targets += batch.targets_BT[row][here].tolist()
        assert torch.equal(batch.namespace_BP[:, 0], batch.namespace_B) and batch.global_tokens == int(batch.valid_BT.sum())
    assert sorted(found) == list(range(epochs * len(lengths)))
    texts = sorted([*inputs, targets[-1]] for inputs, targets in found.values())
    assert texts == sorted([documents.document(i).tolist() for i in range(len(lengths))] * epochs)
    assert all(inputs[1:] == targets[:-1] for inputs, targets in found.values())


def test_hardly_a_position_is_wasted_on_short_documents() -> None:
    documents = make_documents([200] * 100)
    plain, packed = (StreamSampler(documents, streams=8, sequence_length=256, seed=0, packed=share)
                     for share in (False, True))
    assert plain.padding_share == pytest.approx(1 - 199 / 256) and packed.padding_share == 0.0
    assert packed.unpacked_padding_share == plain.padding_share and "0.0% of the positions" in packed.describe_padding()
    assert "22.3%" in packed.describe_padding() and "22.3%" in plain.describe_padding()
    assert all(packed.global_tokens(step) == 8 * 256 for step in range(40))
    finite = StreamSampler(documents, streams=8, sequence_length=256, seed=0, packed=True, epochs=4)
    assert finite.padding_share <= 0.03


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_packed_steps_depend_on_nothing_but_the_step(world_size) -> None:
    whole = make_sampler(DOCUMENTS, packed=True)
    for step in (0, 17, 3):
        parts = [make_sampler(DOCUMENTS, packed=True).batch(step, rank=rank, world_size=world_size, micro=micro, num_micro=2)
                 for rank in range(world_size) for micro in range(2)]
        joined = Batch(*(torch.cat(column) for column in zip(*(part[:-1] for part in parts), strict=True)),
                       parts[0].global_tokens)
        assert equal(joined, whole.batch(step))


# Replay


def make_replaying(slots: int = 100) -> ReplaySampler:
    streams = StreamSampler(make_documents([7] * 40), streams=4, sequence_length=16, seed=0, packed=True,
                            pauses=Pauses(Fraction(1, 4), 4))
    return ReplaySampler(streams, Replay(slots=slots, sequence_length=16, vocab_size=5000, sampler="uniform", seed=0))


def test_pieces_are_stored_and_replayed_with_losses_of_their_own() -> None:
    sampler = make_replaying()
    for step in range(6):
        batch, placed = sampler._mix(step)
        mean_GP = torch.arange(batch.namespace_BP.numel()).view(batch.namespace_BP.shape) + 1.0 + 100 * step
        replay, before = sampler.replay, sampler.replay.written
        for row, piece, start, place in placed:
            length = int(replay.columns["length"][place])
            assert batch.input_ids_BT[row, start:start + length].tolist() == replay.token_MX[place, :length].tolist()
            assert batch.targets_BT[row, start + length - 1] == replay.token_MX[place, length]
            assert (batch.piece_BT[row, start:start + length] == piece).all() and batch.namespace_BP[row, piece] == -1
        length_GP = batch.by_piece(batch.valid_BT)
        assert torch.equal(batch.valid_BT.sum(1).double(), length_GP.sum(1))
        sampler.remember(step, mean_GP * length_GP)
        read = [(row, piece) for row, piece in torch.nonzero(length_GP).tolist() if not batch.replayed_B[row]]
        assert replay.written - before == len(read)
        for number, (row, piece) in enumerate(read, start=before):
            place = number % replay.slots
            assert replay.columns["namespace"][place] == batch.namespace_BP[row, piece]
            assert replay.columns["importance"][place] == mean_GP[row, piece]
            here_T = (batch.piece_BT[row] == piece) & batch.valid_BT[row]
            length = int(replay.columns["length"][place])
            assert replay.token_MX[place, :length].tolist() == batch.input_ids_BT[row][here_T].tolist()
            assert replay.token_MX[place, 1:length + 1].tolist() == batch.targets_BT[row][here_T].tolist()
        for row, piece, _, place in placed:
            assert replay.columns["importance"][place] == mean_GP[row, piece] and replay.columns["step"][place] == step
    assert len(placed) > 1, "a row holds several spans"
    assert replay.forget([int(batch.namespace_BP[0, 0])]) >= 1
    assert int(batch.namespace_BP[0, 0]) not in replay.columns["namespace"][replay.columns["number"] >= 0]


# Sources


def test_sources_are_read_in_proportion_to_their_weights() -> None:
    documents = make_documents([5] * 30 + [50] * 3 + [20] * 10)
    documents = Documents(documents.tokens, documents.offsets, documents.names, {"short": 30, "long": 3, "some": 10})
    weights = (1.0, 2.0, 1.0)
    for packed in (False, True):
        sampler = StreamSampler(documents, streams=4, sequence_length=8, seed=0, weights=weights, packed=packed)
        tokens, texts = np.zeros(3), [set(), set(), set()]
        for step in range(300):
            batch = sampler.batch(step)
            length_BP = batch.by_piece(batch.valid_BT)
            for source in range(3):
                tokens[source] += length_BP[batch.source_BP == source].sum().item()
                texts[source] |= set(batch.document_BP[batch.source_BP == source].tolist())
        assert tokens / tokens.sum() == pytest.approx([0.25, 0.5, 0.25], abs=0.02)
        assert [len(some) for some in texts] == [30, 3, 10], "each source is read whole"
        again, evenly = (StreamSampler(documents, streams=4, sequence_length=8, seed=0, weights=some, packed=packed)
                         for some in (weights, None))
        assert equal(again.batch(200), sampler.batch(200)) and not equal(evenly.batch(2), sampler.batch(2))


def test_every_source_is_shuffled_anew_in_every_epoch() -> None:
    queue = _Queue(np.full(40, 5), [20, 20], [1.0, 1.0], seed=3, shuffle=True)
    taken = [queue.take() for _ in range(80)]
    orders = [[document for document in taken if document // 20 == source] for source in range(2)]
    epochs = [tuple(one % 20 for one in order[start:start + 20]) for order in orders for start in (0, 20)]
    assert len(set(epochs)) == 4 and all(sorted(epoch) == list(range(20)) for epoch in epochs)


def test_the_padding_of_a_mixture_is_that_of_what_is_read() -> None:
    documents = make_documents([5] * 30 + [41] * 3)
    documents = Documents(documents.tokens, documents.offsets, documents.names, {"short": 30, "long": 3})
    sampler = StreamSampler(documents, streams=4, sequence_length=8, seed=0, weights=(3.0, 1.0))
    padding = [1 - sampler.global_tokens(step) / 32 for step in range(500)]
    assert sampler.padding_share == pytest.approx(np.mean(padding), abs=0.01)
    with pytest.raises(ValueError, match="one for each of 2 sources"):
        StreamSampler(documents, streams=4, sequence_length=8, seed=0, weights=(1.0,))


def test_a_corpus_of_sources_keeps_them_apart(tmp_path: Path) -> None:
    for name, count in (("a", 9), ("b", 5)):
        (tmp_path / name).mkdir()
        for number in range(count):
            (tmp_path / name / f"{number}.txt").write_text(f"{name} {number}")
    sources = [{"name": "one", "path": str(tmp_path / "a"), "weight": 2, "held_out": str(tmp_path / "a" / "3.txt")},
               {"name": "two", "path": str(tmp_path / "b")}]
    config = build(DataConfig, {"sources": sources, "tokenizer": "bytes", "held_out_share": 0.3})
    corpus = prepare_corpus(config, vocab_size=257, folder=tmp_path / "cache")
    assert corpus.train.sources["one"] == 8 and corpus.held_out.sources["one"] == 1
    assert corpus.train.sources["two"] + corpus.held_out.sources["two"] == 5
    for side in (corpus.train, corpus.held_out):
        sources = [name.split("/")[0] for name in side.names]
        assert sources == [name for name, count in side.sources.items() for _ in range(count)]
    assert "one: named by data.held_out; two: " in corpus.describe() and "to train on (one 40, two " in corpus.describe()


# Jobs


def job(folder: Path, name: str, **train: object) -> dict:
    values = job_settings(folder, name, train={"memory_sample_ratio": 0.25, "replay_slots": 60, "log_every": 1, **train})
    values["data"] = {"sources": [{"name": "even", "path": f"{folder}/text/*[02468].txt"},
                                  {"name": "odd", "path": f"{folder}/text/*[13579].txt", "weight": 3}],
                      "packing": True, "tokenizer": "bytes", "held_out_share": 0.2, "cache": str(folder / "cache")}
    return values


def run_job(values: dict) -> tuple[list[float], list[str]]:
    """Losses of a job's steps, and the hashes of its banks."""
    session = set_up(build(RunConfig, values), dist.discover())
    losses = []
    for _ in range(6):
        result = loop.train_step(session)
        losses += [result.loss, *result.by_source.values()]
    session.close()
    return losses, [bank.content_hash() for bank in session.model.banks.values()]


def test_a_packed_job_of_sources_with_replay_does_not_depend_on_the_number_of_ranks(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    (alone,) = run_on_ranks(run_job, 1, job(tmp_path, "1"))
    assert len(alone[0]) == 18, "the loss of every source in every step"
    for ranks in (2, 3):
        for losses, _ in run_on_ranks(run_job, ranks, job(tmp_path, str(ranks))):
            assert losses == pytest.approx(alone[0], abs=1e-5)


def train_in_parts(values: dict, *totals: int) -> list[int]:
    codes = []
    for total in totals:
        values["train"]["total_steps"] = total
        codes.append(loop.run(build(RunConfig, values), resume="auto"))
    return codes


def test_a_packed_job_goes_on_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    rows = {}
    for name, totals in (("whole", (6,)), ("parts", (3, 6))):
        values = job(tmp_path, name, learning_rate=1e-3, warmup_steps=100)
        assert run_on_ranks(train_in_parts, 1, values, *totals) == [[0] * len(totals)]
        lines = [json.loads(line) for line in (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        rows[name] = {(line["step"], tag): value for line in lines for tag, value in line.items()
                      if tag.startswith("train/loss") and line["step"] > 3}
    assert rows["parts"] == rows["whole"]
    assert {tag for _, tag in rows["whole"]} == {"train/loss", "train/loss/even", "train/loss/odd"}
