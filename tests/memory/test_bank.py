"""The bank: the same whatever the number of ranks, against dense oracles and a plain model made of dicts.

`on_ranks` runs everything that needs real processes, once per number of ranks; the tests look at what came back.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lmcode.config import EVICTIONS, ConfigError, MemoryConfig
from lmcode.dist import Group
from lmcode.memory import LongTermMemory, lifecycle, measure
from lmcode.memory.entry import MASS_UNIT, MAX_IMPORTANCE
from lmcode.memory.placement import capacity_of, holder_of, virtual_shard_of
from lmcode.protocol import NO_SCORE, Candidates
from tests.helpers.banks import D, H, K, S, filled, make_bank, my_part, twins, unit
from tests.helpers.ranks import RankError, run_on_ranks
from tests.helpers.same_hits import assert_same_hits
from tests.helpers.slow_eviction import place_slowly

QUERIES = 48  # over all ranks, in four documents
RUNS = ({"tier": "exact", "exchange": "all_gather", "fetch": "sums", "write": "surprise"},
        {"tier": "exact", "exchange": "all_to_all", "fetch": "rows", "write": "every_nth"},
        {"tier": "faiss-flat", "exchange": "all_gather", "fetch": "rows", "write": "all"},
        {"tier": "faiss-flat", "exchange": "all_to_all", "fetch": "sums", "write": "surprise"},
        {"tier": "auto", "exchange": "auto", "fetch": "sums", "write": "surprise", "dtype": "bf16"})


def credits_of(seed: int, N: int) -> Tensor:
    """What N queries pay their hits: a share of a softmax, of several, or nothing."""
    credit = torch.rand(H, N, generator=torch.Generator().manual_seed(seed)) * 2
    return credit.where(credit > 0.4, 0.0)


# --- what runs on ranks ------------------------------------------------------------------------------------------


def train_a_little(group: Group, settings: dict[str, Any]) -> dict[str, Any]:
    """Reads, backward passes, commits, deletions; returns this rank's part of everything that must not depend on R."""
    bank = make_bank(group, importance_growth=0.2, second_chance_importance=1.2, write_share=0.4, **settings)
    bank.write(*twins(60, 0), torch.arange(60) % 4, torch.linspace(0.5, 1.5, 60))
    seen: dict[str, list] = {name: [] for name in ("id", "score", "value", "lse", "grad", "hash", "stats", "ages")}
    for step in range(4):
        query = my_part(unit(H, QUERIES, D, seed=10 + step) * 6, group, 1).requires_grad_()
        names = my_part(torch.arange(4).repeat_interleave(QUERIES // 4), group, 0).where(torch.tensor(step != 3), -1)
        hits = bank.search(query.detach(), names, scope=("document", "global", [0, 2], "document")[step])
        value, lse = bank.attend(query, hits)
        weight = my_part(unit(H, QUERIES, D, seed=20 + step), group, 1)
        ((value * weight).sum() + lse.where(lse > NO_SCORE, 0.0).square().sum()).backward()
        for name, one in zip(seen, (hits.id_HNK, hits.score_HNK, value, lse, query.grad), strict=False):
            seen[name].append(one.detach())
        seen["ages"].append(measure.ages(hits, step=step))
        credit = my_part(credits_of(step, QUERIES), group, 1) if step != 1 else None
        bank.commit(micro_batches(group, step), [hits._replace(credit_HN=credit)], step=step)
        if step == 2:
            bank.delete(ids=range(0, 40, 7))
            bank.delete(namespace=1, before_step=1)
        seen["hash"].append(bank.content_hash())
        seen["stats"].append({name: number for name, number in bank.stats().items() if name != "live_by_rank"})
    return seen


def micro_batches(group: Group, step: int) -> list[Candidates]:
    """This rank's candidates of a step, in two parts; some invalid, some not finite."""
    key, value = twins(36, 30 + step)
    value = value.clone()
    value[0, 5, 2], value[1, 17] = float("nan"), 1e20
    surprise = torch.linspace(0, 5, 36).roll(5 * step)
    valid = torch.arange(36) % 5 != step
    columns = [my_part(one, group, axis) for one, axis in ((key, 1), (value, 1), (torch.arange(36) // 9, 0),
                                                            (surprise, 0), (valid, 0))]
    half = len(columns[4]) // 2
    return [Candidates(columns[0][:, part], columns[1][:, part], *(one[part] for one in columns[2:]))
            for part in (slice(0, half), slice(half, None))]


def count_bytes(group: Group, size: int) -> dict[tuple[str, str], dict[str, int]]:
    counted: dict[Any, Any] = {}
    for exchange, fetch in itertools.product(("all_gather", "all_to_all", "auto"), ("sums", "rows")):
        bank = make_bank(group, exchange=exchange, fetch=fetch, group_size=size)
        bank.write(*twins(60, 0), torch.arange(60) % 4)
        group.take()
        query = unit(H, 10, D, seed=group.rank).requires_grad_()
        hits = bank.search(query.detach(), torch.arange(10) % 4)
        bank.attend(query, hits)[0].sum().backward()
        candidates = Candidates(*twins(7, 3), torch.zeros(7).long(), torch.ones(7), torch.ones(7).bool())
        bank.commit([candidates], [hits], step=1)
        counted[exchange, fetch] = group.take()[1]
    counted["hit"] = len(np.unique(hits.ticket.row_E.numpy() % bank.shard.num_slots))
    return counted


def read_raggedly(group: Group, size: int) -> list[tuple[Tensor, ...]]:
    """Rank r asks 3 * r queries (rank 0 none), then nobody asks any; returns hits, values and gradients."""
    seen = []
    for fetch, exchange in (("sums", "all_gather"), ("rows", "all_to_all")):
        bank = make_bank(group, fetch=fetch, exchange=exchange, group_size=size)
        bank.write(*twins(60, 0), torch.arange(60) % 4)
        for count in (3 * group.rank, 0):
            query = unit(H, 12, D, seed=5)[:, :count].clone().requires_grad_()
            hits = bank.search(query.detach(), torch.arange(count) % 4, ragged=True)
            value, lse = bank.attend(query, hits)
            (value.sum() + lse.sum()).backward()
            seen.append((*hits[:2], value.detach(), lse.detach(), query.grad))
        bank.commit([], [hits], step=0)
    return seen


def read_small_banks(group: Group, size: int) -> list[Tensor]:
    """Hits where some ranks have no entry, and where there are fewer entries than hits wanted."""
    found = []
    for tier, E in itertools.product(("exact", "faiss-flat"), (0, 1, 3)):
        bank = make_bank(group, tier=tier, exchange="all_to_all", group_size=size)
        bank.write(*twins(E, 0), torch.zeros(E).long())
        query = my_part(unit(H, 12, D, seed=1), group, 1)
        found.append(bank.search(query, torch.zeros(query.shape[1]).long()).id_HNK)
    return found


def everything(operations: int, size: int) -> dict[str, Any]:
    """One process's share of all checks on ranks, with memory groups of `size`."""
    group = Group.world()
    for seed, eviction in enumerate(EVICTIONS):
        follow_a_model(group, operations, seed=seed, group_size=size, eviction=eviction)
    runs = [train_a_little(group, {**settings, "group_size": size}) for settings in RUNS]
    return {"runs": runs, "bytes": count_bytes(group, size), "ragged": read_raggedly(group, size),
            "small": read_small_banks(group, size)}


def in_all_groups(operations: int, sizes: list[int]) -> dict[int, dict[str, Any]]:
    return {size: everything(operations, size) for size in sizes}


@cache
def _on_ranks(R: int) -> list[dict[int, dict[str, Any]]]:
    return run_on_ranks(in_all_groups, R, 50 if R == 2 else 15, SIZES[R])


def on_ranks(R: int, size: int = 0) -> list[dict[str, Any]]:
    return [rank[size] for rank in _on_ranks(R)]


@cache
def on_one_rank() -> dict[str, Any]:
    return everything(0, 0)


SIZES = {2: [0], 3: [0], 4: [4, 2, 1]}  # of the memory groups, by the number of ranks; 0: all are one


def same_bits(run: int, R: int, size: int) -> bool:
    """Whether a run promises the bits of one rank: FAISS's hits are scored pair by pair, but the exact tier multiplies all
    queries of a memory group at once, and a BLAS may sum in another order where these are fewer."""
    return RUNS[run]["tier"] == "faiss-flat" or size in (0, R)


RANKS = pytest.mark.parametrize(("R", "size"), [(R, size) for R, sizes in SIZES.items() for size in sizes])


# --- a model made of dicts ---------------------------------------------------------------------------------------


class PlainBank:
    """What a bank should do, one entry at a time; entries are dicts, a virtual shard is a list."""

    def __init__(self, slots: int, config: MemoryConfig) -> None:
        self.config, self.next_id, self.evicted, self.rejected = config, 0, 0, 0
        self.rings: list[list[dict | None]] = [[None] * capacity_of(s, slots, S) for s in range(S)]
        self.hands = [0] * S

    def entries(self) -> Iterator[dict]:
        return (one for ring in self.rings for one in ring if one is not None)

    def write(self, batch: list[dict]) -> None:
        groups: dict[int, list[dict]] = {}
        for one in batch:
            one["id"] = self.next_id
            self.next_id += 1
            if not (np.isfinite(one["key"]).all() and np.isfinite(one["value"]).all()):
                self.rejected += 1
                continue
            one["chance"] = one["importance"] >= self.config.second_chance_importance
            groups.setdefault(int(virtual_shard_of(np.array([one["id"]]), S)[0]), []).append(one)
        for shard, group in groups.items():
            ring = self.rings[shard]
            taken, self.hands[shard], spent, stored = place_slowly(self.config.eviction, self.hands[shard], ring, group)
            for slot in spent:
                ring[slot]["chance"] = False
            self.evicted += len(group) - len(stored) + sum(ring[slot] is not None for slot in taken)
            for slot, at in zip(taken, stored, strict=True):
                ring[slot] = group[at]

    def delete(self, condition: Any) -> int:
        count = 0
        for ring in self.rings:
            for slot, one in enumerate(ring):
                if one is not None and condition(one):
                    ring[slot], count = None, count + 1
        return count

    def score(self, query: np.ndarray, head: int, one: dict) -> float:
        return float(query @ one["key"][head].astype(np.float64) + math.log(one["importance"]))

    def touch(self, mass: dict[int, int], step: int) -> None:
        for one in self.entries():
            if one["id"] in mass:
                before, threshold = one["importance"], self.config.second_chance_importance
                one["last_hit"], one["hit_mass"] = step, one["hit_mass"] + mass[one["id"]]
                growth = self.config.importance_growth * mass[one["id"]] / MASS_UNIT
                one["importance"] = min(before + growth, MAX_IMPORTANCE)
                one["chance"] |= bool(before < threshold <= one["importance"])


def check_hits(plain: PlainBank, query: np.ndarray, namespace: int, scope: str, ids: list[int], scores: list[float],
               head: int) -> None:
    """Hits are the best of what may be seen, with the right scores, up to the rounding of near ties."""
    visible = {one["id"]: plain.score(query, head, one) for one in plain.entries()
               if namespace >= 0 and scope in ("global", one["namespace"])}
    found = [one for one in ids if one >= 0]
    assert len(set(found)) == len(found) == min(K, len(visible))
    assert ids[len(found):] == [-1] * (K - len(found))
    assert np.allclose([visible[one] for one in found], scores[:len(found)], atol=1e-5)
    assert np.allclose(sorted(visible.values(), reverse=True)[:K], scores[:len(found)], atol=1e-5)


def follow_a_model(group: Group | None, operations: int, seed: int, group_size: int = 0,
                   eviction: str = "clock") -> dict[str, int]:
    """Random operations on a bank and on the plain model, in step; every rank takes part in each and checks its own."""
    rng = np.random.default_rng(seed)
    bank = make_bank(group, slots=25, importance_growth=0.5, second_chance_importance=1.3, exchange="auto",
                     tier=("exact", "faiss-flat")[seed % 2], group_size=group_size, eviction=eviction)
    plain, rank = PlainBank(25, bank.config), bank.group.rank
    for step in range(operations):
        action = rng.choice(["write", "delete", "search", "commit"], p=[0.3, 0.1, 0.3, 0.3])
        batch = [{"key": unit(H, D, seed=int(rng.integers(2**40))).numpy(), "namespace": int(rng.integers(3)),
                  "value": rng.normal(size=(H, D)).astype(np.float32), "importance": 1.0, "step": step,
                  "last_hit": step, "hit_mass": 0} for _ in range(int(rng.integers(9)))]
        if batch and rng.random() < 0.1:
            batch[0]["value"][0, 0] = np.inf
        stacked = [torch.from_numpy(np.stack([one[name] for one in batch], 1)) if batch else torch.zeros(H, 0, D)
                   for name in ("key", "value")]
        names = torch.tensor([one["namespace"] for one in batch], dtype=torch.int64)
        if action == "write":
            bank.write(*stacked, names, step=step)
            plain.write(batch)
        elif action == "delete":
            delete_some(bank, plain, rng, step)
        else:
            read_and_commit(bank, plain, rng, batch, (*stacked, names), step, commit=action == "commit", rank=rank)
    compare(bank, plain)
    return {"evicted": plain.evicted, "rejected": plain.rejected, "live": len(list(plain.entries()))}


def delete_some(bank: LongTermMemory, plain: PlainBank, rng: np.random.Generator, step: int) -> None:
    namespace, limit, ids = int(rng.integers(4)), step - int(rng.integers(30)), rng.integers(0, plain.next_id + 1, 4)
    ways = [({"namespace": namespace, "before_step": limit},
             lambda one: one["namespace"] == namespace and one["step"] < limit),
            ({"ids": ids.tolist()}, lambda one: one["id"] in ids),
            ({"predicate": lambda columns: columns["importance"] > 3}, lambda one: one["importance"] > 3)]
    settings, condition = ways[int(rng.integers(3))]
    assert bank.delete(**settings) == plain.delete(condition)


def read_and_commit(bank: LongTermMemory, plain: PlainBank, rng: np.random.Generator, batch: list[dict],
                    stacked: tuple[Tensor, ...], step: int, *, commit: bool, rank: int) -> None:
    R, scope = bank.group.size, ("document", "global")[int(rng.integers(2))]
    query = unit(H, 4 * R, D, seed=int(rng.integers(2**40))) * 5
    names = torch.from_numpy(rng.integers(-1, 4, 4 * R))
    mine = slice(4 * rank, 4 * rank + 4)
    hits = bank.search(query[:, mine], names[mine], scope=scope)
    for head, at in itertools.product(range(H), range(4)):
        namespace = int(names[mine][at])
        check_hits(plain, query[head, 4 * rank + at].numpy(), namespace, "global" if scope == "global" else namespace,
                   hits.id_HNK[head, at].tolist(), hits.score_HNK[head, at].tolist(), head)
    if not commit:
        return
    mass: dict[int, int] = {}
    credit = credits_of(step, 4 * R)
    everyone = bank.group.all_gather_object((hits.id_HNK, hits.score_HNK))
    for at, (ids, scores) in enumerate(everyone):
        weight = (scores.double() - scores.double().logsumexp(-1, keepdim=True)).exp()
        paid = weight.float().double() * credit[:, 4 * at:4 * at + 4, None]
        for one, share in zip(ids.flatten().tolist(), paid.flatten().tolist(), strict=True):
            if one >= 0:
                mass[one] = mass.get(one, 0) + round(share * MASS_UNIT)
    plain.touch(mass, step)
    parts = np.array_split(np.arange(len(batch)), R)[rank]
    key, value, namespace = stacked[0][:, parts], stacked[1][:, parts], stacked[2][parts]
    report = bank.commit([Candidates(key, value, namespace, torch.ones(len(parts)), torch.ones(len(parts)).bool())],
                         [hits._replace(credit_HN=credit[:, mine])], step=step)
    plain.write(batch)
    assert report.offered == len(batch) == report.written + report.rejected


def compare(bank: LongTermMemory, plain: PlainBank) -> None:
    """Slot by slot: ids, metadata, vectors, hands; and the counters."""
    for shard in bank.owned:
        state, ring = bank.state(shard), plain.rings[shard]
        assert state["id"].tolist() == [-1 if one is None else one["id"] for one in ring]
        assert int(state["hand"]) == plain.hands[shard]
        for slot, one in enumerate(ring):
            if one is None:
                assert not state["key"][:, slot].any() and not state["value"][:, slot].any()
                continue
            for name in ("namespace", "step", "last_hit", "chance"):
                assert state[name][slot] == one[name], name
            assert abs(int(state["hit_mass"][slot]) - one["hit_mass"]) <= 64
            assert float(state["importance"][slot]) == pytest.approx(one["importance"], abs=1e-4)
            assert np.array_equal(state["key"][:, slot].numpy(), one["key"])
            assert np.array_equal(state["value"][:, slot].numpy(), one["value"])
    stats = bank.stats()
    assert (stats["evicted"], stats["rejected"], stats["next_id"]) == (plain.evicted, plain.rejected, plain.next_id)
    assert stats["live"] == len(list(plain.entries()))


@pytest.mark.parametrize(("seed", "eviction"), enumerate(EVICTIONS))
def test_one_rank_follows_the_model_through_many_wraps(seed: int, eviction: str) -> None:
    outcome = follow_a_model(None, 500, seed, eviction=eviction)
    assert outcome["evicted"] > 15 * 25 and outcome["rejected"] > 8


# --- world-size invariance ---------------------------------------------------------------------------------------


@RANKS
def test_hits_values_and_gradients_do_not_depend_on_the_number_of_ranks(R: int, size: int) -> None:
    alone, together = on_one_rank()["runs"], [rank["runs"] for rank in on_ranks(R, size)]
    for run in range(len(alone)):
        for step in range(4):
            joined = {name: torch.cat([rank[run][name][step] for rank in together], dim=1)
                      for name in ("id", "score", "value", "lse", "grad")}
            if same_bits(run, R, size):
                for name in ("id", "score"):
                    assert torch.equal(joined[name], alone[run][name][step]), (run, step, name)
            assert_same_hits((joined["score"], joined["id"]), (alone[run]["score"][step], alone[run]["id"][step]),
                             tolerance=1e-5)
            for name in ("value", "lse", "grad"):
                assert torch.allclose(joined[name], alone[run][name][step], atol=1e-5), (run, step, name)
            ages = torch.cat([rank[run]["ages"][step] for rank in together])
            assert torch.equal(ages.sort().values, alone[run]["ages"][step].sort().values)


@RANKS
def test_contents_do_not_depend_on_the_number_of_ranks(R: int, size: int) -> None:
    alone = on_one_rank()["runs"]
    for rank in on_ranks(R, size):
        for number, (run, wanted) in enumerate(zip(rank["runs"], alone, strict=True)):
            assert run["hash"] == wanted["hash"] or not same_bits(number, R, size)
            assert run["stats"] == wanted["stats"]


def test_the_scenario_is_worth_its_name() -> None:
    for run in on_one_rank()["runs"]:
        last = run["stats"][-1]
        assert last["evicted"] > 0 and last["rejected"] > 0 and len(set(run["hash"])) == 4
        assert (run["id"][0] >= 0).all() and (run["id"][3] == -1).all()
        assert run["grad"][1].any() and not run["grad"][3].any()


def test_exchange_and_fetch_change_nothing_but_the_route() -> None:
    def build(**settings: Any) -> dict[str, Any]:
        return train_a_little(Group(), settings)
    wanted = build(tier="exact", exchange="all_gather", fetch="rows")
    for exchange, fetch in itertools.product(("all_gather", "all_to_all", "auto"), ("sums", "rows")):
        found = build(tier="exact", exchange=exchange, fetch=fetch)
        assert found["hash"] == wanted["hash"]
        for name in ("id", "score"):
            assert all(torch.equal(a, b) for a, b in zip(found[name], wanted[name], strict=True))
        for name in ("value", "lse", "grad"):
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found[name], wanted[name], strict=True))


def test_tiers_agree() -> None:
    found, wanted = (train_a_little(Group(), {"tier": tier}) for tier in ("faiss-flat", "exact"))
    for name in ("score", "value", "lse", "grad"):
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found[name], wanted[name], strict=True))
    assert torch.equal(found["id"][0], wanted["id"][0])


@RANKS
def test_bytes_are_those_of_the_formulas(R: int, size: int) -> None:
    n, b, E, G = 10 * H, 4, 7, size or R
    for rank, outcome in enumerate(on_ranks(R, size)):
        here = holder_of(60 + np.arange(E * R), S, G) == rank % G
        arriving = int((here & (np.arange(E * R) // E != rank)).sum())
        hit = max(on_ranks(R, size)[other]["bytes"]["hit"] for other in range(rank % G, R, G))
        for (exchange, fetch), counted in ((way, one) for way, one in outcome["bytes"].items() if way != "hit"):
            lists = {"all_gather": G * 12 * n * K, "all_to_all": 12 * n * K + 16 * n}
            read = {"queries": n * D * b + 10 * 8, "hits": lists.get(exchange, min(lists.values())),
                    "values": n * D * b if fetch == "sums" else n * K * 2 * D * b,
                    "gradients": n * (D + 2) * b + n * D * b}
            if fetch == "rows":
                del read["gradients"]
            writes = (R - 1) * (8 + E * 24) + arriving * H * 2 * D * b + (G - 1) * n * b
            writes += (R // G - 1) * (8 + hit * 16)
            # A group of one rank reads for nothing, and a single group has no hits to add up.
            assert counted == {**{name: (G - 1) * each for name, each in read.items() if G > 1}, "writes": writes}


@RANKS
def test_ranks_may_ask_differently_many_queries(R: int, size: int) -> None:
    bank = make_bank()
    bank.write(*twins(60, 0), torch.arange(60) % 4)
    for rank, outcome in enumerate(on_ranks(R, size)):
        for at, (score, ids, value, lse, grad) in enumerate(outcome["ragged"]):
            count = 3 * rank if at % 2 == 0 else 0
            query = unit(H, 12, D, seed=5)[:, :count].clone().requires_grad_()
            hits = bank.search(query.detach(), torch.arange(count) % 4)
            wanted_value, wanted_lse = bank.attend(query, hits)
            (wanted_value.sum() + wanted_lse.sum()).backward()
            assert_same_hits((score, ids), hits[:2], tolerance=1e-5)
            for found, wanted in ((value, wanted_value), (lse, wanted_lse), (grad, query.grad)):
                assert found.shape == wanted.shape and torch.allclose(found, wanted, atol=1e-5)


@RANKS
def test_empty_shards_and_fewer_entries_than_hits(R: int, size: int) -> None:
    alone, together = on_one_rank()["small"], [rank["small"] for rank in on_ranks(R, size)]
    for at, (wanted, E) in enumerate(zip(alone, (0, 1, 3) * 2, strict=True)):
        assert torch.equal(torch.cat([rank[at] for rank in together], 1), wanted)
        assert (wanted >= 0).sum(-1).eq(E).all()


# --- reading on one rank -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fetch", ["sums", "rows"])
def test_attention_over_everything_visible_is_a_dense_softmax(fetch: str) -> None:
    bank, key, value, log_importance = filled(fetch=fetch)
    names, weight = torch.arange(20) % 4, unit(H, 20, D, seed=7)
    query = (unit(H, 20, D, seed=6) * 5).requires_grad_()
    found, lse = bank.attend(query, bank.search(query.detach(), names, top_k=12))
    grad, = torch.autograd.grad((found * weight).sum() + (lse * weight[..., 0]).sum(), query)
    score = query @ key.transpose(1, 2) + log_importance
    score = score.masked_fill(names[:, None] != torch.arange(40) % 4, -float("inf"))
    dense = score.softmax(-1) @ value
    wanted, = torch.autograd.grad((dense * weight).sum() + (score.logsumexp(-1) * weight[..., 0]).sum(), query)
    assert torch.allclose(found, dense, atol=1e-5)
    assert torch.allclose(lse, score.logsumexp(-1), atol=1e-5)
    assert torch.allclose(grad, wanted, atol=1e-5)


def test_fetched_rows_are_those_of_the_hits() -> None:
    bank, key, value, _ = filled()
    hits = bank.search(unit(H, 9, D, seed=1), torch.tensor([0, 1, 2, 3, 0, 1, 2, -1, 9]), top_k=12)
    found_key, found_value = bank.fetch(hits)
    for head, at, place in itertools.product(range(H), range(9), range(12)):
        one = int(hits.id_HNK[head, at, place])
        assert torch.equal(found_key[head, at, place], key[head, one] if one >= 0 else torch.zeros(D))
        assert torch.equal(found_value[head, at, place], value[head, one] if one >= 0 else torch.zeros(D))


@pytest.mark.parametrize("fetch", ["sums", "rows"])
@pytest.mark.parametrize("tier", ["exact", "faiss-flat"])
def test_a_query_without_hits_gets_nothing_and_gives_no_gradient(fetch: str, tier: str) -> None:
    bank, *_ = filled(fetch=fetch, tier=tier)
    query = unit(H, 6, D, seed=1)
    query[1, 2, 3], query[0, 3, 0], query[0, 4, 1] = float("nan"), float("inf"), 1e30
    query.requires_grad_()
    hits = bank.search(query.detach(), torch.tensor([-1, 77, 0, 0, 0, 0]))
    assert hits.id_HNK[:, :5].eq(-1).all() and hits.score_HNK[:, :5].eq(NO_SCORE).all() and hits.valid_HNK[:, 5].all()
    value, lse = bank.attend(query, hits)
    assert value[:, :5].eq(0).all() and lse[:, :5].eq(NO_SCORE).all()
    (value.sum() + lse.sum()).backward()
    assert query.grad[:, :5].eq(0).all() and query.grad[:, 5].ne(0).all()
    assert bank.stats()["blind_queries"] == 3


def test_bf16_queries_get_bf16_values() -> None:
    bank, *_ = filled()
    query = unit(H, 6, D, seed=1).bfloat16().requires_grad_()
    value, lse = bank.attend(query, bank.search(query.detach(), torch.arange(6) % 4))
    (value.sum() + lse.sum()).backward()
    assert value.dtype == query.grad.dtype == torch.bfloat16 and lse.dtype == torch.float32


@pytest.mark.parametrize("fetch", ["sums", "rows"])
def test_reads_never_write(fetch: str) -> None:
    bank, *_ = filled(fetch=fetch)
    before = bank.content_hash()
    query = unit(H, 6, D, seed=1).requires_grad_()
    hits = bank.search(query.detach(), torch.arange(6) % 4)
    first, second = bank.attend(query, hits), bank.attend(query, hits)  # a replay under activation checkpointing
    assert torch.equal(first[0], second[0])
    (first[0].sum() + second[1].sum()).backward()
    bank.fetch(hits)
    measure.recall(bank)
    bank.stats()
    measure.shares_by_rank(bank, hits)
    assert bank.content_hash() == before


def test_scopes() -> None:
    bank, *_ = filled()
    query, names = unit(H, 4, D, seed=1), torch.tensor([0, 1, 2, -1])
    for scope, visible in (("document", None), ("global", {0, 1, 2, 3}), ([3], {3}), ([1, 2, 99], {1, 2}), ([], set())):
        ids = bank.search(query, names, scope=scope, top_k=40).id_HNK
        for at in range(3):
            seen = visible if visible is not None else {at}
            found = ids[:, at][ids[:, at] >= 0]
            assert set((found % 4).tolist()) == seen and len(found) == H * 10 * len(seen)
        assert ids[:, 3].eq(-1).all()


def test_names_on_the_cpu_go_to_the_device_of_the_bank(monkeypatch: pytest.MonkeyPatch) -> None:
    """On `meta` nothing can be searched; so what the reader is given is looked at."""
    config, seen = MemoryConfig(virtual_shards=S, tier="exact"), []
    bank = LongTermMemory(heads=H, head_dim=D, slots=90, top_k=K, config=config, device="meta")
    for name in ("search", "look_up"):
        monkeypatch.setattr(bank.reader, name, lambda query, *names, **_: seen.append((query, *names[:2])) or [torch.zeros(
            1, 1, 1), torch.zeros(1, 1)])
    query, names = torch.zeros(H, 3, D, device="meta"), torch.zeros(3, dtype=torch.int64)
    for document in (None, names):
        bank.search(query, names, document)
        bank.look_up(query, names, document)
    assert len(seen) == 4 and {part.device.type for parts in seen for part in parts} == {"meta"}
    assert {part.device.type for part in bank.sample[:3]} == {"meta"}


def test_recall_counts_what_was_missed() -> None:
    bank, *_ = filled(recall_queries=3)
    query, names = unit(H, 8, D, seed=1), torch.arange(8) % 4
    hits = bank.search(query, names)
    asked = measure.Sample(query, names, torch.full_like(names, -1), bank.config.scope)
    assert measure.check_recall(bank, asked, hits) == measure.recall(bank) == 1.0
    spoiled = hits.id_HNK.clone()
    spoiled[..., 0] = 999
    assert measure.check_recall(bank, asked, hits._replace(id_HNK=spoiled)) == pytest.approx((K - 1) / K)
    assert measure.recall(make_bank()) is None, "where nothing is stored nothing is measured"
    unasked, *_ = filled(recall_queries=0)
    unasked.search(query, names)
    assert measure.recall(unasked) is None


def test_hits_by_rank() -> None:
    class Fake(Group):
        def all_gather(self, tensor: Tensor, *, phase: str) -> Tensor:
            return tensor
    bank, *_ = filled()
    hits = bank.search(unit(H, 8, D, seed=1), torch.arange(8) % 4)
    assert measure.shares_by_rank(bank, hits).tolist() == [hits.id_HNK.numel()]
    bank.inside, bank.group = Fake(rank=1, size=3), Fake(rank=4, size=6)  # the second memory group of two
    wanted = np.bincount(3 + holder_of(hits.id_HNK.numpy().ravel(), S, 3), minlength=6)
    assert measure.shares_by_rank(bank, hits).tolist() == wanted.tolist() and wanted[:3].sum() == 0


# --- writing on one rank -----------------------------------------------------------------------------------------


def test_rows_that_are_not_finite_are_rejected_and_counted() -> None:
    bank, (key, value) = make_bank(), twins(10, 0)
    key[0, 1, 2], value[1, 3, 0] = float("nan"), -float("inf")
    names, importance = torch.zeros(10).long(), torch.ones(10)
    names[5], importance[7], importance[8] = -4, 0.0, float("nan")
    ids = bank.write(key, value * 1e4, names, importance)
    assert ids.tolist() == [0, -1, 2, -1, 4, -1, 6, -1, -1, 9]
    stats = bank.stats()
    assert (stats["rejected"], stats["clipped"], stats["live"], stats["next_id"]) == (5, 5, 5, 10)
    for shard in bank.owned:
        state = bank.state(shard)
        assert state["value"].norm(dim=-1).max() <= 100.001 and state["key"].isfinite().all()
    surprise = torch.tensor([0.5] * 9 + [math.nan])
    candidates = Candidates(key, value, torch.zeros(10).long(), surprise, torch.ones(10).bool())
    report = bank.commit([candidates], [], step=1)
    assert (report.offered, report.written, report.rejected) == (10, 7, 3)


def test_ids_are_never_reused() -> None:
    bank = make_bank(slots=12)
    seen: set[int] = set()
    for round_ in range(20):
        ids = bank.write(*twins(9, round_), torch.zeros(9).long()).tolist()
        assert not seen & set(ids)
        seen |= set(ids)
        bank.delete(ids=ids[:3])
    assert bank.next_id == 180


def test_deleted_entries_never_come_back() -> None:
    bank, key, *_ = filled()
    assert bank.delete(namespace=2) == 10
    assert bank.delete(namespace=2) == 0
    copies = [bank, lifecycle.fork(bank, empty=False)]
    bank.write(*twins(30, 8), torch.arange(30) % 2)
    for one in copies:
        ids = one.search(key[:, 2::4] * 9, torch.full((10,), 2), scope="global", top_k=100).id_HNK
        assert not ((ids < 40) & (ids >= 0) & (ids % 4 == 2)).any()
        for shard in one.owned:
            assert not (one.state(shard)["namespace"] == 2).any()


def test_only_a_fresh_read_can_be_used() -> None:
    bank, *_ = filled()
    other = lifecycle.fork(bank, empty=False)
    query = unit(H, 6, D, seed=1).requires_grad_()
    hits = bank.search(query.detach(), torch.arange(6) % 4)
    value, _ = bank.attend(query, hits)
    with pytest.raises(ValueError, match="since it last changed"):
        other.attend(query, hits)
    bank.commit([], [hits], step=1)
    for stale in (lambda: bank.attend(query, hits), lambda: bank.commit([], [hits], step=2), lambda: bank.fetch(hits)):
        with pytest.raises(ValueError, match="since it last changed"):
            stale()
    with pytest.raises(ValueError, match="before the bank changes"):
        value.sum().backward()
    assert measure.ages(hits, step=5).eq(5).all()  # what was read has an age all the same


@pytest.mark.parametrize("threshold", [0.1, 1e-6])
def test_consolidation_makes_hits_stale(threshold: float) -> None:
    bank, *_ = filled()
    hits = bank.search(unit(H, 6, D, seed=1), torch.arange(6) % 4)
    assert bank.consolidate(threshold).merged == 20  # the twins, which are in the same namespace
    with pytest.raises(ValueError, match="since it last changed"):
        bank.fetch(hits)


def test_hit_mass_does_not_depend_on_how_a_step_is_split() -> None:
    whole, *_ = filled()
    split = lifecycle.fork(whole, empty=False)
    query, names = unit(H, 12, D, seed=1), torch.arange(12) % 4
    whole.commit([], [whole.search(query, names)], step=1)
    split.commit([], [split.search(query[:, part], names[part]) for part in (slice(0, 5), slice(5, 12))], step=1)
    assert whole.content_hash() == split.content_hash()
    mass = sum(int(whole.state(shard)["hit_mass"].sum()) for shard in whole.owned)
    assert mass == pytest.approx(12 * H * MASS_UNIT, abs=12 * H * K)


@pytest.mark.parametrize("fetch", ["sums", "rows"])
def test_an_entry_is_credited_with_its_weight_times_what_its_query_paid(fetch: str) -> None:
    bank, *_ = filled(fetch=fetch)
    query, names, credit = unit(H, 12, D, seed=1) * 3, torch.arange(12) % 4, credits_of(3, 12)
    hits = bank.search(query, names)
    paid: dict[int, float] = {}
    for h, n, k in itertools.product(range(H), range(12), range(K)):
        weight = float(hits.score_HNK[h, n].softmax(0)[k] * credit[h, n])
        paid[int(hits.id_HNK[h, n, k])] = paid.get(int(hits.id_HNK[h, n, k]), 0.0) + weight
    bank.commit([], [hits._replace(credit_HN=credit)], step=1)
    columns = bank.shard.columns
    for one, mass in zip(columns["id"].tolist(), (columns["hit_mass"] / MASS_UNIT).tolist(), strict=True):
        assert mass == pytest.approx(paid.get(one, 0.0), abs=1e-4)
    assert (credit == 0).any() and sum(paid.values()) == pytest.approx(float(credit.sum()), rel=1e-4)


@pytest.mark.parametrize("credit", [0.0, -1.0, math.nan, math.inf])
def test_who_is_paid_nothing_or_no_finite_amount_earns_nothing(credit: float) -> None:
    bank, *_ = filled()
    before = {name: bank.shard.columns[name].copy() for name in ("hit_mass", "importance", "chance")}
    hits = bank.search(unit(H, 12, D, seed=1), torch.arange(12) % 4)
    bank.commit([], [hits._replace(credit_HN=torch.full((H, 12), credit))], step=1)
    for name, column in before.items():
        assert np.array_equal(bank.shard.columns[name], column), name
    assert (bank.shard.columns["last_hit"] == 1).any()


def test_at_the_defaults_who_is_read_again_and_again_gets_and_spends_a_second_chance() -> None:
    bank = LongTermMemory(heads=H, head_dim=D, slots=8, top_k=K, config=MemoryConfig(virtual_shards=1))
    key, value = twins(24, 3)
    bank.write(key[:, :8], value[:, :8], torch.zeros(8).long())
    chances = []
    for step in range(5):  # each read gives entry 0 part of a token's softmax in each head
        hits = bank.search(key[:, :1] * 50, torch.zeros(1).long())
        bank.commit([], [hits._replace(credit_HN=torch.full((H, 1), 0.3))], step=step)
        chances.append(bank.stats()["chances"])
    assert chances == [0, 0, 0, 1, 1]
    for first, last, survives in ((8, 15, True), (15, 22, False)):
        bank.write(key[:, first:last], value[:, first:last], torch.zeros(7).long())
        assert (bank.stats()["chances"], bank.stats()["spared"]) == (0, int(survives))
        assert (0 in bank.shard.columns["id"]) == survives and 1 not in bank.shard.columns["id"]


def test_a_credit_is_one_number_for_each_query() -> None:
    bank, *_ = filled()
    hits = bank.search(unit(H, 12, D, seed=1), torch.arange(12) % 4)
    with pytest.raises(ValueError, match=r"credit of hits must be \[2, 12\].*got \(12, 2\)"):
        bank.commit([], [hits._replace(credit_HN=torch.ones(12, H))], step=1)


def test_search_time_is_counted() -> None:
    bank, *_ = filled()
    bank.search(unit(H, 6, D, seed=1), torch.arange(6) % 4)
    assert bank.reader.stopwatch.take() > 0 == bank.reader.stopwatch.take()


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"top_k must lie in 1\.\.2048: got 0"):
        make_bank(top_k=0)
    with pytest.raises(ConfigError, match="slots must be at least the number of virtual shards: 5 < 6"):
        make_bank(slots=5)
    with pytest.raises(ConfigError, match="at least the number of ranks: 6 < 7"):
        make_bank(Group(rank=0, size=7))
    with pytest.raises(ValueError, match="virtual_shards must be at least memory.group_size: 6 < 7"):
        make_bank(group_size=7)
    bank, *_ = filled()
    query, names = torch.zeros(H, 3, D), torch.zeros(3).long()
    for bad_query, bad_names in ((query[:1], names), (query[..., 1:], names), (query, names[1:])):
        with pytest.raises(ValueError, match=r"queries must be \[2, N, 8\]"):
            bank.search(bad_query, bad_names)
    with pytest.raises(ValueError, match="scope must be .* got 'documents'"):
        bank.search(query, names, scope="documents")
    with pytest.raises(ValueError, match=r"1\.\.2048: got 2049"):
        bank.search(query, names, top_k=2049)
    with pytest.raises(ValueError, match=r"must be \[2, E, 8\]"):
        bank.write(query, query[:, 1:], names)
    with pytest.raises(ValueError, match="at least one of ids, namespace, before_step, predicate"):
        bank.delete()


def test_it_is_no_module() -> None:
    bank, *_ = filled()
    assert not isinstance(bank, torch.nn.Module)
    assert not any(isinstance(one, torch.nn.Parameter) for one in vars(bank.shard).values())
    model = torch.nn.Module()
    model.long_term_memory = bank
    assert not list(model.parameters()) and not list(model.buffers()) and not model.state_dict()


# --- the runner itself -------------------------------------------------------------------------------------------


def fail_on_the_last_rank() -> None:
    group = Group.world()
    if group.rank == group.size - 1:
        raise KeyError("on purpose")
    group.barrier()


def hang() -> None:
    threading.Event().wait()


def test_a_failing_rank_is_named_with_its_traceback() -> None:
    with pytest.raises(RankError, match=r"rank 1 of 2 failed:\n(.|\n)*fail_on_the_last(.|\n)*KeyError: 'on purpose'"):
        run_on_ranks(fail_on_the_last_rank, 2)


def test_a_hanging_rank_is_named_with_its_stack() -> None:
    with pytest.raises(RankError, match=r"ranks \[0\] of 1 did not finish in time:\nrank 0:(.|\n)* in hang\n"):
        run_on_ranks(hang, 1, timeout_s=1)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("scope", ["document", "global"])
def test_looking_up_is_searching_and_attending(scope: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents without an entry, with fewer than K, with twins whose order ids decide, and with more than K."""
    bank = make_bank(slots=300, scope=scope, dtype=dtype)
    long_ways = []
    search = bank.reader.search
    monkeypatch.setattr(bank.reader, "search", lambda *parts, **rest: (long_ways.append(1), search(*parts, **rest))[1])

    def compare(query: Tensor, names: Tensor) -> int:
        """Compares; how often the shortcut did not do."""
        looked, before = bank.look_up(query, names), len(long_ways)
        whole = bank.attend(query, bank.search(query, names))
        for one, other in zip(looked, whole, strict=True):
            assert torch.allclose(one, other, atol=1e-5) and one.dtype == other.dtype and one.shape == other.shape
        long_ways.pop()  # the whole search's own
        return before

    names = torch.tensor([0, 1, 2, -1, 0, 2, 7])
    assert compare(unit(H, 7, D, seed=1) * 4, names) == 0  # nothing stored
    bank.write(unit(H, 3, D, seed=2), unit(H, 3, D, seed=3), torch.zeros(3, dtype=torch.int64))
    bank.write(unit(H, 40, D, seed=4), unit(H, 40, D, seed=5), torch.full((40,), 2), torch.linspace(0.5, 2, 40))
    assert compare(unit(H, 7, D, seed=6) * 4, names) == 0
    assert compare(unit(H, 7, D, seed=6) * 4, names) == 0  # from rows that are kept
    assert compare(unit(H, 1, D, seed=6) * 4, names[2:3]) == compare(unit(H, 1, D, seed=6) * 4, names[3:4]) == 0
    bank.write(unit(H, 1, D, seed=7).expand(-1, 30, -1), unit(H, 30, D, seed=8), torch.full((30,), 2))
    assert compare(unit(H, 1, D, seed=7).expand(-1, 7, -1) * 4, names) == 1  # equals: the first ids win
    bank.delete(namespace=2)
    assert compare(unit(H, 7, D, seed=6) * 4, names) == 1  # not from rows that are gone
    assert compare(unit(H, 7, D, seed=6).index_fill(1, torch.tensor([4]), math.nan), names) == 2
    assert bank.reader.blind_queries == 2
    compare(unit(H, 200, D, seed=9), torch.zeros(200, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"queries must be \[2, N, 8\]"):
        bank.look_up(unit(H, 7, D + 1, seed=6), names)
