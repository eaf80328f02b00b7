"""Where values lie changes nothing but where they lie: the same hits, sums, gradients and files, on any number of ranks."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lmcode.config import ConfigError, MemoryConfig, build
from lmcode.dist import Group
from lmcode.memory import LongTermMemory, lifecycle
from lmcode.memory.store import load_bank, save_bank
from lmcode.protocol import Candidates
from tests.helpers.banks import H, make_bank, my_part, twins, unit
from tests.helpers.ranks import run_on_ranks

STORES = ("device", "host", "mmap")


def live(group: Group, folder: Path, store: str, dtype: str) -> dict[str, Any]:
    """Reads and backward passes, commits, a deletion, a consolidation, a save and a load; what came of each."""
    bank = make_bank(group, value_store=store, value_folder=str(folder) if store == "mmap" else None, dtype=dtype)
    key, value = twins(60, 0)
    bank.write(key, value, torch.arange(60) % 4)
    seen: dict[str, Any] = {"rows": [], "hash": []}
    for step in range(3):
        query = my_part(unit(H, 8, 8, seed=step) * 6, group, 1).requires_grad_()
        hits = bank.search(query.detach(), my_part(torch.arange(8) % 4, group, 0))
        found, lse = bank.attend(query, hits)
        (found.sum() + lse.sum()).backward()
        seen["rows"] += [*hits[:2], found.detach(), lse.detach(), query.grad, *bank.fetch(hits)]
        key, value = (my_part(one, group, 1) for one in twins(40, 10 + step))
        names = torch.arange(key.shape[1]) % 4
        surprise = torch.ones(len(names))
        bank.commit([Candidates(key, value, names, surprise, surprise.bool())], [hits], step=step)
        bank.delete(namespace=step, before_step=1)
        bank.consolidate(0.1)
        seen["hash"].append(bank.content_hash())
    if group.rank == 0:
        (folder / f"{store}-{dtype}-{group.size}").mkdir()
    group.barrier()
    save_bank(folder / f"{store}-{dtype}-{group.size}", bank)
    group.barrier()
    loaded = lifecycle.like(bank)
    load_bank(folder / f"{store}-{dtype}-{group.size}", loaded)
    assert loaded.content_hash() == bank.content_hash() == lifecycle.fork(bank, empty=False).content_hash()
    return seen


def live_everywhere(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    group = Group.world()
    return {(store, dtype): live(group, folder, store, dtype) for store in STORES for dtype in ("fp32", "bf16")}


@pytest.mark.parametrize("R", [1, 2])
def test_all_stores_compute_and_save_the_same(R: int, tmp_path: Path) -> None:
    for found in run_on_ranks(live_everywhere, R, tmp_path):
        for dtype in ("fp32", "bf16"):
            wanted = found["device", dtype]
            for store in ("host", "mmap"):
                assert found[store, dtype]["hash"] == wanted["hash"]
                assert all(torch.equal(a, b) for a, b in zip(found[store, dtype]["rows"], wanted["rows"], strict=True))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(f"{store}-{dtype}-{R}" for store in STORES for dtype in ("fp32", "bf16")), "no file is left"
    for dtype in ("fp32", "bf16"):
        for path in (tmp_path / f"device-{dtype}-{R}").iterdir():
            assert path.read_bytes() == (tmp_path / f"mmap-{dtype}-{R}" / path.name).read_bytes()


def test_a_folder_that_takes_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="memory.value_store = mmap needs .* bytes in .*absent"):
        make_bank(value_store="mmap", value_folder=str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="value_store"):
        build(MemoryConfig, {"value_store": "disk"})


# One head of width 256 and 60,000 slots: 61 MB of keys, 61 MB of values.
PROGRAM = """
import os, re, signal, sys, torch
from pathlib import Path
from lmcode.config import MemoryConfig
from lmcode.memory import LongTermMemory
from lmcode.memory.store import save_bank

def own(key="RssAnon"):  # MB of this process's memory that is no mapped file
    return int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1000

folder, before = Path(sys.argv[1]), own()
config = MemoryConfig(value_store=sys.argv[2], virtual_shards=8, value_folder=sys.argv[1])
bank = LongTermMemory(heads=1, head_dim=256, slots=60_000, top_k=4, config=config)
for _ in range(60):
    key = torch.randn(1, 1000, 256)
    bank.write(key, key, torch.zeros(1000).long())
held, states = own(), [bank.state(shard) for shard in bank.owned]  # as a checkpoint does, which is written later
(folder / "saved").mkdir()
save_bank(folder / "saved", bank)
print(held - before, own() - held, bank.content_hash(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_values_in_a_file_take_no_memory_and_neither_does_a_save(tmp_path: Path) -> None:
    held, copied = {}, {}
    for store in ("device", "mmap"):
        (tmp_path / store).mkdir()
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / store), store]
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        *numbers, digest = ended.stdout.split()
        held[store], copied[store] = map(float, numbers)
        assert ended.returncode == -signal.SIGKILL and [path.name for path in (tmp_path / store).iterdir()] == ["saved"]
        config = MemoryConfig(value_store=store, virtual_shards=8, value_folder=str(tmp_path))
        again = LongTermMemory(heads=1, head_dim=256, slots=60_000, top_k=4, config=config)
        load_bank(tmp_path / store / "saved", again)
        assert again.content_hash() == digest
    assert held["device"] - held["mmap"] > 30, "most of the values' 61 MB: what else a process takes varies by 20"
    assert copied["device"] > 115 and copied["mmap"] < 20, "a copy of keys and values, in memory or in a file"
