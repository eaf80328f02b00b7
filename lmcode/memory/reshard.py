"""Moving a bank to another number of virtual shards or slots: pure functions from states to states.

An entry's id, hence its virtual shard (`placement.virtual_shard_of`), is all that decides where it goes; all else stays.
The one thing to know: nothing is ever dropped. Where a virtual shard would hold more live entries than it has slots, the
move is refused, and `fewest_slots` says how many slots of the whole bank would do.
Letters: X virtual shards; M slots of one; E entries.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from lmcode.memory.entry import EMPTY, METADATA
from lmcode.memory.placement import capacity_of, virtual_shard_of
from lmcode.memory.states import COUNTERS

ROWS = {"key": 1, "value": 1, **dict.fromkeys(METADATA, 0)}  # what an entry has a row in -> along which dim


def live_by_shard(id_E: np.ndarray, virtual_shards: int) -> np.ndarray:
    """How many of these entries (those with an id of at least 0) each virtual shard holds, int64 [X]."""
    return np.bincount(virtual_shard_of(id_E[id_E >= 0], virtual_shards), minlength=virtual_shards)


def fewest_slots(live_X: np.ndarray) -> int:
    """The smallest bank, in slots, whose virtual shards (`capacity_of`) can hold so many entries each."""
    most, shards = max(1, int(live_X.max())), len(live_X)
    fullest = np.flatnonzero(live_X == most)
    # The first few virtual shards have one slot more than the rest: as many as reach the last one that needs it.
    return max(shards, shards * (most - 1) + (int(fullest[-1]) + 1 if len(fullest) else 0))


def check_room(live_X: np.ndarray, slots: int, *, fewest: int | None = None) -> None:
    """Refuses a number of slots that would leave an entry without one.

    Args:
        live_X: int64, entries of each virtual shard.
        fewest: the number of slots to ask for; `fewest_slots` when None.

    Raises:
        ValueError: naming the first virtual shard that has no room, or fewer slots than virtual shards.
    """
    for shard, live in enumerate(live_X.tolist()):
        if live > (capacity := capacity_of(shard, slots, len(live_X))):
            raise ValueError(f"virtual shard {shard} of {len(live_X)} would hold {live} live entries in {capacity} slots; "
                             f"{fewest or fewest_slots(live_X)} slots are the fewest that hold everything")


def reshard(states: Iterable[Mapping[str, Tensor]], *, virtual_shards: int, slots: int,
            shards: Sequence[int] | None = None) -> dict[int, dict[str, Tensor]]:
    """The states of a bank (`LongTermMemory.state`) on another number of virtual shards, by virtual shard.

    Every entry keeps its id, key, value and columns, so an exact search finds the same with the same scores. A virtual
    shard becomes a ring of its entries by id with the hand behind the newest: eviction goes on first in, first out, and what
    a second chance had put off is up first. Virtual shard 0 keeps the number of entries evicted so far. The result does not
    depend on the layouts that the entries have been in before. `LongTermMemory.content_hash` covers the layout, so it
    changes with the number of virtual shards and of slots.

    Args:
        states: all virtual shards of the bank, in any order; taken one at a time.
        shards: the new virtual shards wanted, such as those of one rank; all when None.

    Raises:
        ValueError: if the states are not all those of one bank at one moment, or there is no room (`check_room`). The same
            whatever `shards` says.
    """
    wanted = np.arange(virtual_shards) if shards is None else np.asarray(shards, np.int64)
    live_X, kept, facts = np.zeros(virtual_shards, np.int64), [], []
    for state in states:
        id_M = state["id"].numpy()
        live_X += live_by_shard(id_M, virtual_shards)
        mine_M = (id_M >= 0) & np.isin(virtual_shard_of(id_M, virtual_shards), wanted)
        rows = torch.from_numpy(np.flatnonzero(mine_M))
        kept.append({name: state[name].index_select(dim, rows) for name, dim in ROWS.items()})
        facts.append({name: int(number) for name, number in state.items() if name not in ROWS})
    counters = _of_one_bank(facts)
    check_room(live_X, slots)
    entries = {name: torch.cat([part[name] for part in kept], dim) for name, dim in ROWS.items()}
    id_E = entries["id"].numpy()
    home_E = virtual_shard_of(id_E, virtual_shards)
    order_E = np.lexsort((id_E, home_E))
    starts, ends = (np.searchsorted(home_E[order_E], wanted, side=side) for side in ("left", "right"))
    evicted = sum(one["evicted"] for one in facts)
    moved = {}
    for shard, start, end in zip(wanted.tolist(), starts, ends, strict=True):
        capacity = capacity_of(shard, slots, virtual_shards)
        numbers = {"shard": shard, "virtual_shards": virtual_shards, "slots": slots, "hand": int(end - start) % capacity,
                   "evicted": evicted if shard == 0 else 0, **counters}
        moved[shard] = {**_ring(entries, torch.from_numpy(order_E[start:end]), capacity),
                        **{name: torch.tensor(number) for name, number in numbers.items()}}
    return moved


def _ring(entries: Mapping[str, Tensor], rows: Tensor, capacity: int) -> dict[str, Tensor]:
    """These rows in the first slots of a virtual shard, in order; the other slots are empty."""
    ring = {}
    for name, dim in ROWS.items():
        shape = list(entries[name].shape)
        shape[dim] = capacity
        ring[name] = torch.full(shape, EMPTY[name].item() if name in EMPTY else 0, dtype=entries[name].dtype)
        ring[name].narrow(dim, 0, len(rows)).copy_(entries[name].index_select(dim, rows))
    return ring


def _of_one_bank(facts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """The bank-wide counters of some states' numbers; ValueError unless they are all those of one bank at one moment."""
    same = ("virtual_shards", "slots", *COUNTERS)
    banks = {tuple(one[name] for name in same) for one in facts}
    shards = sorted(one["shard"] for one in facts)
    if len(banks) != 1 or shards != list(range(facts[0]["virtual_shards"])):
        raise ValueError(f"states must be all virtual shards of one bank at one moment: got the shards {shards} with "
                         f"{same} = {sorted(banks)}")
    return {name: facts[0][name] for name in COUNTERS}
