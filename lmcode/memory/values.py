"""Where a shard's values lie (`memory.value_store`): beside the keys, in host memory, or in a working file on disk.

A read looks at the values of those rows alone that won, so they may lie where there is more room. The working file belongs
to the process: it loses its name as soon as it is mapped, so that nothing is left of it after a kill, and a checkpoint is
what brings it back. Its room is reserved at once, since a disk that ran full later would end the process with a signal.
"""

from __future__ import annotations

import os
import tempfile

import torch
from torch import Tensor

from lmcode.config import ConfigError, MemoryConfig

BLOCK = 64 * 2**20  # bytes that are copied from file to file at once


def value_table(shape: tuple[int, ...], dtype: torch.dtype, config: MemoryConfig, device: torch.device) -> Tensor:
    """Zeros of this shape, in the place that the settings name.

    Raises:
        ConfigError: if the folder of a working file takes none, or has no room for it.
    """
    if config.value_store == "mmap":
        return mapped(shape, dtype, config.value_folder)
    if config.value_store == "host":
        return torch.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda")
    return torch.zeros(shape, dtype=dtype, device=device)


def mapped(shape: tuple[int, ...], dtype: torch.dtype, folder: str | None) -> Tensor:
    """Zeros in a file of this process without a name; ConfigError as in `value_table`."""
    count = torch.Size(shape).numel()
    try:
        file, path = tempfile.mkstemp(prefix="lmcode-values-", dir=folder)
        try:
            os.posix_fallocate(file, 0, max(1, count * dtype.itemsize))
            return torch.from_file(path, shared=True, size=count, dtype=dtype).view(shape)
        finally:
            os.close(file)
            os.unlink(path)
    except OSError as error:
        raise ConfigError(f"memory.value_store = mmap needs {count * dtype.itemsize:,} bytes in "
                          f"'{folder or tempfile.gettempdir()}': {error}") from None


def copy_of(table_HMD: Tensor, config: MemoryConfig) -> Tensor:
    """A copy of some slots in host memory; of a bank whose values are in a file a copy in another one, made in blocks."""
    if config.value_store != "mmap":
        return table_HMD.to("cpu", copy=True).contiguous()
    copy_HMD = mapped(tuple(table_HMD.shape), table_HMD.dtype, config.value_folder)
    rows = max(1, BLOCK // max(1, table_HMD.shape[-1] * table_HMD.element_size()))
    for head_MD, copy_MD in zip(table_HMD, copy_HMD, strict=True):
        for start in range(0, len(head_MD), rows):
            copy_MD[start:start + rows] = head_MD[start:start + rows]
    return copy_HMD
