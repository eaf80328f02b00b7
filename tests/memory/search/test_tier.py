"""The seam of search tiers: what a tier of a few lines must do, and that the program takes it by its name alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lmcode.config import TIERS, ConfigError, MemoryConfig, build
from lmcode.memory import LongTermMemory, measure
from lmcode.memory.search.decide import in_order
from lmcode.memory.search.tier import Found, Hidden, Rows, Tier

H, D = 2, 8


class Doubles(Tier):
    """Exact search in fp64, all rows at once; keeps the doubles of unscoped rows until something changes."""

    def __init__(self) -> None:
        self.kept: Tensor | None = None
        self.changes: list[np.ndarray] = []
        self.searches = 0

    def search(self, query_HND: Tensor, rows: Rows, k: int, *, hidden: Hidden = ()) -> Found:
        self.searches += 1
        whole = rows.slot_M is None
        key_HMD = self.kept if whole and self.kept is not None else rows.key_HMD.double()
        self.kept = key_HMD if whole else self.kept
        score_HNM = (query_HND.double() @ key_HMD.transpose(1, 2) + rows.addend_M).float()
        for queries, unseen in hidden:
            score_HNM[:, queries[:, None], unseen] = -1e30
        row_HNM = torch.arange(len(rows.id_M)).expand_as(score_HNM).contiguous()
        return in_order(score_HNM, rows.id_M[row_HNM], row_HNM, k)

    def changed(self, slot_E: np.ndarray) -> None:
        self.kept = None
        self.changes.append(slot_E)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TIERS, "doubles", f"{__name__}:Doubles")


def live(tier: str, scope: str) -> tuple[list[Tensor], LongTermMemory]:
    """All that a bank finds in a short life, its recall and what consolidation does to it."""
    config = build(MemoryConfig, {"tier": tier, "scope": scope, "virtual_shards": 3, "importance_weight": 1.0})
    bank = LongTermMemory(heads=H, head_dim=D, slots=90, top_k=5, config=config)
    chance, seen = torch.Generator().manual_seed(0), []
    names, documents = torch.arange(60) % 4, torch.arange(60) // 9 % 3 - 1
    for step in range(3):
        key, value = torch.randn(2, H, 60, D, generator=chance).round(decimals=1)
        key[:, 30:] = key[:, :30]
        bank.write(key, value, names, torch.rand(60, generator=chance) + 0.5, step, documents)
        query = torch.randn(H, 20, D, generator=chance)
        hits = bank.search(query, names[:20], documents[:20])
        seen += [hits.id_HNK, bank.attend(query, hits)[0]]
        asked = measure.Sample(query, names[:20], documents[:20], bank.config.scope)
        assert measure.check_recall(bank, asked, hits) == 1.0
        hits = bank.search(query, names[:20], documents[:20])
        bank.commit([], [hits], step=step)
        seen += [torch.tensor(bank.consolidate(0.05)[1:]), torch.tensor(bank.delete(namespace=step))]
    return seen, bank


@pytest.mark.parametrize("scope", ["document", "global"])
def test_a_tier_of_a_few_lines_finds_stores_and_merges_the_same(scope: str) -> None:
    (found, bank), (wanted, other) = live("doubles", scope), live("exact", scope)
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, two)
    assert sorted(bank.shard.columns["id"]) == sorted(other.shard.columns["id"])


def test_a_shard_says_which_slots_have_changed() -> None:
    bank = LongTermMemory(heads=H, head_dim=D, slots=40, top_k=3, config=MemoryConfig(tier="doubles", virtual_shards=2))
    query, names = F.normalize(torch.ones(H, 2, D), dim=-1), torch.zeros(2, dtype=torch.int64)
    key = torch.randn(H, 30, D, generator=torch.Generator().manual_seed(0))
    bank.write(key, key, torch.zeros(30).long())
    hits = bank.search(query, names, scope="global")
    tier = bank.shard.searcher.tier("doubles")
    assert tier.searches == 1 and not tier.changes, "made when it is first asked for, of the rows there are then"
    where = {id: slot for slot, id in enumerate(bank.shard.columns["id"].tolist()) if id >= 0}
    won = sorted({where[id] for id in hits.id_HNK.flatten().tolist()})
    bank.commit([], [hits], step=1)
    assert won and not tier.changes, "importance is no part of a key"
    bank.delete(ids=[4, 7])
    assert sorted(np.concatenate(tier.changes)) == sorted((where[4], where[7])) and tier.kept is None
    tier.changes.clear()
    bank.load(1, bank.state(1))
    assert np.array_equal(np.concatenate(tier.changes), np.arange(20, 40))


def test_an_unknown_tier_is_refused_with_those_that_there_are() -> None:
    names = "'exact', 'faiss-flat', 'ivf', 'hnsw', 'doubles'"
    with pytest.raises(ConfigError, match=rf"tier: must be one of 'auto', {names}: got 'double'\."):
        build(MemoryConfig, {"tier": "double"})
    bank = LongTermMemory(heads=H, head_dim=D, slots=40, top_k=3, config=MemoryConfig())
    with pytest.raises(ValueError, match=f"tier must be one of {names}: got 'auto'"):
        bank.search(torch.zeros(H, 1, D), torch.zeros(1).long(), tier="auto")
