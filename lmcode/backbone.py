"""What everything around a language model with memories asks of it: training, evaluation, saving, reports, commands.

The one thing to know: nobody above this file names a class of model, but `opening`, which makes one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from lmcode.config import LMCODEConfig, MemoryConfig
from lmcode.dist import Group
from lmcode.memories.experiences import Experiences
from lmcode.memories.memories import Memories
from lmcode.memory.bank import LongTermMemory
from lmcode.protocol import Retriever


class Backbone(nn.Module):
    """A module that reads what `memories` hold. A subclass sets `config` and `memories`, and has what is abstract here.

    The memories are plain attributes, neither parameters nor buffers: `state_dict`, casts and ZeRO leave them alone.
    """

    config: LMCODEConfig
    memories: Memories
    tokenizer: Any
    activation_checkpointing: bool
    replay: Any
    masters: Callable[[nn.Parameter], Tensor] | None

    @abstractmethod
    def set_retrievers(self, retrievers: Mapping[int, Retriever]) -> None:
        """Gives layers their retrievers; those left out find nothing from now on."""

    @abstractmethod
    def reading_from(self, retrievers: Mapping[int, Retriever]) -> AbstractContextManager[None]:
        """Reads from `retrievers` inside the `with` block ({}: from nothing) and from the former ones after it."""

    @abstractmethod
    def blank_state(self, num_streams: int, *, device: torch.device | None = None) -> Any:
        """What streams carry from window to window before they start."""

    @abstractmethod
    def generate(self, *args: Any, **settings: Any) -> Any:
        """Continues prompts: see `LMCODE.generate`, as for all that follows."""

    @abstractmethod
    def store_experience(self, *args: Any, **settings: Any) -> Any:
        """Remembers texts; their ids."""

    @abstractmethod
    def query_memory(self, *args: Any, **settings: Any) -> Any:
        """Finds experiences by what they say."""

    @abstractmethod
    def inspect_experience(self, id: int) -> dict[str, Any]:
        """Everything about one experience."""

    @abstractmethod
    def delete_experiences(self, *args: Any, **settings: Any) -> Any:
        """Removes experiences, for good; how much that was."""

    @abstractmethod
    def save_pretrained(self, *args: Any, **settings: Any) -> Any:
        """Writes the model into a folder."""

    @property
    def banks(self) -> dict[int, LongTermMemory]:
        """The long-term memories by layer, ascending."""
        return self.memories.banks

    @property
    def group(self) -> Group:
        """The ranks that share the banks."""
        return self.memories.group

    @property
    def memory_config(self) -> MemoryConfig:
        """How the banks store, search and exchange."""
        return self.memories.memory_config

    @property
    def experiences(self) -> Experiences:
        """The experience bank with its texts."""
        return self.memories.experiences

    @property
    def has_experiences(self) -> bool:
        """Whether anything was ever stored; the same on every rank."""
        return self.memories.has_experiences

    def reshard_memory(self, virtual_shards: int, *, slots: int | None = None, experience_slots: int | None = None) -> int:
        """Moves all that the model remembers to another number of virtual shards or slots: see `Memories.reshard`."""
        count = self.memories.reshard(virtual_shards, slots=slots, experience_slots=experience_slots)
        self.config = self.memories.config
        self.set_retrievers(self.banks)
        return count

    def share(self, group: Group, device: torch.device) -> None:
        """Gives all ranks of `group` the weights of rank 0 and spreads the banks over them. A collective.

        Raises:
            ConfigError: see `Memories.move`.
        """
        if group.size > 1:
            for parameter in self.parameters():
                mine = parameter.data if group.rank == 0 else torch.zeros_like(parameter.data)
                parameter.data = group.all_reduce(mine, phase="weights")
        if self.memories.move(group, device):
            self.set_retrievers(self.banks)
