"""Generation: sampling stays inside what was asked for, and a stream is read window by window."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmcode.config import LMCODEConfig
from lmcode.model.generate import generate, next_token
from lmcode.model.lm import MemoryLM

CONFIG = LMCODEConfig(vocab_size=31, hidden_size=32, num_layers=2, num_heads=2, context_length=8, short_term_memory_size=4,
                      short_term_dim=8, short_term_segment=4, memory_layers=(1,), memory_head_dim=8)


@pytest.fixture(scope="module")
def model() -> MemoryLM:
    torch.manual_seed(0)
    return MemoryLM(CONFIG)


@given(st.integers(0, 2**31), st.integers(1, 12), st.floats(0.05, 1.0), st.floats(0.1, 3.0))
def test_draws_come_from_the_top_k_and_the_nucleus(seed: int, top_k: int, top_p: float, temperature: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_BV = torch.randn(3, 10, generator=generator)
    drawn_B = next_token(logits_BV, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
    for logits_V, drawn in zip(logits_BV / temperature, drawn_B.tolist(), strict=True):
        order = logits_V.argsort(descending=True)[:top_k]
        probability = logits_V[order].softmax(0)
        needed = int((probability.cumsum(0) - probability < top_p + 1e-6).sum())
        assert drawn in order[:needed].tolist()


def test_temperature_zero_takes_the_most_likely() -> None:
    logits_BV = torch.randn(5, 9)
    assert torch.equal(next_token(logits_BV, temperature=0), logits_BV.argmax(-1))


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}])
def test_settings_out_of_range_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match="got"):
        next_token(torch.zeros(1, 4), **bad)


def test_the_prompt_is_kept_and_the_seed_decides(model: MemoryLM) -> None:
    prompt = torch.randint(0, 31, (2, 5))
    one, two, three = (generate(model, prompt, max_new_tokens=9, seed=seed) for seed in (1, 1, 2))
    assert one.shape == (2, 14) and torch.equal(one[:, :5], prompt)
    assert torch.equal(one, two) and not torch.equal(one, three)


def test_windows_carry_state_and_are_committed_once_each(model: MemoryLM) -> None:
    """Greedy tokens equal those of reading the text by hand in windows of the context length."""
    committed = []
    written = generate(model, torch.randint(0, 31, (1, 11)), max_new_tokens=10, temperature=0, commit=committed.append)
    assert len(committed) == 2
    model.eval()
    state, expected = None, []
    with torch.no_grad():
        for start in range(0, 20, 8):
            output = model(written[:, start:start + 8], state=state)
            state = output.state
            expected += output.logits[0].argmax(-1).tolist()
    assert written[0, 11:].tolist() == expected[10:20]


def test_the_mode_is_left_as_it_was(model: MemoryLM) -> None:
    for training in (True, False):
        model.train(training)
        generate(model, torch.zeros(1, 1, dtype=torch.int64), max_new_tokens=1)
        assert model.training is training


def test_an_empty_prompt_is_refused(model: MemoryLM) -> None:
    with pytest.raises(ValueError, match="T >= 1"):
        generate(model, torch.zeros(1, 0, dtype=torch.int64), max_new_tokens=1)
