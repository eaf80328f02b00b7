"""Short-term memory: the fast segment loop against the formula, slot by slot; what state and padding do."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lmcode.config import LMCODEConfig
from lmcode.model import MemoryLM, ShortTermMemory

B, C, S, E, L = 3, 24, 5, 12, 8
SHAPE = {"vocab_size": 32, "hidden_size": C, "num_heads": 2, "num_layers": 1, "context_length": 64, "memory_layers": (),
         "short_term_memory_size": S, "short_term_dim": E, "short_term_segment": L, "memory_update_rate": 0.4}


def memory() -> ShortTermMemory:
    torch.manual_seed(1)
    module = MemoryLM(LMCODEConfig(**SHAPE)).layers[0].short_term
    for parameter in module.parameters():  # far from the small initial values, so that every term matters
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def oracle_window(module: ShortTermMemory, x_TD: Tensor, slots_MD: Tensor, valid_T: Tensor) -> tuple[Tensor, Tensor]:
    """The docstring's formula for one stream, with explicit loops."""
    query, key, value = module.tokens(x_TD).chunk(3, dim=-1)
    read_weight, read_value_weight = module.slots_read.weight.chunk(2)
    write_weight, slot_gate_weight = module.slots_write.weight.chunk(2)
    gate_weight = torch.cat([slot_gate_weight, module.candidate_gate.weight], dim=1)  # of [slot, candidate]
    out = []
    for start in range(0, len(x_TD), L):
        stop = min(start + L, len(x_TD))
        normed = torch.stack([F.rms_norm(slot, (E,), eps=1e-6) for slot in slots_MD])
        for t in range(start, stop):
            weight = ((normed @ read_weight.T) @ query[t] / math.sqrt(E)).softmax(0)
            out.append(module.output.weight @ (weight @ (normed @ read_value_weight.T)))
        live = [t for t in range(start, stop) if valid_T[t]]
        if not live:
            continue
        after = []
        for slot, name, seen in zip(slots_MD, module.address_SE, normed, strict=True):
            weight = (key[live] @ (write_weight @ seen + name) / math.sqrt(E)).softmax(0)
            candidate = weight @ value[live]
            z = torch.sigmoid(gate_weight @ torch.cat([seen, candidate]) + module.candidate_gate.bias)
            after.append((1 - z * 0.4) * slot + z * 0.4 * candidate)
        slots_MD = torch.stack(after)
    return torch.stack(out), slots_MD


@pytest.mark.parametrize("num_tokens", [1, 8, 24, 29])
def test_equals_the_formula_slot_by_slot(num_tokens: int) -> None:
    module, x = memory(), torch.randn(B, num_tokens, C)
    valid = torch.arange(num_tokens) < torch.tensor([[num_tokens], [max(1, num_tokens - 11)], [0]])
    carried, reset = torch.randn(B, S, E), torch.tensor([False, True, False])
    out, slots = module(x, slots_BMD=carried, reset_B=reset, valid_BT=valid)
    for b in range(B):
        first = module.initial_slots_SE if reset[b] else carried[b]
        expected_out, expected_slots = oracle_window(module, x[b], first, valid[b])
        torch.testing.assert_close(out[b], expected_out, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(slots[b], expected_slots.detach(), atol=1e-5, rtol=1e-4)


def test_two_windows_split_at_a_segment_equal_one_window() -> None:
    module, x = memory(), torch.randn(B, 6 * L, C)
    whole, slots = module(x)
    first, carried = module(x[:, :2 * L])
    second, after = module(x[:, 2 * L:], slots_BMD=carried)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after, slots, atol=1e-5, rtol=1e-5)


def test_reset_touches_one_stream_and_no_other() -> None:
    module, x, carried = memory(), torch.randn(B, 2 * L, C), torch.randn(B, S, E)
    kept_out, kept = module(x, slots_BMD=carried)
    fresh_out, fresh = module(x)
    out, slots = module(x, slots_BMD=carried, reset_B=torch.tensor([False, True, False]))
    for mixed, untouched, started in ((out, kept_out, fresh_out), (slots, kept, fresh)):
        assert torch.equal(mixed[[0, 2]], untouched[[0, 2]])
        assert torch.equal(mixed[1], started[1])
        assert not torch.equal(mixed[1], untouched[1])


def test_padding_leaves_slots_bit_identical_and_partial_padding_is_not_seen() -> None:
    module, carried = memory(), torch.randn(B, S, E)
    x = torch.randn(B, 3 * L, C)
    nothing = torch.zeros(B, 3 * L, dtype=torch.bool)
    assert torch.equal(module(x, slots_BMD=carried, valid_BT=nothing)[1], carried)
    short = torch.arange(3 * L).expand(B, -1) < L + 3
    _, slots = module(x, slots_BMD=carried, valid_BT=short)
    torch.testing.assert_close(slots, module(x[:, :L + 3], slots_BMD=carried)[1], atol=1e-6, rtol=1e-6)
    x[:, L + 3:] = 100.0
    assert torch.equal(module(x, slots_BMD=carried, valid_BT=short)[1], slots)


def test_a_segment_does_not_see_itself_or_later_ones() -> None:
    module, x = memory(), torch.randn(B, 3 * L, C, requires_grad=True)
    out, _ = module(x)
    for segment in range(3):
        (gradient,) = torch.autograd.grad(out[:, segment * L].square().sum(), x, retain_graph=True)
        by_token = gradient.abs().sum((0, 2))
        assert (by_token[:segment * L + 1] > 0).all()
        assert (by_token[segment * L + 1:] == 0).all()


def test_equal_slots_do_not_stay_equal() -> None:
    module, x = memory(), torch.randn(B, L, C)
    _, slots = module(x, slots_BMD=torch.ones(B, S, E))
    assert (slots.std(dim=1) > 1e-4).any()


def test_slots_are_detached_and_fp32_under_bf16() -> None:
    module = memory().to(torch.bfloat16)
    out, slots = module(torch.randn(B, 2 * L, C, dtype=torch.bfloat16), slots_BMD=torch.randn(B, S, E))
    assert out.dtype == torch.bfloat16 and slots.dtype == torch.float32
    assert out.requires_grad and not slots.requires_grad


def test_a_small_step_is_not_lost_to_rounding_in_bf16() -> None:
    module = memory().to(torch.bfloat16)
    module.update_rate = 1e-4  # far below bf16's resolution of 2^-8
    carried = torch.ones(B, S, E)
    _, slots = module(torch.randn(B, L, C, dtype=torch.bfloat16), slots_BMD=carried)
    assert (slots != carried).float().mean() > 0.5
