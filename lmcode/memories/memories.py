"""`Memories`: all that one model remembers, the banks of its layers and the experiences together.

The one thing to know: it knows no model. Whoever has one reads through `banks` (each is a `Retriever`) and hands back what
the reads found and offer; what concerns all layers alike is done here, once. Methods that say so are collectives of
`group`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lmcode.config import ConfigError, LMCODEConfig, MemoryConfig, build
from lmcode.dist import Group
from lmcode.memories.experiences import VISITS, Experiences
from lmcode.memories.resharding import empty_like, move, move_experiences, refuse_too_small, wanted_slots
from lmcode.memory import lifecycle
from lmcode.memory.bank import LongTermMemory
from lmcode.protocol import ConsolidationReport, EntryShape, LayerMemory

log = logging.getLogger("lmcode")


class Memories:
    """One bank per memory layer, sliced over the ranks of `group`, and the texts that were stored.

    Args:
        config: settings of the model; `long_term_memory_slots` = 0 leaves the banks out.
        shapes: the entries of each memory layer: see `Backbone.memory_shapes`.
        memory: how the banks store, search and exchange. Memory groups (`group_size`) that do not share out the ranks become
            one, with a warning: what they were trained with can be opened anywhere.
        group: the ranks that share the banks; this process alone by default.
        device: where the banks' rows live.

    Attributes:
        banks: by the number of the layer, ascending.

    Raises:
        ConfigError: for keys and values of different widths, which a bank does not store.
    """

    def __init__(self, config: LMCODEConfig, shapes: Mapping[int, EntryShape], memory: MemoryConfig | None = None, *,
                 group: Group | None = None, device: torch.device | str = "cpu") -> None:
        self.config, self.memory_config = config, memory or MemoryConfig()
        self.group, self.device = group or Group(), torch.device(device)
        if self.group.size % max(1, self.memory_config.group_size) and self.group.size > 1:
            log.warning("memory groups of %d ranks do not share out %d: all are one group", self.memory_config.group_size,
                        self.group.size)
        for layer, shape in shapes.items():
            if shape.key_width != shape.value_width:
                raise ConfigError(f"a bank's keys and values must have one width: those of layer {layer} have "
                                  f"{shape.key_width} and {shape.value_width}")
        self.banks: dict[int, LongTermMemory] = {
            layer: LongTermMemory(heads=shape.heads, head_dim=shape.key_width, slots=config.long_term_memory_slots,
                                  top_k=config.memory_top_k, group=self.group, config=self.memory_config,
                                  device=self.device)
            for layer, shape in sorted(shapes.items()) if config.long_term_memory_slots}
        self._experiences: Experiences | None = None

    # Experiences

    @property
    def experiences(self) -> Experiences:
        """The experience bank with its texts; made when it is first needed."""
        if self._experiences is None:
            self._experiences = self.new_experiences()
        return self._experiences

    @experiences.setter
    def experiences(self, experiences: Experiences) -> None:
        self._experiences = experiences

    @property
    def has_experiences(self) -> bool:
        """Whether anything was ever stored (and hence ids given out); the same on every rank."""
        return self._experiences is not None and self._experiences.bank.next_id > 0

    def new_experiences(self) -> Experiences:
        """An empty experience bank that fits this model."""
        return Experiences(self.config, self.memory_config, group=self.group, device=self.device)

    # Writing

    def commit(self, reads: Mapping[int, Sequence[LayerMemory]], *, step: int) -> None:
        """Writes into every bank what some reads offer, and books the hits they had. Collective.

        Args:
            reads: by layer, one for each micro-batch of this rank.
        """
        for layer, bank in self.banks.items():
            bank.commit([read.candidates for read in reads[layer]], [read.hits for read in reads[layer]], step=step)

    def commit_once(self, memory: Mapping[int, LayerMemory], *, step: int) -> None:
        """Writes what a read offers that all ranks have made alike: once, not once a rank; books no hits. Collective."""
        for layer, bank in self.banks.items():
            candidates = memory[layer].candidates
            bank.commit([candidates._replace(valid_N=candidates.valid_N & (self.group.rank == 0))], [], step=step)

    def consolidate(self, threshold: float) -> dict[int, ConsolidationReport]:
        """Merges similar entries of every bank: see `LongTermMemory.consolidate`. Collective."""
        return {layer: bank.consolidate(threshold) for layer, bank in self.banks.items()}

    def free_visit(self) -> int:
        """The first namespace of `VISITS` beyond those of all entries. Collective."""
        mine = VISITS
        for bank in self.banks.values():
            columns = bank.shard.columns
            mine = max(mine, 1 + int(columns["namespace"][columns["id"] >= 0].max(initial=-1)))
        visits: list[int] = self.group.all_gather_object(mine)
        return max(visits)

    # Copies, other ranks, other layouts

    def fork(self, *, slots: int | None = None) -> dict[int, LongTermMemory]:
        """Independent banks, for what must leave these as they are: empty when reads see their own document only, copies
        otherwise.

        Args:
            slots: of an empty one; as many as now when None.
        """
        return fork_banks(self.banks, slots)

    def move(self, group: Group, device: torch.device) -> bool:
        """Spreads the banks over all ranks of `group`; whether anything changed. Collective.

        Raises:
            ConfigError: banks that differ between ranks, more ranks than virtual shards, experiences that are not spread
                yet.
        """
        if self.group.size == group.size and all(bank.device == device for bank in self.banks.values()):
            return False
        if self.group.size not in (1, group.size):
            raise ConfigError(f"the model's banks lie on {self.group.size} ranks and the job has {group.size}")
        if self.group.size != group.size and self.has_experiences:
            raise ConfigError("experiences were stored before the ranks joined: make the model with group=Group.world(), or "
                              "the trainer before storing")
        hashes = group.all_gather_object([bank.content_hash() for bank in self.banks.values()])
        if self.group.size != group.size and any(one != hashes[0] for one in hashes):
            raise ConfigError("every rank must hold the same entries before they are spread over the ranks: these differ")
        self.banks = {layer: _on_ranks(bank, group, device) for layer, bank in self.banks.items()}
        self.group = group
        return True

    def to(self, device: torch.device) -> None:
        """Moves everything to another device; the ranks stay the same, and nothing travels between them.

        Raises:
            ConfigError: if a search tier cannot search there.
        """
        self.banks = {layer: _on_ranks(bank, self.group, device) for layer, bank in self.banks.items()}
        if self._experiences is not None:
            self._experiences.bank = _on_ranks(self._experiences.bank, self.group, device)
        self.device = device

    def reshard(self, virtual_shards: int, *, slots: int | None = None, experience_slots: int | None = None) -> int:
        """Moves everything to another number of virtual shards or slots; returns how many entries that are. Collective.

        Ids, vectors and columns stay as they are, and every search finds the same. From then on `config` and
        `memory_config` say the new numbers.

        Args:
            slots: of each layer's bank (`model.long_term_memory_slots`); as many as now when None.
            experience_slots: of the experiences (`memory.experience_slots`); as many as now when None.

        Raises:
            ConfigError: on every rank, if there is no bank, there are fewer slots than virtual shards or hits wanted, fewer
                virtual shards than ranks, or an entry would be without a slot (the message says how many slots would do).
                Nothing has changed then.
        """
        if not self.banks:
            raise ConfigError("a model without a long-term memory has nothing to reshard: long_term_memory_slots = "
                              f"{self.config.long_term_memory_slots}, memory_layers = {self.config.memory_layers}")
        slots, experience_slots = wanted_slots(self.config, self.memory_config, virtual_shards, slots=slots,
                                               experience_slots=experience_slots)
        experiences = self.experiences if self.has_experiences else None
        refuse_too_small(self.banks, experiences, virtual_shards, slots=slots, experience_slots=experience_slots)
        config = build(LMCODEConfig, {**self.config.model_dump(), "long_term_memory_slots": slots})
        memory = build(MemoryConfig, {**self.memory_config.model_dump(), "virtual_shards": virtual_shards,
                                      "experience_slots": experience_slots})
        banks, empty = empty_like(self.banks, config, memory, group=self.group)
        for layer, bank in banks.items():
            move(self.banks[layer], bank)
        if experiences:
            move_experiences(experiences, empty)
        self.config, self.memory_config, self.banks, self.experiences = config, memory, banks, empty
        return sum(bank.stats()["live"] for bank in [*banks.values(), empty.bank])

    def stats(self) -> dict[int, dict[str, Any]]:
        """`LongTermMemory.stats` of every layer's bank. Collective."""
        return {layer: bank.stats() for layer, bank in self.banks.items()}


def fork_banks(banks: Mapping[int, LongTermMemory], slots: int | None = None) -> dict[int, LongTermMemory]:
    """See `Memories.fork`."""
    return {layer: lifecycle.fork(bank, empty=bank.config.scope == "document", slots=slots) for layer, bank in banks.items()}


def _on_ranks(bank: LongTermMemory, group: Group, device: torch.device) -> LongTermMemory:
    """This rank's part, on `device`, of a bank that it holds whole (or in the same part)."""
    other = lifecycle.like(bank, group=group, device=device)
    for shard in other.owned:
        other.load(shard, bank.state(shard))
    return other
