"""Held-out evaluation: it measures the bank it says it measures, and leaves everything as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lmcode.config import DataConfig
from lmcode.data.corpus import prepare_corpus
from lmcode.data.dataset import MemoryDataset
from lmcode.data.streams import StreamSampler
from lmcode.dist import Group
from lmcode.eval.held_out import evaluate, void_controls
from lmcode.eval.reading import MODES
from lmcode.language_model import LMCODE
from lmcode.memory import LongTermMemory
from tests.helpers.models import model_with


@pytest.fixture(scope="module")
def sampler(tmp_path_factory: pytest.TempPathFactory) -> StreamSampler:
    folder: Path = tmp_path_factory.mktemp("held_out")
    for number in range(12):
        (folder / f"{number}.txt").write_text(f"document {number} says {number * 37} again and again; " * 6)
    corpus = prepare_corpus(DataConfig(path=str(folder), tokenizer="bytes", held_out_share=0.5), vocab_size=257,
                            folder=folder / "cache")
    return StreamSampler(corpus.held_out, streams=3, sequence_length=16, seed=0, epochs=1, shuffle=False)


def losses(model: LMCODE, sampler: StreamSampler, *modes: str) -> list[float]:
    return [evaluate(model, sampler, banks=model.banks, group=Group(), mode=mode, windows=8).loss for mode in modes]


def test_measuring_changes_nothing(sampler: StreamSampler) -> None:
    for scope in ("document", "global"):
        model = model_with(256, scope=scope)
        model.banks[1].write(torch.randn(2, 9, 8), torch.randn(2, 9, 8), torch.arange(9))
        before, retriever = model.banks[1].content_hash(), model.layers[1].long_term_memory
        model.train()
        first = losses(model, sampler, *MODES)
        assert losses(model, sampler, *MODES) == first, "a second measurement finds the same"
        assert model.banks[1].content_hash() == before and model.training
        assert model.layers[1].long_term_memory is retriever


def test_each_mode_is_another_memory(sampler: StreamSampler) -> None:
    assert len({round(loss, 5) for loss in losses(model_with(1024), sampler, *MODES)}) == len(MODES)


def test_off_is_the_same_model_without_a_bank(sampler: StreamSampler) -> None:
    (off,), (without,) = losses(model_with(1024), sampler, "off"), losses(model_with(0), sampler, "on")
    assert off == without


def test_document_scope_starts_empty_and_global_scope_with_what_is_there(sampler: StreamSampler) -> None:
    written = torch.nn.functional.normalize(torch.randn(2, 64, 8), dim=-1), torch.randn(2, 64, 8)
    changed = []
    for scope in ("document", "global"):
        model = model_with(1024, scope=scope)
        (before,) = losses(model, sampler, "on")
        model.banks[1].write(*written, torch.arange(64) % 12)  # also under the names of the documents that are read
        changed.append(losses(model, sampler, "on") != [before])
    assert changed == [False, True]


def test_upkeep_sees_the_evaluation_banks_and_no_other(sampler: StreamSampler) -> None:
    model, seen, merged = model_with(1024), [], []

    def upkeep(window: int, bank: LongTermMemory) -> None:
        assert bank is not model.banks[1]
        seen.append(window)
        merged.append(bank.consolidate(1.0).merged)

    result = evaluate(model, sampler, banks=model.banks, group=Group(), windows=4, upkeep=upkeep)
    assert seen == [0, 1, 2, 3] and sum(merged) > 0
    assert result.loss != evaluate(model, sampler, banks=model.banks, group=Group(), windows=4).loss


def test_every_held_out_token_is_counted_once(sampler: StreamSampler) -> None:
    model = model_with(0)
    result = evaluate(model, sampler, banks={}, group=Group(), windows=sampler.num_steps + 5)
    assert result.tokens == sum(sampler.global_tokens(step) for step in range(sampler.num_steps))


def test_an_unknown_mode_is_refused(sampler: StreamSampler) -> None:
    with pytest.raises(ValueError, match="on, off, shuffled, random: got 'of'"):
        evaluate(model_with(0), sampler, banks={}, group=Group(), mode="of")


def documents(tmp_path: Path, lengths: list[int], *, streams: int) -> StreamSampler:
    rows = [[(7 * place + number) % 250 for place in range(length)] for number, length in enumerate(lengths)]
    return StreamSampler(MemoryDataset(rows).as_documents(), streams=streams, sequence_length=16, seed=0, epochs=1,
                         shuffle=False)


@pytest.mark.parametrize(("lengths", "streams", "scope", "void"), [
    ([100, 100], 1, "document", {"shuffled": "no two held-out documents are read side by side"}),
    ([100], 4, "document", {"shuffled": "no two held-out documents are read side by side (1 held out, eval.streams = 4)"}),
    ([10, 12, 9], 2, "document", dict.fromkeys(("off", "shuffled", "random"), "beyond its first window")),
    ([100, 90], 2, "global", {}),
    ([100], 2, "global", {"shuffled": "no two held-out documents are read side by side"}),
    ([100, 90], 2, "document", {}),
    ([100, 90], 4, "document", {}),
])
def test_a_control_is_void_where_its_loss_must_be_that_of_another_mode(lengths: list[int], streams: int, scope: str,
                                                                       void: dict[str, str], tmp_path: Path) -> None:
    sampler, model = documents(tmp_path, lengths, streams=streams), model_with(1024, scope=scope)
    said = void_controls(sampler, scope=scope, windows=8)
    assert said.keys() == void.keys() and all(part in said[mode] for mode, part in void.items())
    on, off, shuffled, random = losses(model, sampler, *MODES)
    assert ("off" in void) == (off == on) and ("shuffled" in void) == (shuffled in (on, off)), "the reason holds"
    assert ("random" in void) == (random == on)


def test_nothing_far_has_no_loss(tmp_path: Path) -> None:
    model = model_with(0)
    for length, measured in ((100, False), (16 * 17 + 5, True)):
        sampler = documents(tmp_path, [length, length], streams=2)
        result = evaluate(model, sampler, banks={}, group=Group(), windows=sampler.num_steps)
        assert (result.far_loss is not None, result.far_tokens > 0) == (measured, measured)
