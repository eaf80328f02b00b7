"""What a text offers: its own, the same in company and alone, across windows, without reading any bank."""

from __future__ import annotations

import pytest
import torch

from lmcode import LMCODE, LMCODEConfig, MemoryConfig
from lmcode.model import reading
from lmcode.model.reading import read_texts


def model_of(**changes: object) -> LMCODE:
    torch.manual_seed(0)
    config = LMCODEConfig(**{**dict(vocab_size=40, hidden_size=32, num_layers=3, num_heads=2, context_length=8,
                                    short_term_memory_size=4, short_term_dim=8, short_term_segment=4,
                                    long_term_memory_slots=64, memory_head_dim=8, memory_top_k=4, memory_layers=(0, 2)),
                             **changes})
    return LMCODE(config, memory=MemoryConfig(virtual_shards=4))


def rows_of(lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 40, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("successor_values", [True, False])
def test_every_token_but_the_last_offers_an_entry(successor_values: bool) -> None:
    lengths = [1, 2, 8, 9, 16, 17, 30]
    offered = read_texts(model_of(successor_values=successor_values), rows_of(lengths))
    for length, one in zip(lengths, offered, strict=True):
        assert list(one) == [0, 2]
        for candidates in one.values():
            count = length - successor_values
            assert candidates.key_HND.shape == candidates.value_HND.shape == (2, count, 8)
            assert candidates.surprise_N.shape == (count,) and bool(candidates.valid_N.all())


def test_company_and_order_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = model_of(), rows_of([30, 3, 17, 8, 9, 1, 25])
    alone = [read_texts(model, [row])[0] for row in rows]
    monkeypatch.setattr(reading, "STREAMS", 3)
    for together, one in zip(read_texts(model, rows), alone, strict=True):
        for layer, candidates in together.items():
            for got, expected in zip(candidates, one[layer], strict=True):
                torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_banks_are_neither_read_nor_written_and_the_mode_stays() -> None:
    model, rows = model_of(dropout=0.5), rows_of([20, 12])
    model.train()
    before = read_texts(model, rows)
    for bank in model.banks.values():
        bank.write(torch.randn(2, 30, 8), torch.randn(2, 30, 8) * 9, torch.zeros(30, dtype=torch.int64))
    hashes = [bank.content_hash() for bank in model.banks.values()]
    for one, other in zip(before, read_texts(model, rows), strict=True):
        assert all(torch.equal(a, b) for layer in one for a, b in zip(one[layer], other[layer], strict=True))
    assert model.training and [bank.content_hash() for bank in model.banks.values()] == hashes
    assert all(model.layers[layer].long_term_memory is bank for layer, bank in model.banks.items())


def test_the_surprise_is_the_loss_of_the_token_that_the_value_comes_from() -> None:
    model, row = model_of(), rows_of([8])[0]
    model.eval()
    with model.reading_from({}):
        output = model(torch.tensor([row]), torch.tensor([row]))
    torch.testing.assert_close(read_texts(model, [row])[0][2].surprise_N, output.token_loss[0, :-1].detach())
