"""What `Memories.reshard` takes: its checks, and the moves of whole banks and of the experiences.

`memory.reshard` says where each entry goes; here all ranks of a group do it together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from torch import Tensor

from lmcode.config import ConfigError, LMCODEConfig, MemoryConfig
from lmcode.dist import Group, raise_together
from lmcode.memories.experiences import Experiences
from lmcode.memory import lifecycle
from lmcode.memory.bank import LongTermMemory
from lmcode.memory.reshard import check_room, fewest_slots, live_by_shard, reshard


def wanted_slots(config: LMCODEConfig, memory: MemoryConfig, virtual_shards: int, *, slots: int | None,
                 experience_slots: int | None) -> tuple[int, int]:
    """The slots of each bank and of the experiences; as now where None.

    Raises:
        ConfigError: for fewer slots than virtual shards.
    """
    slots = config.long_term_memory_slots if slots is None else slots
    experience_slots = memory.experience_slots if experience_slots is None else experience_slots
    for name, number in (("slots", slots), ("experience_slots", experience_slots)):
        if number < virtual_shards:
            raise ConfigError(f"{name} must be at least the number of virtual shards: {number} < {virtual_shards}")
    return slots, experience_slots


def refuse_too_small(banks: Mapping[int, LongTermMemory], experiences: Experiences | None, virtual_shards: int, *,
                     slots: int, experience_slots: int) -> None:
    """Raises ConfigError where an entry would be without a slot. A collective."""
    _check_rooms("slots", slots, {f"layer {layer}": live_counts(bank, virtual_shards) for layer, bank in banks.items()})
    live_X = live_counts(experiences.bank, virtual_shards) if experiences else np.zeros(virtual_shards, np.int64)
    _check_rooms("experience_slots", experience_slots, {"experiences": live_X})


def empty_like(banks: Mapping[int, LongTermMemory], config: LMCODEConfig, memory: MemoryConfig, *,
               group: Group) -> tuple[dict[int, LongTermMemory], Experiences]:
    """Empty banks like these and an empty experience bank, under other settings. A collective.

    Raises:
        ConfigError: on every rank, if they cannot be made on any.
    """
    made, empty, problem = {}, None, None
    try:
        made = {layer: lifecycle.like(bank, slots=config.long_term_memory_slots,
                                       config=bank.config.model_copy(update={"virtual_shards": memory.virtual_shards}))
                for layer, bank in banks.items()}
        empty = Experiences(config, memory, group=group, device=next(iter(made.values())).device)
    except (ValueError, RuntimeError, MemoryError) as error:
        problem = (f"{memory.virtual_shards} virtual shards of {config.long_term_memory_slots} and "
                   f"{memory.experience_slots} slots cannot be made: {error}")
    raise_together(group, problem)
    assert empty is not None
    return made, empty


def live_counts(bank: LongTermMemory, virtual_shards: int) -> np.ndarray:
    """How many of a bank's entries would lie in each of `virtual_shards`, int64 [S], on every rank. A collective."""
    mine = {shard: live_by_shard(bank.state(shard)["id"].numpy(), virtual_shards) for shard in bank.owned}
    counts = {shard: count_X for part in bank.group.all_gather_object(mine) for shard, count_X in part.items()}
    count_X: np.ndarray = np.sum(list(counts.values()), axis=0)
    return count_X


def _check_rooms(name: str, slots: int, live: Mapping[str, np.ndarray]) -> None:
    """Refuses a number of slots that is too small for any of these banks; the message gives one that does for all."""
    fewest = max(map(fewest_slots, live.values()))
    for bank, live_X in live.items():
        try:
            check_room(live_X, slots, fewest=fewest)
        except ValueError as error:
            raise ConfigError(f"{bank} ({name} = {slots}): {error}") from None


def move(bank: LongTermMemory, other: LongTermMemory) -> None:
    """Gives `other`, of any layout that has room, everything that `bank` holds. A collective."""
    states = reshard(_states(bank), virtual_shards=other.config.virtual_shards, slots=other.slots, shards=other.owned)
    lifecycle.restore(other, states)


def _states(bank: LongTermMemory) -> Iterator[dict[str, Tensor]]:
    """All virtual shards of a bank on every rank, one at a time. A collective."""
    for shard in range(bank.config.virtual_shards):
        parts = bank.group.all_gather_object(bank.state(shard) if shard in bank.owned else None)
        yield next(state for state in parts if state is not None)


def move_experiences(experiences: Experiences, other: Experiences) -> None:
    """Gives `other`, of any layout that has room, all experiences with their texts. A collective."""
    move(experiences.bank, other.bank)
    everyones = {id: one for part in experiences.group.all_gather_object(experiences.held) for id, one in part.items()}
    mine = set(other.bank.shard.columns["id"].tolist())
    other.hold({id: one for id, one in everyones.items() if id in mine})
