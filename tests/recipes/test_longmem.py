"""Recipe longmem: the side network, what it carries, what it reads, what is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lmcode
from lmcode import ConfigError
from lmcode.recipes.longmem import sources_of
from tests.helpers.recipe_models import FAMILIES, attached, plain, read, tokens


def test_a_side_layer_begins_as_the_second_of_its_two() -> None:
    assert (sources_of(1), sources_of(2), sources_of(3), sources_of(6)) == ([0], [1], [1, 2], [1, 3, 5])
    model = attached("llama", "longmem", opened=False)
    recipe, layers = model.lmcode.recipe, model.lmcode.anatomy.layers
    for source, side in zip([1, 2], recipe.layers, strict=True):
        assert side is not layers[source] and type(side) is type(layers[source])
        for name, weight in layers[source].state_dict().items():
            assert torch.equal(side.state_dict()[name], weight), name
    assert [side.self_attn.layer_idx for side in recipe.layers] == [3, 4]
    assert [layer.self_attn.layer_idx for layer in layers] == [0, 1, 2]


@pytest.mark.parametrize("family", FAMILIES)
def test_side_layers_that_do_nothing_hand_on_the_whole_backbone(family: str) -> None:
    """The residuals from network to network add up to all that the backbone's layers do, also where their number is odd."""
    model, ids_BT = attached(family, "longmem", opened=False), tokens(2, 12)
    with torch.no_grad():
        model.lmcode.recipe.opening_D.fill_(1.0)
        changed_BTV = model(ids_BT).logits
        for parameter in model.lmcode.recipe.layers.parameters():
            parameter.zero_()
    expected_BTV = plain(family)(ids_BT).logits
    torch.testing.assert_close(model(ids_BT).logits, expected_BTV, rtol=0, atol=1e-5)
    assert not torch.allclose(changed_BTV, expected_BTV, atol=1e-2)


def test_the_residual_is_the_papers() -> None:
    """H_side[l] = f(H_side[l-1]) + H[2l] - H[2l-2], layers counted from 1; H_side[0] = H[0], the embeddings."""
    model, ids_BT = attached("llama", "longmem"), tokens(2, 12)
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []
    for side in model.lmcode.recipe.layers:
        side.register_forward_hook(lambda _, args, out: calls.append((args[0], out)))
    ends: list[torch.Tensor] = []
    model.lmcode.recipe.norm.register_forward_hook(lambda _, args, out: ends.append(args[0]))
    model(ids_BT)
    layer_outputs: list[torch.Tensor] = []
    other = plain("llama")
    for layer in other.model.layers:
        layer.register_forward_hook(lambda _, args, out: layer_outputs.append(out))
    other(ids_BT)
    hidden = [other.model.embed_tokens(ids_BT), *layer_outputs]
    torch.testing.assert_close(calls[0][0], hidden[0])
    torch.testing.assert_close(calls[1][0], calls[0][1] + hidden[2] - hidden[0])
    torch.testing.assert_close(ends[0], calls[1][1] + hidden[3] - hidden[2])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_streams_carry_rows_for_side_layers_too(family: str) -> None:
    """Windows beside a cache that holds all are one window, for the opened side network as well."""
    ids_BT, model = tokens(2, 40), attached(family, "longmem", cache=40)
    expected = model(ids_BT, labels=ids_BT).loss
    loss_BT, outputs = read(model, ids_BT, window=8)
    torch.testing.assert_close(loss_BT.mean(), expected, rtol=0, atol=1e-5)
    assert len(outputs[-1].state.key) == 5


def test_a_side_layer_sees_a_sliding_window_as_its_source_does() -> None:
    """Mistral's window is 48 here; the room of a side layer in the cache holds all keys."""
    model, ids_BT = attached("mistral", "longmem"), tokens(1, 44)
    settings: dict[str, Any] = {"attention_mask": torch.ones_like(ids_BT), "max_new_tokens": 12, "do_sample": False,
                                "pad_token_id": 0, "output_logits": True, "return_dict_in_generate": True}
    cached, slow = (torch.stack(model.generate(ids_BT, use_cache=use, **settings).logits) for use in (True, False))
    torch.testing.assert_close(cached, slow, rtol=0, atol=1e-4)


def test_only_the_side_network_gets_gradients_and_is_kept() -> None:
    model, ids_BT = attached("llama", "longmem"), tokens(2, 32)
    backbone = model.lmcode
    outputs = read(model, ids_BT, window=8)[1]
    backbone(ids_BT[:, :8], ids_BT[:, :8], state=outputs[-1].state).loss.backward()
    own = {name for name, _ in backbone.recipe.named_parameters()}
    assert {name for name, parameter in backbone.recipe.named_parameters()
            if parameter.grad is not None and bool(parameter.grad.any())} == own
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if "lmcode_recipe" not in name)
    assert {name for name, _ in backbone.kept_parameters()} == {f"recipe.{name}" for name in own}


def test_the_way_over_opens_in_the_first_step() -> None:
    """Closed, it alone gets a gradient; one step later all of the side network does."""
    model, ids_BT = attached("llama", "longmem", opened=False), tokens(2, 24)
    recipe = model.lmcode.recipe
    model.lmcode(ids_BT, ids_BT).loss.backward()
    assert recipe.opening_D.grad.abs().min() > 0
    assert not any(bool(one.grad.any()) for one in recipe.layers.parameters())
    torch.optim.SGD(recipe.parameters(), lr=0.1).step()
    model.lmcode(ids_BT, ids_BT).loss.backward()
    assert all(bool(one.grad.any()) for one in recipe.layers.parameters())


def test_the_read_is_a_gated_sum_over_found_tokens() -> None:
    """In the layer that reads, against loops over the entries of the bank as they are; not in the other one."""
    model = attached("llama", "longmem", memory_layers=(2,), memory_top_k=2, sinks=0, cache=0, distance=9,
                     memory={"virtual_shards": 1, "importance_weight": 0.0})
    backbone, seen = model.lmcode, []
    read(model, tokens(1, 24, seed=4), window=12)
    state = backbone.banks[2].state(0)
    live = state["id"] >= 0
    key_HMCD, value_HMCD = (state[name][:, live].unflatten(-1, (4, -1)) for name in ("key", "value"))
    assert key_HMCD.shape == (2, 6, 4, 8)
    after_attention = backbone.recipe.after_attention

    def spied(layer: int, query: Any, mixed: Any, current: Any) -> Any:
        result = after_attention(layer, query, mixed, current)
        seen.append((layer, backbone.anatomy.at_distance(query, 9)[0], mixed[0], result[0]))
        return result

    backbone.recipe.after_attention = spied
    model(tokens(1, 7))
    assert [layer for layer, *_ in seen] == [3, 4] and torch.equal(seen[0][2], seen[0][3])
    _, query, mixed, result = seen[1]
    for head in range(4):
        gate = torch.sigmoid(backbone.recipe.memory_gate_H[head])
        for token in range(7):
            score_MC = key_HMCD[head // 2] @ query[head, token]
            best = score_MC.mean(1).argsort(descending=True)[:2]
            found = score_MC[best].flatten().softmax(0) @ value_HMCD[head // 2, best].flatten(0, 1)
            expected = gate * found + (1 - gate) * mixed[head, token]
            torch.testing.assert_close(result[head, token], expected, rtol=0, atol=1e-5)


def test_what_is_stored_are_the_backbones_keys_and_values_in_their_order() -> None:
    """Also of a text whose length is no multiple of a chunk, of several windows, and of one shorter than a chunk."""
    model = attached("llama", "longmem", context_length=10, opened=True, memory={"virtual_shards": 1})
    backbone, seen = model.lmcode, []
    attend = backbone._attend

    def spied(current: Any, module: Any, query: Any, key: Any, value: Any, mask: Any, **settings: Any) -> Any:
        if module.layer_idx == 1:
            seen.append((backbone.anatomy.rotate(key, current.tables, back=True)[0], value[0]))
        return attend(current, module, query, key, value, mask, **settings)

    backbone._attend = spied
    backbone.store_experience(tokens(1, 13))
    key, value = (torch.cat([part[0] for part in seen], dim=1) if at == 0 else torch.cat([part[1] for part in seen], dim=1)
                  for at in (0, 1))
    at = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 10, 11, 12, 12]
    state = backbone.banks[1].state(0)
    order = state["id"].argsort()[-4:]
    for name, expected in (("key", key[:, at] * 8 ** -0.5), ("value", value[:, at])):
        torch.testing.assert_close(state[name][:, order].reshape(2, 16, 8), expected, rtol=0, atol=1e-5)
    backbone.store_experience([5, 6])
    assert backbone.banks[1].stats()["live"] == 5


@pytest.mark.parametrize(("options", "message"), [
    ({"memory_layers": "all"}, "model.memory_layers must be one layer, whose keys and values are stored: got 'all'"),
    ({"memory_layers": (0, 1)}, "model.memory_layers must be one layer"),
    ({"memory_head_dim": 8}, "with the recipe longmem model.memory_head_dim must be 32 for this backbone: got 8"),
    ({"retrieval_stride": 2}, "model.retrieval_stride must be 1"),
    ({"chunk": 0}, "model.recipe_options of 'longmem': chunk"),
    ({"chunck": 2}, "attach has no option 'chunck' with the recipe 'longmem'. Did you mean 'chunk'"),
])
def test_what_does_not_fit_is_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        lmcode.attach(plain("llama"), "longmem", **options)
    assert "\n" not in str(caught.value)
