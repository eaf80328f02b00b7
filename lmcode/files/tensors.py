"""Writing a safetensors file tensor by tensor, without the second copy of all in memory that `safetensors.torch` makes.

The format is theirs: eight bytes for the length of a JSON header, the header padded to a multiple of eight, and then the
tensors, their bytes little-endian, one behind the other. https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

KINDS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32", torch.bool: "BOOL"}


def write_tensors(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes tensors on the CPU, of a dtype in `KINDS`; a KeyError for another. Not atomic.

    A tensor that is not contiguous is copied while it is written.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # so that every tensor is aligned
    end = 0
    for name in order:
        one, start, end = tensors[name], end, end + tensors[name].nbytes
        header[name] = {"dtype": KINDS[one.dtype], "shape": list(one.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        _write_all(handle, struct.pack("<Q", len(text)) + text)
        for name in order:
            _write_all(handle, tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    finally:
        os.close(handle)


def _write_all(handle: int, data: bytes | memoryview) -> None:
    """One call of `os.write` may take a part of it only."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(handle, rest):]
