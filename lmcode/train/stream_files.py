"""The state of a job's streams on disk: one file per rank, by its first stream, which any number of ranks loads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lmcode.protocol import State

FOLDER = "streams"


def stream_parts(states: Mapping[int, State], *, first: int) -> dict[str, Callable[[Path], None]]:
    """The file of one rank by its path, if it has states; with a copy of what is to be written.

    Args:
        states: by micro-batch: consecutive parts of the rank's block, so they are joined.
        first: the first stream of the block.
    """
    if not states:
        return {}
    micros = [named_tensors(states[micro]) for micro in sorted(states)]
    whole = {name: torch.cat([one[name] for one in micros]).cpu().contiguous() for name in micros[0]}
    return {f"{FOLDER}/from-{first:08d}.safetensors": partial(save_file, whole)}


def load_streams(folder: Path, kind: type[State], *, rank: int, world_size: int, num_micro: int,
                 device: torch.device | str = "cpu") -> dict[int, State]:
    """The states of this rank's streams by micro-batch, whatever number of ranks and micro-batches saved them.

    Args:
        kind: the named tuple that the model's states are.

    Raises:
        ValueError: if the saved streams do not divide over ranks and micro-batches.
    """
    parts = [load_file(path) for path in sorted(folder.glob("from-*.safetensors"))]  # by first stream: the global order
    if not parts:
        return {}
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    count = len(whole["pending_valid_B"])
    size, rest = divmod(count, world_size * num_micro)
    if rest:
        raise ValueError(f"{count} saved streams do not divide over {world_size} ranks x {num_micro} micro-batches")
    starts = [(rank * num_micro + micro) * size for micro in range(num_micro)]
    return {micro: _state_of(kind, {name: rows[first:first + size].clone().to(device) for name, rows in whole.items()})
            for micro, first in enumerate(starts)}


def named_tensors(state: State) -> dict[str, Tensor]:
    """The tensors of a state under names of one level."""
    named: dict[str, Tensor] = {}
    for name, value in state._asdict().items():
        named.update({name: value} if isinstance(value, Tensor) else {f"{name}.{i}": one for i, one in enumerate(value)})
    return named


def _state_of(kind: Any, named: dict[str, Tensor]) -> State:
    def of(field: str) -> Any:
        count = sum(name.startswith(f"{field}.") for name in named)
        return named[field] if field in named else tuple(named[f"{field}.{i}"] for i in range(count))

    state: State = kind(**{field: of(field) for field in kind._fields})
    return state
