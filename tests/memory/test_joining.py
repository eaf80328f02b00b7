"""Merging at commit: against a list that is kept by hand, and on any number of ranks."""

from __future__ import annotations

from typing import Any

import torch

from lmcode.config import MemoryConfig
from lmcode.dist import Group
from lmcode.memory.bank import LongTermMemory
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


def filled(group: Group) -> LongTermMemory:
    bank = bank_of(group)
    for step, (key_HED, value_HED) in enumerate(batches()):
        bank.write(key_HED, value_HED, torch.tensor([0, 0, 0, 0, 1, 1, 1]), step=step)
    return bank


def test_a_newcomer_joins_the_nearest_entry_of_its_text() -> None:
    held: dict[int, dict[str, Any]] = {}
    number = 0
    for step, (key_HED, value_HED) in enumerate(batches()):
        before = {id_: {**one} for id_, one in held.items()}
        for at in range(7):
            key, value, space = key_HED[:, at], value_HED[:, at], int(at > 3)
            scored = [(float(torch.cosine_similarity(one["key"], key, dim=-1).mean()), -id_)
                      for id_, one in before.items() if one["space"] == space]
            best = max(scored, default=(0.0, 0))
            if best[0] > 0.9:
                one = held[-best[1]]
                count = one["count"]
                lengths = one["key"].norm(dim=-1), key.norm(dim=-1)
                mean = (count * one["key"] + key) / (count + 1)
                wanted = (count * lengths[0] + lengths[1]) / (count + 1)
                one.update(key=mean * (wanted / mean.norm(dim=-1))[:, None], count=count + 1, step=step,
                           value=(count * one["value"] + value) / (count + 1))
            else:
                held[number + at] = {"key": key, "value": value, "space": space, "count": 1, "step": step}
        number += 7
    assert any(one["count"] > 2 for one in held.values()) and any(one["count"] == 1 for one in held.values())
    shard = filled(Group()).shard
    assert {*shard.columns["id"][shard.live_M].tolist()} == {*held}
    for slot in shard.live_M.nonzero()[0]:
        one = held[int(shard.columns["id"][slot])]
        assert (int(shard.columns["count"][slot]), int(shard.columns["step"][slot])) == (one["count"], one["step"])
        torch.testing.assert_close(shard.key_HMD[:, slot], one["key"])
        torch.testing.assert_close(shard.value_HMD[:, slot], one["value"])


def _hashes() -> list[str]:
    world = Group.world()
    return [filled(group).content_hash() for group in (world, world.split(2)[0])]


def test_ranks_change_nothing() -> None:
    alone = filled(Group()).content_hash()
    assert run_on_ranks(_hashes, 4) == [[alone, alone]] * 4
