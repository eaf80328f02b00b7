"""`LMCODE`: the language model together with its memories, as users know it.

The joint between two packages that do not know each other: `model/` (a plain module that asks a retriever) and `memory/`
(banks that know no model). Everything public about a model with memory is reached from here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmcode.backbone import Backbone
from lmcode.config import ConfigError, LMCODEConfig, MemoryConfig
from lmcode.data.tokenizer import check_vocab
from lmcode.dist import Group, check_same, on_rank_0
from lmcode.memories.experiences import Namespace, is_number_of_a_name, namespace_number
from lmcode.memories.files import prepare_search
from lmcode.model.generation.generate import Generation, Prompts, generate
from lmcode.model.generation.sampling import Decoding
from lmcode.model.lm import LMCODEOutput, MemoryLM, memory_shapes
from lmcode.model.state import StreamState
from lmcode.presets import load_run_config
from lmcode.protocol import EntryShape
from lmcode.saved import checkpoint, pretrained
from lmcode.saved.places import is_run_or_checkpoint


class LMCODE(MemoryLM, Backbone):  # type: ignore[misc]  # its forward takes its own kind of state, and a cache
    """A `MemoryLM` that owns one bank per memory layer, sliced over the ranks of `group`.

    Args:
        config: shape of the model; `long_term_memory_slots` = 0 leaves the banks out (the read keeps its local part).
        memory: how the banks store, search and exchange: see `Memories`.
        group: the ranks that share the banks; this process alone by default.
        device: where the banks' rows live; the CPU by default.
    """

    def __init__(self, config: LMCODEConfig, *, memory: MemoryConfig | None = None, group: Group | None = None,
                 device: torch.device | str = "cpu") -> None:
        if config.recipe is not None:
            raise ConfigError(f"these settings are of the backbone '{config.backbone}' with the recipe '{config.recipe}': "
                              "open them by lmcode.opening.open_model, or by a command")
        self.begin(config, memory, group=group, device=device)
        super().__init__(config, self.memories.banks)

    @classmethod
    def memory_shapes(cls, config: LMCODEConfig) -> dict[int, EntryShape]:
        return memory_shapes(config)

    def learned_numbers(self, layer: int) -> dict[str, list[float]]:
        """See `Backbone.learned_numbers`; lists are empty where ZeRO-3 holds the weights elsewhere."""
        temperature_H, bias_H, null_H = (self.get_parameter(f"layers.{layer}.long_term_read.{name}").detach()
                                         for name in ("log_temperature_H", "retrieved_bias_H", "null_logit_H"))
        return {"temperature": temperature_H.exp().tolist(), "bias": bias_H.tolist(), "null": null_H.tolist()}

    def resize_token_embeddings(self, vocab_size: int) -> torch.nn.Embedding:
        """See `MemoryLM.resize_token_embeddings`; it is refused, too, where the tokenizer has more ids."""
        if self.tokenizer is not None:
            check_vocab(self.tokenizer, vocab_size)
        return super().resize_token_embeddings(vocab_size)

    def generate(self, input_ids: Prompts, max_length: int | None = None, temperature: float = 0.8, top_k: int = 50,
                 top_p: float = 0.9, *, max_new_tokens: int | None = None, repetition_penalty: float = 1.0,
                 no_repeat_ngram_size: int = 0, eos_id: int | None = None, seed: int | None = None,
                 attention_mask: Tensor | None = None, namespace: Namespace | Sequence[Namespace] | Tensor | None = None,
                 write_memory: bool = False, step: int = 0, state: StreamState | None = None, return_state: bool = False,
                 use_cache: bool = True, on_token: Callable[[Tensor], None] | None = None) -> Tensor | Generation:
        """Continues every prompt, reading the memories; a collective of the banks' group.

        All ranks pass the same arguments, get the same tokens (those that rank 0 draws) and stop together.

        Args:
            input_ids: integer [B, T], or a list of lists of ids, which may differ in length.
            max_length: tokens of the result, prompt included; or give `max_new_tokens`; 128 new ones without either.
            temperature, top_k, top_p, repetition_penalty, no_repeat_ngram_size, eos_id, seed: see `Decoding`.
            attention_mask: bool or 0/1 [B, T], 0 at padding, which must lead.
            namespace: the document that the streams, all of them or each, read (with the memory scope "document") and
                write, as a number or as the name that experiences were stored under ("visit:N" for what training read, see
                `namespace_number`); stream b's is b when None. A number under which nothing is stored finds nothing.
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
            ValueError: for arguments out of range; a name under which nothing is stored; `write_memory` without a namespace
                or without a bank; ranks that were given different arguments.
        """
        self._check_same("generate", input_ids, max_length, temperature, top_k, top_p, max_new_tokens, repetition_penalty,
                         no_repeat_ngram_size, eos_id, seed, attention_mask, namespace, write_memory, step, state is None,
                         return_state, use_cache)
        decoding = Decoding(max_length=max_length, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k,
                            top_p=top_p, repetition_penalty=repetition_penalty, eos_id=eos_id, seed=seed,
                            no_repeat_ngram_size=no_repeat_ngram_size)
        if not isinstance(input_ids, Tensor | Sequence) or isinstance(input_ids, Tensor) and input_ids.dim() == 0:
            raise ValueError(f"prompts must be integer ids [B, T] or a list of lists of ids: got {input_ids!r:.60}")
        namespace_B = self._namespaces(namespace, len(input_ids))
        if write_memory and (not self.banks or namespace_B is None):
            raise ValueError("write_memory needs a bank and a namespace to write under: got "
                             f"{len(self.banks)} banks and namespace={namespace}")
        if self.banks and not write_memory:
            self._check_known(namespace)

        def commit(output: LMCODEOutput) -> None:  # all ranks read the same text
            self.memories.commit_once(output.memory, step=step)

        done = generate(self, input_ids, decoding, attention_mask=attention_mask,
                        namespace_B=namespace_B, state=state, use_cache=use_cache, on_token=on_token,
                        finish=return_state or write_memory, commit=commit if write_memory else None,
                        agree=lambda token_B: self.group.all_gather(token_B, phase="tokens")[:len(token_B)])
        return done if return_state else done.tokens_BT

    def write_on(self, prompts: Prompts, decoding: Decoding, *, window: int, commit: Callable[[LMCODEOutput], None],
                 agree: Callable[[Tensor], Tensor]) -> Generation:
        return generate(self, prompts, decoding, window=window, commit=commit, agree=agree)

    def save_pretrained(self, save_directory: str | Path, *, include_memory: bool = True) -> None:
        """Writes the model's files into a folder, all of them or none; those of the model that was saved there before are
        replaced, and all other files stay as they are.

        Args:
            save_directory: the same on every rank, on a file system that all ranks share. A link to a folder is followed.
            include_memory: banks and experiences too. They can hold what the model has read, word for word.

        Raises:
            ConfigError: on every rank, if the folder has another program's config.json, or a file under another of the names
                in `saved.pretrained` that was not saved here or has been changed since (a README.md is kept instead); if a
                weight is not finite; if the file system refuses. What was there is as it was.
        """
        check_same(self.group, "save_pretrained", str(save_directory), include_memory)
        pretrained.write(self, Path(save_directory).absolute(), include_memory=include_memory)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *, include_memory: bool = True,
                        group: Group | None = None, device: torch.device | str = "cpu", revision: str | None = None,
                        cache_dir: str | Path | None = None, force_download: bool = False,
                        local_files_only: bool = False, token: str | bool | None = None) -> LMCODE:
        """Loads what `save_pretrained` or a training job wrote, in eval mode. A collective of `group`.

        With memory.tier=hnsw graphs are taken from beside the folder, if they are kept there, or begun.

        Args:
            pretrained_model_name_or_path: the folder of a saved model, a run or a checkpoint, or the name of a repository of
                the Hugging Face hub.
            include_memory: the memory too, if the folder holds it; otherwise it is empty.
            group: the ranks that share the banks, `Group.world()` in a job of several; this process alone by default.
            device: where weights and banks go.
            revision, cache_dir, force_download, local_files_only, token: of the download.

        Raises:
            ConfigError: on every rank: what is missing, damaged, or does not fit; the message names the file.
        """
        group = group or Group()
        check_same(group, "from_pretrained", include_memory)
        name = Path(pretrained_model_name_or_path)
        if on_rank_0(group, lambda: is_run_or_checkpoint(name)):
            folder = on_rank_0(group, lambda: checkpoint.find(name))
            config = load_run_config(folder / "config.yaml")
            model = checkpoint.read_model(folder, cls, config, group=group, device=device, memory=include_memory).eval()
            prepare_search(folder, model.memories)
            return model
        folder = pretrained.find(pretrained_model_name_or_path, group, revision=revision, cache_dir=cache_dir, token=token,
                                 force_download=force_download, local_files_only=local_files_only)
        model = pretrained.read(folder, cls, include_memory=include_memory, group=group, device=device)
        prepare_search(folder, model.memories)
        return model

    def push_to_hub(self, repo_id: str, *, include_memory: bool = True, private: bool | None = None,
                    token: str | None = None, commit_message: str | None = None) -> str:
        """Saves the model in a temporary folder, which rank 0 uploads; returns the commit's address.
        See `save_pretrained`."""
        check_same(self.group, "push_to_hub", repo_id, include_memory)
        return pretrained.push(self, repo_id, include_memory=include_memory, private=private, token=token,
                               commit_message=commit_message)

    def _namespaces(self, namespace: Namespace | Sequence[Namespace] | Tensor | None, num_streams: int) -> Tensor | None:
        """A namespace for each stream, on the model's device."""
        if namespace is None:
            return None
        given: Any = namespace.tolist() if isinstance(namespace, Tensor) else namespace
        alone = isinstance(given, str) or not isinstance(given, Sequence)
        numbers = [one if is_number_of_a_name(one) else namespace_number(one)
                   for one in ([given] if alone else given)]
        namespace_B = torch.tensor(numbers, dtype=torch.int64, device=self.embedding.weight.device)
        return namespace_B.expand(num_streams) if alone else namespace_B

    def _check_known(self, namespace: Namespace | Sequence[Namespace] | Tensor | None) -> None:
        """Refuses the name of a namespace in which there is nothing. A collective."""
        for name in [namespace] if isinstance(namespace, str) else namespace if isinstance(namespace, Sequence) else ():
            if isinstance(name, str):
                number = np.array([namespace_number(name)])
                here = sum(len(bank.shard.ledger.slots_of_namespaces(number)) for bank in self.banks.values())
                if not any(self.group.all_gather_object(here)):  # what `generate` wrote is no experience
                    self.experiences.known(name)
