"""Held-out evaluation: it measures the bank it says it measures, and leaves everything as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lmcode.config import DataConfig, LMCODEConfig, MemoryConfig
from lmcode.dist import Group
from lmcode.eval.held_out import MODES, evaluate
from lmcode.lmcode import LMCODE
from lmcode.memory import LongTermMemory
from lmcode.train.corpus import prepare_corpus
from lmcode.train.data import StreamSampler

SHAPE = {"vocab_size": 257, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "context_length": 16, "memory_layers": (1,),
         "short_term_memory_size": 4, "short_term_dim": 8, "short_term_segment": 8, "memory_head_dim": 8, "memory_top_k": 4,
         "memory_bias": 2.0}


@pytest.fixture(scope="module")
def sampler(tmp_path_factory: pytest.TempPathFactory) -> StreamSampler:
    folder: Path = tmp_path_factory.mktemp("held_out")
    for number in range(12):
        (folder / f"{number}.txt").write_text(f"document {number} says {number * 37} again and again; " * 6)
    corpus = prepare_corpus(DataConfig(path=str(folder), tokenizer="bytes", held_out_share=0.5), vocab_size=257,
                            folder=folder / "cache")
    return StreamSampler(corpus.held_out, streams=3, sequence_length=16, seed=0, epochs=1, shuffle=False)


def model_with(slots: int, **memory: object) -> LMCODE:
    torch.manual_seed(0)
    model = LMCODE(LMCODEConfig(**SHAPE, long_term_memory_slots=slots), memory=MemoryConfig(virtual_shards=4, **memory))
    with torch.no_grad():  # sharp heads and open gates, so that what is retrieved shows in the loss
        for parameter in model.layers[1].long_term_read.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)
    return model


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


def test_the_three_modes_are_three_different_memories(sampler: StreamSampler) -> None:
    on, off, shuffled = losses(model_with(1024), sampler, *MODES)
    assert len({round(loss, 5) for loss in (on, off, shuffled)}) == 3


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
    with pytest.raises(ValueError, match="on, off, shuffled: got 'of'"):
        evaluate(model_with(0), sampler, banks={}, group=Group(), mode="of")
