"""Banks on disk: one safetensors file per virtual shard, so that any number of ranks can load what any other wrote.

    shard-00003.safetensors
      header entry "lmcode"  JSON object of integers: format (1), shard, virtual_shards, slots, hand, evicted,
                             next_id, rejected, clipped
      key, value             [H, M, D] fp32 or bf16; M slots of this virtual shard, zero in an empty one
      id, namespace, step, last_hit, hit_mass, count     [M] int64; id -1 in an empty slot
      importance             [M] fp32
      chance                 [M] bool

Refused, each with a ValueError that names the file: what is not safetensors or is cut short; a header without the
entry, of another format or with other keys; missing or additional tensors; other shapes, dtypes, numbers of slots or
virtual shards than the bank's; numbers that are not finite; ids that are repeated, not below next_id or of another
virtual shard; importance out of range; a hand outside the ring. Flipped bits can pass all this: whoever keeps the files
keeps their hashes. Scores are not stored: importance and the bank's settings give them anew. No file here is a pickle.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lmcode.files.tensors import write_tensors
from lmcode.memory import lifecycle
from lmcode.memory.entry import ADDED, EMPTY, METADATA
from lmcode.memory.states import COUNTERS

if TYPE_CHECKING:
    from lmcode.memory.bank import LongTermMemory

FORMAT = 1
NUMBERS = ("shard", "virtual_shards", "slots", "hand", "evicted", *COUNTERS)
TENSORS = ("key", "value", *METADATA)


def shard_file(folder: Path | str, shard: int) -> Path:
    """The file of a virtual shard."""
    return Path(folder) / f"shard-{shard:05d}.safetensors"


def save_shard(path: Path | str, state: dict[str, Tensor]) -> None:
    """Writes one virtual shard, a `LongTermMemory.state`. Not atomic: a commit of several files is the caller's."""
    header = {"format": FORMAT, **{name: int(state[name]) for name in NUMBERS}}
    write_tensors(path, {name: state[name] for name in TENSORS}, {"lmcode": json.dumps(header)})


def load_shard(path: Path | str) -> dict[str, Tensor]:
    """Reads what `save_shard` wrote, an earlier version's included; `LongTermMemory.load` judges the content.

    Raises:
        ValueError: if the file is missing or not of this format.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("lmcode", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a readable shard file: {error}") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"{path}: the header entry 'lmcode' must be an object of format {FORMAT}: got {header}")
    fine = {*header} == {"format", *NUMBERS} and all(type(number) is int for number in header.values())
    if not fine or max(map(abs, header.values())) >= 2**63:
        raise ValueError(f"{path}: the header entry 'lmcode' must hold the int64 numbers {NUMBERS}: got {header}")
    if "id" in tensors:
        tensors = {**{name: torch.full_like(tensors["id"], int(EMPTY[name])) for name in ADDED}, **tensors}
    if {*tensors} != {*TENSORS}:
        raise ValueError(f"{path}: tensors must be {sorted(TENSORS)}: got {sorted(tensors)}")
    return {**tensors, **{name: torch.tensor(header[name]) for name in NUMBERS}}


def save_bank(folder: Path | str, bank: LongTermMemory) -> None:
    """Writes the virtual shards `bank.to_save`; together the ranks write each once. The folder must exist."""
    for shard in bank.to_save:
        save_shard(shard_file(folder, shard), bank.state(shard))


def load_bank(folder: Path | str, bank: LongTermMemory) -> None:
    """Loads the virtual shards of this rank, whatever number of ranks saved them. Collective.

    Raises:
        ValueError: on every rank, if any rank finds a file that is missing, refused (see above) or of another moment
            than the rest; no rank's bank has changed then.
    """
    states: dict[int, dict[str, Tensor]] = {}
    problem = None
    try:
        for shard in bank.owned:
            states[shard] = load_shard(shard_file(folder, shard))
            bank.shard.check(shard, states[shard])
    except ValueError as error:
        problem = f"{shard_file(folder, shard)}: {error}" if str(folder) not in str(error) else str(error)
    try:
        lifecycle.restore(bank, states, problem)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
