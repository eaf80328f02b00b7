"""The memory of a model on disk: a folder for each bank and one for the experiences, one file per virtual shard and kind.

`memory_parts` copies what a rank holds and returns how to write it, so that a checkpoint can be written while training
goes on; `save_memory` writes it at once. Together the ranks write all of it, and any number of ranks loads it.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from torch import Tensor

from lmcode.config import ConfigError
from lmcode.dist import raise_together
from lmcode.files.durable import Parts
from lmcode.memories.experience_files import experience_parts, load_experiences
from lmcode.memories.experiences import name_documents
from lmcode.memories.memories import Memories
from lmcode.memory import planning
from lmcode.memory.bank import LongTermMemory
from lmcode.memory.search.graphs import remove_graphs
from lmcode.memory.search.plan import first_plan, load_plan, save_plan
from lmcode.memory.store import load_bank, save_shard, shard_file

BANKS, EXPERIENCES, PLAN = "banks", "experiences", "search.safetensors"


def bank_folder(layer: int) -> str:
    """Where the bank of a layer lies."""
    return f"{BANKS}/layer-{layer:02d}"


def memory_folders(memories: Memories) -> list[str]:
    """The folders that the memory's files go into."""
    return [*map(bank_folder, memories.banks), *([EXPERIENCES] if memories.has_experiences else [])]


def make_folders(folder: Path, memories: Memories) -> None:
    """Makes the folders that the memory's files go into."""
    for name in memory_folders(memories):
        (folder / name).mkdir(parents=True)


def memory_parts(memories: Memories) -> Parts:
    """The files that this rank writes of all banks and experiences, by path; each holds a copy of what goes into it."""
    parts: Parts = {}
    for layer, bank in memories.banks.items():
        parts.update({shard_file(bank_folder(layer), shard).as_posix(): partial(save_shard, state=on_host(bank.state(shard)))
                      for shard in bank.to_save})
        if bank.plan.centroid_HXD is not None and memories.group.rank == 0:
            parts[f"{bank_folder(layer)}/{PLAN}"] = partial(save_plan, plan=bank.plan)
    if memories.has_experiences:
        parts.update({f"{EXPERIENCES}/{name}": write for name, write in experience_parts(memories.experiences).items()})
    return parts


def load_plan_of(bank: LongTermMemory, path: Path) -> None:
    """Gives a bank the plan that was saved with it; where there is none, what an empty bank has. A collective.

    Raises:
        ConfigError: on every rank, if it is refused.
    """
    plan, problem = first_plan(bank.config.tier), None
    try:
        if path.exists() and bank.config.tier != "hnsw":  # another tier's
            plan = load_plan(path, heads=bank.heads, head_dim=bank.head_dim)
    except ValueError as error:
        problem = str(error)
    raise_together(bank.group, problem)
    bank.use(plan)


def graph_folder(folder: Path, layer: int) -> Path:
    """Where the graphs of a layer's bank are kept (`memory.tier=hnsw`) that were made of what lies in the folder of a
    checkpoint or of a saved model: beside it, since they are no part of it, and one for all checkpoints of a run."""
    beside = folder.parent.parent / "graphs" if folder.parent.name == "checkpoints" else folder.with_name(
        f"{folder.name}.graphs")
    return beside / f"layer-{layer:02d}"


def prepare_search(folder: Path, memories: Memories) -> None:
    """Gives banks that were filled from a folder, and are searched approximately, what that takes and was not saved with
    them. A collective.

    Graphs are kept beside the folder, but not beside a snapshot of the hub's: that cache is not ours to write into.
    """
    ours = folder.parent.name != "snapshots"
    for layer, bank in memories.banks.items():
        planning.prepare(bank, graphs=graph_folder(folder, layer) if ours else None)


def forget_graphs(folder: Path, memories: Memories) -> None:
    """Removes the graphs that are kept beside a folder, of which something is to be gone."""
    for layer in memories.banks:
        remove_graphs(graph_folder(folder, layer))


def on_host(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state's tensors in host memory."""
    return {name: tensor.cpu() for name, tensor in state.items()}


def save_memory(folder: Path, memories: Memories) -> None:
    """Writes this rank's part of all banks and experiences; the folders must exist."""
    for name, write in memory_parts(memories).items():
        write(folder / name)


def load_memory(folder: Path, memories: Memories) -> None:
    """Fills banks and experiences from a checkpoint; one without experiences has none. A collective.

    Raises:
        ConfigError: on every rank, if a file is missing or refused.
    """
    try:
        for layer, bank in memories.banks.items():
            load_bank(folder / bank_folder(layer), bank)
            load_plan_of(bank, folder / bank_folder(layer) / PLAN)
        if memories.banks:
            experiences = memories.new_experiences()  # those that were there do not go with these banks
            if memories.group.all_gather_object((folder / EXPERIENCES).is_dir())[0]:
                load_experiences(folder / EXPERIENCES, experiences)
                name_documents(memories.banks, experiences)
            memories.experiences = experiences
    except ValueError as error:
        raise ConfigError(str(error)) from None
