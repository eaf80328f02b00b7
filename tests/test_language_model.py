"""The public object: a model whose banks no module machinery can see."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lmcode
from lmcode import LMCODE, LMCODEConfig, MemoryConfig
from lmcode.dist import Group
from tests.helpers.patience import PATIENCE_S
from tests.helpers.ranks import run_on_ranks

CONFIG = LMCODEConfig(vocab_size=40, hidden_size=32, num_layers=3, num_heads=2, context_length=16, short_term_memory_size=4,
                      short_term_dim=8, long_term_memory_slots=64, memory_head_dim=8, memory_top_k=4, memory_layers=(0, 2))


def test_every_memory_layer_has_a_bank_of_its_own() -> None:
    model = LMCODE(CONFIG, memory=MemoryConfig(virtual_shards=4))
    assert list(model.banks) == [0, 2] and model.banks[0] is not model.banks[2]
    assert model.layers[1].long_term_memory.consolidate_memories(threshold=0.2) == (0.2, 0, 0)
    for layer, bank in model.banks.items():
        assert model.layers[layer].long_term_memory is bank


def test_a_bank_is_neither_module_nor_parameter_nor_buffer() -> None:
    model = LMCODE(CONFIG, memory=MemoryConfig(virtual_shards=4))
    bank = model.banks[0]
    assert not isinstance(bank, nn.Module)
    tables = {id(bank.shard.key_HMD), id(bank.shard.value_HMD)}
    for tensor in [*model.parameters(), *model.buffers(), *model.state_dict().values()]:
        assert id(tensor) not in tables
    model.to(torch.bfloat16)
    assert bank.shard.key_HMD.dtype == torch.float32, "a cast of the model leaves the bank alone"


def test_two_models_in_one_process_share_no_memory() -> None:
    one, two = (LMCODE(CONFIG, memory=MemoryConfig(virtual_shards=4)) for _ in range(2))
    one.banks[0].write(torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.zeros(3, dtype=torch.int64))
    assert one.banks[0].stats()["live"] == 3 and two.banks[0].stats()["live"] == 0


def test_a_forward_pass_reads_and_never_writes() -> None:
    model = LMCODE(CONFIG, memory=MemoryConfig(virtual_shards=4))
    before = {layer: bank.content_hash() for layer, bank in model.banks.items()}
    output = model(torch.randint(0, 40, (2, 10)), torch.randint(0, 40, (2, 10)))
    output.loss.backward()
    assert {layer: bank.content_hash() for layer, bank in model.banks.items()} == before
    for layer, bank in model.banks.items():
        bank.commit([output.memory[layer].candidates], [output.memory[layer].hits], step=0)
    assert {layer: bank.content_hash() for layer, bank in model.banks.items()} != before


def test_banks_and_experiences_go_where_the_weights_go() -> None:
    model = LMCODE(CONFIG, memory=MemoryConfig(virtual_shards=4, tier="exact"))
    model.store_experience([1, 2, 3])
    banks = model.banks
    assert model.half().banks is banks, "another dtype of the weights is no reason to move"
    model.to("meta")
    shards = [bank.shard for bank in [*model.banks.values(), model.experiences.bank]]
    assert {table.device.type for shard in shards for table in vars(shard).values() if isinstance(table, torch.Tensor)} == {
        "meta"}
    assert all(model.layer(number).long_term_memory is bank for number, bank in model.banks.items())


def test_without_slots_there_is_no_bank_and_the_parameters_are_the_same() -> None:
    with_bank = LMCODE(CONFIG, memory=MemoryConfig(virtual_shards=4))
    without = LMCODE(CONFIG.model_copy(update={"long_term_memory_slots": 0}))
    assert without.banks == {}
    assert [p.shape for p in with_bank.parameters()] == [p.shape for p in without.parameters()]


def test_every_public_name_is_there() -> None:
    assert [getattr(lmcode, name).__name__ for name in lmcode.__all__] == lmcode.__all__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'LMCODER'"):
        _ = lmcode.LMCODER


def test_the_package_imports_without_torch() -> None:
    done = subprocess.run([sys.executable, "-c", "import lmcode, sys; sys.exit('torch' in sys.modules)"], timeout=PATIENCE_S)
    assert done.returncode == 0


DISAGREEMENTS: dict[str, Callable[[LMCODE, int, str], Any]] = {  # what rank 0 and rank 1 call otherwise
    "another id": lambda model, rank, folder: model.inspect_experience(rank),
    "no such id": lambda model, rank, folder: model.inspect_experience(99 if rank else 0),
    "no id": lambda model, rank, folder: model.inspect_experience("x" if rank else 0),
    "another text": lambda model, rank, folder: model.store_experience([1 + rank]),
    "no text": lambda model, rank, folder: model.store_experience([] if rank else [1]),
    "another question": lambda model, rank, folder: model.query_memory([1 + rank]),
    "another number of hits": lambda model, rank, folder: model.query_memory([1], top_k=-rank),
    "another deletion": lambda model, rank, folder: model.delete_experiences(ids=[rank]),
    "no deletion": lambda model, rank, folder: model.delete_experiences(ids=[0] if rank else None),
    "other prompts": lambda model, rank, folder: model.generate([[1 + rank]], max_new_tokens=1),
    "no prompts": lambda model, rank, folder: model.generate([[1]] if rank else 7, max_new_tokens=1),
    "other lengths": lambda model, rank, folder: model.generate([[1]], max_new_tokens=1 + rank),
    "a setting that cannot be": lambda model, rank, folder: model.generate([[1]], temperature=-rank),
    "writing or not": lambda model, rank, folder: model.generate([[1]], 3, namespace=0, write_memory=bool(rank)),
    "a state or none": lambda model, rank, folder: model.generate([[1]], 3, return_state=bool(rank)),
    "with memory or not": lambda model, rank, folder: model.save_pretrained(folder, include_memory=bool(rank)),
    "another folder": lambda model, rank, folder: model.save_pretrained(f"{folder}-{rank}"),
    "loading the memory or not": lambda model, rank, folder: LMCODE.from_pretrained(
        folder, include_memory=bool(rank), group=model.group),
}


def disagree(folder: str) -> tuple[dict[str, str], list[int]]:
    """What each call is refused with, and then the ids that agreeing ranks get."""
    group = Group.world()
    model = LMCODE(CONFIG, memory=MemoryConfig(virtual_shards=4), group=group)
    model.store_experience([[1, 2, 3], [4, 5, 6]])
    said = {}
    for name, call in DISAGREEMENTS.items():
        try:
            call(model, group.rank, folder)
        except ValueError as error:
            said[name] = str(error)
    return said, model.store_experience([7, 8])


def test_ranks_that_call_a_collective_otherwise_are_all_refused_and_none_waits(tmp_path: Path) -> None:
    for said, ids in run_on_ranks(disagree, 2, str(tmp_path / "model")):
        assert said.keys() == DISAGREEMENTS.keys()
        for name, message in said.items():
            assert "is a collective: all ranks must pass the same arguments" in message, (name, message)
        assert ids == [2], "nothing was stored by those that were refused"
