"""How banks come from other banks and from states: made alike, copied, restored whole.

A state is one virtual shard as `states` describes it. What is collective must be called by all ranks of the bank's group in
the same order.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lmcode.config import MemoryConfig
from lmcode.dist import Group
from lmcode.memory import planning
from lmcode.memory.bank import LongTermMemory
from lmcode.memory.states import COUNTERS, check_moments
from lmcode.precision import without_autocast


def like(bank: LongTermMemory, *, slots: int | None = None, config: MemoryConfig | None = None,
         group: Group | None = None, device: torch.device | str | None = None) -> LongTermMemory:
    """An empty bank of this one's shape, searched by the same plan; what is given is different. Collective of its group."""
    other = LongTermMemory(heads=bank.heads, head_dim=bank.head_dim, slots=slots or bank.slots, top_k=bank.top_k,
                           config=config or bank.config, group=group or bank.group, device=device or bank.device)
    other.use(bank.plan)
    other.choice.log_like(bank.choice)
    return other


@without_autocast()
def fork(bank: LongTermMemory, *, empty: bool, slots: int | None = None) -> LongTermMemory:
    """An independent bank with the same settings: empty (only then may `slots` differ) or a copy of all entries.

    With memory.tier=hnsw a copy waits for graphs, shares them and makes none of its own: what it finds must not hang on
    the clock. Collective then.
    """
    if slots not in (None, bank.slots) and not empty:
        raise ValueError(f"a copy must have the slots of its original, {bank.slots}: got {slots}")
    other = like(bank, slots=slots)
    for shard in () if empty else bank.owned:
        other.load(shard, bank.state(shard))
    if planning.makes_graphs(bank) and not empty:
        planning.build_graphs(bank)
        other.shard.searcher.graphs.share(bank.shard.searcher.graphs)
    return other


def restore(bank: LongTermMemory, states: Mapping[int, Mapping[str, Tensor]], problem: str | None = None) -> None:
    """Loads all virtual shards of this rank, given checked states, or none on any rank. Collective.

    Raises:
        ValueError: on all ranks, if any has a `problem` or the states are not all of one moment.
    """
    moments = {tuple(int(state[name]) for name in COUNTERS) for state in states.values()}
    check_moments(bank.group.all_gather_object((problem, moments)))
    for shard, state in states.items():
        bank.load(shard, state)
