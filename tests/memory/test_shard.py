"""One rank's rows: rings, the index by namespace, scores in the keys, weighted sums and their gradient, states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lmcode.config import MemoryConfig
from lmcode.memory.entry import (
    EMPTY,
    MASS_UNIT,
    MAX_IMPORTANCE,
    METADATA,
    acceptable,
    admit,
    choose,
    clip_norm,
    importance_of,
    inspect,
    stack_candidates,
    unpack_criteria,
)
from lmcode.memory.placement import virtual_shard_of
from lmcode.memory.shard import Shard
from lmcode.memory.ticket import Ticket, query_gradients, value_sums, winning_rows
from lmcode.protocol import NO_SCORE, Candidates

H, D, S = 2, 6, 4


def make_shard(slots: int = 40, owned: tuple[int, ...] = (0, 1, 2, 3), **settings: Any) -> Shard:
    config = MemoryConfig(**({"virtual_shards": S, "importance_weight": 1.0} | settings))
    return Shard(heads=H, head_dim=D, slots=slots, owned=owned, config=config, device=torch.device("cpu"))


def fill(shard: Shard, E: int, *, first_id: int = 0, step: int = 0, importance: float = 1.0,
         namespaces: int = 3) -> None:
    """Writes E random entries with consecutive ids; id i is in namespace i mod `namespaces`."""
    generator = torch.Generator().manual_seed(first_id)
    key = F.normalize(torch.randn(E, H, D, generator=generator), dim=-1)
    ids = np.arange(first_id, first_id + E)
    shard.write(admit(key, key * 2 + 1, ids % namespaces, np.full(E, importance, np.float32), first_id=first_id,
                      step=step, max_norm=100.0)[0])


def with_counters(state: dict[str, torch.Tensor], next_id: int = 10_000) -> dict[str, torch.Tensor]:
    return {**state, "next_id": torch.tensor(next_id), "rejected": torch.tensor(0), "clipped": torch.tensor(0)}


def make_ticket(shard: Shard, bags: list[list[tuple[int, int]]]) -> Ticket:
    """Bags of (head, slot) with random weights."""
    rows = [head * shard.num_slots + slot for bag in bags for head, slot in bag]
    count = torch.tensor([len(bag) for bag in bags])
    bag_E = torch.arange(len(bags)).repeat_interleave(count)
    return Ticket(torch.tensor(rows, dtype=torch.int64), bag_E, count.cumsum(0) - count, torch.rand(len(rows)),
                  torch.zeros(len(rows), dtype=torch.int64), len(bags), 0)


# --- the rules an entry passes -----------------------------------------------------------------------------------


def test_choice_of_candidates() -> None:
    surprise = np.array([1.0, 5.0, np.nan, 5.0, 2.0, 0.0, 5.0, 3.0], np.float32)
    assert choose(surprise, MemoryConfig(write="all")).all()
    every = choose(surprise, MemoryConfig(write="every_nth", write_every=3))
    assert np.flatnonzero(every).tolist() == [0, 3, 6]
    for share, wanted in ((0.25, [1, 3]), (0.26, [1, 3, 6]), (0.5, [1, 3, 6, 7]), (1.0, [0, 1, 3, 4, 5, 6, 7])):
        assert np.flatnonzero(choose(surprise, MemoryConfig(write="surprise", write_share=share))).tolist() == wanted
    assert choose(surprise[:0], MemoryConfig(write="surprise")).shape == (0,)


def test_initial_importance() -> None:
    importance = importance_of(np.array([0.0, 1.0, 1e9, -3.0, np.nan, np.inf], np.float32))
    assert importance[:4].tolist() == pytest.approx([0.5, 1.0, 1.5, 0.5])
    assert np.isnan(importance[4:]).all()
    assert (np.diff(importance_of(np.linspace(0, 20, 50))) > 0).all()


def test_unacceptable_rows() -> None:
    key, value = torch.ones(8, H, D), torch.ones(8, H, D)
    key[0, 1, 3], value[1, 0, 0], value[2, 1, 1] = float("nan"), float("inf"), -float("inf")
    namespace, importance = np.zeros(8, np.int64), np.ones(8, np.float32)
    namespace[3] = -1
    importance[4:7] = np.nan, 0.0, np.inf
    finite = inspect(key, value, 100.0).finite_E.numpy()
    assert acceptable(finite, namespace, importance).tolist() == [False] * 7 + [True]


def test_clipping_keeps_direction_even_where_squares_overflow() -> None:
    vector = torch.stack([torch.full((1, 3), size) for size in (0.0, 1e-20, 1.0, 1e3, 3e38)])
    clipped, was_long = clip_norm(vector, 5.0)
    assert was_long.tolist() == [False, False, False, True, True]
    assert torch.equal(clipped[:3], vector[:3])
    assert torch.allclose(clipped[3:].norm(dim=-1), torch.tensor(5.0))
    assert torch.allclose(clipped[3], clipped[4])


def test_candidates_travel_unchanged() -> None:
    valid = torch.tensor([True, False, True])
    one = Candidates(torch.randn(H, 3, D), torch.randn(H, 3, D), torch.tensor([2**60 + 1, 5, 7]),
                     torch.tensor([0.1, 0.2, float("nan")]), valid, torch.tensor([2**62 + 1, 3, -1]))
    one.value_HND[0, 2, 1] = torch.inf
    unknown = one._replace(document_N=None)
    vector, criteria = stack_candidates([one, unknown], heads=H, head_dim=D, dtype=torch.float32, device=torch.device("cpu"),
                                     max_norm=100.0)
    criteria = unpack_criteria(criteria)
    assert criteria.namespace_E.tolist() == [2**60 + 1, 7] * 2 and criteria.document_E.tolist() == [2**62 + 1, -1, -1, -1]
    np.testing.assert_array_equal(criteria.surprise_E, np.array([0.1, np.nan] * 2, np.float32))
    assert criteria.finite_E.tolist() == [True, False] * 2 and not criteria.long_E.any()
    assert torch.equal(vector[:2, 0], one.key_HND[:, valid].transpose(0, 1))
    assert torch.equal(vector[2:, 1], one.value_HND[:, valid].transpose(0, 1))


# --- rows --------------------------------------------------------------------------------------------------------


def test_entries_lie_in_their_virtual_shard_and_nowhere_else() -> None:
    shard = make_shard(slots=100, owned=(1, 3))
    fill(shard, 30)
    for number, place in shard.range_of.items():
        ids = shard.columns["id"][place]
        assert (virtual_shard_of(ids[ids >= 0], S) == number).all()
    wanted = [one for one in range(30) if virtual_shard_of(np.array([one]), S)[0] in (1, 3)]
    assert sorted(shard.columns["id"][shard.live_M].tolist()) == wanted


def test_a_ring_forgets_the_oldest_and_counts_them() -> None:
    shard = make_shard(slots=12)
    for batch in range(20):
        fill(shard, 5, first_id=5 * batch)
    ids = np.arange(100)
    for number, place in shard.range_of.items():
        mine = ids[virtual_shard_of(ids, S) == number]
        assert sorted(shard.columns["id"][place].tolist()) == mine[-3:].tolist()
        assert shard.evicted[number] == len(mine) - 3


def test_a_batch_larger_than_the_ring_keeps_its_last_entries() -> None:
    whole, parts = make_shard(slots=12), make_shard(slots=12)
    fill(whole, 50)
    generator = torch.Generator().manual_seed(0)
    key = F.normalize(torch.randn(50, H, D, generator=generator), dim=-1)
    for at in range(50):
        one = key[at:at + 1]
        parts.write(admit(one, one * 2 + 1, np.array([at % 3]), np.ones(1, np.float32), first_id=at, step=0,
                          max_norm=100.0)[0])
    assert whole.evicted == parts.evicted
    assert sorted(whole.columns["id"]) == sorted(parts.columns["id"])


def test_the_addend_to_a_score_is_the_weighted_log_importance() -> None:
    shard = make_shard(importance_weight=0.5)
    fill(shard, 10, importance=3.0)
    assert torch.allclose(shard.addend_M[shard.live_M], torch.tensor(0.5 * np.log(3.0), dtype=torch.float32))
    assert shard.addend_M[~shard.live_M].eq(NO_SCORE).all()


def test_index_by_namespace_follows_every_change() -> None:
    shard, rng = make_shard(slots=60), np.random.default_rng(0)
    for round_ in range(30):
        fill(shard, 7, first_id=7 * round_, namespaces=5)
        shard.delete(np.flatnonzero(rng.random(60) < 0.1))
        for names in ([0], [4], [1, 3], [9], [9, 2]):
            slots = shard.ledger.slots_of_namespaces(np.array(names))
            live = shard.live_M
            wanted = np.flatnonzero(live & np.isin(shard.columns["namespace"], names))
            assert sorted(slots) == wanted.tolist()
            keys = list(zip(shard.columns["namespace"][slots], shard.columns["id"][slots], strict=True))
            assert keys == sorted(keys)


@pytest.mark.parametrize("tier", ["exact", "faiss-flat", "ivf", "hnsw"])
def test_a_namespace_that_fills_most_of_a_shard_is_searched_where_it_lies(tier: str) -> None:
    """No key is copied, and nobody else's entry is found, not even where fewer are left than were asked for."""
    shard = make_shard(slots=40, tier=tier, scope="global")
    fill(shard, 20, namespaces=1)
    fill(shard, 12, first_id=20, namespaces=3)
    assert shard.views.of_namespaces((0,)).key_HMD.data_ptr() == shard.key_HMD.data_ptr()
    assert shard.views.of_namespaces((1,)).key_HMD.shape[1] < 20
    query = torch.randn(4, H, D, generator=torch.Generator().manual_seed(9))
    nobody = np.full(4, -1)
    wanted = shard.ledger.slots_of_namespaces(np.array([0]))
    expected = torch.einsum("nhd,hmd->nhm", query, shard.key_HMD[:, wanted]) + shard.addend_M[wanted]
    order = expected.argsort(-1, descending=True)
    for k in (5, 36):
        score, ids, slot = shard.searcher.search(query, np.ones(4, np.int64), nobody, k, scope=[0], tier=tier)
        found = min(k, len(wanted))
        assert torch.equal(slot[..., :found], torch.from_numpy(wanted)[order[..., :found]])
        torch.testing.assert_close(score[..., :found], expected.gather(-1, order)[..., :found])
        assert bool((ids[..., found:] == -1).all()) and bool((ids[..., :found] >= 0).all())


def test_a_deleted_slot_keeps_nothing() -> None:
    shard = make_shard()
    fill(shard, 30)
    mask = np.isin(shard.columns["id"], [3, 4, 5, 999])
    assert shard.delete(np.flatnonzero(mask)) == mask.sum() == 3
    assert shard.delete(np.flatnonzero(mask)) == 0
    assert shard.key_HMD[:, mask].eq(0).all() and shard.value_HMD[:, mask].eq(0).all()
    assert shard.addend_M[mask].eq(NO_SCORE).all()
    for name in METADATA:
        assert (shard.columns[name][mask] == EMPTY[name]).all()


def test_a_hit_raises_importance_and_may_earn_a_chance() -> None:
    shard = make_shard(importance_growth=0.5, second_chance_importance=2.0)
    fill(shard, 8)
    slots = np.flatnonzero(shard.live_M)[:4]
    mass = np.array([0, 1, 2, 1000]) * MASS_UNIT
    shard.touch(slots, mass, step=7)
    columns = shard.columns
    assert columns["importance"][slots].tolist() == [1.0, 1.5, 2.0, MAX_IMPORTANCE]
    assert columns["chance"][slots].tolist() == [False, False, True, True]
    assert columns["hit_mass"][slots].tolist() == mass.tolist()
    assert (columns["last_hit"] == 7).sum() == 4
    assert torch.allclose(shard.addend_M[slots], torch.tensor([1.0, 1.5, 2.0, MAX_IMPORTANCE]).log())
    shard.ledger.update(slots, {"chance": False})
    shard.touch(slots, mass, step=8)  # crossed before: no second second chance
    assert columns["chance"][slots].tolist() == [False, True, False, False]


def test_mass_is_weight_times_credit_counted_in_integers_over_all_heads() -> None:
    shard = make_shard()
    ticket, credit = make_ticket(shard, [[(0, 3), (0, 5)], [(1, 3)], [], [(0, 3)]]), torch.tensor([0.3, 2.5, 0.7, 0.0])
    slots, mass = shard.count_hits([ticket], [credit])
    units = [round(weight * share * MASS_UNIT) for weight, share in
             zip(ticket.weight_E.tolist(), credit[[0, 0, 1, 3]].tolist(), strict=True)]
    assert mass.dtype == np.int64
    assert slots.tolist() == [3, 5] and mass.tolist() == [units[0] + units[2] + units[3], units[1]]
    twice = shard.count_hits([ticket, ticket], [credit, credit])
    assert twice[0].tolist() == [3, 5] and twice[1].tolist() == (2 * mass).tolist()
    assert [len(part) for part in shard.count_hits([], [])] == [0, 0]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_sums_and_their_gradient_against_autograd(dtype: str) -> None:
    torch.manual_seed(0)
    shard = make_shard(dtype=dtype)
    fill(shard, 40)
    live = np.flatnonzero(shard.live_M)[:20]
    bags = [[(head, int(slot)) for slot in np.random.default_rng(at).choice(live, size, replace=False)]
            for at, (head, size) in enumerate([(0, 3), (1, 0), (0, 1), (1, 20), (0, 0), (1, 5)])]
    ticket = make_ticket(shard, bags)
    query = torch.randn(len(bags), D, requires_grad=True)
    grad, grad_lse = torch.randn(len(bags), D), torch.randn(len(bags))
    weights, values, total = [], [], torch.zeros(())
    for at, bag in enumerate(bags):
        if not bag:
            weights.append(torch.zeros(0))
            values.append(torch.zeros(D))
            continue
        key = torch.stack([shard.key_HMD[head, slot] for head, slot in bag]).float()
        value = torch.stack([shard.value_HMD[head, slot] for head, slot in bag]).float()
        score = key @ query[at] + shard.addend_M[[slot for _, slot in bag]]
        weights.append(score.softmax(0))
        values.append(weights[-1] @ value)
        total = total + values[-1] @ grad[at] + score.logsumexp(0) * grad_lse[at]
    ticket = ticket._replace(weight_E=torch.cat(weights).detach())
    value_QD = torch.stack(values).detach()
    assert torch.allclose(value_sums(shard.value_HMD, ticket), value_QD, atol=1e-5)
    wanted = torch.autograd.grad(total, query)[0]
    found = query_gradients(shard.key_HMD, shard.value_HMD, ticket, grad, (grad * value_QD).sum(-1), grad_lse)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert found[[1, 4]].eq(0).all()


def test_a_ticket_without_winners() -> None:
    shard = make_shard()
    ticket, tables = make_ticket(shard, [[], [], []]), (shard.key_HMD, shard.value_HMD)
    assert torch.equal(value_sums(shard.value_HMD, ticket), torch.zeros(3, D))
    assert query_gradients(*tables, ticket, torch.ones(3, D), torch.ones(3), torch.ones(3)).eq(0).all()
    assert winning_rows(*tables, ticket, 2).eq(0).all()


# --- states ------------------------------------------------------------------------------------------------------


def test_a_state_moves_to_another_shard() -> None:
    first, second = make_shard(), make_shard(owned=(2, 0))
    fill(first, 30, importance=2.5)
    fill(second, 11, first_id=500)
    for number in (2, 0):
        second.load(number, with_counters(first.state(number)))
        for name, tensor in first.state(number).items():
            assert torch.equal(second.state(number)[name], tensor)
        assert torch.equal(second.key_HMD[:, second.range_of[number]], first.key_HMD[:, first.range_of[number]])
    assert sorted(second.ledger.slots_of_namespaces(np.arange(3))) == np.flatnonzero(second.live_M).tolist()


def spoil(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict], dict]:
    return lambda state: {**state, name: change(state[name].clone())}


def put(at: int, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[at] = value
        return tensor
    return change


@pytest.mark.parametrize(("change", "message"), [
    (spoil("key", put(0, float("nan"))), "'key' must be finite"),
    (spoil("value", put(3, float("inf"))), "'value' must be finite"),
    (spoil("importance", put(0, float("nan"))), "'importance' must be finite"),
    (spoil("importance", put(0, 0.0)), r"importance must lie in \(0, 10.0\]"),
    (spoil("importance", put(0, 11.0)), r"importance must lie in \(0, 10.0\]"),
    (spoil("namespace", put(0, -2)), "namespaces at or above 0"),
    (spoil("hand", put(0, 10)), r"hand must lie in 0\.\.9"),
    (spoil("hand", put(0, -1)), r"hand must lie in 0\.\.9"),
    (spoil("evicted", put(0, -1)), "evicted count at or above 0"),
    (spoil("id", lambda ids: put(1, int(ids[0]))(ids)), "must not occur twice"),
    (spoil("id", lambda ids: put(0, 9_999 if virtual_shard_of(np.array([9_999]), S)[0] else 9_998)(ids)),
     "every id must belong here"),
    (spoil("next_id", put(0, 3)), "next_id must exceed every id"),
    (spoil("rejected", put(0, -1)), "counters be at or above 0"),
    (spoil("shard", put(0, 1)), "'shard' must be 0: got 1"),
    (spoil("slots", put(0, 41)), "'slots' must be 40: got 41"),
    (spoil("virtual_shards", put(0, 5)), "'virtual_shards' must be 4: got 5"),
    (spoil("key", lambda key: key[:, :-1]), "'key' must be"),
    (spoil("key", lambda key: key.bfloat16()), "'key' must be"),
    (spoil("step", lambda step: step.int()), "'step' must be"),
    (lambda state: {name: tensor for name, tensor in state.items() if name != "chance"}, "a state holds"),
    (lambda state: {**state, "surprise": torch.zeros(10)}, "a state holds"),
])
def test_impossible_states_are_refused_and_change_nothing(change: Callable[[dict], dict], message: str) -> None:
    shard = make_shard()
    fill(shard, 60)
    assert shard.live_M[shard.range_of[0]].all()
    before = shard.state(0)
    with pytest.raises(ValueError, match=message):
        shard.load(0, change(with_counters(before)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in shard.state(0).items())


def test_a_virtual_shard_of_another_rank_is_refused() -> None:
    with pytest.raises(ValueError, match=r"this rank holds the virtual shards \(1, 3\): got 0"):
        make_shard(owned=(1, 3)).state(0)
