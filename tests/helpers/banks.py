"""Small banks, keys of length 1 for them, and what lies in a bank as plain values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lmcode.config import MemoryConfig
from lmcode.dist import Group
from lmcode.memory import LongTermMemory
from lmcode.memory.entry import METADATA

H, D, K, S = 2, 8, 5, 6


def make_bank(group: Group | None = None, *, slots: int = 90, top_k: int = K, **settings: Any) -> LongTermMemory:
    return LongTermMemory(heads=H, head_dim=D, slots=slots, top_k=top_k, group=group,
                          config=MemoryConfig(**({"virtual_shards": S, "importance_weight": 1.0} | settings)))


def unit(*shape: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def twins(E: int, seed: int) -> tuple[Tensor, Tensor]:
    """Keys of which half have a twin, and values."""
    key = unit(H, E, D, seed=seed)
    key[:, E // 2:] = key[:, :E - E // 2]
    return key, unit(H, E, D, seed=seed + 1) * 2


def my_part(rows: Tensor, group: Group, axis: int) -> Tensor:
    return rows.chunk(group.size, dim=axis)[group.rank].contiguous()


def filled(**settings: Any) -> tuple[LongTermMemory, Tensor, Tensor, Tensor]:
    """A bank of 40 entries in 4 namespaces that holds them all, with their keys, values and log-importance."""
    bank, (key, value) = make_bank(slots=200, **settings), twins(40, 3)
    importance = torch.linspace(0.5, 4.0, 40)
    bank.write(key, value, torch.arange(40) % 4, importance)
    return bank, key, value, importance.log()


def states_of(bank: LongTermMemory) -> list[dict[str, Tensor]]:
    return [bank.state(shard) for shard in bank.owned]


def plain(states: Any) -> dict[int, dict[str, Any]]:
    """Every live entry as a dict, by id."""
    found: dict[int, dict[str, Any]] = {}
    for state in states:
        for slot, id in enumerate(state["id"].tolist()):
            if id >= 0:
                assert id not in found
                found[id] = {"key": state["key"][:, slot].tolist(), "value": state["value"][:, slot].tolist(),
                             **{name: state[name][slot].item() for name in METADATA}}
    return found
