"""Banks on disk: any number of ranks reads what any other wrote, and nothing that is not a bank gets in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmcode.dist import Group
from lmcode.memory import LongTermMemory, load_bank, load_shard, save_bank, save_shard
from lmcode.memory.store import shard_file
from tests.helpers.banks import filled, make_bank, my_part, twins, unit
from tests.helpers.ranks import run_on_ranks


def my_queries(group: Group, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return my_part(unit(2, 12, 8, seed=seed) * 5, group, 1), my_part(torch.arange(12) % 4, group, 0)


def used_bank(group: Group | None = None, **settings: object) -> LongTermMemory:
    """A bank with hits, evictions, second chances, rejected, clipped and deleted entries."""
    bank = make_bank(group, importance_growth=0.5, second_chance_importance=1.2, **settings)
    for step in range(3):
        key, value = twins(60, step)
        value[0, 3] *= 1e3
        key[0, 5, 0] = float("inf")
        bank.write(key, value, torch.arange(60) % 4, step=step, document_E=torch.arange(60) % 5 + 2**60)
        bank.commit([], [bank.search(*my_queries(bank.group, step))], step=step)
    bank.delete(ids=range(100, 180, 9))
    return bank


def save_on_ranks(folder: str, in_groups: str) -> list[str]:
    group, contents = Group.world(), []
    for place, size in ((folder, 0), (in_groups, 2)):
        bank = used_bank(group, group_size=size)
        assert len(set(group.all_gather_object(bank.to_save))) == group.size, "no file is written twice"
        save_bank(place, bank)
        contents.append(bank.content_hash())
    return contents


def load_on_ranks(folder: str, damaged: str, group_size: int) -> tuple[str, int, str, bool]:
    bank = make_bank(Group.world(), group_size=group_size)
    load_bank(folder, bank)
    before, message = bank.content_hash(), ""
    try:
        load_bank(damaged, bank)
    except ValueError as error:
        message = str(error)
    return before, bank.next_id, message, bank.content_hash() == before


def load_everywhere(folder: str, damaged: str) -> list[tuple[str, int, str, bool]]:
    return [load_on_ranks(folder, damaged, group_size) for group_size in (0, 1)]


def test_any_number_of_ranks_loads_what_any_other_saved(tmp_path: Path) -> None:
    whole, in_groups, damaged = folders = [tmp_path / name for name in ("whole", "in_groups", "damaged")]
    for folder in folders:
        folder.mkdir()
    saved = [content for rank in run_on_ranks(save_on_ranks, 4, str(whole), str(in_groups)) for content in rank]
    assert sorted(path.name for path in whole.iterdir()) == [f"shard-{shard:05d}.safetensors" for shard in range(6)]
    assert set(saved) == {used_bank().content_hash()}
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == {
        path.name: path.read_bytes() for path in in_groups.iterdir()}
    alone = make_bank()
    load_bank(whole, alone)
    assert alone.content_hash() == saved[0]
    for path in whole.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes()[:-1 if path.name == "shard-00003.safetensors" else None])
    loaded = run_on_ranks(load_everywhere, 2, str(whole), str(damaged))
    for found, next_id, message, unchanged in [one for rank in loaded for one in rank]:
        assert (found, next_id) == (saved[0], 180)
        assert "shard-00003.safetensors" in message and unchanged  # on both ranks, though only one reads that file


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_loaded_bank_goes_on_as_the_saved_one(tmp_path: Path, dtype: str) -> None:
    bank, other = used_bank(dtype=dtype), make_bank(dtype=dtype, importance_growth=0.5, second_chance_importance=1.2)
    save_bank(tmp_path, bank)
    load_bank(tmp_path, other)
    query, names = unit(2, 8, 8, seed=1) * 5, torch.arange(8) % 4
    for one in (bank, other):
        one.commit([], [one.search(query, names)], step=9)
        one.write(*twins(30, 9), torch.arange(30) % 4, step=9)
    assert bank.content_hash() == other.content_hash()
    found, wanted = bank.search(query, names), other.search(query, names)
    assert torch.equal(found.id_HNK, wanted.id_HNK) and torch.equal(found.score_HNK, wanted.score_HNK)


def test_a_file_of_a_version_without_documents_is_one_of_unknown_documents(tmp_path: Path) -> None:
    bank, loaded = used_bank(), make_bank(importance_growth=0.5, second_chance_importance=1.2)
    save_bank(tmp_path, bank)
    for path in tmp_path.iterdir():
        rewrite(path, lambda tensors, header: tensors.pop("document"))
    load_bank(tmp_path, loaded)
    for shard in bank.owned:
        was, now = bank.state(shard), loaded.state(shard)
        assert set(was["document"].tolist()) - {-1} and set(now.pop("document").tolist()) == {-1}
        assert all(torch.equal(was[name], tensor) for name, tensor in now.items())


def test_nothing_of_a_deleted_entry_is_in_the_files(tmp_path: Path) -> None:
    bank, _, value, _ = filled()
    bank.delete(ids=[7])
    save_bank(tmp_path, bank)
    for path in tmp_path.iterdir():
        assert value[0, 7].numpy().tobytes() not in path.read_bytes()


def rewrite(path: Path, change: Callable[[dict, dict], None]) -> None:
    """Saves the file again after `change` to its tensors and the numbers in its header."""
    state = load_shard(path)
    tensors = load_file(path)
    header = {"format": 1, **{name: int(number) for name, number in state.items() if name not in tensors}}
    change(tensors, header)
    metadata = {"lmcode": header["raw"] if "raw" in header else json.dumps(header)}
    save_file(tensors, path, metadata=metadata)


def setting(name: str, value: object) -> Callable[[dict, dict], None]:
    return lambda tensors, header: header.update({name: value})


@pytest.mark.parametrize(("change", "message"), [
    (setting("format", 2), "must be an object of format 1"),
    (setting("raw", "[1]"), "must be an object of format 1"),
    (setting("raw", "{"), "not a readable shard file"),
    (setting("colour", 3), "must hold the int64 numbers"),
    (setting("hand", 1.5), "must hold the int64 numbers"),
    (setting("hand", True), "must hold the int64 numbers"),
    (setting("hand", 2**70), "must hold the int64 numbers"),
    (setting("hand", 99), r"hand must lie in 0\.\.14"),
    (setting("shard", 1), "'shard' must be 0: got 1"),
    (setting("virtual_shards", 7), "'virtual_shards' must be 6: got 7"),
    (setting("slots", 91), "'slots' must be 90: got 91"),
    (setting("next_id", 1000), "all virtual shards must agree"),
    (setting("next_id", 5), "next_id must exceed every id"),
    (lambda tensors, header: header.pop("evicted"), "must hold the int64 numbers"),
    (lambda tensors, header: tensors.pop("chance"), "tensors must be"),
    (lambda tensors, header: tensors.update(more=torch.zeros(1)), "tensors must be"),
    (lambda tensors, header: tensors["value"].fill_(float("nan")), "'value' must be finite"),
    (lambda tensors, header: tensors.update(key=tensors["key"].double()), "'key' must be"),
    (lambda tensors, header: tensors.update(id=tensors["id"].flip(0)[:3]), "'id' must be"),
    (lambda tensors, header: tensors["id"].add_(tensors["id"] >= 0), "every id must belong here"),
])
def test_refused_files_change_nothing(tmp_path: Path, change: Callable[[dict, dict], None], message: str) -> None:
    save_bank(tmp_path, used_bank())
    rewrite(shard_file(tmp_path, 0), change)
    bank = make_bank()
    bank.write(*twins(5, 0), torch.zeros(5).long())
    before = bank.content_hash()
    with pytest.raises(ValueError, match=message) as caught:
        load_bank(tmp_path, bank)
    assert str(tmp_path) in str(caught.value)
    assert bank.content_hash() == before


@pytest.mark.parametrize("content", [b"", b"not a tensor file", None])
def test_what_is_no_shard_file_is_refused(tmp_path: Path, content: bytes | None) -> None:
    save_bank(tmp_path, used_bank())
    path = shard_file(tmp_path, 4)
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match="shard-00004.safetensors: not a readable shard file"):
        load_bank(tmp_path, make_bank())


def test_another_bank_is_refused(tmp_path: Path) -> None:
    save_bank(tmp_path, used_bank())
    for settings, message in (({"slots": 96}, "must be"), ({"dtype": "bf16"}, "must be"),
                              ({"virtual_shards": 5}, "must be")):
        with pytest.raises(ValueError, match=message):
            load_bank(tmp_path, make_bank(**settings))


def test_a_state_survives_the_file(tmp_path: Path) -> None:
    state = used_bank().state(2)
    save_shard(tmp_path / "one", state)
    loaded = load_shard(tmp_path / "one")
    assert {*loaded} == {*state}
    for name, tensor in state.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)
