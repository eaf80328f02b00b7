"""The cache of former windows: with room for all it is attention over the whole document, with less it ends where it says;
another document, or the future, is never in it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lmcode import LMCODE, LMCODEConfig, MemoryConfig
from lmcode.config import ConfigError, build
from lmcode.model.generation.generate import Decoding, generate
from lmcode.model.lm import MemoryLM
from lmcode.model.state import StreamState

WINDOW = 8
PLAIN = {"vocab_size": 40, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "context_length": WINDOW, "memory_layers": (),
         "short_term_memory_size": 0, "long_term_memory_slots": 0}


def make(**changes: object) -> MemoryLM:
    torch.manual_seed(0)
    model = MemoryLM(LMCODEConfig(**{**PLAIN, **changes}))
    with torch.no_grad():  # weights so large that everything a token could see shows
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    return model.eval()


def tokens(rows: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(40, (rows, length), generator=torch.Generator().manual_seed(seed))


def in_windows(model: MemoryLM, ids_BT: Tensor, ends: list[int], state: StreamState | None = None) -> Tensor:
    """Logits of tokens that are read in windows with these ends."""
    logits = []
    for start, end in zip([0, *ends], ends, strict=False):
        output = model(ids_BT[:, start:end], state=state)
        logits.append(output.logits)
        state = output.state
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("ends", [[8, 16, 24], [3, 11, 12, 20, 24]])
def test_with_room_for_all_it_is_attention_over_the_whole(ends: list[int]) -> None:
    model, whole, ids_BT = make(cache_windows=3), make(context_length=24), tokens(3, 24)
    torch.testing.assert_close(in_windows(model, ids_BT, ends), whole(ids_BT).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("windows", [1, 2])
def test_a_layer_sees_so_many_windows_before_its_own_and_nothing_later(windows: int) -> None:
    model, ids_1T, ends = make(cache_windows=windows, num_layers=1), tokens(1, 32), [8, 16, 24, 32]
    before = in_windows(model, ids_1T, ends)[0]
    for place in range(32):
        changed_1T = ids_1T.clone()
        changed_1T[0, place] = (changed_1T[0, place] + 7) % 40
        differs_T = (in_windows(model, changed_1T, ends)[0] - before).abs().amax(-1) > 1e-6
        place_T = torch.arange(32)
        assert torch.equal(differs_T, (place_T >= place) & (place_T // WINDOW - place // WINDOW <= windows))


def test_padding_and_a_new_document_leave_the_cache_as_they_should() -> None:
    model, ids_BT = make(cache_windows=2), tokens(3, 24)
    state = in_two(model, ids_BT)
    valid_BT = torch.arange(8) < torch.tensor([8, 5, 0])[:, None]
    padded = model(ids_BT[:, 16:], state=state, valid_BT=valid_BT, reset_B=torch.tensor([True, False, False]))
    assert padded.state.past_length[0].tolist() == [8, 16, 16], "a document of one window; all that there is room for"
    for before, after in zip(state.past, padded.state.past, strict=True):
        assert torch.equal(after[2], before[2]) and torch.equal(after[1, :11], before[1, 5:])
    fresh = model(ids_BT[:, 16:])
    torch.testing.assert_close(padded.logits[0], fresh.logits[0], atol=1e-5, rtol=1e-4)
    going_on = model(ids_BT[:, :8], state=padded.state).logits
    cut_BT = torch.cat([ids_BT[1:2, :21], ids_BT[1:2, :8]], dim=1)
    torch.testing.assert_close(going_on[1], in_windows(model, cut_BT, [8, 16, 21, 29])[0, 21:], atol=1e-4, rtol=1e-4)
    after_one = in_windows(model, torch.cat([ids_BT[:1, 16:], ids_BT[:1, :8]], dim=1), [8, 16])[0, 8:]
    torch.testing.assert_close(going_on[0], after_one, atol=1e-4, rtol=1e-4)


def in_two(model: MemoryLM, ids_BT: Tensor) -> StreamState:
    state: StreamState = model(ids_BT[:, 8:16], state=model(ids_BT[:, :8]).state).state
    return state


def test_documents_that_share_a_window_see_and_leave_their_own_past_only() -> None:
    model, ids_BT = make(cache_windows=2), tokens(2, 32)
    state = in_two(model, ids_BT)
    piece_BT = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2]] * 2)
    names_BP = torch.tensor([[0, 1, 2]] * 2)
    packed = model(ids_BT[:, 16:24], state=state, namespace_B=names_BP, piece_BT=piece_BT)
    assert packed.state.past_length[0].tolist() == [2, 2]
    parts = [model(ids_BT[:, 16:19], state=state), model(ids_BT[:, 19:22]), model(ids_BT[:, 22:24])]
    torch.testing.assert_close(packed.logits, torch.cat([part.logits for part in parts], dim=1), atol=1e-4, rtol=1e-4)
    after = [model(ids_BT[:, 24:], state=one.state).logits for one in (packed, parts[-1])]
    torch.testing.assert_close(*after, atol=1e-4, rtol=1e-4)
    same = model(ids_BT[:, 16:24], state=state, namespace_B=names_BP, piece_BT=torch.zeros_like(piece_BT))
    assert same.state.past_length[0].tolist() == [16, 16]
    torch.testing.assert_close(same.logits, model(ids_BT[:, 16:24], state=state).logits, atol=1e-4, rtol=1e-4)


def test_activation_checkpointing_changes_nothing_and_projections_learn_from_the_cache() -> None:
    model, ids_BT = make(cache_windows=1).train(), tokens(2, 16)
    state = model(ids_BT[:, :8]).state
    assert not any(past.requires_grad for past in state.past)
    outputs, gradients = [], []
    for model.activation_checkpointing, before in ((False, state), (True, state), (False, None)):
        model.zero_grad()
        outputs.append(model(ids_BT[:, 8:], targets_BT=ids_BT[:, 8:], state=before))
        outputs[-1].loss.backward()
        gradients.append(model.layers[0].attention.query_key_value.weight.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1])
    assert not torch.allclose(gradients[0], gradients[2], rtol=0.1), "keys and values of the cache are trained"
    for one, other in zip(outputs[0].state.past, outputs[1].state.past, strict=True):
        torch.testing.assert_close(one, other)


def test_writing_on_reads_the_cache() -> None:
    model, whole = make(cache_windows=3), make(context_length=32)
    decoding = Decoding(max_new_tokens=17, temperature=0.0)
    prompts = tokens(2, 5)
    written = generate(model, prompts, decoding).tokens_BT
    assert torch.equal(written, generate(whole, prompts, decoding).tokens_BT)
    first = generate(model, prompts, Decoding(max_new_tokens=6, temperature=0.0), finish=True)
    assert first.state is not None and first.state.past_length[0].tolist() == [11, 11]


def test_it_stands_beside_a_bank_and_short_term_slots() -> None:
    shape = {**PLAIN, "memory_layers": (1,), "short_term_memory_size": 3, "short_term_dim": 8, "short_term_segment": 4,
             "long_term_memory_slots": 64, "memory_head_dim": 8, "memory_top_k": 4, "cache_windows": 1}
    model = LMCODE(LMCODEConfig(**shape), memory=MemoryConfig(virtual_shards=4))
    state = in_two(model, tokens(2, 16))
    assert [past.shape for past in state.past] == [(2, WINDOW, 32)] * 2
    blank = model.blank_state(2)
    assert [one.shape for one in blank.past] == [one.shape for one in state.past] and blank.past_length[0].tolist() == [0, 0]
    with pytest.raises(ValueError, match="past must have shapes"):
        model(tokens(2, 8), state=state._replace(past=state.past[:1]))


def test_it_needs_relative_positions() -> None:
    with pytest.raises(ConfigError, match="cache_windows needs relative positions, positions=rotary: got 'learned'"):
        build(LMCODEConfig, {**PLAIN, "cache_windows": 1, "positions": "learned"})
