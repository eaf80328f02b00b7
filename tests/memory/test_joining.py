"""Merging at commit: against a list that is kept by hand, and on any number of ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lmcode.config import MemoryConfig
from lmcode.dist import Group
from lmcode.memory import joining
from lmcode.memory.bank import LongTermMemory
from lmcode.memory.joining import superseded
from lmcode.protocol import Candidates
from tests.helpers.ranks import run_on_ranks

H, D = 2, 4


def bank_of(group: Group, **settings: Any) -> LongTermMemory:
    config = MemoryConfig(virtual_shards=4, tier="exact", merge_above=0.9, eviction="oldest", **settings)
    return LongTermMemory(heads=H, head_dim=D, slots=64, top_k=2, config=config, group=group)


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys around a few directions, so that many join: [H, E, D] each, and values."""
    generator = torch.Generator().manual_seed(0)
    centre_HXD = torch.randn(H, 5, D, generator=generator)
    made = []
    for _ in range(6):
        which = torch.randint(0, 5, (7,), generator=generator)
        key_HED = centre_HXD[:, which] + 0.25 * torch.randn(H, 7, D, generator=generator)
        made.append((key_HED, torch.randn(H, 7, D, generator=generator)))
    return made


def filled(group: Group, keep: str = "mean") -> LongTermMemory:
    bank = bank_of(group, merge_keep=keep)
    for step, (key_HED, value_HED) in enumerate(batches()):
        bank.write(key_HED, value_HED, torch.tensor([0, 0, 0, 0, 1, 1, 1]), step=step)
    return bank


@pytest.mark.parametrize("keep", ["mean", "newest"])
def test_a_newcomer_joins_the_nearest_entry_of_its_text(keep: str) -> None:
    held: dict[int, dict[str, Any]] = {}
    number = 0
    for step, (key_HED, value_HED) in enumerate(batches()):
        before = {id_: {**one} for id_, one in held.items()}
        for at in range(7):
            key, value, space = key_HED[:, at], value_HED[:, at], int(at > 3)
            later = [key_HED[:, other] for other in range(at + 1, 7) if int(other > 3) == space]
            if keep == "newest" and any(torch.cosine_similarity(other, key, dim=-1).mean() > 0.9 for other in later):
                continue
            scored = [(float(torch.cosine_similarity(one["key"], key, dim=-1).mean()), -id_)
                      for id_, one in before.items() if one["space"] == space]
            best = max(scored, default=(0.0, 0))
            if best[0] > 0.9:
                one = held[-best[1]]
                count = one["count"]
                if keep == "newest":
                    one.update(key=key, value=value, count=count + 1, step=step)
                    continue
                lengths = one["key"].norm(dim=-1), key.norm(dim=-1)
                mean = (count * one["key"] + key) / (count + 1)
                wanted = (count * lengths[0] + lengths[1]) / (count + 1)
                one.update(key=mean * (wanted / mean.norm(dim=-1))[:, None], count=count + 1, step=step,
                           value=(count * one["value"] + value) / (count + 1))
            else:
                held[number + at] = {"key": key, "value": value, "space": space, "count": 1, "step": step}
        number += 7
    assert any(one["count"] > 2 for one in held.values()) and any(one["count"] == 1 for one in held.values())
    shard = filled(Group(), keep).shard
    assert {*shard.columns["id"][shard.live_M].tolist()} == {*held}
    for slot in shard.live_M.nonzero()[0]:
        one = held[int(shard.columns["id"][slot])]
        assert (int(shard.columns["count"][slot]), int(shard.columns["step"][slot])) == (one["count"], one["step"])
        torch.testing.assert_close(shard.key_HMD[:, slot], one["key"])
        torch.testing.assert_close(shard.value_HMD[:, slot], one["value"])


def offered(group: Group) -> LongTermMemory:
    """A bank to which one rank, the last, offers the candidates of each step in two parts."""
    bank = bank_of(group, merge_keep="newest", write="all")
    for step, (key, value) in enumerate(batches()):
        mine = group.rank == group.size - 1
        parts = [Candidates(key[:, part], value[:, part], torch.tensor([0, 0, 0, 0, 1, 1, 1])[part], torch.ones(7)[part],
                            torch.full((7,), mine)[part]) for part in (slice(0, 3), slice(3, 7))]
        bank.commit(parts, [], step=step)
    return bank


def test_of_candidates_that_say_a_key_anew_the_last_is_found() -> None:
    bank = bank_of(Group(), merge_keep="newest", write="all")
    key = F.normalize(torch.randn(H, 1, D, generator=torch.Generator().manual_seed(1)), dim=-1)
    for step, values in enumerate(([1.0, 2.0], [3.0], [4.0, 5.0, 6.0])):
        value = torch.tensor(values).expand(H, D, -1).transpose(1, 2).contiguous()
        bank.commit([Candidates(key.expand(-1, len(values), -1), value, torch.zeros(len(values)).long(),
                                torch.ones(len(values)), torch.ones(len(values)).bool())], [], step=step)
        found, _ = bank.look_up(key, torch.zeros(1).long())
        assert bank.stats()["live"] == 1 and torch.allclose(found, torch.full_like(found, values[-1]))


def test_blocks_of_a_long_text_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    key_EHD = torch.cat([key.transpose(0, 1) for key, _ in batches()])
    text_E2 = np.stack([np.arange(len(key_EHD)) % 2, np.zeros(len(key_EHD), np.int64)], axis=1)
    whole = superseded(key_EHD, text_E2, above=0.9)
    monkeypatch.setattr(joining, "BLOCK", 4)
    assert 0 < whole.sum() < len(whole) and (superseded(key_EHD, text_E2, above=0.9) == whole).all()


def _hashes() -> list[str]:
    world = Group.world()
    return [make(group).content_hash() for group in (world, world.split(2)[0]) for make in (filled, offered)]


def test_ranks_change_nothing() -> None:
    alone = [make(Group()).content_hash() for make in (filled, offered)]
    assert run_on_ranks(_hashes, 4) == [alone * 2] * 4
