"""What everything around a language model with memories asks of it: training, evaluation, saving, reports, commands.

The one thing to know: nobody above this file names a class of model, but `opening`, which makes one. A new kind of model is
a subclass that has what is abstract here; everything else comes with it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lmcode.config import LMCODEConfig, MemoryConfig
from lmcode.data.streams import Batch
from lmcode.data.tokenizer import MIN_BPE_VOCAB, ByteTokenizer
from lmcode.dist import Group
from lmcode.memories.memories import Memories
from lmcode.memories.remembering import Remembering, Spans
from lmcode.model.generation.generate import Generation, Prompts
from lmcode.model.generation.sampling import Decoding
from lmcode.protocol import EntryShape, Output, Retriever, State


def forward_batch(call: Callable[..., Output], batch: Batch, state: State | None = None) -> Output:
    """Runs a backbone over a batch: its streams read their windows, each from its part of `state`.

    Args:
        call: the module itself, or the engine's `forward`, which wraps it.
        state: what the streams carry from their last window; None where all start.
    """
    return call(batch.input_ids_BT, targets_BT=batch.targets_BT, state=state, reset_B=batch.reset_B,
                valid_BT=batch.valid_BT, **batch.reading())


def token_losses(output: Output) -> Tensor:
    """The loss of each token, nats; ValueError where the backbone returned none, though it was given targets."""
    if output.token_loss is None:
        raise ValueError("the model must return a loss of each token where it is given targets: got None")
    return output.token_loss


class Backbone(Remembering, nn.Module):
    """A module that reads what `memories` hold. A subclass calls `begin`, and has what is abstract here.

    The memories are plain attributes, neither parameters nor buffers: `state_dict`, casts and ZeRO leave them alone.

    Attributes:
        config: of the model's settings the rest uses vocab_size, context_length, retrieval_stride, successor_values,
            long_term_memory_slots and memory_top_k.
        activation_checkpointing: recompute layers in the backward pass, where the model can.
        masters: while the model is trained, and after that, what gives the fp32 weight behind a parameter, whole, on the
            CPU (a collective): in bf16, or sharded by ZeRO-3, the parameters are not what is to be saved. None otherwise.
        replay: the spans that training keeps for replay; deleting a text deletes its spans, too.
    """

    config: LMCODEConfig
    memories: Memories
    activation_checkpointing: bool = False
    masters: Callable[[nn.Parameter], Tensor] | None = None
    replay: Spans | None = None

    def begin(self, config: LMCODEConfig, memory: MemoryConfig | None = None, *, group: Group | None = None,
              device: torch.device | str = "cpu") -> None:
        """Gives the model its settings and empty memories; a subclass's `__init__`, which has these arguments, calls it.

        Args:
            memory: how the banks store, search and exchange: see `Memories`.
            group: the ranks that share the banks; this process alone by default.
            device: where the banks' rows live; the CPU by default.
        """
        self.config = config
        self.memories = Memories(config, self.memory_shapes(config), memory, group=group, device=device)
        self._tokenizer = ByteTokenizer() if config.vocab_size >= MIN_BPE_VOCAB else None

    @classmethod
    @abstractmethod
    def memory_shapes(cls, config: LMCODEConfig) -> dict[int, EntryShape]:
        """The layers that read a long-term memory under these settings, and the entries of each."""

    @abstractmethod
    def forward(self, input_ids: Tensor, labels: Tensor | None = None, *, targets_BT: Tensor | None = None,
                state: State | None = None, reset_B: Tensor | None = None, namespace_B: Tensor | None = None,
                document_B: Tensor | None = None, valid_BT: Tensor | None = None,
                piece_BT: Tensor | None = None) -> Output:
        """Reads one window of each stream, and writes nothing: see `Batch` for the arguments."""

    @abstractmethod
    def set_retrievers(self, retrievers: Mapping[int, Retriever]) -> None:
        """Gives layers their retrievers; those left out find nothing from now on."""

    @abstractmethod
    def reading_from(self, retrievers: Mapping[int, Retriever]) -> AbstractContextManager[None]:
        """Reads from `retrievers` inside the `with` block ({}: from nothing) and from the former ones after it."""

    @abstractmethod
    def blank_state(self, num_streams: int, *, device: torch.device | None = None) -> State:
        """What streams carry from window to window before they start."""

    @abstractmethod
    def generate(self, input_ids: Prompts, *settings: Any, **named: Any) -> Tensor | Generation:
        """Continues prompts as the commands ask: see `LMCODE.generate`. A collective."""

    @abstractmethod
    def write_on(self, prompts: Prompts, decoding: Decoding, *, window: int, commit: Callable[[Output], None],
                 agree: Callable[[Tensor], Tensor]) -> Generation:
        """Continues prompts, and gives each window that was read or written to `commit`, for callers with memories of their
        own: see `model.generation.generate`. A collective."""

    @abstractmethod
    def save_pretrained(self, *args: Any, **settings: Any) -> Any:
        """Writes the model as a folder that other people load: see `LMCODE.save_pretrained`."""

    def storing(self) -> AbstractContextManager[None]:
        """Inside the block texts are read in order to be stored: all of a window is offered at once."""
        return nullcontext()

    def kept_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that are saved with the model; the others come from elsewhere."""
        return self.named_parameters()

    @property
    def offers_by_token(self) -> bool:
        """Whether a window's candidates are one for each of its tokens, in their order."""
        return True

    def identity(self) -> dict[str, Any] | None:
        """What else the model is made of, as JSON: its memories belong to that alone. None: it is all here."""
        return None

    def check_identity(self, saved: Mapping[str, Any]) -> None:
        """Refuses, by ConfigError, memories and weights that were made beside something else."""

    @property
    def memory_layers(self) -> tuple[int, ...]:
        """The layers that read a long-term memory, ascending."""
        return tuple(sorted(self.memory_shapes(self.config)))

    def learned_numbers(self, layer: int) -> dict[str, list[float]]:
        """What the read of a memory layer has learned, by head: "temperature", "bias" on hits and "null" logit, for reports.
        Empty where the model has no such read."""
        return {}

    @property
    def memory_config(self) -> MemoryConfig:
        """How the banks store, search and exchange."""
        return self.memories.memory_config

    def reshard_memory(self, virtual_shards: int, *, slots: int | None = None, experience_slots: int | None = None) -> int:
        """Moves all that the model remembers to another number of virtual shards or slots: see `Memories.reshard`."""
        count = self.memories.reshard(virtual_shards, slots=slots, experience_slots=experience_slots)
        self.config = self.memories.config
        self.set_retrievers(self.banks)
        return count

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Backbone:
        """What torch calls for `to`, `cuda`, `half` and the like: banks and experiences go where the weights go."""
        before = [parameter.device for parameter in self.parameters()][:1]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's own is not annotated
        after = [parameter.device for parameter in self.parameters()][:1]
        if before != after and after != [self.memories.device]:
            self.memories.to(after[0])
            self.set_retrievers(self.banks)
        return self

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
