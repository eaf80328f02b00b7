"""The tier ivf: hits of a slow oracle that probes the same lists; the same on any number of ranks, after any operation."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lmcode.config import ConfigError, MemoryConfig
from lmcode.dist import Group
from lmcode.memory import LongTermMemory, lifecycle, measure, planning
from lmcode.memory.reshard import reshard
from lmcode.memory.search import ivf, plan
from lmcode.memory.search.flat import search_flat
from lmcode.memory.search.ivf import IvfTier, nearest_centroids, search_by_probing
from lmcode.memory.search.plan import Measurements, Plan, load_plan, revise, save_plan
from lmcode.memory.search.tier import Rows
from tests.helpers.ranks import run_on_ranks
from tests.helpers.rows import assert_same, whole_numbers, with_twins

pytest.importorskip("faiss")
H, D, K = 2, 8, 5


def searching(rows: Rows, centroid_HXD: Tensor, probes: int) -> IvfTier:
    tier = IvfTier()
    tier.use(Plan(True, probes, 1, centroid_HXD))
    return tier


def some_centroids(rows: Rows, lists: int) -> Tensor:
    return F.normalize(rows.key_HMD[:, :lists] + 1e-3, dim=-1)


HIDDEN = ([], [(torch.tensor([0, 2, 5]), torch.arange(20, 90)), (torch.tensor([7]), torch.arange(60, 200))])


@pytest.mark.parametrize("make", [whole_numbers, with_twins])
@pytest.mark.parametrize("hidden", HIDDEN)
def test_equals_the_oracle_that_probes_the_same_lists(make: object, hidden: list) -> None:
    query, rows = make(0, 40, 900)
    centroid = some_centroids(rows, 24)
    for probes in (1, 3, 24):
        tier = searching(rows, centroid, probes)
        found = tier.search(query, rows, 33, hidden=hidden)
        for head in range(len(query)):
            list_M = nearest_centroids(rows.key_HMD[head], centroid[head], 1)[:, 0].numpy()
            wanted = search_by_probing(query[head], rows.of_head(head), 33, list_M=list_M, hidden=hidden,
                                       probe_NX=nearest_centroids(query[head], centroid[head], probes))
            assert_same([part[head] for part in found], wanted)
    assert_same(found, search_flat(query, rows, 33, hidden=hidden))  # all lists: nothing is missed


def test_probes_and_lists_follow_from_the_vector_alone() -> None:
    vector, centroid = torch.randn(3000, D), torch.randn(20, D)
    whole, order = nearest_centroids(vector, centroid, 4), torch.randperm(3000)
    assert torch.equal(nearest_centroids(vector[order], centroid, 4).sort(1).values, whole[order].sort(1).values)
    assert torch.equal(nearest_centroids(vector[:7], centroid, 1), whole[:7, :1])
    ties = nearest_centroids(torch.ones(1, D), torch.ones(9, D), 3)
    assert sorted(ties[0].tolist()) == [0, 1, 2]
    assert nearest_centroids(vector[:2], centroid, 99).sort(1).values.tolist() == [list(range(20))] * 2


# --- a bank ------------------------------------------------------------------------------------------------------


def clustered(seed: int, count: int) -> Tensor:
    chance = torch.Generator().manual_seed(seed)
    centre = torch.randn(12, D, generator=torch.Generator().manual_seed(5))
    key = centre[torch.randint(12, (H, count), generator=chance)] + 0.3 * torch.randn(H, count, D, generator=chance)
    return F.normalize(key, dim=-1)


def make_bank(**settings: object) -> LongTermMemory:
    plan.LEAST_ENTRIES = 64  # in processes of their own; put back by the fixture elsewhere
    config = MemoryConfig(**{"tier": "ivf", "scope": "global", "virtual_shards": 4, "recall_queries": 12, **settings})
    return LongTermMemory(heads=H, head_dim=D, slots=500, top_k=K, config=config, group=Group.world())


@pytest.fixture(autouse=True)
def least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "LEAST_ENTRIES", 64)


def ask(bank: LongTermMemory, seed: int) -> tuple[Tensor, Tensor]:
    """All ranks' hits of 24 queries of four documents, and this rank's searched again by the oracle if it is alone."""
    query, group = 7 * clustered(1000 + seed, 24), bank.group
    mine = slice(group.rank * 24 // group.size, (group.rank + 1) * 24 // group.size)
    names, documents = torch.arange(24)[mine] % 3, torch.arange(24)[mine] % 4
    hits = bank.search(query[:, mine], names, documents)
    if group.size == 1 and bank.plan.centroid_HXD is not None and bank.plan.probing:
        check_against_oracle(bank, query, names.numpy(), documents.numpy(), hits)
    parts = group.all_gather_object((hits.score_HNK, hits.id_HNK))
    return torch.cat([part[0] for part in parts], 1), torch.cat([part[1] for part in parts], 1)


def check_against_oracle(bank: LongTermMemory, query: Tensor, names: np.ndarray, documents: np.ndarray,
                         hits: object) -> None:
    shard, columns = bank.shard, bank.shard.columns
    rows = Rows(shard.key_HMD, shard.addend_M, torch.from_numpy(columns["id"]))
    hidden = [(torch.tensor([number]), torch.from_numpy(np.flatnonzero(
        (columns["document"] == document) & (columns["namespace"] != name))))
        for number, (name, document) in enumerate(zip(names, documents, strict=True))]
    for head, centroid_XD in enumerate(bank.plan.centroid_HXD):
        list_M = nearest_centroids(shard.key_HMD[head], centroid_XD, 1)[:, 0].numpy().copy()
        list_M[columns["id"] < 0] = -1
        wanted = search_by_probing(query[head], rows.of_head(head), K, list_M=list_M, hidden=hidden,
                                   probe_NX=nearest_centroids(query[head], centroid_XD, bank.plan.probes))
        assert torch.equal(hits.id_HNK[head], wanted[1]) and torch.equal(hits.score_HNK[head], wanted[0])


def life(folder: str, dtype: str) -> list[Tensor]:
    """What a bank finds in the course of random operations, in order."""
    bank, chance, seen = make_bank(dtype=dtype), np.random.default_rng(3), []
    for step in range(8):
        count = 90 if step else 300
        key, texts = clustered(step, count), torch.arange(count)
        importance = torch.rand(count, generator=torch.Generator().manual_seed(step)) + 0.5
        bank.write(key, key, texts % 3, importance, step, texts % 5)
        seen += ask(bank, step)  # the newest writes are found at once
        recall = planning.review(bank)
        assert bank.plan.centroid_HXD is not None and recall is not None
        bank.use(replace(bank.plan, probes=2))
        seen += ask(bank, step)
        if step == 2:
            found = ask(bank, step)[1]
            gone = [int(found[0, 0, 0]), int(found[1, 3, 1])]
            assert bank.delete(ids=gone) == len({*gone}) and bank.plan.centroid_HXD is None
            planning.review(bank)
            assert not np.isin(ask(bank, step)[1], gone).any()
        if step == 4:
            bank.consolidate(0.02)
            seen += ask(bank, step)
        if step == 6:  # save and load, on the same ranks
            if bank.group.rank == 0:
                save_plan(Path(folder) / "plan", bank.plan)
            bank.group.barrier()
            other = make_bank(dtype=dtype)
            lifecycle.restore(other, {shard: bank.state(shard) for shard in bank.owned})
            other.use(load_plan(Path(folder) / "plan", heads=H, head_dim=D))
            assert all(torch.equal(*pair) for pair in zip(ask(bank, step), ask(other, step), strict=True))
            bank = other
        mine = slice(bank.group.rank * 4 // bank.group.size, (bank.group.rank + 1) * 4 // bank.group.size)
        hits = bank.search(clustered(step, 4)[:, mine], torch.zeros(4, dtype=torch.int64)[mine])
        bank.commit([], [hits], step=step)  # attention changes scores, and no list
        seen += [torch.tensor([chance.integers(9)])]
    assert bank.stats()["evicted"] > 0
    return seen


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_same_hits_on_any_number_of_ranks_after_any_operation(dtype: str, tmp_path: Path) -> None:
    alone = life(str(tmp_path), dtype)
    for ranks in (2, 4) if dtype == "fp32" else (2,):
        for one in run_on_ranks(life, ranks, str(tmp_path), dtype):
            for part, wanted in zip(one, alone, strict=True):
                assert torch.equal(part, wanted)


def filled(**settings: object) -> LongTermMemory:
    bank = make_bank(**settings)
    bank.write(clustered(0, 400), clustered(0, 400), torch.zeros(400).long())
    return bank


def test_a_reshard_keeps_what_is_found() -> None:
    bank = filled()
    planning.review(bank)
    states = reshard([bank.state(shard) for shard in bank.owned], virtual_shards=7, slots=700)
    other = lifecycle.like(bank, slots=700, config=bank.config.model_copy(update={"virtual_shards": 7}))
    lifecycle.restore(other, states)
    assert all(torch.equal(*pair) for pair in zip(ask(bank, 0), ask(other, 0), strict=True))


def test_before_there_are_centroids_it_is_exact_and_a_look_up_is_a_search() -> None:
    bank, query, names = filled(), 7 * clustered(9, 6), torch.zeros(6).long()
    exact = bank.search(query, names, tier="exact")
    assert torch.equal(bank.search(query, names).id_HNK, exact.id_HNK)
    planning.prepare(bank)
    bank.use(replace(bank.plan, probes=1))
    hits = bank.search(query, names)
    assert not torch.equal(hits.id_HNK, exact.id_HNK), "one list of many misses some"
    for one, other in zip(bank.look_up(query, names), bank.attend(query, hits), strict=True):
        torch.testing.assert_close(one, other)
    own = bank.search(query, names, scope="document")
    assert torch.equal(own.id_HNK, bank.search(query, names, scope="document", tier="exact").id_HNK)


def test_a_review_probes_more_until_recall_is_reached_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lmcode")
    bank = filled(recall_target=1.0, recall_queries=200)
    bank.search(7 * clustered(3, 200), torch.zeros(200).long())
    assert planning.review(bank) == 1.0 and "with new centroids: 400 entries" in caplog.text
    bank.use(replace(bank.plan, probes=1))
    before = planning.review(bank)
    assert before < 1.0 and bank.plan.probes == 2 and "recall 0." in caplog.text
    while bank.plan.probing and planning.review(bank) < 1.0:
        pass
    assert measure.recall(bank) == 1.0
    assert bank.plan.probing or "searched exactly from now on" in caplog.text
    assert any(record.levelname == "WARNING" for record in caplog.records) != bank.plan.probing


def test_few_queries_convert_no_whole_table(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, kinds, score_pairs = filled(dtype="bf16"), [], ivf.score_pairs
    planning.prepare(bank)
    bank.use(replace(bank.plan, probes=1))
    monkeypatch.setattr(ivf, "score_pairs", lambda query, rows, row: kinds.append(rows.key_MD.dtype) or score_pairs(
        query, rows, row))
    query, names = 7 * clustered(9, 200), torch.zeros(200).long()
    whole = bank.search(query, names)
    assert {*kinds} == {torch.float32}
    kinds.clear()
    few = bank.search(query[:, :2], names[:2])
    assert {*kinds} == {torch.bfloat16}
    assert torch.equal(few.id_HNK, whole.id_HNK[:, :2]) and torch.equal(few.score_HNK, whole.score_HNK[:, :2])


def test_auto_says_what_it_picked_and_why_at_first_and_when_that_changes(caplog: pytest.LogCaptureFixture,
                                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.INFO, "lmcode")
    bank, query, names = filled(tier="auto"), 7 * clustered(9, 6), torch.zeros(6).long()
    for _ in range(2):
        bank.search(query, names)
        lifecycle.fork(bank, empty=False).search(query, names)
    said = "'exact' for reads of scope 'global' (400 entries of this rank, K = 5, 6 queries of each rank and head): fewer"
    assert caplog.text.count("for reads of scope") == caplog.text.count(said) == 1
    monkeypatch.setattr(plan, "AUTO_ENTRIES", 300)
    planning.review(bank)
    bank.search(query, names)
    assert "'ivf' for reads of scope 'global'" in caplog.text and "lists are probed" in caplog.text
    bank.look_up(query, names)
    bank.search(query, names, scope="document")
    assert "'exact' for reads of scope 'document'" in caplog.text and caplog.text.count("for reads of scope") == 3


def test_centroids_are_of_entries_chosen_by_id_and_deleting_takes_them_away(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.arange(10_000)
    chosen = plan.sampled(ids, 10_000, 2_000)
    assert abs(chosen.sum() - 2_000) < 200 and plan.sampled(ids, 10_000, 10_000).all()
    order = np.random.default_rng(0).permutation(10_000)
    assert np.array_equal(plan.sampled(ids[order], 10_000, 2_000), chosen[order])
    bank = filled()
    planning.prepare(bank)
    assert bank.plan.trained_on == 400 and bank.plan.centroid_HXD.shape == (H, plan.lists_for(400), D)
    again = planning.train(bank.shard, bank.group, bank.inside, 400)
    assert torch.equal(again, bank.plan.centroid_HXD)
    assert bank.delete(ids=[10**6]) == 0 and bank.plan.centroid_HXD is not None
    assert bank.delete(ids=[3]) == 1 and bank.plan == Plan(True)


# --- the plan ----------------------------------------------------------------------------------------------------

PROBING = Plan(True, 8, 1000, torch.zeros(1, 64, 2))


@pytest.mark.parametrize(("old", "measured", "tier", "probes", "train", "alarming"), [
    (Plan(True), Measurements(63), "ivf", None, None, None),  # too few entries
    (Plan(True), Measurements(64), "ivf", 8, True, False),
    (PROBING, Measurements(1000, 0.96, 9.0), "ivf", None, None, None),
    (PROBING, Measurements(1000, None), "ivf", None, None, None),
    (PROBING, Measurements(3999, 0.96, 3.9), "ivf", None, None, None),
    (PROBING, Measurements(4000, 0.96), "ivf", 8, True, False),  # outgrown
    (PROBING, Measurements(1250, 0.96, 4.1), "ivf", 8, True, False),  # uneven
    (PROBING, Measurements(1000, 0.94), "ivf", 16, False, False),
    (replace(PROBING, probes=16), Measurements(1250, 0.94), "ivf", 8, True, True),
    (replace(PROBING, probes=16), Measurements(1249, 0.94), "ivf", 16, False, True),  # falls back
    (replace(PROBING, probing=False), Measurements(3999, 1.0), "ivf", None, None, None),
    (replace(PROBING, probing=False), Measurements(4000, 1.0), "ivf", 8, True, False),  # and tries again
    (Plan(), Measurements(plan.AUTO_ENTRIES - 1, 1.0), "auto", None, None, None),
    (Plan(), Measurements(plan.AUTO_ENTRIES, 1.0), "auto", 8, True, False),
    (PROBING, Measurements(10**7, 0.1), "exact", None, None, None),
])
def test_what_a_plan_becomes(old: Plan, measured: Measurements, tier: str, probes: int, train: bool, alarming: bool) -> None:
    change = revise(old, measured, MemoryConfig(tier=tier))
    came = (None, None, None) if change is None else (change.plan.probes, change.train, change.alarming)
    assert came == (probes, train, alarming)
    if change is not None and alarming and not train:
        assert not change.plan.probing


def test_a_plan_comes_back_from_its_file_or_is_refused(tmp_path: Path) -> None:
    made, path = Plan(True, 3, 77, torch.randn(H, 5, D)), tmp_path / "search.safetensors"
    save_plan(path, made)
    came = load_plan(path, heads=H, head_dim=D)
    assert came.centroid_HXD.equal(made.centroid_HXD)
    assert replace(came, centroid_HXD=None) == replace(made, centroid_HXD=None)
    with pytest.raises(ValueError, match=r"fp32 \[2, L, 9\]: got \(2, 5, 8\)"):
        load_plan(path, heads=H, head_dim=9)
    save_plan(path, replace(made, centroid_HXD=made.centroid_HXD * torch.inf))
    with pytest.raises(ValueError, match="must be finite"):
        load_plan(path, heads=H, head_dim=D)
    save_plan(path, replace(made, probes=0))
    with pytest.raises(ValueError, match="at least 1 for probes"):
        load_plan(path, heads=H, head_dim=D)
    path.write_bytes(b"x" * 40)
    with pytest.raises(ValueError, match="not a readable search plan"):
        load_plan(path, heads=H, head_dim=D)


def test_without_faiss_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ivf.faiss_index, "available", lambda device: False)
    with pytest.raises(ConfigError, match="ivf needs FAISS"):
        make_bank()
