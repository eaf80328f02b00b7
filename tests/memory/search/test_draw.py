"""Entries drawn by lot: evenly, from what a query may see and nothing else, the same on any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lmcode.config import MemoryConfig
from lmcode.dist import Group
from lmcode.eval.reading import RandomRetriever
from lmcode.memory import LongTermMemory
from lmcode.memory.search.draw import drawn, lots
from tests.helpers.ranks import run_on_ranks

H, D, K, ENTRIES = 2, 8, 5, 120
NAMES, DOCUMENTS = torch.arange(ENTRIES) % 4, torch.arange(ENTRIES) // 4 % 3


def filled(scope: str, group: Group | None = None) -> LongTermMemory:
    config = MemoryConfig(scope=scope, virtual_shards=4)
    bank = LongTermMemory(heads=H, head_dim=D, slots=400, top_k=K, config=config, group=group)
    key, value = torch.randn(2, H, ENTRIES, D, generator=torch.Generator().manual_seed(0))
    bank.write(torch.nn.functional.normalize(key, dim=-1), value, NAMES, None, 0, DOCUMENTS)
    bank.delete(ids=[0, 4, 5])
    return bank


def queries(names: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query = torch.randn(H, len(names), D, generator=torch.Generator().manual_seed(1))
    return query, torch.tensor(names), torch.tensor(names) % 3


@pytest.mark.parametrize("scope", ["document", "global"])
def test_only_what_a_query_may_see_is_drawn(scope: str) -> None:
    reader = RandomRetriever(filled(scope))
    query, names, documents = queries([0, 1, 2, 3, -1] * 40)
    drawn_ids: dict[int, set[int]] = {}
    for _ in range(4):
        hits = reader.search(query, names, documents)
        for place, name in enumerate(names.tolist()):
            drawn_ids.setdefault(name, set()).update(hits.id_HNK[:, place].flatten().tolist())
        rows = hits.id_HNK[:, names >= 0]
        assert all(len(set(row.tolist())) == K for row in rows.flatten(0, 1)), "no entry twice"
    live = set(range(ENTRIES)) - {0, 4, 5}
    assert drawn_ids.pop(-1) == {-1}
    for name, ids in drawn_ids.items():
        allowed = {one for one in live if NAMES[one] == name or (scope == "global" and DOCUMENTS[one] != name % 3)}
        assert ids == allowed, "all of them come up, and no other"


def test_a_draw_is_even_and_differs_from_query_to_query() -> None:
    score_XM = drawn(np.arange(4000), np.arange(20))
    firsts = np.bincount(score_XM.argmax(axis=1), minlength=20)
    assert firsts.min() > 130 and firsts.max() < 280, "200 each"
    assert abs(np.corrcoef(score_XM[:, 3], score_XM[:, 4])[0, 1]) < 0.1
    lot_HN = lots(np.array([7, 7, 9, 7]), 2, 0)
    assert len(np.unique(lot_HN)) == 8 and not np.isin(lots(np.array([7, 7, 9, 7]), 2, 1), lot_HN).any()
    assert np.array_equal(lots(np.array([9]), 2, 0)[:, 0], lot_HN[:, 2]), "what else is read beside it does not matter"


def test_what_was_drawn_is_attended_to_as_it_stands() -> None:
    bank = filled("document")
    reader, (query, names, documents) = RandomRetriever(bank), queries([0, 1, 1, -1])
    hits = reader.search(query, names, documents)
    value, lse = reader.attend(query, hits)
    where = {one: slot for slot, one in enumerate(bank.shard.columns["id"].tolist())}
    for head in range(H):
        for place in range(3):
            slots = [where[one] for one in hits.id_HNK[head, place].tolist()]
            logits = bank.shard.key_HMD[head, slots] @ query[head, place]
            expected = logits.softmax(0) @ bank.shard.value_HMD[head, slots]
            torch.testing.assert_close(value[head, place], expected)
            torch.testing.assert_close(lse[head, place], logits.logsumexp(0))
    assert not value[:, 3].any() and (lse[:, 3] < -1e29).all()


def draw_on_ranks(group: Group | None = None) -> list:
    """Each rank asks for its share of the same four documents."""
    group = group or Group.world()
    bank = filled("global", group)
    reader, (query, names, documents) = RandomRetriever(bank), queries([0, 0, 1, 1, 2, 2, 3, 3])
    mine = slice(8 // group.size * group.rank, 8 // group.size * (group.rank + 1))
    found = []
    for _ in range(3):
        hits = reader.search(query[:, mine], names[mine], documents[mine])
        found.append((hits.id_HNK.transpose(0, 1).tolist(), reader.attend(query[:, mine], hits)[1].transpose(0, 1).tolist()))
    everyones = group.all_gather_object(found)
    return [[row for part in everyones for row in part[turn][kind]] for turn in range(3) for kind in range(2)]


def test_a_draw_is_the_same_on_any_number_of_ranks() -> None:
    alone, two = draw_on_ranks(Group()), run_on_ranks(draw_on_ranks, 2)[0]
    assert alone[::2] == two[::2]
    for one, other in zip(alone[1::2], two[1::2], strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other))
