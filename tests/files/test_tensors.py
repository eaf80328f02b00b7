"""Files that are written tensor by tensor are what safetensors reads, whatever is in them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lmcode.files.tensors import KINDS, write_tensors


def test_safetensors_reads_the_same_names_bits_and_words(tmp_path: Path) -> None:
    bits = torch.randint(0, 256, (3, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tensors = {str(kind): bits.view(kind) if kind != torch.bool else bits > 99 for kind in KINDS}
    tensors |= {"turned": tensors["torch.int64"].T, "empty": torch.zeros(0, 4), "number": torch.tensor(5)}
    write_tensors(tmp_path / "some.safetensors", tensors, {"words": '{"a": "é"}'})
    loaded = load_file(tmp_path / "some.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
        flat = (one.contiguous().reshape(-1).view(torch.uint8) for one in (loaded[name], tensor))
        assert torch.equal(*flat)
    with safe_open(tmp_path / "some.safetensors", framework="pt") as file:
        assert file.metadata() == {"words": '{"a": "é"}'}


def test_a_kind_that_banks_do_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        write_tensors(tmp_path / "some.safetensors", {"half": torch.zeros(2, dtype=torch.float16)}, {})
