"""Consolidation: the same whatever the number of ranks, and what a slow plain model does with dicts and loops."""

from __future__ import annotations

import itertools
import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lmcode.config import MemoryConfig
from lmcode.dist import Group
from lmcode.memory import ConsolidationReport, LongTermMemory, consolidate, lifecycle
from lmcode.memory.consolidate import (
    choose_pairs,
    farthest,
    links_of,
    merge_vectors,
    route_of,
    sum_last,
    unit_keys,
)
from tests.helpers.ranks import run_on_ranks
from tests.helpers.same_hits import assert_same_hits

H, D, S = 2, 8, 6
RUNS = ({"tier": "exact"}, {"tier": "faiss-flat"}, {"tier": "faiss-flat", "exchange": "all_to_all", "dtype": "bf16"})


def make_bank(group: Group | None = None, *, slots: int = 400, **settings: Any) -> LongTermMemory:
    usual = {"virtual_shards": S, "importance_growth": 0.3, "second_chance_importance": 1.4}
    config = MemoryConfig(**(usual | settings))
    return LongTermMemory(heads=H, head_dim=D, slots=slots, top_k=5, group=group, config=config)


def crowd(E: int, *, seed: int, noise: tuple[float, ...] = (0.0, 0.02, 0.1, 0.3)) -> tuple[Tensor, Tensor]:
    """Keys around E / 8 centres, from exact copies to loose neighbours, and random values."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(H, max(1, E // 8), D, generator=generator)[:, torch.arange(E) % max(1, E // 8)]
    scale = torch.tensor(noise)[torch.randint(len(noise), (E,), generator=generator)]
    key = F.normalize(F.normalize(centre, dim=-1) + scale[:, None] * torch.randn(H, E, D, generator=generator), dim=-1)
    return key, torch.randn(H, E, D, generator=generator)


def names_of(E: int) -> Tensor:
    return torch.arange(E) // 5 % 3


def fill(bank: LongTermMemory, E: int, *, seed: int = 0, documents: tuple[int, ...] = (-1,)) -> None:
    """A crowd with importance, some of it hit, so that every column has something to merge."""
    key, value = crowd(E, seed=seed)
    document = torch.tensor(documents)[torch.arange(E) // 60 % len(documents)]  # so that each has some of every centre
    bank.write(key, value, names_of(E), torch.linspace(0.5, 1.6, E), document_E=document)
    mine = torch.arange(E)[::3].chunk(bank.group.size)[bank.group.rank]
    bank.commit([], [bank.search(key[:, mine] * 6, names_of(E)[mine], ragged=True)], step=seed + 3)


def entries_of(bank: LongTermMemory) -> dict[int, dict[str, Any]]:
    """Live entries by id, on one rank."""
    found = {}
    for shard in bank.owned:
        state = bank.state(shard)
        for slot in (state["id"] >= 0).nonzero().flatten().tolist():
            one = {name: state[name][slot].item() for name in
                   ("namespace", "document", "importance", "step", "last_hit", "hit_mass", "count", "chance")}
            found[int(state["id"][slot])] = {**one, **{name: state[name][:, slot].double().numpy()
                                                       for name in ("key", "value")}}
    return found


# --- a slow plain model ------------------------------------------------------------------------------------------


def distance_between(one: dict, other: dict) -> float:
    cosines = [a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in zip(one["key"], other["key"], strict=True)]
    return max(0.0, 1.0 - sum(cosines) / H)


def pair_up(entries: dict[int, dict], threshold: float) -> list[tuple[int, int]]:
    """One round of pairs, by comparing everybody with everybody."""
    nearest = {}
    for one, mine in sorted(entries.items()):
        others = sorted((round(distance_between(mine, theirs), 9), other) for other, theirs in entries.items()
                        if other != one and all(theirs[name] == mine[name] for name in ("namespace", "document")))
        if others and others[0][0] < threshold:
            nearest[one] = others[0]
    pairs: list[tuple[int, int]] = []
    for one, (_, other) in nearest.items():
        if not any(name in pair for pair in pairs for name in (one, other)):
            pairs.append((one, other))
    left = [one for one in nearest if not any(one in pair for pair in pairs)]
    for hub in {nearest[one][1] for one in left}:
        waiting = None
        for one in (one for one in left if nearest[one][1] == hub):
            if waiting is None:
                waiting = one
                continue
            angles = math.acos(1 - nearest[one][0]) + math.acos(1 - nearest[waiting][0])
            if 1 - math.cos(min(math.pi, angles)) < threshold:
                pairs.append((one, waiting))
                waiting = None
            else:
                waiting = min(one, waiting, key=lambda name: (nearest[name][0], name))
    return sorted((min(pair), max(pair)) for pair in pairs)


def consolidate_slowly(entries: dict[int, dict], threshold: float) -> dict[int, dict]:
    entries = dict(entries)
    for survivor, loser in pair_up(entries, threshold):
        mine, other = entries[survivor], entries.pop(loser)
        n, m = mine["count"], other["count"]
        merged = {name: (n * mine[name] + m * other[name]) / (n + m) for name in ("key", "value", "importance")}
        lengths = [(n * np.linalg.norm(a) + m * np.linalg.norm(b)) / (n + m)
                   for a, b in zip(mine["key"], other["key"], strict=True)]
        merged["key"] = np.stack([key * length / np.linalg.norm(key)
                                  for key, length in zip(merged["key"], lengths, strict=True)])
        entries[survivor] = {**mine, **merged, "count": n + m, "hit_mass": mine["hit_mass"] + other["hit_mass"],
                             "last_hit": max(mine["last_hit"], other["last_hit"]),
                             "chance": mine["chance"] or other["chance"]}
    return entries


@pytest.mark.parametrize(("settings", "seed", "documents"), [
    *itertools.product(RUNS, [0], [(-1,)]), (RUNS[0], 1, (-1,)), (RUNS[1], 2, (-1,)),
    (RUNS[0], 0, (-7, -1, 2**63 - 1)), (RUNS[1], 1, (-7, -1, 2**63 - 1))])
def test_it_does_what_the_slow_model_does(settings: dict[str, Any], seed: int, documents: tuple[int, ...],
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consolidate, "BLOCK", 23)
    bank, rough = make_bank(**settings), 5e-3 if settings.get("dtype") else 1e-6
    fill(bank, 160 * len(documents), seed=seed, documents=documents)
    merged = []
    for threshold in (0.02, 0.1, 0.1, 0.4, 2.0):
        before = entries_of(bank)
        wanted, report = consolidate_slowly(before, threshold), bank.consolidate(threshold)
        found = entries_of(bank)
        assert report == ConsolidationReport(threshold, len(before), len(before) - len(wanted))
        assert report.after == len(found) and found.keys() == wanted.keys()
        for one, mine in found.items():
            for name in ("namespace", "document", "step", "last_hit", "hit_mass", "count", "chance"):
                assert mine[name] == wanted[one][name], name
            for name in ("importance", "key", "value"):
                assert mine[name] == pytest.approx(wanted[one][name], abs=rough, rel=rough), name
        merged.append(report.merged)
    assert min(merged) > 0, "every round must have had something to do"


# --- world-size invariance ---------------------------------------------------------------------------------------


def follow(group: Group, settings: dict[str, Any]) -> dict[str, Any]:
    """Writes, reads and consolidates in turn; everything here must not depend on ranks and memory groups."""
    bank = make_bank(group, slots=250, **settings)
    seen: dict[str, list] = {"reports": [], "hashes": [], "hits": [], "merged": []}
    for step, threshold in enumerate((0.05, 0.1, 0.5, 0.1)):
        if step != 1:
            fill(bank, 90, seed=step % 2, documents=(-1, 5))  # the same crowd again: copies across virtual shards
        seen["reports"].append(tuple(bank.consolidate(threshold)))
        seen["hashes"].append(bank.content_hash())
        seen["merged"].append(bank.stats()["merged"])
        everyone = bank.search(crowd(20, seed=9)[0] * 5, names_of(20))
        seen["hits"].append(everyone[:2])
    return seen


def assert_same_course(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Bit by bit, as blocks of one size are multiplied, but for the reads: their queries are more where ranks are more."""
    for came, expected in zip(found["hits"], wanted["hits"], strict=True):
        assert_same_hits(came, expected, tolerance=1e-5)
    assert {**found, "hits": None} == {**wanted, "hits": None}


def follow_all() -> list[dict[str, Any]]:
    consolidate.BLOCK, group = 16, Group.world()
    empty = make_bank(group)
    assert tuple(empty.consolidate(0.1)) == (0.1, 0, 0)
    empty.write(*crowd(1, seed=0), names_of(1))
    assert tuple(empty.consolidate(2.0)) == (2.0, 1, 0)
    if group.size == 4:
        for settings, size in zip(RUNS, (2, 1, 2), strict=True):
            assert_same_course(follow(group, {**settings, "group_size": size}), follow(group, settings))
    return [follow(group, settings) for settings in RUNS]


@cache
def alone() -> list[dict[str, Any]]:
    return run_on_ranks(follow_all, 1)[0]


@pytest.mark.parametrize("R", [2, 3, 4])
def test_nothing_depends_on_the_number_of_ranks(R: int) -> None:
    for rank in run_on_ranks(follow_all, R):
        for found, wanted in zip(rank, alone(), strict=True):
            assert_same_course(found, wanted)


def test_the_scenario_is_worth_its_name() -> None:
    for run in alone():
        assert min(merged for _, _, merged in run["reports"]) > 0
        assert len(set(run["hashes"])) == len(run["hashes"])


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = set()
    for block in (7, 64, 4096):
        monkeypatch.setattr(consolidate, "BLOCK", block)
        bank = make_bank(tier="exact")
        fill(bank, 160)
        bank.consolidate(0.1)
        hashes.add(bank.content_hash())
    assert len(hashes) == 1


# --- what it keeps and what it changes ---------------------------------------------------------------------------


def test_nothing_happens_where_nothing_is_close() -> None:
    bank = make_bank(slots=700)
    key = F.normalize(torch.randn(H, 300, D, generator=torch.Generator().manual_seed(0)), dim=-1)
    bank.write(key, key, names_of(300))
    before = bank.content_hash()
    assert bank.consolidate(1e-4).merged == 0
    assert bank.content_hash() == before and bank.stats()["merged"] == 0


def test_repeating_it_comes_to_an_end_where_everybody_is_far_apart() -> None:
    bank = make_bank()
    fill(bank, 160)
    while bank.consolidate(0.1).merged:
        pass
    left = list(entries_of(bank).values())
    assert len(left) < 120
    assert all(distance_between(one, other) > 0.1 - 1e-6 for one, other in itertools.combinations(left, 2)
               if one["namespace"] == other["namespace"])


def test_namespaces_never_mix() -> None:
    bank = make_bank()
    key = crowd(1, seed=0)[0].expand(H, 40, D)
    value = torch.arange(40.0).div(2)[:, None].expand(H, 40, D)
    bank.write(key, value, torch.arange(40))
    assert bank.consolidate(2.0).merged == 0
    bank.write(key, value, torch.arange(40))
    assert bank.consolidate(0.1).merged == 40
    for one in entries_of(bank).values():
        assert one["count"] == 2 and one["value"] == pytest.approx(one["namespace"] / 2)


def test_nor_do_documents_in_a_namespace() -> None:
    """The nearest one is looked for among its own, though all others are nearer."""
    bank = make_bank()
    key, far = crowd(1, seed=0)[0].expand(H, 9, D), crowd(1, seed=0)[0] + 0.1
    document = torch.tensor([-3, -2, -1, 0, 1, 2, 3, 4, 5])
    bank.write(key, key, torch.zeros(9).long(), document_E=document)
    assert bank.consolidate(2.0).merged == 0
    bank.write(far.expand(H, 9, D), key, torch.zeros(9).long(), document_E=document)
    assert bank.consolidate(0.5).merged == 9
    assert sorted(one["document"] for one in entries_of(bank).values()) == document.tolist()


def test_counts_and_weighted_means_are_conserved() -> None:
    bank = make_bank()
    fill(bank, 160)

    def totals() -> tuple[int, int, np.ndarray, float]:
        live = entries_of(bank).values()
        return (sum(one["count"] for one in live), sum(one["hit_mass"] for one in live),
                sum(one["count"] * one["value"] for one in live), sum(one["count"] * one["importance"] for one in live))

    before, merged = totals(), 0
    for threshold in (0.05, 0.1, 0.3, 1.0):
        merged += bank.consolidate(threshold).merged
        after = totals()
        assert after[:2] == before[:2]
        assert after[2] == pytest.approx(before[2], abs=1e-4) and after[3] == pytest.approx(before[3], abs=1e-4)
        assert bank.stats()["merged"] == merged == 160 - bank.stats()["live"]


def test_losers_are_gone_for_good() -> None:
    bank = make_bank()
    fill(bank, 160)
    before = set(entries_of(bank))
    bank.consolidate_memories(threshold=0.1)
    losers = before - set(entries_of(bank))
    assert losers
    bank.write(*crowd(60, seed=5), names_of(60))
    for copy in (bank, lifecycle.fork(bank, empty=False)):
        found = copy.search(crowd(160, seed=0)[0] * 6, names_of(160), scope="global", top_k=300).id_HNK
        assert not losers & set(found.flatten().tolist()) and not losers & set(entries_of(copy))


def test_a_survivor_is_found_by_what_it_has_become() -> None:
    bank = make_bank(importance_weight=1.0)
    fill(bank, 160)
    bank.consolidate(0.1)
    fresh = lifecycle.fork(bank, empty=False)  # computes its scores anew
    query, names = crowd(30, seed=3)[0] * 5, names_of(30)
    found, wanted = (one.search(query, names, top_k=50) for one in (bank, fresh))
    assert torch.equal(found.id_HNK, wanted.id_HNK) and torch.equal(found.score_HNK, wanted.score_HNK)


@pytest.mark.parametrize("tier", ["exact", "faiss-flat"])
def test_equal_entries_halve_each_round(tier: str) -> None:
    bank = make_bank(tier=tier)
    bank.write(crowd(1, seed=0)[0].expand(H, 48, D), crowd(48, seed=1)[1], torch.zeros(48).long())
    assert [bank.consolidate(0.1).after for _ in range(7)] == [24, 12, 6, 3, 2, 1, 1]
    assert [one["count"] for one in entries_of(bank).values()] == [48]


def test_bad_thresholds_are_refused() -> None:
    for threshold in (0.0, -0.1, 2.01, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"cosine distance in \(0, 2\]: got"):
            make_bank().consolidate(threshold)


# --- pure functions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 7, 64, 129])
def test_sums_have_the_same_bits_in_every_batch(width: int) -> None:
    table = torch.randn(40, width, generator=torch.Generator().manual_seed(width))
    whole = sum_last(table)
    assert torch.allclose(whole, table.sum(-1), atol=1e-5)
    for part in (slice(0, 1), slice(3, 20), slice(39, 40)):
        assert torch.equal(sum_last(table[part]), whole[part])
    assert torch.equal(sum_last(table.T.contiguous().T), whole)


def test_unit_keys() -> None:
    key = torch.randn(H, 5, D) * torch.tensor([1e-30, 1.0, 50.0, 0.0, 1.0])[:, None]
    unit_P = unit_keys(key).view(5, H, D)
    assert torch.allclose(unit_P.norm(dim=-1), torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0])[:, None])
    assert torch.allclose(unit_P[2] * key[:, 2].norm(dim=-1, keepdim=True), key[:, 2], rtol=1e-5)


def test_the_nearest_other_one_is_never_oneself() -> None:
    ids = torch.tensor([3, 5, 7, 9])
    other = torch.tensor([[3, 8], [2, 5], [1, 2], [9, -1]])
    score = torch.tensor([[2.0, 1.9], [2.0, 2.0], [1.99, 1.98], [2.0, -1e30]])
    links = links_of(ids, score, other, heads=2, threshold=0.5)
    assert links[:, :2].tolist() == [[3, 8], [5, 2], [7, 1]]
    assert links[:, 2].contiguous().view(torch.float64).tolist() == pytest.approx([0.05, 0.0, 0.005], abs=1e-6)
    assert links_of(ids, score, other, heads=2, threshold=0.01)[:, 0].tolist() == [5, 7]


def as_links(links: list[tuple[int, int, float]]) -> np.ndarray:
    bits = np.array([distance for *_, distance in links]).view(np.int64)
    return np.array([(one, other, bit) for (one, other, _), bit in zip(links, bits.tolist(), strict=True)],
                    np.int64).reshape(-1, 3)


def test_pairs_are_taken_greedily_in_id_order() -> None:
    chain = [(4, 3, 0.01), (3, 2, 0.02), (2, 1, 0.03), (1, 2, 0.03)]
    assert choose_pairs(as_links(chain), 0.1).tolist() == [[1, 2], [3, 4]]
    assert choose_pairs(as_links(chain[::-1]), 0.1).tolist() == [[1, 2], [3, 4]]
    assert choose_pairs(as_links([]), 0.1).shape == (0, 2)


def test_siblings_pair_only_if_they_must_be_close() -> None:
    star = [(1, 2, 0.0), (2, 1, 0.0), (5, 1, 0.02), (6, 1, 0.09), (7, 1, 0.02), (8, 1, 0.02)]
    assert choose_pairs(as_links(star), 0.1).tolist() == [[1, 2], [5, 7]]
    assert choose_pairs(as_links(star), 0.4).tolist() == [[1, 2], [5, 6], [7, 8]]


def test_farthest_is_a_bound_that_is_reached() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        a, b, c = unit_keys(torch.randn(H, 3, D, generator=generator) + 0.5).double() / math.sqrt(H)
        assert 1 - float(a @ c) <= farthest(1 - float(a @ b), 1 - float(b @ c)) + 1e-6
    for one, other in ((0.0, 0.0), (0.1, 0.2), (0.5, 0.4), (1.0, 1.0), (1.5, 0.9)):
        wanted = 1 - math.cos(min(math.pi, math.acos(1 - one) + math.acos(1 - other)))
        assert farthest(one, other) == pytest.approx(wanted, abs=1e-9)


def test_opposite_keys_do_not_cancel() -> None:
    one = torch.zeros(1, 2, H, D)
    one[..., 0] = 1.0
    other = one.clone()
    other[:, 0, 1] *= -1
    merged = merge_vectors(one, other, torch.tensor([2]), torch.tensor([2]))
    assert torch.equal(merged[:, 0], one[:, 0].double())


@pytest.mark.parametrize("R", [1, 2, 5])
def test_every_loser_gets_to_its_survivor(R: int) -> None:
    survivor, loser = np.arange(0, 80, 2), np.arange(1, 81, 2)
    routes = [route_of(survivor, loser, virtual_shards=S, rank=rank, ranks=R) for rank in range(R)]
    rows = routes[0].rows // R
    tables = np.full((R, R * rows), -1)
    for rank, route in enumerate(routes):
        tables[rank, route.sent_at.numpy()] = loser[route.sent_E]
    for rank, route in enumerate(routes):
        arrived = np.concatenate([table[rank * rows:(rank + 1) * rows] for table in tables])
        assert arrived[route.arrived_at.numpy()].tolist() == loser[route.arriving_E].tolist()
    assert sum(route.sent_E.sum() for route in routes) == sum(route.arriving_E.sum() for route in routes) == 40
