"""Recipe knn against a mixture that is computed from all entries at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lmcode
from lmcode.config import ConfigError
from lmcode.recipes.knn import BASE, DIGITS, mixed, tokens_in, values_of
from tests.helpers.recipe_models import VOCAB, attached, plain, read, tokens

EVERYTHING = {"memory": {"virtual_shards": 1, "importance_weight": 0.0}, "memory_top_k": 256, "sinks": 0, "cache": 0}


def test_a_share_of_the_probability_goes_to_what_followed_the_nearest_contexts() -> None:
    """Every entry is a neighbour here, so the mixture follows from what is stored and the model's own numbers."""
    model, ids_BT = attached("llama", "knn", **EVERYTHING), tokens(1, 40, seed=4)
    recipe, seen = model.lmcode.recipe, tokens(1, 9, seed=5)
    read(model, ids_BT, window=8)
    with torch.no_grad():
        hidden = plain("llama")(ids_BT[:, :8], output_hidden_states=True).hidden_states[2]
        first = recipe.keys_of(hidden)[0]
    bank, = model.lmcode.banks.values()
    state = bank.state(0)
    live = state["id"].argsort(stable=True)[-39:]  # the first token followed none
    assert (state["id"] >= 0).sum() == 39
    torch.testing.assert_close(tokens_in(state["value"][0, live]), ids_BT[0, 1:])
    torch.testing.assert_close(state["key"][0, live][:7], first[:7], rtol=0, atol=1e-5)

    ours = model(seen).logits.log_softmax(-1)[0]
    with torch.no_grad():
        alone = plain("llama")(seen, output_hidden_states=True)
        cosine_TM = recipe.keys_of(alone.hidden_states[2])[0] @ state["key"][0, live].T
        weight_TM = (cosine_TM * recipe.log_temperature.exp()).softmax(-1)
        even_T = -weight_TM.max(-1).values.log()
        share_T = torch.sigmoid(recipe.bias + recipe.slope * (cosine_TM.max(-1).values - 0.7) + recipe.spread * even_T)
        near_TX = torch.zeros(9, VOCAB).index_add(1, ids_BT[0, 1:], weight_TM)
        expected = ((1 - share_T[:, None]) * alone.logits[0].softmax(-1) + share_T[:, None] * near_TX).log()
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
    assert 0.0 < float(share_T.min()) and float(share_T.max()) < 1.0


def test_what_follows_across_windows_is_stored_whatever_their_length() -> None:
    stored = []
    for window in (1, 5, 40):
        model = attached("llama", "knn", **{**EVERYTHING, "cache": 40})
        read(model, tokens(2, 40, seed=4), window=window)
        bank, = model.lmcode.banks.values()
        state = bank.state(0)
        live = state["id"] >= 0
        rows = sorted(zip(state["namespace"][live].tolist(), tokens_in(state["value"][0, live]).tolist(), strict=True))
        stored.append(rows)
    assert stored[0] == stored[1] == stored[2] and len(stored[0]) == 2 * 39


def test_padding_and_new_documents_follow_nothing() -> None:
    model = attached("llama", "knn", **EVERYTHING)
    backbone, ids_BT = model.lmcode, tokens(2, 12, seed=4)
    valid_BT = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    first = backbone(ids_BT[:, :6], valid_BT=valid_BT)
    second = backbone(ids_BT[:, 6:], state=first.state, reset_B=torch.tensor([True, False]))
    offered = [next(iter(one.memory.values())).candidates for one in (first, second)]
    assert [one.valid_N.view(2, 6).sum(1).tolist() for one in offered] == [[5, 1], [5, 6]]
    torch.testing.assert_close(offered[1].key_HND[0, 6], first.state.recipe[0][1])
    torch.testing.assert_close(first.state.recipe[0][1], offered[0].key_HND[0, 6 + 2], msg="the last token that is one")


def test_repeated_text_becomes_likelier() -> None:
    """The second reading of a random text, in another stream of the same namespace, which the plain model cannot know."""
    model, ids_BT = attached("llama", "knn", opened=False, memory_bias=2.0), tokens(1, 60, seed=4)
    before, _ = read(model, ids_BT, window=20, write=False)
    read(model, ids_BT, window=20)
    after, _ = read(model, ids_BT, window=20, write=False)
    assert float(after.mean()) < 0.5 * float(before.mean())


def test_a_model_may_be_made_bf16_afterwards() -> None:
    model, ids_BT = attached("llama", "knn", **EVERYTHING), tokens(1, 20, seed=4)
    read(model, ids_BT, window=8)
    expected = model(ids_BT).logits
    torch.testing.assert_close(model.to(torch.bfloat16)(ids_BT).logits.float(), expected, rtol=0, atol=0.3)


@given(st.lists(st.integers(0, BASE**DIGITS - 1), min_size=1, max_size=50), st.sampled_from([6, 32, 64]))
def test_a_value_is_one_token(ids: list[int], width: int) -> None:
    id_N = torch.tensor(ids)
    value_NX = values_of(id_N, width)
    assert torch.equal(tokens_in(value_NX), id_N) and torch.equal(tokens_in(value_NX.bfloat16().float()), id_N)
    assert float(value_NX.norm(dim=-1).max()) < 3.0, "memory.max_norm scales longer ones down"


def test_means_of_two_tokens_are_no_token() -> None:
    id_N = torch.randperm(50_000, generator=torch.Generator().manual_seed(0))[:2000]
    one, other = values_of(id_N, 64).chunk(2)
    for weight in (0.5, 0.25, 0.1):
        assert bool((tokens_in(one * weight + other * (1 - weight)) == -1).all())


def plainly(logits: torch.Tensor, token: torch.Tensor, weight: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """The mixture over the whole vocabulary."""
    weight = weight.where(token >= 0, 0.0)
    near = torch.zeros_like(logits).scatter_add(-1, token.clamp(min=0), weight)
    return ((1 - share[..., None]) * logits.softmax(-1) + share[..., None] * near).log()


def test_the_mixture_and_its_gradient_are_those_of_all_probabilities() -> None:
    parts = []
    for mix in (mixed, plainly):
        torch.manual_seed(1)
        logits = (torch.randn(2, 3, 11, dtype=torch.float64) * 3).requires_grad_()
        weight = torch.rand(2, 3, 4, dtype=torch.float64).softmax(-1).requires_grad_()
        share = torch.tensor([[0.1, 0.3, 0.9]] * 2, dtype=torch.float64).requires_grad_()
        token = torch.tensor([[[3, 3, 7, 0], [0, 1, 2, 3], [5, 5, 5, 5]], [[10, -1, -1, -1], [9, 9, -1, -1], [4, 4, 2, 2]]])
        ours = mix(logits, token, weight, share).log_softmax(-1)
        (ours * torch.randn(2, 3, 11, dtype=torch.float64)).sum().backward()
        parts.append((ours, logits.grad, share.grad, weight.grad))
    for one, other in zip(*parts, strict=True):  # the weights of the second row do not sum to 1, where tokens are missing
        torch.testing.assert_close(one[0], other[0], rtol=1e-9, atol=1e-9)


def test_the_mixture_stays_finite() -> None:
    torch.manual_seed(0)
    logits = (torch.randn(2, 3, 11) * 200).requires_grad_()  # most probabilities are 0 in fp32
    weight = torch.rand(2, 3, 4).softmax(-1).requires_grad_()
    share = torch.tensor([[0.0, 0.3, 1.0]] * 2).requires_grad_()
    token = torch.randint(-1, 11, (2, 3, 4))
    ours = mixed(logits, token, weight, share)
    torch.testing.assert_close(ours[:, 0].softmax(-1), logits[:, 0].softmax(-1))
    ours.gather(-1, token[..., :1].clamp(min=0)).sum().backward()
    assert all(bool(one.isfinite().all()) for one in (ours, logits.grad, weight.grad, share.grad))


@pytest.mark.parametrize(("options", "message"), [
    ({"memory_layers": (0, 1)}, r"knn model.memory_layers must be one layer, whose hidden states are keys: got \(0, 1\)"),
    ({"memory_layers": "all"}, r"must be one layer, .*: got 'all'"),
    ({"memory_heads": 2}, r"with the recipe knn model.memory_heads must be 1 for this backbone: got 2"),
    ({"memory_head_dim": 5}, r"model.memory_head_dim must be at least 6, to hold a token: got 5"),
    ({"seed": -1}, r"model.recipe_options of 'knn': seed"),
])
def test_what_does_not_fit_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lmcode.attach(plain("llama"), "knn", **options)
