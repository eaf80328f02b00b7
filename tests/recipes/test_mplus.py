"""Recipe mplus: who leaves the pool and where it goes, in which order it is read, and what trains the retriever."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import lmcode
from lmcode import ConfigError, dist
from lmcode.backbone_config import resolved
from lmcode.config import RunConfig, build
from lmcode.dist import Group
from lmcode.recipes.pool import draws, filled, first, last_of, renewed
from lmcode.recipes.recipe import Left, Pass
from lmcode.train import loop, saving, stream_files
from lmcode.train.session import Session
from lmcode.train.start import open_run, set_up
from tests.helpers.ranks import run_on_ranks
from tests.helpers.recipe_models import attached, plain, read, tokens
from tests.helpers.small_run import settings, start, write_corpus


def test_tokens_survive_as_the_paper_says() -> None:
    """2,000 streams with a pool of 40 that 5 enter: after t renewals (1 - 5/40)^t are there, within binomial bounds; each
    token was in the pool or has left it once, in both in the order of age, against a list for each stream."""
    B, N, K, T = 2000, 40, 5, 8
    valid_BT = (torch.arange(T) < 7).expand(B, T)
    pool_BN, count_B = torch.full((B, N), -1), torch.zeros(B, dtype=torch.int64)
    gone: list[list[int]] = [[] for _ in range(B)]
    for step in range(24):
        left_BT = step * T + torch.arange(T).expand(B, T)
        draw_BN = draws(torch.arange(B), torch.full((B,), step), places=N, layer=1, seed=3)
        kept_BN, count_B, dropped_BT, dropped_valid_BT = renewed(count_B, last_of(valid_BT, K), draw_BN)
        both_BX = torch.cat([pool_BN, left_BT], dim=1)
        pool_BN = both_BX.gather(1, kept_BN)
        for row, (ids, ok) in enumerate(zip(both_BX.gather(1, dropped_BT).tolist(), dropped_valid_BT.tolist(), strict=True)):
            leaving = [one for one, left in zip(ids, ok, strict=True) if left]
            assert len(leaving) == (0 if (step + 1) * K <= N else K) and leaving == sorted(leaving)
            gone[row] += leaving
        inside = [row[N - count:] for row, count in zip(pool_BN.tolist(), count_B.tolist(), strict=True)]
        offered = [at * T + place for at in range(step + 1) for place in range(2, 7)]
        for there, out in zip(inside, gone, strict=True):
            assert there == sorted(there) and sorted(there + out) == offered
    assert torch.equal(count_B, torch.full((B,), N)) and bool(filled(count_B, N).all())
    first_full = N // K - 1  # the step whose tokens found the pool full for the first time
    for age in range(24 - first_full):
        came = 23 - age
        survived = sum(sum(came * T <= one < (came + 1) * T for one in row) for row in inside) / K
        share = (1 - K / N) ** age
        bound = 5 * math.sqrt(B * share * (1 - share))  # tokens of one stream exclude each other: K of them vary less
        assert abs(survived - B * share) <= bound + 1e-9, (age, survived / B, share)


def test_a_draw_depends_on_stream_renewal_layer_and_seed_alone() -> None:
    def drawn(namespace: int, renewal: int, layer: int = 0, seed: int = 0) -> list[int]:
        return draws(torch.tensor([namespace]), torch.tensor([renewal]), places=9, layer=layer, seed=seed)[0].tolist()

    both = draws(torch.tensor([5, 7]), torch.tensor([1, 2]), places=9, layer=0, seed=0).tolist()
    assert both == [drawn(5, 1), drawn(7, 2)] and min(both[0]) >= 0
    others = (drawn(5, 1), drawn(6, 1), drawn(5, 2), drawn(5, 1, layer=1), drawn(5, 1, seed=1))
    assert len({tuple(one) for one in others}) == 5
    assert first(torch.tensor([[False, True, False, True]]), 3)[0][0, :2].tolist() == [1, 3]


def _window(model: Any, ids_BT: torch.Tensor, state: Any, **named: Any) -> tuple[Any, dict[int, Left]]:
    """One window in our way, and what left the row of each memory layer."""
    backbone, seen = model.lmcode, {}
    offered = backbone.recipe.offered

    def spied(layer: int, current: Pass, left: Left, known_BT: torch.Tensor) -> Any:
        seen[layer] = left
        return offered(layer, current, left, known_BT)

    backbone.recipe.offered = spied
    try:
        return backbone(ids_BT, targets_BT=ids_BT.roll(-1, 1), state=state, **named), seen
    finally:
        backbone.recipe.offered = offered


def test_what_is_dropped_is_what_the_bank_gets() -> None:
    """Window by window: the pool afterwards and the candidates are the pool before and the last of what left the row; values
    are those of the layer, keys those of the retriever. A document starts with an empty pool."""
    model, state = attached("llama", "mplus"), None
    backbone, ids_BT = model.lmcode, torch.randperm(300).view(2, 150)  # layer 0 has one key and value for each word
    pools: dict[int, list[set[Any]]] = {layer: [set(), set()] for layer in range(3)}
    dropped = 0
    for step in range(8):
        reset_B = torch.tensor([step == 6, False])
        output, seen = _window(model, ids_BT[:, 8 * step:8 * step + 8], state, reset_B=reset_B)
        state = output.state
        for layer in range(3):
            key_BHND, value_BHND, _ = state.recipe[3 * layer:3 * layer + 3]
            candidates, left = output.memory[layer].candidates, seen[layer]
            value_HBTX = candidates.value_HND.unflatten(1, (2, 8))
            torch.testing.assert_close(candidates.key_HND[..., :8].unflatten(1, (2, 8)), torch.einsum(
                "hbtd,hde->hbte", value_HBTX[..., :8], backbone.recipe.keys[str(layer)].weight))
            assert not bool(candidates.key_HND[..., 8:].any())
            for row in range(2):
                before = set() if bool(reset_B[row]) else pools[layer][row]
                valid = int(left.valid_BT[row].sum())
                entered = [_token(left.key_BHTD[row, :, at], left.value_BHTD[row, :, at]) for at in range(valid)][-4:]
                count = int(state.recipe[-2][row])
                inside = [_token(key_BHND[row, :, at], value_BHND[row, :, at]) for at in range(8 - count, 8)]
                out = [_token(value_HBTX[:, row, at, :8] * 8 ** 0.5, value_HBTX[:, row, at, 8:]) for at in range(8)
                       if bool(candidates.valid_N.view(2, 8)[row, at])]
                assert inside[len(inside) - len(entered):] == entered
                assert set(inside) | set(out) == before | set(entered) and not set(inside) & set(out)
                pools[layer][row], dropped = set(inside), dropped + len(out)
        backbone.memories.commit({layer: [one] for layer, one in output.memory.items()}, step=step)
    assert dropped == sum(bank.stats()["live"] for bank in backbone.banks.values()) > 0


def _token(key_HD: torch.Tensor, value_HD: torch.Tensor) -> tuple[float, ...]:
    return tuple(round(number, 4) + 0.0 for number in torch.cat([key_HD, value_HD]).flatten().tolist())


def test_pool_and_hits_join_the_softmax_in_the_order_of_age() -> None:
    """Against one softmax over all keys: hits by their ids, then the pool, at the places right before the row."""
    model = attached("llama", "mplus", memory_layers=(1,), memory_bias=-0.5, sinks=0, cache=0, pool=6, distance=11,
                     memory_top_k=16, memory={"virtual_shards": 1, "importance_weight": 0.0})
    backbone, ids_BT, seen = model.lmcode, tokens(1, 31), {}
    _, outputs = read(model, ids_BT[:, :24], window=8)
    attend = backbone._attend

    def spied(current: Any, module: Any, query: Any, key: Any, value: Any, mask: Any, **settings: Any) -> Any:
        result = attend(current, module, query, key, value, mask, **settings)
        if module.layer_idx == 1:
            seen.update(query=query, key=key, value=value, result=result, current=current)
        return result

    backbone._attend = spied
    output = backbone(ids_BT[:, 24:], targets_BT=ids_BT[:, 24:], state=outputs[-1].state)
    live = backbone.banks[1].state(0)
    kept = live["id"] >= 0
    order = live["id"][kept].argsort()
    entry_HMX = live["value"][:, kept][:, order].float()
    assert entry_HMX.shape[1] == 6 and int(outputs[-1].state.recipe[-2]) == 6
    hits = output.memory[1].hits.id_HNK
    assert bool((hits.sort(-1)[0][..., -6:] == live["id"][kept][order]).all()), "all of a small bank is found"
    anatomy, pool_key, pool_value = backbone.anatomy, *outputs[-1].state.recipe[:2]
    place = torch.arange(-12, 0).clamp(min=-11)[None]
    for head in range(4):
        key_ND = torch.cat([entry_HMX[head // 2, :, :8] * 8 ** 0.5, pool_key[0, head // 2]])[None, None]
        placed = anatomy.rotate(key_ND, anatomy.tables(place, key_ND))[0, 0]
        query_TD, own_TD = seen["query"][0, head], seen["key"][0, head // 2]
        own_TT = (query_TD @ own_TD.T * 8 ** -0.5).masked_fill(torch.ones(7, 7, dtype=torch.bool).triu(1), -1e30)
        weight = torch.cat([own_TT, query_TD @ placed.T * 8 ** -0.5 - 0.5], dim=1).softmax(dim=1)
        values = torch.cat([seen["value"][0, head // 2], entry_HMX[head // 2, :, 8:], pool_value[0, head // 2]])
        torch.testing.assert_close(seen["result"][0, :, head], weight @ values, rtol=0, atol=1e-5)
        share = weight[:, 7:13].sum(dim=1)
        part = output.memory[1].share_HN[head // 2]
        other = seen.setdefault(("share", head // 2), share)
        if other is not share:
            torch.testing.assert_close(part, (share + other) / 2, rtol=0, atol=1e-5)


def test_every_layer_has_a_memory_without_a_bias() -> None:
    config = lmcode.attach(plain("llama"), "mplus", memory={"virtual_shards": 4}).lmcode.config
    assert config.memory_layer_indices == (0, 1, 2) and config.memory_bias == 0.0


def test_texts_that_are_stored_go_to_the_bank_at_once() -> None:
    model = attached("llama", "mplus")
    model.lmcode.store_experience(tokens(3, 30, seed=1))
    assert [bank.stats()["live"] for bank in model.lmcode.banks.values()] == [12, 12, 12]


def test_training_teaches_the_retriever_which_keys_are_attended_to() -> None:
    """The value of the loss is that of the tokens; its gradient reaches the projections alone, and following it lowers the
    retriever's loss. Evaluation has no such gradient, and the first window of a stream one of zero."""
    model = attached("llama", "mplus", opened=False)
    backbone, ids_BT = model.lmcode, tokens(2, 32)
    _, outputs = read(model, ids_BT[:, :24], window=8)
    state, window = outputs[-1].state, {"targets_BT": ids_BT[:, 24:].roll(-1, 1)}
    backbone.eval()
    told = backbone(ids_BT[:, 24:], state=state, **window)
    assert not told.loss.requires_grad
    backbone.train()
    backbone(ids_BT[:, :8], targets_BT=ids_BT[:, :8]).loss.backward()
    parameters = list(backbone.recipe.parameters())
    assert all(one.grad is not None and not bool(one.grad.any()) for one in parameters)
    losses: list[float] = []
    auxiliary = backbone.recipe.auxiliary

    def spied(current: Pass) -> torch.Tensor:
        loss_BT = auxiliary(current)
        losses.append(float(loss_BT.detach().mean()))
        return loss_BT

    backbone.recipe.auxiliary = spied
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        output = backbone(ids_BT[:, 24:], state=state, **window)
        output.token_loss.sum().backward()
        assert all(bool(one.grad.any()) for one in parameters)
        if len(losses) == 1:
            torch.testing.assert_close(output.token_loss, told.token_loss)
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    assert {name.split(".")[0] for name, one in backbone.named_parameters() if one.grad is not None} == {"recipe"}


@pytest.mark.parametrize(("options", "message"), [
    ({"pool": 3, "compressed": 4}, "compressed must not exceed pool: got 4 and 3"),
    ({"pool": 0}, "pool"),
    ({"memory_head_dim": 8}, "with the recipe mplus model.memory_head_dim must be 16 for this backbone: got 8"),
])
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lmcode.attach(plain("llama"), "mplus", **options)


def _values(folder: Path, name: str) -> dict[str, Any]:
    """A run with a backbone, whose pools are filled after two windows."""
    values = settings(folder, name, train={"total_steps": 6, "learning_rate": 0.01})
    values["model"] = {"backbone": str(folder / "backbone"), "recipe": "mplus", "context_length": 16, "memory_top_k": 4,
                       "memory_bias": 0.0, "long_term_memory_slots": 480,
                       "recipe_options": {"sinks": 2, "cache": 6, "pool": 8, "compressed": 4}}
    return resolved(values)


def _advance(session: Session, steps: int) -> list[Any]:
    """Of each step the loss and the ids of the hits; at last what the streams carry, the bank, and what was trained."""
    seen: list[Any] = []
    for _ in range(steps):
        result = loop.train_step(session)
        seen.append((result.loss, result.reads[2][0].hits.id_HNK.tolist()))
    carried = [one.tolist() for state in session.states.values() for one in stream_files.named_tensors(state).values()]
    weights = {name: weight.tolist() for name, weight in session.engine.weights().items()}
    return [seen, carried, session.model.banks[2].content_hash(), weights]


def _resumed(values: dict[str, Any]) -> list[Any]:
    config = build(RunConfig, values)
    session = set_up(config, dist.discover(), start=open_run(config, Group.world(), "auto"))
    assert session.step == 3
    end = _advance(session, 3)
    session.close()
    return end


def _whole_and_resumed(folder: Path) -> tuple[list[Any], list[Any]]:
    session = start(_values(folder, "whole"))
    whole = [_advance(session, 3)[0], _advance(session, 3)]
    session.close()
    session = start(_values(folder, "half"))
    assert _advance(session, 3)[0] == whole[0]
    saving.save(session)
    session.close()
    if session.group.rank == 0:
        shutil.copytree(folder / "runs" / "half", folder / "runs" / "alone")
    return whole[1], _resumed(_values(folder, "half"))


def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path: Path) -> None:
    """Two ranks, bit for bit; and one rank from their checkpoint, by its losses."""
    write_corpus(tmp_path)
    plain("llama").save_pretrained(tmp_path / "backbone")
    made = run_on_ranks(_whole_and_resumed, 2, tmp_path)
    for whole, resumed_one in made:
        assert whole == resumed_one
        assert set(whole[3]) == {f"recipe.{kind}.{layer}.weight" for kind in ("queries", "keys") for layer in range(3)}
        assert any(one >= 0 for _, ids in whole[0] for head in ids for query in head for one in query), "the bank is read"
    alone = run_on_ranks(_resumed, 1, _values(tmp_path, "alone"))[0]
    losses = [loss for loss, _ in alone[0]]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor([loss for loss, _ in made[0][0][0]]), rtol=0, atol=1e-4)
