"""What one rank holds of a bank: the rows of its virtual shards, each a ring in a contiguous range of slots.

The shard does what needs no other rank: it searches its rows, weighs and differentiates those that won, and writes,
deletes and counts. Beside the keys, `[H, M, D]`, lie the addends to their scores, fp32 `[M]`: `importance_weight *
log(importance)` of a live entry and `NO_SCORE` in an empty slot. So that attention is counted changes no key.
Letters: M slots of this rank; G gathered queries; Q = G * H bags of winners, bag = query * H + head; W winners.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Union

import numpy as np
import torch
from torch import Tensor

from lmcode.config import MemoryConfig
from lmcode.memory.consolidate import merge_columns, merge_vectors, pack_columns, unit_keys
from lmcode.memory.entry import COUNTERS, MASS_UNIT, MAX_IMPORTANCE, UNKNOWN, Entries, check_content
from lmcode.memory.evict import policy_of
from lmcode.memory.ledger import Ledger
from lmcode.memory.placement import capacity_of, virtual_shard_of
from lmcode.memory.search.decide import no_hits
from lmcode.memory.search.exact import Stack, attend_best, stack_rows
from lmcode.memory.search.hnsw import HnswTier
from lmcode.memory.search.ivf import IvfTier
from lmcode.memory.search.plan import Plan
from lmcode.memory.search.tier import Found, Hidden, Rows, Tier, tier_of
from lmcode.memory.ticket import Ticket
from lmcode.memory.values import copy_of, value_table
from lmcode.protocol import NO_SCORE

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Predicate = Callable[[Mapping[str, np.ndarray]], np.ndarray]
Scope = Union[str, Sequence[int]]  # noqa: UP007  (evaluated at run time)
Groups = tuple[Union[tuple[int, ...], None], ...]  # noqa: UP007  (evaluated at run time)
KEPT_ROWS = 16384  # rows copied for searches that the next searches find again, as long as nothing changes
STACKED_ROWS = 65536  # rows copied for look-ups, likewise
_VERSIONS = itertools.count(1)  # no two states of any two shards in this process share a version


class Shard:
    """The rows of the virtual shards `owned`. Keys and values lie on `device`, everything else on the CPU.

    version: a number that is never the same again after a change. Ranks that make the same calls change it in the same ones,
        even where a call finds nothing to change.
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
        self._texts: tuple[np.ndarray, dict[tuple[int, int], slice]] | None = None
        self._kept: dict[object, Rows] = {}
        self._stacks: dict[object, Stack | None] = {}
        self._tiers: dict[str, Tier] = {}
        self.plan = Plan()

    @property
    def live_M(self) -> np.ndarray:
        """bool, slots that hold an entry."""
        return self.columns["id"] >= 0

    # --- writing ---------------------------------------------------------------------------------------------------

    def write(self, entries: Entries) -> None:
        """Stores those entries that belong here and that the policy of eviction takes, and evicts what is in their way.

        `evicted` counts both: who is refused has had an id, and is gone.
        """
        shard_E = virtual_shard_of(entries.id_E, self.config.virtual_shards)
        columns, stored, slots, spent = entries.metadata(), [], [], []
        for shard, place in self.range_of.items():
            batch = np.flatnonzero(shard_E == shard)
            ring = self.ledger.ring(shard)
            placement = self._policy(ring, {name: column[batch] for name, column in columns.items()})
            kept = batch if placement.stored_m is None else batch[placement.stored_m]
            self.evicted[shard] += len(batch) - len(kept) + int((ring.columns["id"][placement.slot_m] >= 0).sum())
            self.hand[shard] = placement.hand
            stored.append(kept)
            slots.append(placement.slot_m + place.start)
            spent.append(placement.spent + place.start)
        self.ledger.update(np.concatenate(spent), {"chance": False})
        self._put(np.concatenate(slots), entries.take(np.concatenate(stored)))

    def _put(self, slot_E: np.ndarray, entries: Entries) -> None:
        slots = self._on_device(slot_E)
        self.key_HMD[:, slots] = entries.key_EHD.transpose(0, 1).to(self.key_HMD.dtype)
        self.value_HMD[:, slots.to(self.value_HMD.device)] = entries.value_EHD.transpose(0, 1).to(self.value_HMD)
        self.ledger.put(slot_E, {**entries.metadata(),
                                 "chance": entries.importance_E >= self.config.second_chance_importance})
        self._refresh_scores(slot_E)
        self._say_changed(slot_E)
        self._texts = None

    def _refresh_scores(self, slot_E: np.ndarray) -> None:
        """Puts importance into the addends of slots that have changed; whatever was kept of them is out of date.

        The logarithm is fp64, so that its fp32 value is the same on every path.
        """
        live_E = self.columns["id"][slot_E] >= 0
        importance_E = np.where(live_E, self.columns["importance"][slot_E], 1.0).astype(np.float64)
        addend_E = np.where(live_E, self.config.importance_weight * np.log(importance_E), NO_SCORE)
        self.addend_M[self._on_device(slot_E)] = self._on_device(addend_E.astype(np.float32))
        self._kept.clear()
        self._stacks.clear()
        self.version = next(_VERSIONS)

    def _say_changed(self, slot_E: np.ndarray) -> None:
        """Tells the tiers which slots have other keys, other entries or none now."""
        for tier in self._tiers.values() if len(slot_E) else ():
            tier.changed(slot_E)

    def matching(self, *, ids: Sequence[int] | None, namespace: int | None, before_step: int | None,
                 predicate: Predicate | None) -> np.ndarray:
        """Slots of the entries that meet all given conditions, int64; ValueError without any. See `LongTermMemory.delete`.
        """
        if (ids, namespace, before_step, predicate) == (None, None, None, None):
            raise ValueError("delete needs at least one of ids, namespace, before_step, predicate: got none")
        if ids is not None:
            slot_E = self.slots_of_ids(np.unique(np.asarray(ids, np.int64)))
        elif namespace is not None:
            slot_E = self.slots_of(np.array([namespace]))
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
        slots = self._on_device(slot_E)
        self.key_HMD[:, slots] = 0
        self.value_HMD[:, slots.to(self.value_HMD.device)] = 0
        self._refresh_scores(slot_E)
        self._say_changed(slot_E)
        self._texts = None
        return len(slot_E)

    def name_documents(self, first_E: np.ndarray, end_E: np.ndarray, document_E: np.ndarray) -> None:
        """Gives entries of unknown document those of ranges of ids, which ascend and do not overlap."""
        if len(first_E):
            id_M, document_M = self.columns["id"], self.columns["document"]
            at_M = np.searchsorted(first_E, id_M, side="right") - 1
            named_M = (at_M >= 0) & (id_M < end_E[at_M]) & (document_M == UNKNOWN)
            document_M[named_M] = document_E[at_M[named_M]]
            self._texts = None

    def slots_of_ids(self, id_E: np.ndarray) -> np.ndarray:
        """Slots of those entries that this rank holds, in the order of the ids."""
        slot_E = self.ledger.slots_of_ids(id_E)
        return slot_E[slot_E >= 0]

    def questions(self, slot_n: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """What these slots ask when they look for neighbours, on the device: ids, texts (namespace and document, int64
        [n, 2]), `unit_keys`."""
        id_n, namespace_n, document_n = (self._on_device(self.columns[name][slot_n])
                                         for name in ("id", "namespace", "document"))
        unit_nF = unit_keys(self.key_HMD[:, self._on_device(slot_n)])
        return id_n, torch.stack([namespace_n, document_n], dim=1), unit_nF

    def take(self, id_E: np.ndarray) -> tuple[Tensor, Tensor]:
        """What another rank needs of these entries to merge them: fp32 vector_E2HD and int64 `pack_columns` [E, 5]."""
        slot_E = self.slots_of_ids(id_E)
        slots = self._on_device(slot_E)
        value_HED = self.value_HMD[:, slots.to(self.value_HMD.device)].to(slots.device)
        vector_2HED = torch.stack([self.key_HMD[:, slots], value_HED]).float()
        return vector_2HED.permute(2, 0, 1, 3), self._on_device(pack_columns(self.columns, slot_E))

    def absorb(self, id_E: np.ndarray, other_E2HD: Tensor, other_E5: Tensor) -> None:
        """Merges into each of these entries another one, a row of `take`. Id, namespace and step stay."""
        slot_E, (mine_E2HD, mine_E5) = self.slots_of_ids(id_E), self.take(id_E)
        merged_E2HD = merge_vectors(mine_E2HD, other_E2HD, mine_E5[:, 0], other_E5[:, 0])
        key_HED, value_HED = merged_E2HD.permute(1, 2, 0, 3)
        slots = self._on_device(slot_E)
        self.key_HMD[:, slots] = key_HED.to(self.key_HMD.dtype)
        self.value_HMD[:, slots.to(self.value_HMD.device)] = value_HED.to(self.value_HMD)
        self.ledger.update(slot_E, merge_columns(mine_E5.cpu().numpy(), other_E5.cpu().numpy()))
        self._refresh_scores(slot_E)
        self._say_changed(slot_E)

    def count_hits(self, tickets: Sequence[Ticket], credits_Q: Sequence[Tensor]) -> tuple[np.ndarray, np.ndarray]:
        """Which slots won in these reads, ascending, and the attention that each received, over all heads, in units of
        1 / `MASS_UNIT`: int64 both.

        A weight times its bag's credit is exact in fp64 and rounded once. Both come from a model's fp32 and may differ in
        their last bits between batch shapes; a coarser unit would let fewer of them through, but magnify those.

        Args:
            credits_Q: of each read, fp32.
        """
        slots, units = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for ticket, credit_Q in zip(tickets, credits_Q, strict=True):
            unit_W = (ticket.weight_W.double() * credit_Q.double()[ticket.bag_W] * MASS_UNIT).round().long()
            slots.append(ticket.row_W.cpu().numpy() % self.num_slots)
            units.append(unit_W.cpu().numpy())
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

    # --- reading ---------------------------------------------------------------------------------------------------

    def slots_by_text(self) -> tuple[np.ndarray, dict[tuple[int, int], slice]]:
        """Live slots sorted by (namespace, document, id), and where among them those of each text are."""
        if self._texts is None:
            live = np.flatnonzero(self.live_M)
            text_2P = np.stack([self.columns[name][live] for name in ("namespace", "document")])
            order_P = np.lexsort((self.columns["id"][live], text_2P[1], text_2P[0]))
            starts, ends, texts = _runs(text_2P.T[order_P])
            self._texts = live[order_P], dict(zip(texts, map(slice, starts, ends), strict=True))
        return self._texts

    def slots_of(self, namespaces: np.ndarray) -> np.ndarray:
        """Live slots of these namespaces, by (namespace, id)."""
        return self.ledger.slots_of_namespaces(namespaces)

    def search(self, query_GHD: Tensor, namespace_G: np.ndarray, document_G: np.ndarray, k: int, *, scope: Scope,
               tier: str) -> Found:
        """The k best rows of this rank for each query and head: score, id and slot, [G, H, K], in total order.

        A query with a negative namespace sees nothing, whatever the scope; one of a known document sees nothing that was
        written from this document under another namespace.
        """
        def hidden(slot_P: Tensor | None, queries: np.ndarray) -> Hidden:
            return () if scope == "document" else self._hidden(slot_P, namespace_G[queries], document_G[queries])

        searching = self._tier(tier)
        rows_of = self._table if searching.whole else self._rows_of
        return self._search(query_GHD, _groups(namespace_G, scope), k, searching.search, rows_of, hidden)

    def look_up(self, query_NHD: Tensor, namespace_N: np.ndarray, k: int, *, scope: Scope,
                longest: float) -> tuple[Tensor, ...] | None:
        """What attending to the hits of a `search` would give, [N, H, D], and its log-sum-exp, [N, H], and whether that
        takes a search after all, bool [N]; None if it does for all.

        Args:
            longest: length of the longest query, finite.
        """
        if self.value_HMD.device != self.device:
            return None
        (N, H, D), names = query_NHD.shape, namespace_N.tolist()
        if scope == "document":
            groups: Groups = tuple((name,) for name in (names if len(set(names)) > 1 else names[:1]))
        else:
            groups = (seen_in(scope),)
        stack = self._stack(groups)
        if stack is None:
            return None
        value_XQD, lse_XQ, doubtful_XQ = attend_best(query_NHD.transpose(0, 1).reshape(H * len(groups), -1, D), stack,
                                                     self.value_HMD.flatten(0, 1), k, longest)
        value_NHD, lse_NH = value_XQD.view(H, N, -1).transpose(0, 1), lse_XQ.view(H, N).transpose(0, 1)
        if stack.has_empty or min(names) < 0:
            sees_N1 = (~stack.empty_G & self._on_device(namespace_N >= 0))[:, None]
            value_NHD, lse_NH = value_NHD.where(sees_N1[..., None], 0.0), lse_NH.where(sees_N1, NO_SCORE)
        return value_NHD, lse_NH, doubtful_XQ.view(H, N).any(dim=0)

    def _stack(self, groups: tuple[tuple[int, ...] | None, ...]) -> Stack | None:
        """The rows of these namespaces (None: of all), group by group; None if they are too many. Kept until the shard
        changes."""
        if groups not in self._stacks:
            slots = [np.flatnonzero(self.live_M) if names is None else self.slots_of(np.array(names)) for names in groups]
            columns = len(slots) * max(map(len, slots))
            if columns + sum(stack.num_columns for stack in self._stacks.values() if stack) > STACKED_ROWS:
                self._stacks.clear()
            self._stacks[groups] = (None if columns > STACKED_ROWS
                                    else stack_rows(self.key_HMD, self.addend_M, [*map(self._on_device, slots)]))
        return self._stacks[groups]

    def nearest(self, unit_GF: Tensor, text_G2: np.ndarray, *, tier: str) -> Found:
        """The two entries here that are nearest to each query in its text, itself included: as `search`, [G, 2].

        Args:
            unit_GF: rows of `unit_keys`; so are the rows that they are compared with, a text at a time.
            text_G2: namespace (negative: none, so nothing is found) and document of each query.
        """
        order_G = np.lexsort((text_G2[:, 1], text_G2[:, 0]))
        groups = [(order_G[start:end], text) for start, end, text in zip(*_runs(text_G2[order_G]), strict=True)
                  if text[0] >= 0]
        found = self._search(unit_GF.unsqueeze(1), groups, 2, self._tier(tier).search, self._unit_rows_of)
        return found[0][:, 0], found[1][:, 0], found[2][:, 0]

    def use(self, plan: Plan) -> None:
        """How the whole bank is searched from now on."""
        self.plan = plan
        for tier in self._tiers.values():
            tier.use(plan)

    def list_lengths(self) -> np.ndarray:
        """How many entries each list of the plan's centroids holds here, int64 [H, L]."""
        tier = self._tier("ivf")
        assert isinstance(tier, IvfTier)
        return tier.lengths(self._table(None))

    @property
    def graphs(self) -> HnswTier:
        """The tier of graphs."""
        tier = self._tier("hnsw")
        assert isinstance(tier, HnswTier)
        return tier

    def all_rows(self) -> Rows:
        """All slots."""
        return self._table(None)

    def forget(self, slot_E: np.ndarray) -> None:
        """Has no tier keep a copy of what was in these slots."""
        for tier in self._tiers.values():
            tier.forget(slot_E)

    def _tier(self, name: str) -> Tier:
        if name not in self._tiers:
            self._tiers[name] = tier_of(name)()
            self._tiers[name].placed(self.range_of)
            self._tiers[name].use(self.plan)
        return self._tiers[name]

    def _search(self, query_GHD: Tensor, groups: list[tuple[np.ndarray, Any]], k: int, search: Callable[..., Found],
                rows_of: Callable[[Any], Rows],
                hidden_of: Callable[[Tensor | None, np.ndarray], Hidden] = lambda *_: ()) -> Found:
        """Group by group; a tier goes head by head, so here, and nowhere else, queries are turned for it."""
        G, H, _ = query_GHD.shape
        found = no_hits((G, H, k), query_GHD.device)
        for queries, seen in groups:
            rows = rows_of(seen)
            if len(rows.id_P) == 0:
                continue
            positions = self._on_device(queries)
            query_HQD = query_GHD.index_select(0, positions).transpose(0, 1).contiguous()
            score_HQK, id_HQK, slot_HQK = search(query_HQD, rows, k, hidden=hidden_of(rows.slot_P, queries))
            if rows.slot_P is not None:
                slot_HQK = rows.slot_P[slot_HQK.clamp(min=0)].where(slot_HQK >= 0, -1)
            for whole, part in zip(found, (score_HQK, id_HQK, slot_HQK), strict=True):
                whole.index_copy_(0, positions, part.transpose(0, 1))
        return found

    def _hidden(self, slot_P: Tensor | None, namespace_Q: np.ndarray, document_Q: np.ndarray) -> Hidden:
        """Which of these rows (None: of all slots) are hidden from whom: those of a query's own document, written under
        another namespace, so in another reading. What its own reading has written comes from earlier tokens."""
        documents = np.unique(document_Q[document_Q >= 0])
        if len(documents) == 0:
            return ()
        document_P, namespace_P = (self.columns[name] if slot_P is None else self.columns[name][slot_P.cpu().numpy()]
                                   for name in ("document", "namespace"))
        own_L = np.flatnonzero(np.isin(document_P, documents))
        if len(own_L) == 0:
            return ()
        readings, reading_Q = np.unique(np.stack([document_Q, namespace_Q], axis=1), axis=0, return_inverse=True)
        pairs = [(np.flatnonzero(reading_Q.reshape(-1) == number),
                  own_L[(document_P[own_L] == document) & (namespace_P[own_L] != namespace)])
                 for number, (document, namespace) in enumerate(readings) if document >= 0]
        return [(self._on_device(query_Q), self._on_device(row_P)) for query_Q, row_P in pairs if len(row_P)]

    def _table(self, names: tuple[int, ...] | None) -> Rows:
        """`_rows_of`, but all slots where all rows are seen."""
        if names is not None:
            return self._rows_of(names)
        return Rows(self.key_HMD, self.addend_M, self._on_device(self.columns["id"]), None)

    def _rows_of(self, names: tuple[int, ...] | None) -> Rows:
        """The rows of these namespaces; None: of all."""
        if names in self._kept:
            return self._kept[names]
        slot_P = np.flatnonzero(self.live_M) if names is None else self.slots_of(np.array(names))
        # From half full on, scores of empty slots cost less than a copy of the live rows.
        if names is None and (2 * len(slot_P) >= self.num_slots > 0):
            return Rows(self.key_HMD, self.addend_M, self._on_device(self.columns["id"]), None)
        slots = self._on_device(slot_P)
        id_P = self._on_device(self.columns["id"][slot_P])
        return self._keep(names, Rows(self.key_HMD.index_select(1, slots), self.addend_M[slots], id_P, slots))

    def _unit_rows_of(self, text: tuple[int, int]) -> Rows:
        """The `unit_keys` of the rows of a text."""
        if ("text", text) in self._kept:
            return self._kept["text", text]
        order_P, texts = self.slots_by_text()
        slot_P = order_P[texts.get(text, slice(0))]
        slots = self._on_device(slot_P)
        unit_1PF = unit_keys(self.key_HMD[:, slots]).unsqueeze(0)
        return self._keep(("text", text), Rows(unit_1PF, unit_1PF.new_zeros(len(slot_P)),
                                               self._on_device(self.columns["id"][slot_P]), slots))

    def _keep(self, key: object, rows: Rows) -> Rows:
        """Keeps few rows until the shard changes."""
        if len(rows.id_P) + sum(len(kept.id_P) for kept in self._kept.values()) <= KEPT_ROWS:
            self._kept[key] = rows
        return rows

    # --- state -----------------------------------------------------------------------------------------------------

    def state(self, shard: int) -> dict[str, Tensor]:
        """A copy of one virtual shard on the CPU: key and value [H, C, D], one column per item of `entry.METADATA`, and
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
                `check_content`. Nothing has changed then.
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
        self._say_changed(np.arange(place.start, place.stop))
        self._texts = None

    def check(self, shard: int, state: Mapping[str, Tensor]) -> None:
        """Raises ValueError where a state, bank-wide counters included, is not one of this virtual shard."""
        place = self._place_of(shard)
        (H, _, D), C = self.value_HMD.shape, place.stop - place.start
        numbers = {"shard": shard, "virtual_shards": self.config.virtual_shards, "slots": self.slots}
        mine: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            **dict.fromkeys(("key", "value"), ((H, C, D), self.value_HMD.dtype)),
            **{name: ((C,), torch.from_numpy(column[:0].copy()).dtype) for name, column in self.columns.items()},
            **dict.fromkeys((*numbers, "hand", "evicted", *COUNTERS), ((), torch.int64))}
        if {*mine} != {*state}:
            raise ValueError(f"virtual shard {shard}: a state holds {sorted(mine)}: got {sorted(state)}")
        for name, expected in mine.items():
            if expected != (came := (tuple(state[name].shape), state[name].dtype)):
                raise ValueError(f"virtual shard {shard}: '{name}' must be {expected}: got {came}")
        for name, number in numbers.items():
            if int(state[name]) != number:
                raise ValueError(f"virtual shard {shard}: '{name}' must be {number}: got {int(state[name])}")
        check_content(state, self.config.virtual_shards)

    def _place_of(self, shard: int) -> slice:
        if shard not in self.range_of:
            raise ValueError(f"this rank holds the virtual shards {self.owned}: got {shard}")
        return self.range_of[shard]

    def _on_device(self, index: np.ndarray) -> Tensor:
        return torch.from_numpy(index).to(self.key_HMD.device)


def seen_in(scope: Scope) -> tuple[int, ...] | None:
    """The namespaces of a scope that is the same for all queries; None: all."""
    return None if isinstance(scope, str) else tuple(scope)


def _groups(namespace_G: np.ndarray, scope: Scope) -> list[tuple[np.ndarray, tuple[int, ...] | None]]:
    """Queries that see the same namespaces, and those (None: all); queries with a negative one are in no group."""
    if scope == "document" and len(namespace_G) == 1:
        return [(np.array([0]), (int(namespace_G[0]),))] if namespace_G[0] >= 0 else []
    if scope == "document":
        order = np.argsort(namespace_G, kind="stable")
        names, starts = np.unique(namespace_G[order], return_index=True)
        return [(queries, (int(name),)) for name, queries in zip(names, np.split(order, starts[1:]), strict=True)
                if name >= 0]
    queries = np.flatnonzero(namespace_G >= 0)
    return [(queries, seen_in(scope))] if len(queries) else []


def _runs(text_P2: np.ndarray) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """Where equal rows of a sorted table start and end, and which they are."""
    changes = np.flatnonzero((text_P2[1:] != text_P2[:-1]).any(axis=1)) + 1
    bounds = [0, *changes.tolist(), len(text_P2)] if len(text_P2) else [0]
    return bounds[:-1], bounds[1:], list(map(tuple, text_P2[bounds[:-1]].tolist()))


def digest_of(state: Mapping[str, Tensor]) -> bytes:
    """blake2b over the names, dtypes, shapes and bytes of a state, by name."""
    digest = hashlib.blake2b(digest_size=32)
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()
