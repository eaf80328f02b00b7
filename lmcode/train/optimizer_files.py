"""The optimizer's state on disk: one safetensors file per rank, whole parameters inside, no pickle.

Each parameter's two moments are in the file of one rank, chosen so that all files are about equally large. Any number of
ranks and any ZeRO stage reads what any other wrote, which DeepSpeed's own files do not allow without a conversion.

    optimizer/part-00000.safetensors    NAME.exp_avg, NAME.exp_avg_sq: fp32, the parameter's shape
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor, zeros_like

FOLDER = "optimizer"


def part_file(rank: int) -> str:
    """The file of one rank, relative to the checkpoint."""
    return f"{FOLDER}/part-{rank:05d}.safetensors"


def divide(parameters: Iterable[tuple[str, dict[str, Tensor]]], *, rank: int,
           ranks: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All weights by name (on rank 0; elsewhere none), and the moments that `rank` keeps.

    Args:
        parameters: name and state, "weight" and moments, of every parameter: `Engine.parameters`. Each is let go before
            the next comes, so a rank holds its share only.
    """
    weights, moments, sizes = {}, {}, [0] * ranks
    for name, state in parameters:
        owner = sizes.index(min(sizes))
        sizes[owner] += state["weight"].numel()
        if rank == 0:
            weights[name] = state["weight"].contiguous()
        if rank == owner:
            moments.update({f"{name}.{moment}": t.contiguous() for moment, t in state.items() if moment != "weight"})
    return weights, moments


def reader(folder: Path, weights: Mapping[str, Tensor], moments: Iterable[str]) -> Callable[[str], dict[str, Tensor]]:
    """From a parameter's name to its state, as `Engine.load` asks for it; a moment that was never saved is zero.

    Raises:
        ValueError: from the returned function, for a parameter that the checkpoint lacks or holds in another shape.
    """
    files = [safe_open(path, framework="pt") for path in sorted((folder / FOLDER).glob("part-*.safetensors"))]
    holder = {key: file for file in files for key in file.keys()}

    def read(name: str) -> dict[str, Tensor]:
        if name not in weights:
            raise ValueError(f"'{folder}' has no weight '{name}'")
        state = {"weight": weights[name]}
        for moment in moments:
            key = f"{name}.{moment}"
            state[moment] = holder[key].get_tensor(key) if key in holder else zeros_like(weights[name])
            if state[moment].shape != weights[name].shape:
                raise ValueError(f"'{folder}': '{key}' must have the shape of its parameter, "
                                 f"{list(weights[name].shape)}: got {list(state[moment].shape)}")
        return state

    return read
