"""`LMCODE`: the language model together with its banks, as users know it.

The joint between two packages that do not know each other: `model/` (a plain module that asks a retriever) and `memory/`
(banks that know no model). Everything public about a model with memory is reached from here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lmcode.config import LMCODEConfig, MemoryConfig
from lmcode.dist import Group
from lmcode.memory.bank import LongTermMemory
from lmcode.model.generate import Generation, Prompts, generate
from lmcode.model.lm import LMCODEOutput, MemoryLM, StreamState
from lmcode.model.sampling import Decoding


class LMCODE(MemoryLM):
    """A `MemoryLM` that owns one bank per memory layer, sliced over the ranks of `group`.

    Args:
        config: shape of the model; `long_term_memory_slots` = 0 leaves the banks out (the read keeps its local part).
        memory: how the banks store, search and exchange.
        group: the ranks that share the banks; this process alone by default.
        device: where the banks' rows live; the CPU by default.

    The banks are plain attributes, neither parameters nor buffers: `state_dict`, casts and ZeRO leave them alone.
    """

    def __init__(self, config: LMCODEConfig, *, memory: MemoryConfig | None = None, group: Group | None = None,
                 device: torch.device | str = "cpu") -> None:
        self.memory_config = memory or MemoryConfig()
        self.group = group or Group()
        banks = {}
        if config.long_term_memory_slots:
            for layer in config.memory_layer_indices:
                banks[layer] = LongTermMemory(
                    heads=config.memory_heads, head_dim=config.memory_head_dim, slots=config.long_term_memory_slots,
                    top_k=config.memory_top_k, config=self.memory_config, group=self.group,
                    device=torch.device(device))
        super().__init__(config, banks)
        self.banks: dict[int, LongTermMemory] = banks

    def generate(self, input_ids: Prompts, max_length: int | None = None, temperature: float = 0.8, top_k: int = 50,
                 top_p: float = 0.9, *, max_new_tokens: int | None = None, repetition_penalty: float = 1.0,
                 no_repeat_ngram_size: int = 0, eos_id: int | None = None, seed: int | None = None,
                 attention_mask: Tensor | None = None, namespace: int | Sequence[int] | Tensor | None = None,
                 write_memory: bool = False, step: int = 0, state: StreamState | None = None, return_state: bool = False,
                 use_cache: bool = True, on_token: Callable[[Tensor], None] | None = None) -> Tensor | Generation:
        """Continues every prompt, reading the memories; a collective of the banks' group.

        All ranks pass the same arguments, get the same tokens (those that rank 0 draws) and stop together.

        Args:
            input_ids: integer [B, T], or a list of lists of ids, which may differ in length.
            max_length: tokens of the result, prompt included; or give `max_new_tokens`; 128 new ones without either.
            temperature, top_k, top_p, repetition_penalty, no_repeat_ngram_size, eos_id, seed: see `Decoding`.
            attention_mask: bool or 0/1 [B, T], 0 at padding, which must lead.
            namespace: the document that the streams, all of them or each, read (with the memory scope "document") and write;
                stream b is in namespace b when None.
            write_memory: store in the banks, under `namespace`, what is read and produced: each window of `context_length`
                tokens when it is full, the last ones at the end. Reading alone changes nothing in a bank.
            step: recorded as the step in which these entries were written.
            state: short-term memory carried over from an earlier call, whose texts the prompts continue.
            return_state: return a `Generation`, whose state the next call can take.
            use_cache: False computes the whole window anew for every token; the tokens are the same.
            on_token: called with every step's tokens, int64 [B], as soon as they are chosen.

        Returns:
            int64 [B, T + new tokens], prompts included and padded with `eos_id` where a stream ended early; or a
            `Generation` with these tokens, the mask of padding and the state.

        Raises:
            ValueError: for arguments out of range; `write_memory` without a namespace or without a bank; ranks that were
                given different prompts.
        """
        decoding = Decoding(max_length=max_length, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k,
                            top_p=top_p, repetition_penalty=repetition_penalty, eos_id=eos_id, seed=seed,
                            no_repeat_ngram_size=no_repeat_ngram_size)
        namespace_B = self._namespaces(namespace, len(input_ids))
        if write_memory and (not self.banks or namespace_B is None or bool((namespace_B < 0).any())):
            raise ValueError("write_memory needs a bank and a namespace >= 0 to write under: got "
                             f"{len(self.banks)} banks and namespace={namespace}")
        self._check_same_everywhere(input_ids, decoding)

        def commit(output: LMCODEOutput) -> None:
            for layer, bank in self.banks.items():
                candidates = output.memory[layer].candidates
                mine_N = candidates.valid_N & (self.group.rank == 0)  # all ranks read the same text: write it once
                bank.commit([candidates._replace(valid_N=mine_N)], [], step=step)

        done = generate(self, input_ids, decoding, attention_mask=attention_mask,
                        namespace_B=namespace_B, state=state, use_cache=use_cache, on_token=on_token,
                        finish=return_state or write_memory, commit=commit if write_memory else None,
                        agree=lambda token_B: self.group.all_gather(token_B, phase="tokens")[:len(token_B)])
        return done if return_state else done.tokens_BT

    def _namespaces(self, namespace: int | Sequence[int] | Tensor | None, num_streams: int) -> Tensor | None:
        """A namespace for each stream, on the model's device."""
        if namespace is None:
            return None
        namespace_B = torch.as_tensor(namespace, dtype=torch.int64, device=self.embedding.weight.device)
        return namespace_B.expand(num_streams) if namespace_B.dim() == 0 else namespace_B

    def _check_same_everywhere(self, input_ids: Prompts, decoding: Decoding) -> None:
        """Refuses, on all ranks, what would let ranks make different passes and wait for each other for ever."""
        ids = input_ids.tolist() if isinstance(input_ids, Tensor) else input_ids
        if any(other != (ids, decoding) for other in self.group.all_gather_object((ids, decoding))):
            raise ValueError("generate is a collective: all ranks must pass the same prompts and settings")
