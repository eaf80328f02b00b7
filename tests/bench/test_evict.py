"""`lmcode bench evict`: a row for each policy and size, banks that are full and take turns, sizes that have a peer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lmcode.bench import banks
from lmcode.bench.banks import DOCUMENT
from lmcode.bench.evict import PARTS, WRITES, FullBank
from lmcode.cli.command import BAD_USAGE, DONE, main
from lmcode.config import EVICTIONS, MemoryConfig
from lmcode.memory import LongTermMemory


def test_every_policy_and_size_has_its_row_and_sizes_take_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    steps, step = list[int](), FullBank.step

    def counted(bank: FullBank) -> dict[str, float]:
        steps.append(bank.bank.slots)
        return step(bank)

    monkeypatch.setattr(FullBank, "step", counted)
    out = tmp_path / "evict.json"
    assert main(["bench", "evict", "--slots", "3000", "1000", "--rounds", "2", "--out", str(out)]) == DONE
    said = json.loads(out.read_text())
    assert [(row["policy"], row["slots"]) for row in said["rows"]] == [
        (policy, slots) for policy in EVICTIONS for slots in (1000, 3000)]
    assert all(row["cost"] == 1.0 for row in said["rows"] if row["slots"] == 1000)
    assert all(row["worst ms"] >= row["step ms"] >= row["write ms"] for row in said["rows"])
    assert {f"{part} ms" for part in (*PARTS, "evict")} <= said["rows"][0].keys()
    assert steps == [1000, 3000] * 3 * len(EVICTIONS), "the first round does not count"
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(said["rows"])


def test_a_step_hits_and_writes_and_whoever_asks_where_changes_nothing() -> None:
    full = FullBank(5000, "clock", seed=0)
    bank = full.bank
    before = bank.stats()
    assert before["live"] == before["slots"] == 5000
    full.step()
    after = bank.stats()
    assert after["live"] == 5000 and after["next_id"] == before["next_id"] + WRITES
    assert after["evicted"] == before["evicted"] + WRITES
    assert (bank.shard.columns["hit_mass"] > 0).sum() > 2000
    hash_before = bank.content_hash()
    full._placing(torch.zeros(1, WRITES, 16), np.zeros(WRITES, np.int64), 99)
    assert bank.content_hash() == hash_before


@pytest.mark.parametrize("aging", [False, True])
def test_a_filled_bank_has_no_free_slot_and_ages_if_it_is_to(aging: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(banks, "AT_ONCE", DOCUMENT)
    bank = LongTermMemory(heads=2, head_dim=4, slots=2 * DOCUMENT, top_k=2, config=MemoryConfig())
    banks.fill(bank, seed=1, aging=aging)
    assert bank.stats()["live"] == bank.slots < bank.next_id, "shares of the virtual shards differ"
    written = bank.shard.columns["step"]
    assert bool((written == bank.shard.columns["namespace"]).all() if aging else (written == 0).all())


@pytest.mark.parametrize(("words", "message"), [
    (["--policies", "clok"], "--policies must name some of clock, fifo, lru, oldest, importance, random: got 'clok'. "
                             "Did you mean 'clock'?"),
    (["--slots", "2000", "2000"], "the smallest is the peer of the others: got 2000"),
    (["--slots", "10", "2000"], "expected 1000 or more: got 10"),
    (["--out", "nowhere/file.json"], "--out must lie in a folder that exists"),
])
def test_what_cannot_be_measured_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "evict", *words]) == BAD_USAGE
    assert message in capsys.readouterr().err
