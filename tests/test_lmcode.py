"""The public object: a model whose banks no module machinery can see."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from patience import PATIENCE_S
from torch import nn

import lmcode
from lmcode import LMCODE, LMCODEConfig, MemoryConfig

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
    tables = {id(bank.shard.key_HME), id(bank.shard.value_HMD)}
    for tensor in [*model.parameters(), *model.buffers(), *model.state_dict().values()]:
        assert id(tensor) not in tables
    model.to(torch.bfloat16)
    assert bank.shard.key_HME.dtype == torch.float32, "a cast of the model leaves the bank alone"


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


def test_without_slots_there_is_no_bank_and_the_parameters_are_the_same() -> None:
    with_bank = LMCODE(CONFIG, memory=MemoryConfig(virtual_shards=4))
    without = LMCODE(CONFIG.model_copy(update={"long_term_memory_slots": 0}))
    assert without.banks == {}
    assert [p.shape for p in with_bank.parameters()] == [p.shape for p in without.parameters()]


@pytest.mark.parametrize("name", lmcode.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(lmcode, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'LMCODER'"):
        _ = lmcode.LMCODER


def test_the_package_imports_without_torch() -> None:
    done = subprocess.run([sys.executable, "-c", "import lmcode, sys; sys.exit('torch' in sys.modules)"], timeout=PATIENCE_S)
    assert done.returncode == 0
