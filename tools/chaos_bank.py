"""python tools/chaos_bank.py [--operations 1000000] [--ranks 1] [--group-size 0] [--seed 0] [--folder FOLDER]

Random operations on a bank beside a plain model of dicts that knows the rules and nothing of the code: writes (bad rows
among them), deletions, searches in document and global scope and in sets of namespaces, consolidation, saving and loading,
forking. An entry written, an entry deleted, a query searched and every other call count as one operation each. Compared are
the hits of each query (ids, scores, namespaces) and, after each stretch, the whole content slot by slot. Exit code 1 for a
single wrong result.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import chaos
import numpy as np
import torch

from lmcode.config import MemoryConfig
from lmcode.dist import Group
from lmcode.memory import LongTermMemory, lifecycle
from lmcode.memory.placement import capacity_of, virtual_shard_of
from lmcode.memory.store import load_bank, save_bank

H, D, K, S, SLOTS, NAMESPACES = 2, 8, 6, 7, 331, 6
THRESHOLD, CLOSE = 0.1, 1e-5  # of consolidation; scores nearer than CLOSE may swap
CONFIG = {"virtual_shards": S, "importance_weight": 1.0, "second_chance_importance": 1.5}
ACTIONS = {"write": 0.36, "search": 0.4, "delete": 0.15, "consolidate": 0.03, "save and load": 0.03, "fork": 0.03}


class Plain:
    """A bank as a list of rings of dicts: key and value [H, D], id, namespace, importance, count, chance."""

    def __init__(self) -> None:
        self.rings: list[list[dict[str, Any] | None]] = [[None] * capacity_of(s, SLOTS, S) for s in range(S)]
        self.hands, self.next_id = [0] * S, 0

    def entries(self) -> list[dict[str, Any]]:
        """What is there, by id."""
        return sorted((one for ring in self.rings for one in ring if one), key=lambda one: one["id"])

    def write(self, batch: list[dict[str, Any]]) -> None:
        """Ids in order, bad rows left out; then each virtual shard takes in its part."""
        groups: dict[int, list[dict[str, Any]]] = {}
        for one in batch:
            one["id"] = self.next_id
            self.next_id += 1
            if np.isfinite(one["key"]).all() and np.isfinite(one["value"]).all() and one["namespace"] >= 0:
                shard = int(virtual_shard_of(np.array([one["id"]]), S)[0])
                groups.setdefault(shard, []).append(one)
        for shard, group in groups.items():
            self._take_in(shard, group[-len(self.rings[shard]):])

    def _take_in(self, shard: int, group: list[dict[str, Any]]) -> None:
        """Free slots from the hand on; then entries without a second chance; then, all chances being spent, the rest."""
        ring, C, hand = self.rings[shard], len(self.rings[shard]), self.hands[shard]
        order = [(hand + n) % C for n in range(C)]
        free = [slot for slot in order if ring[slot] is None][:len(group)]
        moved = 0
        while moved < len(free) and order[moved] == free[moved]:
            moved += 1
        taken, need, at = list(free), len(group) - len(free), 0
        full = [slot for slot in order if ring[slot] is not None]
        while need:  # the hand goes round, at most twice
            slot = full[at % len(full)]
            if at < len(full) and ring[slot]["chance"]:
                ring[slot]["chance"] = False
            elif slot not in taken:
                taken.append(slot)
                need -= 1
                moved = order.index(slot) + 1
            at += 1
        self.hands[shard] = (hand + moved) % C
        for slot, one in zip(taken, group, strict=True):
            ring[slot] = one

    def delete(self, condition: Any) -> int:
        count = 0
        for ring in self.rings:
            for slot, one in enumerate(ring):
                if one is not None and condition(one):
                    ring[slot], count = None, count + 1
        return count

    def consolidate(self) -> tuple[dict[int, int], bool]:
        """Which loser goes into which survivor, by the rule (greedy in id order, then those nearest to the same entry),
        and whether distances are clear enough for rounding not to matter."""
        links, clear = [], True
        every = self.entries()
        for namespace in {one["namespace"] for one in every}:
            same = [one for one in every if one["namespace"] == namespace]
            key = np.stack([one["key"] for one in same]).astype(np.float64)
            key /= np.maximum(np.linalg.norm(key, axis=-1, keepdims=True), 1e-300)
            distance = 1 - np.einsum("ahd,bhd->ab", key, key) / H
            np.fill_diagonal(distance, 9)
            nearest = np.sort(distance, axis=1)
            gaps = np.append(np.abs(nearest[:, 0] - THRESHOLD), (nearest[:, 1] - nearest[:, 0]) if len(same) > 1 else 9)
            clear &= bool((gaps > 1e-6).all())
            best = distance.argmin(1)
            links += [(one["id"], same[best[n]]["id"], max(0.0, distance[n, best[n]])) for n, one in enumerate(same)
                      if distance[n, best[n]] < THRESHOLD]
        pairs, free_pairs_clear = pair_up(sorted(links))
        for survivor, loser in pairs.items():
            self._merge(survivor, loser)
        return pairs, clear and free_pairs_clear

    def _merge(self, survivor: int, loser: int) -> None:
        by_id = {one["id"]: one for one in self.entries()}
        mine, other = by_id[survivor], by_id[loser]
        weights = np.array([mine["count"], other["count"]], np.float64)
        share = weights / weights.sum()
        for name in ("key", "value"):
            both = np.stack([mine[name], other[name]]).astype(np.float64)
            mean = np.tensordot(share, both, 1)
            if name == "key":
                wanted = np.tensordot(share, np.linalg.norm(both, axis=-1), 1)
                mean *= (wanted / np.linalg.norm(mean, axis=-1))[:, None]
            mine[name] = mean.astype(np.float32)
        mine["importance"] = float(np.float32(share @ [mine["importance"], other["importance"]]))
        mine["count"] += other["count"]
        mine["chance"] |= other["chance"]
        self.delete(lambda one: one["id"] == loser)


def pair_up(links: list[tuple[int, int, float]]) -> tuple[dict[int, int], bool]:
    """Survivor -> loser of one round of consolidation, and whether rounding could not change it."""
    pairs: dict[int, int] = {}
    taken: set[int] = set()
    for one, other, _ in links:
        if not taken & {one, other}:
            pairs[min(one, other)] = max(one, other)
            taken |= {one, other}
    waiting: dict[int, tuple[float, int]] = {}
    clear = True
    for one, other, distance in links:
        if one in taken:
            continue
        if other in waiting:
            first, sibling = waiting.pop(other)
            apart = 1 - np.cos(min(np.pi, np.arccos(1 - first) + np.arccos(1 - distance)))
            clear &= abs(apart - THRESHOLD) > 1e-6 and abs(first - distance) > 1e-9
            if apart < THRESHOLD:
                pairs[min(one, sibling)] = max(one, sibling)
            else:
                waiting[other] = min((first, sibling), (distance, one))
        else:
            waiting[other] = (distance, one)
    return pairs, clear


class Trial:
    """A bank and its plain double, and what was found."""

    def __init__(self, seed: int, folder: Path, group_size: int = 0) -> None:
        self.rng, self.folder, self.group = np.random.default_rng(seed), folder, Group.world()
        self.bank = LongTermMemory(heads=H, head_dim=D, slots=SLOTS, top_k=K, group=self.group,
                                   config=MemoryConfig(tier=("exact", "faiss-flat")[seed % 2], group_size=group_size,
                                                       **CONFIG))
        self.plain, self.done, self.wrong = Plain(), Counter[str](), list[str]()
        self.foreign = self.unclear = 0

    def require(self, fine: bool, what: str) -> None:
        if not fine:
            self.wrong.append(f"{sum(self.done.values()):,} operations in: {what}")

    def write(self) -> None:
        """Some entries, a tenth of them near an older one, some of them bad."""
        count, rng = int(rng_count(self.rng)), self.rng
        key = rng.normal(size=(count, H, D)).astype(np.float32)
        key /= np.linalg.norm(key, axis=-1, keepdims=True)
        old = self.plain.entries()
        names = rng.integers(NAMESPACES, size=count)
        for n in np.flatnonzero(rng.random(count) < 0.1) if old else ():
            twin = old[int(rng.integers(len(old)))]
            key[n] = twin["key"] + rng.normal(scale=0.05, size=(H, D)).astype(np.float32)
            names[n] = twin["namespace"]
        value = rng.normal(size=(count, H, D)).astype(np.float32)
        importance = rng.uniform(0.5, 2.0, count).astype(np.float32)
        if rng.random() < 0.1:
            value[0, 0, 0], names[-1] = (np.nan, np.inf)[int(rng.integers(2))], -1
        batch = [{"key": key[n], "value": value[n], "namespace": int(names[n]), "importance": float(importance[n]),
                  "count": 1, "chance": bool(importance[n] >= CONFIG["second_chance_importance"])} for n in range(count)]
        first = self.plain.next_id
        bad = ~np.isfinite(value).all((1, 2)) | (names < 0)
        ids = self.bank.write(*(torch.from_numpy(x).transpose(0, 1) for x in (key, value)), torch.from_numpy(names),
                              torch.from_numpy(importance))
        self.plain.write(batch)
        self.require(ids.tolist() == np.where(bad, -1, first + np.arange(count)).tolist(), "ids of a write")
        self.done["write"] += count

    def delete(self) -> None:
        rng, limit = self.rng, int(self.rng.integers(self.plain.next_id + 1))
        namespace = int(rng.integers(NAMESPACES))
        ids = rng.integers(max(0, limit - 40), limit + 1, 12)
        if rng.random() < 0.5:
            count, expected = self.bank.delete(ids=ids.tolist()), self.plain.delete(lambda one: one["id"] in ids)
        else:
            count = self.bank.delete(namespace=namespace, predicate=lambda columns: columns["importance"] < 0.8)
            expected = self.plain.delete(lambda one: one["namespace"] == namespace and one["importance"] < 0.8)
        self.require(count == expected, f"a deletion removed {count}, not {expected}")
        self.done["delete"] += max(1, count)

    def search(self) -> None:
        """A batch of queries in one scope, against all entries scored in fp64."""
        rng, count = self.rng, int(rng_count(self.rng))
        query = rng.normal(size=(H, count, D)).astype(np.float32)
        names = rng.integers(-1, NAMESPACES, count)
        scope = ("document", "global", sorted({int(n) for n in rng.integers(NAMESPACES, size=2)}))[int(rng.integers(3))]
        hits = self.bank.search(torch.from_numpy(query), torch.from_numpy(names), scope=scope)
        self.check_hits(query.astype(np.float64), names, scope, hits.id_HNK.numpy(), hits.score_HNK.numpy())
        self.done["search"] += count

    def check_hits(self, query_HND: np.ndarray, names: np.ndarray, scope: Any, id_HNK: np.ndarray,
                   score_HNK: np.ndarray) -> None:
        every = self.plain.entries()
        ids, spaces = (np.array([one[name] for one in every], np.int64) for name in ("id", "namespace"))
        key_PHD = np.stack([one["key"] for one in every]).astype(np.float64) if every else np.zeros((0, H, D))
        score_HNP = np.einsum("hnd,phd->hnp", query_HND, key_PHD)
        score_HNP += np.log([one["importance"] for one in every])
        allowed = {"document": names[:, None] == spaces, "global": np.ones((len(names), len(ids)), bool)}
        seen_NP = allowed[scope] if isinstance(scope, str) else np.isin(spaces, scope)[None].repeat(len(names), 0)
        seen_NP &= names[:, None] >= 0
        padded = np.concatenate([np.where(seen_NP, score_HNP, -np.inf), np.full((*score_HNP.shape[:2], K), -np.inf)], -1)
        best = -np.sort(-padded, axis=-1)[..., :K]
        valid = id_HNK >= 0
        self.require(np.array_equal(valid, np.isfinite(best)), "the number of hits")
        place = np.searchsorted(ids, id_HNK).clip(max=max(0, len(ids) - 1))
        self.require(bool((ids[place] == id_HNK)[valid].all()) if len(ids) else not valid.any(), "a hit that is not there")
        if not len(ids):
            return
        visible = np.take_along_axis(seen_NP[None].repeat(H, 0), place, -1)
        self.foreign += int((valid & ~visible).sum())
        true = np.take_along_axis(score_HNP, place, -1)
        near = (np.abs(true - score_HNK) < CLOSE) & (np.abs(best - score_HNK) < CLOSE)
        self.require(bool(near[valid].all()), "hits or scores of a search")
        order = (score_HNK[..., :-1] > score_HNK[..., 1:]) | ((score_HNK[..., :-1] == score_HNK[..., 1:])
                                                              & (id_HNK[..., :-1] < id_HNK[..., 1:]))
        self.require(bool(order[valid[..., 1:]].all()), "the order of hits")
        self.require(bool((np.diff(np.sort(np.where(valid, id_HNK, -1 - np.arange(K)))) > 0).all()), "a hit twice")

    def consolidate(self) -> None:
        before = {one["id"] for one in self.plain.entries()}
        report = self.bank.consolidate(THRESHOLD)
        pairs, clear = self.plain.consolidate()
        if not clear:  # near ties: rounding may choose otherwise, so the double starts afresh from the bank
            self.unclear += 1
            self.copy()
        else:
            self.require((report.before, report.merged) == (len(before), len(pairs)), f"{report} beside {len(pairs)} pairs")
            self.compare()
        self.done["consolidate"] += 1

    def save_and_load(self) -> None:
        save_bank(self.folder, self.bank)
        self.group.barrier()
        loaded = lifecycle.fork(self.bank, empty=True)
        load_bank(self.folder, loaded)
        self.require(loaded.content_hash() == self.bank.content_hash(), "a loaded bank is another one")
        self.bank = loaded
        self.group.barrier()
        self.done["save and load"] += 1

    def fork(self) -> None:
        """Goes on with a copy; what is done to the original must not show."""
        original, content = self.bank, self.bank.content_hash()
        self.bank = lifecycle.fork(original, empty=False)
        original.delete(namespace=int(self.rng.integers(NAMESPACES)))
        self.require(self.bank.content_hash() == content, "a fork changes with its original")
        self.done["fork"] += 1

    def states(self) -> list[tuple[int, dict[str, torch.Tensor]]]:
        """All virtual shards, from every rank that holds them."""
        mine = [(shard, self.bank.state(shard)) for shard in self.bank.owned]
        return sorted((one for part in self.group.all_gather_object(mine) for one in part), key=lambda one: one[0])

    def compare(self) -> None:
        """Slot by slot."""
        for shard, state in self.states():
            ring = self.plain.rings[shard]
            live = [slot for slot, one in enumerate(ring) if one is not None]
            ids = np.full(len(ring), -1)
            ids[live] = [ring[slot]["id"] for slot in live]
            self.require(np.array_equal(state["id"].numpy(), ids), f"ids in virtual shard {shard}")
            self.require(int(state["hand"]) == self.plain.hands[shard], f"hand of virtual shard {shard}")
            for name in ("namespace", "count", "chance", "importance", "key", "value"):
                expected = np.array([ring[slot][name] for slot in live])
                came = state[name].transpose(0, 1) if name in ("key", "value") else state[name]
                fine = not live or np.allclose(came.numpy()[live], expected, rtol=1e-5, atol=1e-6)
                self.require(fine, f"{name} in virtual shard {shard}")
            empty = np.setdiff1d(np.arange(len(ring)), live)
            self.require(not state["key"][:, empty].any() and not state["value"][:, empty].any(), "an empty slot is not")

    def copy(self) -> None:
        for shard, state in self.states():
            ring = self.plain.rings[shard]
            for slot, id in enumerate(state["id"].tolist()):
                ring[slot] = None if id < 0 else {
                    "key": state["key"][:, slot].numpy(), "value": state["value"][:, slot].numpy(), "id": id,
                    "namespace": int(state["namespace"][slot]), "importance": float(state["importance"][slot]),
                    "count": int(state["count"][slot]), "chance": bool(state["chance"][slot])}


def rng_count(rng: np.random.Generator) -> int:
    """Size of a batch: mostly a few dozen."""
    return int(rng.choice([1, 2, 8, 40, 64, 120]))


def try_operations(operations: int, seed: int, folder: Path, size: int = 0) -> tuple[Counter[str], list[str], int, int]:
    """Random operations until there are so many; counts, wrong results, wrong-namespace hits, near ties."""
    trial, calls = Trial(seed, folder, group_size=size), 0
    if trial.group.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
    trial.group.barrier()
    while (count := sum(trial.done.values())) < operations and not trial.wrong:
        action = str(trial.rng.choice(list(ACTIONS), p=list(ACTIONS.values())))
        getattr(trial, action.replace(" ", "_"))()
        calls += 1
        if calls % 20 == 0:
            trial.compare()
        if trial.group.rank == 0 and count // 50_000 != sum(trial.done.values()) // 50_000:
            print(f"{folder.name}: {sum(trial.done.values()):,} operations", flush=True)  # to the ranks' log
    trial.compare()
    return trial.done, trial.wrong, trial.foreign, trial.unclear


def run(arguments: argparse.Namespace) -> int:
    rows: list[tuple[Any, ...]] = [("operations", *ACTIONS, "all", "wrong results", "wrong-namespace hits", "near ties")]
    failures: list[str] = []
    half = -(-arguments.operations // 2)
    with chaos.place(arguments.folder) as folder:
        for number, tier in enumerate(("exact", "faiss-flat")):
            results = chaos.on_ranks(try_operations, arguments.ranks, half, 2 * arguments.seed + number,
                                     folder / tier, arguments.group_size, folder=folder)
            done, _, _, unclear = results[0]
            wrong, foreign = [one for result in results for one in result[1]], sum(result[2] for result in results)
            rows.append((f"{tier}, {arguments.ranks} rank(s)", *(done[name] for name in ACTIONS), sum(done.values()),
                         len(wrong), foreign, unclear))
            failures += wrong + ([f"{tier}: {foreign} hits of a foreign namespace"] if foreign else [])
    print(chaos.table(rows))
    return chaos.verdict(f"{arguments.operations:,} random operations: 0 wrong results, 0 wrong-namespace hits", failures)


def main(argv: list[str] | None = None) -> int:
    parser = chaos.parser_of(__doc__)
    parser.add_argument("--operations", type=int, default=10**6)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--group-size", type=int, default=0, help="ranks of a memory group; 0: all ranks are one")
    parser.add_argument("--seed", type=int, default=0)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
