"""What one rank holds of a bank: the rows of its virtual shards, each a ring in a contiguous range of slots.

The shard owns the tables and alone changes them, knowing no other rank: it writes, deletes, merges and counts. Its
`searcher` reads them. Beside the keys, `[H, M, D]`, lie the addends to their scores, fp32 `[M]`: `importance_weight *
log(importance)` of a live entry and `NO_SCORE` in an empty slot. So counting attention changes no key.
Letters: M slots of this rank; E entries, or winners; X bags of winners (`ticket`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from lmcode.config import MemoryConfig
from lmcode.memory.consolidate import merge_columns, merge_vectors, pack_columns, unit_keys
from lmcode.memory.entry import MASS_UNIT, MAX_IMPORTANCE, UNKNOWN, Entries
from lmcode.memory.evict import policy_of
from lmcode.memory.ledger import Ledger
from lmcode.memory.placement import capacity_of, virtual_shard_of
from lmcode.memory.searcher import Searcher
from lmcode.memory.states import check_state
from lmcode.memory.ticket import Ticket
from lmcode.memory.values import copy_of, value_table
from lmcode.memory.views import Views, on_device
from lmcode.protocol import NO_SCORE

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Predicate = Callable[[Mapping[str, np.ndarray]], np.ndarray]
_VERSIONS = itertools.count(1)  # no two states of any two shards in this process share a version


class Shard:
    """The rows of the virtual shards `owned`. Keys and values lie on `device`, everything else on the CPU.

    version: a number that is never the same again after a change. Ranks that make the same calls change it in the same ones,
        even where a call finds nothing to change.
    views, searcher: read the tables. Every change of a score, a key or an entry is told to them in the method that makes it.
    """

    def __init__(self, *, heads: int, head_dim: int, slots: int, owned: Sequence[int], config: MemoryConfig,
                 device: torch.device) -> None:
        self.config, self.slots, self.owned, self.device = config, slots, tuple(owned), device
        capacities = [capacity_of(shard, slots, config.virtual_shards) for shard in self.owned]
        self.ledger = Ledger(self.owned, capacities, favoured_from=config.second_chance_importance)
        self.columns, self.range_of = self.ledger.columns, self.ledger.range_of
        self.num_slots = M = self.ledger.num_slots
        self.key_HMD = torch.zeros(heads, M, head_dim, dtype=DTYPES[config.dtype], device=device)
        self.addend_M = torch.full((M,), NO_SCORE, device=device)
        self.value_HMD = value_table((heads, M, head_dim), DTYPES[config.dtype], config, device)
        self.hand, self.evicted = self.ledger.hand, self.ledger.evicted
        self._policy = policy_of(config.eviction)
        self.version = next(_VERSIONS)
        self.views = Views(self.key_HMD, self.addend_M, self.ledger)
        self.searcher = Searcher(self.views, self.value_HMD, self.ledger)

    @property
    def live_M(self) -> np.ndarray:
        """bool, slots that hold an entry."""
        return self.columns["id"] >= 0

    # --- writing ---------------------------------------------------------------------------------------------------

    def write(self, entries: Entries) -> None:
        """Stores those entries that belong here and that the policy of eviction takes, and evicts what is in their way.

        `evicted` counts both: an entry that is refused has had an id, too.
        """
        shard_E = virtual_shard_of(entries.id_E, self.config.virtual_shards)
        columns, stored, slots, spent = entries.metadata(), [], [], []
        for shard, place in self.range_of.items():
            batch = np.flatnonzero(shard_E == shard)
            ring = self.ledger.ring(shard)
            placement = self._policy(ring, {name: column[batch] for name, column in columns.items()})
            kept = batch if placement.stored_E is None else batch[placement.stored_E]
            self.evicted[shard] += len(batch) - len(kept) + int((ring.columns["id"][placement.slot_E] >= 0).sum())
            self.hand[shard] = placement.hand
            stored.append(kept)
            slots.append(placement.slot_E + place.start)
            spent.append(placement.spent + place.start)
        self.ledger.update(np.concatenate(spent), {"chance": False})
        self._put(np.concatenate(slots), entries.take(np.concatenate(stored)))

    def _put(self, slot_E: np.ndarray, entries: Entries) -> None:
        slots = on_device(slot_E, self.key_HMD)
        self.key_HMD[:, slots] = entries.key_EHD.transpose(0, 1).to(self.key_HMD.dtype)
        self.value_HMD[:, slots.to(self.value_HMD.device)] = entries.value_EHD.transpose(0, 1).to(self.value_HMD)
        self.ledger.put(slot_E, {**entries.metadata(),
                                 "chance": entries.importance_E >= self.config.second_chance_importance})
        self._refresh_scores(slot_E)
        self.searcher.changed(slot_E)
        self.views.regrouped()

    def _refresh_scores(self, slot_E: np.ndarray) -> None:
        """Puts importance into the addends of slots that have changed; whatever was kept of them is out of date.

        The logarithm is fp64, so that its fp32 value is the same on every path.
        """
        live_E = self.columns["id"][slot_E] >= 0
        importance_E = np.where(live_E, self.columns["importance"][slot_E], 1.0).astype(np.float64)
        addend_E = np.where(live_E, self.config.importance_weight * np.log(importance_E), NO_SCORE)
        self.addend_M[on_device(slot_E, self.key_HMD)] = on_device(addend_E.astype(np.float32), self.key_HMD)
        self.views.rescored()
        self.version = next(_VERSIONS)

    def matching(self, *, ids: Sequence[int] | None, namespace: int | None, before_step: int | None,
                 predicate: Predicate | None) -> np.ndarray:
        """Slots of the entries that meet all given conditions, int64; ValueError without any. See `LongTermMemory.delete`.
        """
        if (ids, namespace, before_step, predicate) == (None, None, None, None):
            raise ValueError("delete needs at least one of ids, namespace, before_step, predicate: got none")
        if ids is not None:
            slot_E = self.slots_of_ids(np.unique(np.asarray(ids, np.int64)))
        elif namespace is not None:
            slot_E = self.ledger.slots_of_namespaces(np.array([namespace]))
        else:
            slot_E = np.flatnonzero(self.live_M)
        if namespace is not None:
            slot_E = slot_E[self.columns["namespace"][slot_E] == namespace]
        if before_step is not None:
            slot_E = slot_E[self.columns["step"][slot_E] < before_step]
        if predicate is not None:
            met_M = np.asarray(predicate({name: column.copy() for name, column in self.columns.items()}), bool)
            slot_E = slot_E[met_M[slot_E]]
        return slot_E

    def delete(self, slot_E: np.ndarray) -> int:
        """Empties those of these slots that are live, leaving nothing of their entries; returns how many there were."""
        slot_E = slot_E[self.columns["id"][slot_E] >= 0]
        self.ledger.clear(slot_E)
        slots = on_device(slot_E, self.key_HMD)
        self.key_HMD[:, slots] = 0
        self.value_HMD[:, slots.to(self.value_HMD.device)] = 0
        self._refresh_scores(slot_E)
        self.searcher.changed(slot_E)
        self.views.regrouped()
        return len(slot_E)

    def name_documents(self, first_E: np.ndarray, end_E: np.ndarray, document_E: np.ndarray) -> None:
        """Gives entries of unknown document the document of the range that their id is in; ranges ascend and do not
        overlap."""
        if len(first_E):
            id_M, document_M = self.columns["id"], self.columns["document"]
            at_M = np.searchsorted(first_E, id_M, side="right") - 1
            named_M = (at_M >= 0) & (id_M < end_E[at_M]) & (document_M == UNKNOWN)
            document_M[named_M] = document_E[at_M[named_M]]
            self.views.regrouped()

    def slots_of_ids(self, id_E: np.ndarray) -> np.ndarray:
        """Slots of those entries that this rank holds, in the order of the ids."""
        slot_E = self.ledger.slots_of_ids(id_E)
        return slot_E[slot_E >= 0]

    def questions(self, slot_E: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """The queries of a search for the neighbours of these slots, on the device: ids, texts (namespace and document,
        int64 [E, 2]), `unit_keys`."""
        id_E, namespace_E, document_E = (on_device(self.columns[name][slot_E], self.key_HMD)
                                         for name in ("id", "namespace", "document"))
        unit_ED = unit_keys(self.key_HMD[:, on_device(slot_E, self.key_HMD)])
        return id_E, torch.stack([namespace_E, document_E], dim=1), unit_ED

    def take(self, id_E: np.ndarray) -> tuple[Tensor, Tensor]:
        """What another rank needs of these entries to merge them: fp32 vector_E2HD and int64 `pack_columns` [E, 5]."""
        slot_E = self.slots_of_ids(id_E)
        slots = on_device(slot_E, self.key_HMD)
        value_HED = self.value_HMD[:, slots.to(self.value_HMD.device)].to(slots.device)
        vector_2HED = torch.stack([self.key_HMD[:, slots], value_HED]).float()
        return vector_2HED.permute(2, 0, 1, 3), on_device(pack_columns(self.columns, slot_E), self.key_HMD)

    def absorb(self, id_E: np.ndarray, other_E2HD: Tensor, other_E5: Tensor, *, replace: bool = False) -> None:
        """Merges into each of these entries another one, a row of `take`. Id, namespace and step stay.

        Args:
            replace: whether the other's vectors take the place of the entry's, instead of the mean of both.
        """
        slot_E, (mine_E2HD, mine_E5) = self.slots_of_ids(id_E), self.take(id_E)
        merged_E2HD = other_E2HD if replace else merge_vectors(mine_E2HD, other_E2HD, mine_E5[:, 0], other_E5[:, 0])
        key_HED, value_HED = merged_E2HD.permute(1, 2, 0, 3)
        slots = on_device(slot_E, self.key_HMD)
        self.key_HMD[:, slots] = key_HED.to(self.key_HMD.dtype)
        self.value_HMD[:, slots.to(self.value_HMD.device)] = value_HED.to(self.value_HMD)
        self.ledger.update(slot_E, merge_columns(mine_E5.cpu().numpy(), other_E5.cpu().numpy()))
        self._refresh_scores(slot_E)
        self.searcher.changed(slot_E)

    def count_hits(self, tickets: Sequence[Ticket], credits_X: Sequence[Tensor]) -> tuple[np.ndarray, np.ndarray]:
        """Which slots won in these reads, ascending, and the attention that each received, over all heads, in units of
        1 / `MASS_UNIT`: int64 both.

        A weight times its bag's credit is exact in fp64 and rounded once. Both come from a model's fp32 and may differ in
        their last bits between batch shapes; a coarser unit would let fewer of them through, but magnify those.

        Args:
            credits_X: of each read, fp32.
        """
        slots, units = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for ticket, credit_X in zip(tickets, credits_X, strict=True):
            unit_E = (ticket.weight_E.double() * credit_X.double()[ticket.bag_E] * MASS_UNIT).round().long()
            slots.append(ticket.row_E.cpu().numpy() % self.num_slots)
            units.append(unit_E.cpu().numpy())
        return self.ledger.add_up(np.concatenate(slots), np.concatenate(units))

    def touch(self, slot_E: np.ndarray, mass_E: np.ndarray, step: int) -> None:
        """Applies the hit statistics of one step, `count_hits`: last hit, hit mass, importance and its effect on scores.

        Importance grows by `importance_growth` per unit of attention; where it crosses `second_chance_importance`, the
        entry gets its second chance.
        """
        columns, threshold = self.columns, self.config.second_chance_importance
        before_E = columns["importance"][slot_E]
        growth_E = self.config.importance_growth * mass_E / MASS_UNIT
        after_E = np.minimum(before_E + growth_E, MAX_IMPORTANCE).astype(np.float32)
        chance_E = columns["chance"][slot_E] | ((before_E < threshold) & (after_E >= threshold))
        self.ledger.update(slot_E, {"last_hit": step, "hit_mass": columns["hit_mass"][slot_E] + mass_E,
                                    "importance": after_E, "chance": chance_E})
        self._refresh_scores(slot_E)

    # --- state -----------------------------------------------------------------------------------------------------

    def state(self, shard: int) -> dict[str, Tensor]:
        """A copy of one virtual shard on the CPU: key and value [H, M, D], one column per item of `entry.METADATA`, and
        the numbers shard, virtual_shards, slots, hand and evicted as int64 scalars."""
        place = self._place_of(shard)
        columns = {name: torch.from_numpy(column[place].copy()) for name, column in self.columns.items()}
        numbers = {"shard": shard, "virtual_shards": self.config.virtual_shards, "slots": self.slots,
                   "hand": self.hand[shard], "evicted": self.evicted[shard]}
        return {"key": copy_of(self.key_HMD[:, place], self.config),
                "value": copy_of(self.value_HMD[:, place], self.config),
                **columns, **{name: torch.tensor(number) for name, number in numbers.items()}}

    def load(self, shard: int, state: Mapping[str, Tensor]) -> None:
        """Replaces one virtual shard by a state; scores are computed anew.

        Raises:
            ValueError: if the state does not fit (names, shapes, dtypes) or is not one a bank can be in: see
                `states.check_content`. Nothing has changed then.
        """
        self.check(shard, state)
        place = self._place_of(shard)
        self.key_HMD[:, place] = state["key"].to(self.key_HMD)
        self.value_HMD[:, place] = state["value"].to(self.value_HMD)
        for name, column in self.columns.items():
            column[place] = state[name].numpy()
        self.hand[shard], self.evicted[shard] = int(state["hand"]), int(state["evicted"])
        self.ledger.forget()
        self._refresh_scores(np.arange(place.start, place.stop))
        self.searcher.changed(np.arange(place.start, place.stop))
        self.views.regrouped()

    def check(self, shard: int, state: Mapping[str, Tensor]) -> None:
        """Raises ValueError where a state, bank-wide counters included, is not one of this virtual shard."""
        (H, _, D), place = self.value_HMD.shape, self._place_of(shard)
        check_state(state, shape=(H, place.stop - place.start, D), dtype=self.value_HMD.dtype, shard=shard,
                    virtual_shards=self.config.virtual_shards, slots=self.slots)

    def _place_of(self, shard: int) -> slice:
        if shard not in self.range_of:
            raise ValueError(f"this rank holds the virtual shards {self.owned}: got {shard}")
        return self.range_of[shard]
