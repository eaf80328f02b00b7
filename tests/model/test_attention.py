"""Self-attention: rotation, causality, and equality with the textbook loop."""

from __future__ import annotations

import math

import pytest
import torch

from lmcode.config import LMCODEConfig
from lmcode.model.attention import SelfAttention
from lmcode.model.rotary import rotary_table, rotate


def attention(**changes: object) -> tuple[LMCODEConfig, SelfAttention]:
    torch.manual_seed(0)
    config = LMCODEConfig(**({"vocab_size": 32, "hidden_size": 24, "num_heads": 3, "context_length": 64} | changes))
    return config, SelfAttention(config)


def test_rotation_keeps_length_and_leaves_position_zero_alone() -> None:
    x = torch.randn(2, 7, 3, 8)
    turned = rotate(x, rotary_table(7, 8))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(turned[:, 0], x[:, 0])
    assert not torch.allclose(turned[:, 1], x[:, 1])


def test_rotated_scores_depend_on_distance_only() -> None:
    query, key = torch.randn(8), torch.randn(8)
    table = rotary_table(20, 8)
    turned_query = rotate(query.expand(1, 20, 8), table)[0]
    turned_key = rotate(key.expand(1, 20, 8), table)[0]
    score = turned_query @ turned_key.T
    for distance in (0, 3, 11):
        diagonal = score.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rotary", [True, False])
def test_equals_the_loop_over_tokens_and_heads(rotary: bool) -> None:
    config, module = attention()
    x = torch.randn(2, 9, 24)
    rotation = rotary_table(9, 8) if rotary else None
    query, key, value = (part.view(2, 9, 3, 8) for part in module.query_key_value(x).chunk(3, dim=-1))
    if rotation is not None:
        query, key = rotate(query, rotation), rotate(key, rotation)
    mixed = torch.zeros(2, 9, 3, 8)
    for b in range(2):
        for i in range(9):
            for a in range(3):
                weight = (key[b, :i + 1, a] @ query[b, i, a] / math.sqrt(8)).softmax(0)
                mixed[b, i, a] = weight @ value[b, :i + 1, a]
    torch.testing.assert_close(module(x, rotation=rotation), module.output(mixed.view(2, 9, 24)), atol=1e-5, rtol=1e-5)


def test_no_gradient_reaches_later_tokens() -> None:
    _, module = attention()
    x = torch.randn(2, 9, 24, requires_grad=True)
    for t in (0, 4, 8):
        (gradient,) = torch.autograd.grad(module(x, rotation=rotary_table(9, 8))[:, t].square().sum(), x)
        assert gradient[:, t + 1:].abs().max().item() == 0.0 if t < 8 else True
        assert (gradient[:, :t + 1].abs().sum(-1) > 0).all()


def test_keeps_bf16() -> None:
    _, module = attention()
    x = torch.randn(2, 5, 24, dtype=torch.bfloat16)
    assert module.to(torch.bfloat16)(x, rotation=rotary_table(5, 8)).dtype == torch.bfloat16


def test_dropout_acts_in_training_only() -> None:
    _, module = attention(dropout=0.5)
    x = torch.randn(2, 9, 24)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))
