"""A model's whole memory, the banks of all layers and the experiences, on another number of virtual shards or slots.

`memory.reshard` says where each entry goes; here all ranks of a model's group do it together, with all banks or with none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from torch import Tensor

from lmcode.config import ConfigError, LMCODEConfig, MemoryConfig, build
from lmcode.dist import raise_together
from lmcode.experience.experiences import Experiences
from lmcode.lmcode import LMCODE
from lmcode.memory.bank import LongTermMemory
from lmcode.memory.reshard import check_room, fewest_slots, live_by_shard, reshard


def reshard_memory(model: LMCODE, virtual_shards: int, *, slots: int | None = None,
                   experience_slots: int | None = None) -> int:
    """Moves all that a model remembers to `virtual_shards`; returns how many entries that are. A collective.

    Ids, vectors and columns stay as they are, and every search finds the same. From then on `model.config` and
    `model.memory_config` say the new numbers.

    Args:
        slots: of each layer's bank (`model.long_term_memory_slots`); as many as now when None.
        experience_slots: of the experiences (`memory.experience_slots`); as many as now when None.

    Raises:
        ConfigError: on every rank, if the model has no bank, there are fewer slots than virtual shards or hits wanted, fewer
            virtual shards than ranks, or an entry would be without a slot (the message says how many slots would do).
            Nothing has changed then.
    """
    if not model.banks:
        raise ConfigError("a model without a long-term memory has nothing to reshard: long_term_memory_slots = "
                          f"{model.config.long_term_memory_slots}, memory_layers = {model.config.memory_layers}")
    slots = model.config.long_term_memory_slots if slots is None else slots
    experience_slots = model.memory_config.experience_slots if experience_slots is None else experience_slots
    for name, number in (("slots", slots), ("experience_slots", experience_slots)):
        if number < virtual_shards:
            raise ConfigError(f"{name} must be at least the number of virtual shards: {number} < {virtual_shards}")
    experiences = model.experiences if model.has_experiences else None
    _check_rooms("slots", slots, {f"layer {layer}": live_counts(bank, virtual_shards)
                                  for layer, bank in model.banks.items()})
    _check_rooms("experience_slots", experience_slots, {"experiences": (
        live_counts(experiences.bank, virtual_shards) if experiences else np.zeros(virtual_shards, np.int64))})
    config = build(LMCODEConfig, {**model.config.model_dump(), "long_term_memory_slots": slots})
    memory = build(MemoryConfig, {**model.memory_config.model_dump(), "virtual_shards": virtual_shards,
                                  "experience_slots": experience_slots})
    banks, empty, problem = {}, None, None
    try:
        banks = {layer: _empty(bank, slots=slots, virtual_shards=virtual_shards) for layer, bank in model.banks.items()}
        device = next(iter(banks.values())).device
        empty = Experiences(config, memory, group=model.group, device=device)
    except (ValueError, RuntimeError, MemoryError) as error:
        problem = f"{virtual_shards} virtual shards of {slots} and {experience_slots} slots cannot be made: {error}"
    raise_together(model.group, problem)
    for layer, bank in banks.items():
        move(model.banks[layer], bank)
    if experiences:
        move_experiences(experiences, empty)
    model.config, model.memory_config, model.banks, model.experiences = config, memory, banks, empty
    model.set_retrievers(banks)
    return sum(bank.stats()["live"] for bank in [*banks.values(), empty.bank])


def live_counts(bank: LongTermMemory, virtual_shards: int) -> np.ndarray:
    """How many of a bank's entries would lie in each of `virtual_shards`, int64 [S], on every rank. A collective."""
    mine = {shard: live_by_shard(bank.state(shard)["id"].numpy(), virtual_shards) for shard in bank.owned}
    counts = {shard: count_S for part in bank.group.all_gather_object(mine) for shard, count_S in part.items()}
    return np.sum(list(counts.values()), axis=0)


def _check_rooms(name: str, slots: int, live: Mapping[str, np.ndarray]) -> None:
    """Refuses a number of slots that is too small for any of these banks; the message gives one that does for all."""
    fewest = max(map(fewest_slots, live.values()))
    for bank, live_S in live.items():
        try:
            check_room(live_S, slots, fewest=fewest)
        except ValueError as error:
            raise ConfigError(f"{bank} ({name} = {slots}): {error}") from None


def _empty(bank: LongTermMemory, *, slots: int, virtual_shards: int) -> LongTermMemory:
    """An empty bank like `bank`, of another layout."""
    return LongTermMemory(heads=bank.heads, head_dim=bank.head_dim, slots=slots, top_k=bank.top_k, group=bank.group,
                          config=bank.config.model_copy(update={"virtual_shards": virtual_shards}), device=bank.device)


def move(bank: LongTermMemory, other: LongTermMemory) -> None:
    """Gives `other`, of any layout that has room, everything that `bank` holds. A collective."""
    other.restore(reshard(_states(bank), virtual_shards=other.config.virtual_shards, slots=other.slots, shards=other.owned))


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
    other.held = {id: one for id, one in everyones.items() if id in mine}
