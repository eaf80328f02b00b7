"""A state: one virtual shard as it is copied, sent and saved; what of it is refused, and its digest.

A state maps names to tensors on the CPU: key and value [H, M, D], the columns of `entry.METADATA` [M], and numbers, each an
int64 scalar: shard, virtual_shards, slots (of the whole bank), hand, evicted and the bank's `COUNTERS`. All that comes from
outside is judged here before anything of a bank changes.
Letters: M slots of the virtual shard.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from lmcode.memory.entry import MAX_IMPORTANCE, METADATA
from lmcode.memory.placement import virtual_shard_of

COUNTERS = ("next_id", "rejected", "clipped")  # numbers of a whole bank, kept with each of its virtual shards


def check_state(state: Mapping[str, Tensor], *, shape: tuple[int, ...], dtype: torch.dtype, shard: int, virtual_shards: int,
                slots: int) -> None:
    """Raises ValueError where a state is not that of one virtual shard with keys and values of this shape and dtype, or
    where its content cannot be: see `check_content`."""
    numbers = {"shard": shard, "virtual_shards": virtual_shards, "slots": slots}
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        **dict.fromkeys(("key", "value"), (shape, dtype)),
        **{name: (shape[1:2], torch.from_numpy(np.zeros(0, kind)).dtype) for name, kind in METADATA.items()},
        **dict.fromkeys((*numbers, "hand", "evicted", *COUNTERS), ((), torch.int64))}
    if {*expected} != {*state}:
        raise ValueError(f"virtual shard {shard}: a state holds {sorted(expected)}: got {sorted(state)}")
    for name, wanted in expected.items():
        if wanted != (came := (tuple(state[name].shape), state[name].dtype)):
            raise ValueError(f"virtual shard {shard}: '{name}' must be {wanted}: got {came}")
    for name, number in numbers.items():
        if int(state[name]) != number:
            raise ValueError(f"virtual shard {shard}: '{name}' must be {number}: got {int(state[name])}")
    check_content(state, virtual_shards)


def check_content(state: Mapping[str, Tensor], virtual_shards: int) -> None:
    """Raises ValueError for a state that no sequence of writes can lead to.

    Refused: a number that is not finite; a hand outside the ring; a negative counter; an id that is not below next_id,
    occurs twice or hashes to another virtual shard; a live entry with importance outside (0, `MAX_IMPORTANCE`] or a
    negative namespace.
    """
    shard, id_M = int(state["shard"]), state["id"].numpy()
    where = f"virtual shard {shard}"
    for name in ("key", "value", "importance"):
        if not bool(state[name].isfinite().all()):
            raise ValueError(f"{where}: '{name}' must be finite")
    if not 0 <= int(state["hand"]) < len(id_M) or int(state["evicted"]) < 0:
        raise ValueError(f"{where}: the hand must lie in 0..{len(id_M) - 1} and the evicted count at or above 0: "
                         f"got {int(state['hand'])} and {int(state['evicted'])}")
    live_M = id_M >= 0
    if id_M.max() >= int(state["next_id"]) or min(int(state[name]) for name in COUNTERS) < 0:
        raise ValueError(f"{where}: next_id must exceed every id, and counters be at or above 0")
    if len(np.unique(id_M[live_M])) != live_M.sum():
        raise ValueError(f"{where}: an id must not occur twice")
    if (virtual_shard_of(id_M[live_M], virtual_shards) != shard).any():
        raise ValueError(f"{where}: every id must belong here among {virtual_shards} virtual shards")
    importance_M, namespace_M = state["importance"].numpy()[live_M], state["namespace"].numpy()[live_M]
    if (importance_M <= 0).any() or (importance_M > MAX_IMPORTANCE).any() or (namespace_M < 0).any():
        raise ValueError(f"{where}: importance must lie in (0, {MAX_IMPORTANCE}] and namespaces at or above 0")


def check_moments(outcomes: Sequence[tuple[str | None, set[tuple[int, ...]]]]) -> None:
    """Raises ValueError if any rank has a problem, or the states that all ranks hold differ in their `COUNTERS`.

    Args:
        outcomes: of every rank, its problem and the counters of its states.
    """
    problems = [problem for problem, _ in outcomes if problem]
    if problems:
        raise ValueError("; ".join(problems))
    moments = set().union(*(some for _, some in outcomes))
    if len(moments) != 1:
        raise ValueError(f"all virtual shards must agree in {COUNTERS}: got {sorted(moments)}")


def digest_of(state: Mapping[str, Tensor]) -> bytes:
    """blake2b over the names, dtypes, shapes and bytes of a state, by name."""
    digest = hashlib.blake2b(digest_size=32)
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()
