"""Deletion is final: what is left after any history is what the same history leaves that never had the deleted texts."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lmcode import LMCODE, dist
from lmcode.memories.experiences import VISITS
from lmcode.memories.files import load_memory, make_folders, save_memory
from lmcode.memories.remembering import Deleted
from lmcode.memory import LongTermMemory
from lmcode.model import reading
from tests.helpers.models import model_of
from tests.helpers.ranks import run_on_ranks

NAMES = (0, "house", "visit:1")  # where experiences are stored; documents are read in the last one, too
SENTENCES = ("the key is under the mat", "the ship left the harbour of Hull", "a whale is no fish")
NOW, YOUNG, OLD = 2 * 10**9, 10**6, 10**9  # seconds
Step = tuple[str, dict[str, Any]]


def history_of(seed: int) -> list[Step]:
    """Texts that are near copies of each other, stored, generated and read; consolidations and deletions between them."""
    chance, steps = random.Random(seed), []
    for _ in range(14):
        kind = chance.choice(("store", "store", "store", "generate", "read", "consolidate", "consolidate", "forget"))
        name, text = chance.choice(NAMES), chance.choice(SENTENCES)
        if kind == "store":
            texts = [f"{chance.choice(('', 'and ', 'so '))}{text}{chance.choice(('', '.', ' now'))}" for _ in range(3)]
            steps.append((kind, {"texts": texts, "namespace": name, "age": chance.choice((YOUNG, OLD))}))
        elif kind in ("generate", "read"):
            steps.append((kind, {"text": text, "namespace": name if kind == "generate" else NAMES[-1],
                                 "seed": chance.randrange(3)}))
        elif kind == "consolidate":
            steps.append((kind, {"threshold": chance.choice((0.1, 0.5, 1.0))}))
        else:
            how = chance.choice(("ids", "ids", "ids", "ids", "namespace", "older_than"))
            steps.append((kind, {how: {"ids": chance.random(), "namespace": name, "older_than": OLD // 2}[how]}))
    first = "store", {"texts": [SENTENCES[0]] * 2, "namespace": 0, "age": YOUNG}
    return [first, *steps, ("consolidate", {"threshold": 0.5}), ("forget", {"ids": 0.5})]


def read(model: LMCODE, text: str, seed: int) -> None:
    """Writes what training would of a document."""
    for layer, bank in model.banks.items():
        random_E = torch.Generator().manual_seed(seed + layer)
        key_HED = torch.randn(bank.heads, 1, bank.head_dim, generator=random_E).expand(-1, len(text), -1)
        value_HED = torch.randn(bank.heads, len(text), bank.head_dim, generator=random_E)
        bank.write(key_HED, value_HED, torch.full((len(text),), VISITS + 1), document_E=torch.full((len(text),), seed))


def live(model: LMCODE, history: list[Step]) -> tuple[list[Step], list[set[bytes]]]:
    """Goes through a history; returns it without what it has deleted and without deletions, and the values that were there
    before each deletion."""
    told: dict[int, tuple[int, str]] = {}  # by id: which step, and the text
    kept: list[Step | None] = []
    values: list[set[bytes]] = []
    for kind, facts in history:
        kept.append((kind, facts) if kind != "forget" else None)
        if kind == "store":
            ids = model.store_experience(facts["texts"], facts["namespace"], stored_at=NOW - facts["age"])
            told.update({id: (len(kept) - 1, text) for id, text in zip(ids, facts["texts"], strict=True)})
        elif kind == "generate":
            with model.reading_from({}):  # a text that is told by a deleted one is no entry of it
                model.generate([list(facts["text"].encode())], max_new_tokens=3, seed=facts["seed"], write_memory=True,
                               namespace=[facts["namespace"]])
        elif kind == "read":
            read(model, facts["text"], facts["seed"])
        elif kind == "consolidate":
            for bank in model.banks.values():
                bank.consolidate(facts["threshold"])
            model.experiences.bank.consolidate(facts["threshold"])
        elif forget(model, facts, values) and "namespace" in facts:
            kept[:] = [None if step and step[1].get("namespace") == facts["namespace"] else step for step in kept]
    left: dict[int, list[str]] = {}
    for one in model.experiences.all():
        left.setdefault(told[one.id][0], []).append(one.text)
    steps = [(kind, {**facts, "texts": left.get(place, [])} if kind == "store" else facts)
             for place, step in enumerate(kept) if step for kind, facts in [step]]
    return [(kind, facts) for kind, facts in steps if kind != "store" or facts["texts"]], values


def forget(model: LMCODE, conditions: dict[str, Any], values: list[set[bytes]]) -> bool:
    stored = [one.id for one in model.experiences.all()]
    if "ids" in conditions:
        conditions = {"ids": random.Random(conditions["ids"]).sample(stored, len(stored) // 2)}
    values.append(set().union(*(values_of(bank) for bank in model.banks.values())))
    try:
        return isinstance(model.delete_experiences(**conditions), Deleted)
    except ValueError:  # nothing there
        return False


def values_of(bank: LongTermMemory) -> set[bytes]:
    value_HMD = bank.shard.value_HMD[:, torch.from_numpy(bank.shard.live_M)]
    return {row.numpy().tobytes() for row in value_HMD.flatten(0, 1)}


def entries_of(bank: LongTermMemory) -> list[tuple[Any, ...]]:
    """Everything about the entries of all ranks but their ids, in the order of those; documents by their first entries."""
    shard, mine = bank.shard, {}
    for slot in np.flatnonzero(shard.live_M):
        columns = {name: column[slot].item() for name, column in shard.columns.items()}
        mine[columns.pop("id")] = (columns, shard.key_HMD[:, slot].tolist(), shard.value_HMD[:, slot].tolist())
    everyones = {id: one for part in bank.inside.all_gather_object(mine) for id, one in part.items()}
    documents: dict[int, int] = {}
    for _, (columns, *_) in sorted(everyones.items()):
        columns["document"] = documents.setdefault(columns["document"], len(documents))
    return [one for _, one in sorted(everyones.items())]


def remembered(model: LMCODE) -> dict[str, Any]:
    model.group.barrier()
    found = [[(one.text, one.namespace, one.score) for one in model.query_memory(text, top_k=30)[0]] for text in SENTENCES]
    return {"layers": [entries_of(bank) for bank in model.banks.values()], "keys": entries_of(model.experiences.bank),
            "texts": [one.row() for one in model.experiences.all()], "found": found}


def lives(seeds: tuple[int, ...], folder: Path) -> list[tuple[dict[str, Any], dict[str, Any], int, int]]:
    """For each seed what a life has left, what the life without the deleted texts has left, how much merged and went."""
    reading.STREAMS = 1  # a text is read alone, so that its entries have the same bits in any company
    LMCODE._now = lambda self: NOW
    group, outcomes = dist.Group.world(), []
    for seed in seeds:
        history = history_of(seed)
        model, other = (model_of(memory={"scope": "document"}, group=group) for _ in range(2))
        without, values = live(model, history)
        again, _ = live(other, without)
        assert [kind for kind, _ in again] == [kind for kind, _ in without]
        outcomes.append((remembered(model), remembered(other), sum(bank.stats()["merged"] for bank in other.banks.values()),
                         other.experiences.bank.next_id))
        if group.size == 1:
            check_files(model, other, history, set().union(*values), folder / str(seed))
    return outcomes


def check_files(model: LMCODE, other: LMCODE, history: list[Step], values: set[bytes], folder: Path) -> None:
    """No byte of a deleted text or of its entries is in a file, and what is loaded is what was saved."""
    contents = []
    for name, one in (("with", model), ("without", other)):
        make_folders(folder / name, one.memories)
        save_memory(folder / name, one.memories)
        contents.append(b"".join(path.read_bytes() for path in sorted((folder / name).rglob("*.*"))))
    texts = {text for kind, facts in history if kind == "store" for text in facts["texts"]}
    kept = {one.text for one in model.experiences.all()}
    gone = {f'"{text}"'.encode() for text in texts - kept} | {one for one in values if one not in contents[1]}
    assert len(gone) > 20 and not [secret for secret in gone if secret in contents[0]]
    loaded = model_of(memory={"scope": "document"})
    load_memory(folder / "with", loaded.memories)
    assert remembered(loaded) == remembered(model)


def test_entries_that_an_earlier_version_saved_learn_whose_they_are(tmp_path: Path) -> None:
    model, other = model_of(memory={"write": "every_nth", "write_every": 9}), model_of()
    model.store_experience(["a", *SENTENCES, "b", *SENTENCES], ["house", 0] * 4)
    read(model, SENTENCES[0], 3)
    make_folders(tmp_path, model.memories)
    save_memory(tmp_path, model.memories)
    for path in tmp_path.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys() if name != "document"}
        save_file(tensors, path, header)
    load_memory(tmp_path, other.memories)
    for was, now in zip([*model.banks.values(), model.experiences.bank], [*other.banks.values(), other.experiences.bank],
                        strict=True):
        known = was.shard.columns["document"].clip(max=-1)  # nothing says which document the rest is of
        assert (known < -1).any() and (now.shard.columns["document"] == known).all()


SEEDS = tuple(range(5))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run_on_ranks(lives, 1, SEEDS, tmp_path_factory.mktemp("lives"))[0]


def test_what_is_left_is_what_a_history_without_the_deleted_texts_leaves(alone: list[Any]) -> None:
    for found, wanted, _, _ in alone:
        assert found.keys() == wanted.keys()
        for name in found:
            assert found[name] == wanted[name], name
    assert sum(merged for *_, merged, _ in alone) > 30 and sum(stored for *_, stored in alone) > 20


def test_it_is_the_same_on_two_ranks(alone: list[Any], tmp_path: Path) -> None:
    for rank in run_on_ranks(lives, 2, SEEDS[:2], tmp_path):
        for (found, wanted, *_), (single, *_) in zip(rank, alone, strict=False):
            assert found == wanted == single
