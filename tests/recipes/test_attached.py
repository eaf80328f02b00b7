"""What every recipe must do in every family: nothing while its memory is empty, no look ahead, the same however called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lmcode
from lmcode import ConfigError, estimate
from lmcode.config import RECIPES
from lmcode.dist import Group
from lmcode.opening import open_model
from lmcode.presets import load_run_config
from lmcode.recipes import foreign
from lmcode.recipes.attached import Attached
from lmcode.report.facts import gather
from tests.helpers.kills import growing, kills
from tests.helpers.ranks import run_on_ranks
from tests.helpers.recipe_models import FAMILIES, OPTIONS, attached, plain, read, tokens

EVERY = [(family, recipe) for family in FAMILIES for recipe in RECIPES]
# Rotated positions and learned ones, grouped heads and plain; every other family with one recipe.
SOME = [(family, recipe) for family, recipe in EVERY if family in ("llama", "gpt2") or recipe == "camelot"]


@pytest.mark.parametrize(("family", "recipe"), EVERY)
def test_an_empty_memory_changes_nothing(family: str, recipe: str) -> None:
    ids_BT, model = tokens(2, 24), attached(family, recipe, opened=False)
    expected = plain(family)(ids_BT).logits
    torch.testing.assert_close(model(ids_BT).logits, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.lmcode(ids_BT).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_with_a_cache_that_holds_all_are_one_window(family: str) -> None:
    ids_BT, model = tokens(2, 40), attached(family, "camelot", cache=40)
    expected = plain(family)(ids_BT, labels=ids_BT).loss
    loss_BT, outputs = read(model, ids_BT, window=8)
    torch.testing.assert_close(loss_BT.mean(), expected, rtol=0, atol=1e-5)
    assert not any(bool(one.candidates.valid_N.any()) for output in outputs for one in output.memory.values())


@pytest.mark.parametrize(("family", "recipe"), SOME)
def test_a_memory_changes_what_is_read_and_no_token_sees_a_later_one(family: str, recipe: str) -> None:
    """In our way: windows, carried rows, entries that were written between them."""
    ids_BT, changed_at = tokens(2, 48), 37
    other_BT = ids_BT.clone()
    other_BT[:, changed_at] = (other_BT[:, changed_at] + 1) % 300
    loss_BT, outputs = read(attached(family, recipe), ids_BT, window=8)
    other_loss_BT, _ = read(attached(family, recipe), other_BT, window=8)
    blind_BT, _ = read(attached(family, recipe), ids_BT, window=8, write=False)
    assert torch.equal(loss_BT[:, :changed_at - 1], other_loss_BT[:, :changed_at - 1])
    assert not torch.allclose(loss_BT[:, changed_at - 1:], other_loss_BT[:, changed_at - 1:], atol=1e-4)
    assert not torch.allclose(loss_BT[:, 32:], blind_BT[:, 32:], atol=1e-5), "the memory is read"
    assert all(bool(one.hits.valid_HNK.any()) for one in outputs[-1].memory.values())


@pytest.mark.parametrize(("family", "recipe"), SOME)
def test_no_token_sees_a_later_one_in_a_call_of_transformers(family: str, recipe: str) -> None:
    model, ids_BT = attached(family, recipe), tokens(2, 20)
    empty_BTV = model(ids_BT).logits
    model.lmcode.store_experience(tokens(3, 30, seed=1))
    other_BT = ids_BT.clone()
    other_BT[:, 12] = (other_BT[:, 12] + 1) % 300
    logits_BTV, other_BTV = model(ids_BT).logits, model(other_BT).logits
    torch.testing.assert_close(logits_BTV[:, :12], other_BTV[:, :12], rtol=0, atol=1e-6)
    assert not torch.allclose(logits_BTV[:, 12:], other_BTV[:, 12:], atol=1e-3)
    assert not torch.allclose(logits_BTV, empty_BTV, atol=1e-4), "the memory is read"


@pytest.mark.parametrize(("family", "recipe"), SOME)
def test_texts_are_written_alike_with_a_cache_without_and_among_others(family: str, recipe: str) -> None:
    model = attached(family, recipe)
    model.lmcode.store_experience(tokens(3, 30, seed=1))
    long_BT, short_BT = tokens(1, 14, seed=2), tokens(1, 9, seed=3)
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    alone = [model.generate(one, attention_mask=torch.ones_like(one), **settings)[0, one.shape[1]:]
             for one in (long_BT, short_BT)]
    slow = model.generate(long_BT, attention_mask=torch.ones_like(long_BT), use_cache=False, **settings)[0, 14:]
    assert torch.equal(alone[0], slow)
    ids_BT = torch.cat([long_BT, torch.nn.functional.pad(short_BT, (5, 0))])
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, :5] = 0
    assert torch.equal(model.generate(ids_BT, attention_mask=mask_BT, **settings)[:, 14:], torch.stack(alone))
    ours = model.lmcode.generate([long_BT[0].tolist(), short_BT[0].tolist()], max_new_tokens=6, temperature=0.0, namespace=0)
    assert torch.equal(ours[:, 14:], torch.stack(alone))
    beams = [model.generate(ids_BT, attention_mask=mask_BT, num_beams=3, use_cache=cached, **settings)
             for cached in (True, False)]
    assert torch.equal(*beams)
    with model.lmcode.namespace([0, 0]), pytest.raises(ValueError, match=r"got 2 for 6 rows"):
        model.generate(ids_BT, attention_mask=mask_BT, num_beams=3, **settings)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_cache_beyond_a_sliding_window_is_as_none(recipe: str) -> None:
    """Mistral's layers see 48 tokens here: 90 are read at once, or 40 and then single ones, or seven at a time."""
    model, ids_BT = attached("mistral", recipe), tokens(2, 90)
    model.lmcode.store_experience(tokens(3, 30, seed=1))
    with torch.no_grad():
        expected_BTV, shifted_BTV = model(ids_BT).logits, model(ids_BT[:, 30:]).logits
        for step in (1, 7):
            cache, parts = foreign.new_cache(model), []
            for start in (0, *range(40, 90, step)):
                part_BT = ids_BT[:, start:start + (step if start else 40)]
                parts.append(model(part_BT, past_key_values=cache, use_cache=True).logits)
            torch.testing.assert_close(torch.cat(parts, dim=1), expected_BTV, rtol=0, atol=1e-4)
    assert not torch.allclose(shifted_BTV[:, 5], expected_BTV[:, 35], atol=1e-3), "what lies in the window is read"


@pytest.mark.parametrize("recipe", RECIPES)
def test_recomputed_layers_give_the_same_and_search_once(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grads, searches = [], []
    for recompute in (False, True):
        model = attached("llama", recipe, train_backbone=True)
        model.lmcode.store_experience(tokens(3, 30, seed=1))
        bank = next(iter(model.lmcode.banks.values()))
        search, calls = bank.search, []

        def counted(*args: Any, search: Any = search, calls: list[int] = calls, **named: Any) -> Any:
            calls.append(1)
            return search(*args, **named)

        monkeypatch.setattr(bank, "search", counted)
        model.train()
        model.lmcode.activation_checkpointing = recompute
        ids_BT = tokens(2, 16)
        output = model.lmcode(ids_BT, ids_BT, namespace_B=torch.zeros(2, dtype=torch.int64))
        output.loss.backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
        searches.append(len(calls))
    assert searches == [1, 1] and len(grads[0]) == len(grads[1]) > 0
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_deleted_text_leaves_nothing(recipe: str) -> None:
    model, ids_BT = attached("llama", recipe), tokens(2, 20)
    before = model(ids_BT).logits
    model.lmcode.store_experience(tokens(3, 30, seed=1), stored_at=1)
    assert not torch.allclose(model(ids_BT).logits, before, atol=1e-4)
    gone = model.lmcode.delete_experiences(older_than=60)
    assert gone.experiences == 3 and gone.entries > 0
    torch.testing.assert_close(model(ids_BT).logits, before, rtol=0, atol=1e-6)
    for bank in model.lmcode.banks.values():
        assert bank.stats()["live"] == 0 and not any(bool(bank.state(shard)["value"].any()) for shard in bank.owned)


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_saved_is_the_memory_and_what_was_trained(recipe: str, tmp_path: Path) -> None:
    backbone, saved, ids_BT = tmp_path / "backbone", tmp_path / "saved", tokens(2, 20)
    plain("llama").save_pretrained(backbone)
    first = open_model(backbone, [f"model.recipe={recipe}", "model.long_term_memory_slots=256"]).model
    assert isinstance(first, Attached)
    with torch.no_grad():
        for parameter in first.recipe.parameters():
            parameter.normal_(std=0.2)
    first.store_experience(tokens(3, 30, seed=1))
    first.save_pretrained(saved)
    names = [name for name, _ in first.kept_parameters()]
    assert all(name.startswith("recipe.") for name in names) and bool(names) == bool([*first.recipe.parameters()])
    second = open_model(saved).model
    assert isinstance(second, Attached)
    torch.testing.assert_close(second.backbone(ids_BT).logits, first.backbone(ids_BT).logits, rtol=0, atol=1e-6)
    assert (second.banks and {layer: bank.content_hash() for layer, bank in second.banks.items()}
            == {layer: bank.content_hash() for layer, bank in first.banks.items()})
    plain("llama", seed=5).save_pretrained(backbone)
    with pytest.raises(ConfigError, match="this memory was made with the backbone .* its hash is"):
        open_model(saved)


@pytest.mark.parametrize("recipe", ["camelot", "lmcode"])
def test_a_kill_while_saving_leaves_the_old_memory_or_the_new_one(recipe: str, tmp_path: Path) -> None:
    """At one in so many of the calls that change the file system: what lies there can be opened and is one of the two; a
    recipe without weights and one with."""
    backbone, saved = tmp_path / "backbone", tmp_path / "saved"
    plain("llama").save_pretrained(backbone)
    model = open_model(backbone, [f"model.recipe={recipe}", "model.long_term_memory_slots=64", "memory.virtual_shards=2",
                                  "memory.experience_slots=8", "model.memory_layers=[1]"]).model

    def facts(one: Attached) -> tuple[Any, ...]:
        weights = [parameter.tolist() for _, parameter in one.kept_parameters()]
        return [bank.content_hash() for bank in one.banks.values()], weights, len(one.experiences.held)

    model.store_experience(tokens(1, 30, seed=1))
    model.save_pretrained(saved)
    former = facts(model)
    model.store_experience(tokens(1, 30, seed=2))
    with torch.no_grad():
        for parameter in model.recipe.parameters():
            parameter.add_(0.5)
    states, found = (former, facts(model)), set()
    for _, killed in kills(saved, lambda: model.save_pretrained(saved), growing(12)):
        found.add((states.index(facts(open_model(saved).model)), killed))
    assert found >= {(0, True), (1, False)}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_backbone_may_be_bf16(recipe: str, family: str) -> None:
    """The recipe's weights stay fp32, but for layers that are copies of the backbone's. With an empty memory it is the plain
    model to bf16's precision, its losses with a memory are near those of fp32, and what is trained has gradients."""
    ids_BT, model = tokens(2, 48), plain(family).to(torch.bfloat16)
    expected = model(ids_BT).logits
    lmcode.attach(model, recipe, memory={"virtual_shards": 4}, long_term_memory_slots=256,
                  **{"sinks": 2, "cache": 6, **OPTIONS[recipe]})
    logits = model(ids_BT).logits
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.2)
    loss_BT, _ = read(model, ids_BT, window=8)
    expected_BT, _ = read(attached(family, recipe, opened=False), ids_BT, window=8)
    torch.testing.assert_close(loss_BT, expected_BT, rtol=0, atol=0.2)
    model.lmcode.store_experience(tokens(3, 30, seed=1))
    assert not torch.equal(model(ids_BT).logits, logits) or recipe in ("lmcode", "longmem"), "these two begin closed"
    assert model.lmcode.generate(ids_BT[:, :9], max_new_tokens=4, temperature=0.0, namespace=0).shape == (2, 13)
    model.lmcode.train()
    output = model.lmcode(ids_BT[:, :16], ids_BT[:, :16])
    trained = [parameter for _, parameter in model.lmcode.kept_parameters()]
    if trained:
        output.loss.backward()
    assert recipe == "longmem" or all(one.dtype == torch.float32 for one in trained)
    assert any(one.grad is not None for one in trained) == bool(trained)


@pytest.mark.parametrize(("options", "message"), [
    ({"recipe": "camel"}, r"model.recipe must be one of camelot, .*Did you mean 'camelot'"),
    ({"cashe": 3}, r"attach has no option 'cashe' with the recipe 'camelot'. Did you mean 'cache'"),
    ({"cache": -1}, r"model.recipe_options of 'camelot': cache"),
    ({"cache": 300}, r"sinks and cache must leave room for a window: the backbone has 256 positions"),
    ({"memory_layers": (7,)}, r"memory_layers must lie in 0..2: got 7"),
    ({"memory_heads": 3}, r"with the recipe camelot model.memory_heads must be 2 for this backbone: got 3"),
    ({"retrieval_stride": 4}, r"model.retrieval_stride must be 1"),
    ({"memory_values": "token"}, r"model.memory_values is of our own model.* must be 'state', got 'token'"),
    ({"memory_key_tokens": 2}, r"model.memory_key_tokens is of our own model.* must be 0, got 2"),
])
def test_what_does_not_fit_is_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        lmcode.attach(plain("llama"), **options)
    assert "\n" not in str(caught.value)


def test_other_models_are_refused_by_name(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, BloomConfig

    with pytest.raises(ConfigError, match=r"architectures llama, mistral, qwen2, qwen3, gpt2, gpt_neox: got 'bloom'"):
        lmcode.attach(AutoModelForCausalLM.from_config(BloomConfig(vocab_size=30, hidden_size=8, n_layer=1, n_head=1)))
    with pytest.raises(ConfigError, match="attach takes a causal language model of transformers: got Linear"):
        lmcode.attach(torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="attached to once"):
        lmcode.attach(attached("llama", "camelot"))
    plain("llama").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="by --recipe or model.recipe=, one of camelot"):
        open_model(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, "model_type": "bert"}))
    with pytest.raises(ConfigError, match="got 'bert'"):
        open_model(tmp_path, ["model.recipe=camelot"])


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_estimate_counts_a_backbone_by_its_config(recipe: str, tmp_path: Path) -> None:
    plain("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    settings = [f"model.backbone={tmp_path}", f"model.recipe={recipe}", "train.sequence_length=32"]
    model = attached("llama", recipe).lmcode
    config = load_run_config(None, settings)
    assert estimate.count_parameters(config) == sum(p.numel() for p in model.parameters())
    assert estimate.count_trained(config) == sum(p.numel() for _, p in model.kept_parameters())


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_report_shows_what_was_read(recipe: str) -> None:
    texts = [row.tolist() for row in tokens(2, 60)]
    facts = gather(attached("llama", recipe).lmcode, texts, title="", length=16)
    assert facts.reading is not None and {*facts.reading.layers} == {one.layer for one in facts.banks}
    assert all(0 < one.hit_share < 1 for one in facts.reading.layers.values())


def _read_together(recipe: str, group: Group) -> tuple[list[float], torch.Tensor]:
    """Four streams that the ranks share are read window by window, with commits: losses and ids of hits of all of them."""
    backbone = attached("llama", recipe, group=group).lmcode
    mine = slice(group.rank * 4 // group.size, (group.rank + 1) * 4 // group.size)
    ids_BT, state, losses, ids = tokens(4, 40)[mine], None, [], []
    for start in range(0, 40, 8):
        part_BT = ids_BT[:, start:start + 8]
        output = backbone(part_BT, targets_BT=part_BT.roll(-1, 1), state=state, namespace_B=torch.arange(4)[mine])
        state = output.state
        losses += group.all_gather(output.token_loss.detach().sum(1), phase="test").tolist()
        hits = next(iter(output.memory.values())).hits.id_HNK.transpose(0, 1).contiguous()
        ids.append(group.all_gather(hits, phase="test"))
        backbone.memories.commit({layer: [one] for layer, one in output.memory.items()}, step=start)
    return losses, torch.cat(ids)


def _on_four_and_on_two() -> list[dict[str, tuple[list[float], torch.Tensor]]]:
    world = Group.world()
    return [{recipe: _read_together(recipe, group) for recipe in OPTIONS} for group in (world, world.split(2)[0])]


def test_ranks_change_nothing() -> None:
    alone = {recipe: _read_together(recipe, Group()) for recipe in OPTIONS}
    for made in run_on_ranks(_on_four_and_on_two, 4):
        for together in made:
            for recipe, (losses, ids) in together.items():
                torch.testing.assert_close(torch.tensor(losses), torch.tensor(alone[recipe][0]), rtol=0, atol=1e-4)
                assert float((ids == alone[recipe][1]).float().mean()) > 0.99, recipe  # near ties may trade places


def test_the_cache_goes_by_either_name() -> None:
    """transformers 5.24 renames past_key_values."""
    class Old:
        def forward(self, input_ids: Any, past_key_values: Any = None) -> None: ...

    class New:
        def forward(self, input_ids: Any, cache: Any = None) -> None: ...

    assert (foreign.cache_name(Old()), foreign.cache_name(New())) == ("past_key_values", "cache")
    cache = foreign.new_cache(plain("llama"))
    assert foreign.cache_in([None, 3, cache]) is cache and foreign.cache_in([3]) is None
