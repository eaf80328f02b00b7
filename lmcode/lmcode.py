"""`LMCODE`: the language model together with its banks, as users know it.

The joint between two packages that do not know each other: `model/` (a plain module that asks a retriever) and `memory/`
(banks that know no model). Everything public about a model with memory is reached from here.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmcode.config import LMCODEConfig, MemoryConfig
from lmcode.dist import Group, check_same
from lmcode.experience.experiences import (
    Experience,
    Experiences,
    Namespace,
    Retrieved,
    delete_token_entries,
    is_number_of_a_name,
    live_token_entries,
    namespace_number,
    write_token_entries,
)
from lmcode.experience.input import Content, comparable, contents_of, experiences_of, read_content
from lmcode.memory.bank import LongTermMemory
from lmcode.model.generate import Generation, Prompts, generate
from lmcode.model.lm import LMCODEOutput, MemoryLM, StreamState
from lmcode.model.reading import read_texts
from lmcode.model.sampling import Decoding
from lmcode.saved.pretrained import Pretrained
from lmcode.tokenizer import MIN_BPE_VOCAB, ByteTokenizer, Tokenizer, as_tokenizer, check_vocab

log = logging.getLogger("lmcode")
STORED_AT_ONCE = 256  # experiences whose token entries are in memory at the same time


class LMCODE(MemoryLM, Pretrained):
    """A `MemoryLM` that owns one bank per memory layer, sliced over the ranks of `group`.

    Args:
        config: shape of the model; `long_term_memory_slots` = 0 leaves the banks out (the read keeps its local part).
        memory: how the banks store, search and exchange. Memory groups (`group_size`) that do not share out the ranks become
            one, with a warning: what they were trained with can be opened anywhere.
        group: the ranks that share the banks; this process alone by default.
        device: where the banks' rows live; the CPU by default.

    The banks are plain attributes, neither parameters nor buffers: `state_dict`, casts and ZeRO leave them alone.
    """

    def __init__(self, config: LMCODEConfig, *, memory: MemoryConfig | None = None, group: Group | None = None,
                 device: torch.device | str = "cpu") -> None:
        self.memory_config = memory or MemoryConfig()
        self.group = group or Group()
        if self.group.size % max(1, self.memory_config.group_size) and self.group.size > 1:
            log.warning("memory groups of %d ranks do not share out %d: all are one group", self.memory_config.group_size,
                        self.group.size)
        banks = {}
        if config.long_term_memory_slots:
            for layer in config.memory_layer_indices:
                banks[layer] = LongTermMemory(
                    heads=config.memory_heads, head_dim=config.memory_head_dim, slots=config.long_term_memory_slots,
                    top_k=config.memory_top_k, config=self.memory_config, group=self.group,
                    device=torch.device(device))
        super().__init__(config, banks)
        self.banks: dict[int, LongTermMemory] = banks
        self._tokenizer: Tokenizer | None = ByteTokenizer() if config.vocab_size >= MIN_BPE_VOCAB else None
        self._device = torch.device(device)
        self._experiences: Experiences | None = None

    @property
    def tokenizer(self) -> Tokenizer | None:
        """What text passes through: bytes unless another is set; None if the vocabulary is too small for bytes.

        Takes lmcode's, a `tokenizers.Tokenizer` or a Hugging Face tokenizer (a copy of it). ConfigError for anything else,
        and for a vocabulary that exceeds the model's.
        """
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        tokenizer = as_tokenizer(tokenizer)
        check_vocab(tokenizer, self.config.vocab_size)
        self._tokenizer = tokenizer

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
                write, as a number or as the name that experiences were stored under; stream b's is b when None. A number
                under which nothing is stored finds nothing.
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

    def store_experience(self, text: Content | Sequence[Content], namespace: Namespace | Sequence[Namespace] = 0,
                         importance: float | Sequence[float] = 1.0, *, stored_at: int | Sequence[int] | None = None,
                         step: int = 0) -> list[int]:
        """Remembers one text or many: for `query_memory`, verbatim, and in every layer's bank, for generation. Collective.

        Each text is read by itself, window by window if it is longer than the context, and its token entries are
        written under its namespace. When `memory.experience_slots` is full, older experiences make way, whole; ids are
        spread over virtual shards, each of which holds its share of the slots, so the first ones go a little before that.

        Args:
            text: text or a row of token ids, or a list of those; a tensor of ids [T] or [B, T].
            namespace: a number or a name; one for all, or one for each. Generation reads what is in its namespace: 0 for
                a single prompt. Documents that the model was trained on have numbers, too.
            importance: in (0, 10]; raises the score, and delays eviction from `memory.second_chance_importance` on.
            stored_at: Unix second from which the age counts; now when None.
            step: recorded in the layers' banks as the step in which the token entries were written.

        Returns:
            The ids, one for each text, also of a single one.

        Raises:
            ValueError: for empty or blank text, ids outside the vocabulary or of a wrong shape or type, a namespace or
                importance out of range, text without a tokenizer, a model without a bank, ranks that were given
                different arguments. Nothing has been stored then.
        """
        self._check_has_banks()
        self._check_same("store_experience", text, namespace, importance, stored_at, step)
        contents = contents_of(text)
        moment = self._now() if stored_at is None else stored_at
        batch, rows = experiences_of(contents, namespace=namespace, importance=importance, stored_at=moment,
                                     tokenizer=self.tokenizer, vocab_size=self.config.vocab_size)
        ids: list[int] = []
        for start in range(0, len(batch), STORED_AT_ONCE):
            part = slice(start, start + STORED_AT_ONCE)
            offered = read_texts(self, rows[part])
            entries = write_token_entries(self.banks, batch[part], offered, step=step)
            stored, gone = self.experiences.store(
                [replace(one, entries=ranges) for one, ranges in zip(batch[part], entries, strict=True)])
            delete_token_entries(self.banks, gone)
            ids += stored
        return ids

    def query_memory(self, text: Content, top_k: int = 5, namespace: Namespace | None = None
                     ) -> tuple[list[Retrieved], Tensor]:
        """The stored experiences that share most with a text, best first, and their ids, int64 [hits]. Collective.

        What is compared are words and runs of letters, not what the model makes of them: see `memory.lexical`.

        Args:
            text: text or a row of token ids.
            top_k: hits wanted, 1..2048; there are fewer if fewer are stored, none in an empty memory.
            namespace: look there only; everywhere when None.

        Raises:
            ValueError: for a bad text (as `store_experience`), `top_k` out of range, a namespace under which nothing is
                stored, a model without a bank, ranks that were given different arguments.
        """
        self._check_has_banks()
        self._check_same("query_memory", text, top_k, namespace)
        contents = contents_of(text)
        if len(contents) != 1:
            raise ValueError(f"a query is one text or one row of ids: got {len(contents)}")
        if isinstance(top_k, bool) or not isinstance(top_k, int):
            raise ValueError(f"top_k must be an integer in 1..2048: got {top_k!r}")
        words, ids, _ = read_content(contents[0], self.tokenizer, self.config.vocab_size)
        found = self.experiences.find(Experience(words, ids).searchable, top_k=top_k, namespace=namespace,
                                      now=self._now())
        return found, torch.tensor([one.id for one in found], dtype=torch.int64)

    def delete_experiences(self, *, ids: Sequence[int] | None = None, namespace: Namespace | None = None,
                           older_than: float | None = None) -> int:
        """Removes, for good and with all their token entries, the experiences that meet all given conditions. Collective.

        Args:
            ids: of experiences that are stored, at least one.
            older_than: seconds; those stored longer ago than that.

        Returns:
            How many there were; 0 is possible where conditions exclude each other, or nothing is as old.

        Raises:
            ValueError: for no condition, an id or a namespace that is not stored, a negative age.
        """
        self._check_has_banks()
        self._check_same("delete_experiences", ids, namespace, older_than)
        if ids is None and namespace is None and older_than is None:
            raise ValueError("delete_experiences needs at least one of ids, namespace, older_than: got none")
        if older_than is not None and not older_than >= 0:
            raise ValueError(f"older_than is an age in seconds, 0 or more: got {older_than}")
        before = None if older_than is None else math.ceil(self._now() - older_than)
        if ids is not None and not len(ids):
            raise ValueError("ids must name at least one experience: got none")
        chosen = self.experiences.all(ids=ids, namespace=namespace, before=before)
        delete_token_entries(self.banks, self.experiences.remove(chosen))
        return len(chosen)

    def inspect_experience(self, id: int) -> dict[str, Any]:
        """Everything about one experience, as JSON values: `Experience.row` with id, age, virtual shard, and, by layer, the
        range of its token entries' ids and how many are still there. Collective.

        Raises:
            ValueError: for an unknown id, a model without a bank, ranks that were given different ids.
        """
        self._check_has_banks()
        self._check_same("inspect_experience", id)
        one, = self.experiences.all(ids=[id])
        entries = {layer: {"ids": list(ids), "live": live_token_entries(self.banks[layer], ids)}
                   for layer, ids in sorted((one.entries or {}).items()) if layer in self.banks}
        return {"id": one.id, "text": one.text, **one.row(), "namespace_number": namespace_number(one.namespace),
                "age": max(0, self._now() - one.stored_at), "virtual_shard": self.experiences.virtual_shard(one.id),
                "token_entries": entries}

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
        return Experiences(self.config, self.memory_config, group=self.group, device=self._device)

    def _check_has_banks(self) -> None:
        if not self.banks:
            raise ValueError("a model without a long-term memory has no experiences: "
                             f"long_term_memory_slots = {self.config.long_term_memory_slots}, "
                             f"memory_layers = {self.config.memory_layers}")

    def _now(self) -> int:
        """The Unix second on rank 0."""
        return self.group.all_gather_object(int(time.time()))[0]

    def _check_same(self, name: str, *arguments: Any) -> None:
        """Refuses, on all ranks, arguments that differ between ranks: what follows is then refused by all or by none."""
        if self.group.size > 1:  # one rank need not spell out its prompts
            check_same(self.group, name, comparable(arguments))

    def _namespaces(self, namespace: Namespace | Sequence[Namespace] | Tensor | None, num_streams: int) -> Tensor | None:
        """A namespace for each stream, on the model's device."""
        if namespace is None:
            return None
        if isinstance(namespace, Tensor):
            namespace = namespace.tolist()
        alone = isinstance(namespace, str) or not isinstance(namespace, Sequence)
        numbers = [one if is_number_of_a_name(one) else namespace_number(one)
                   for one in ([namespace] if alone else namespace)]
        namespace_B = torch.tensor(numbers, dtype=torch.int64, device=self.embedding.weight.device)
        return namespace_B.expand(num_streams) if alone else namespace_B

    def _check_known(self, namespace: Namespace | Sequence[Namespace] | Tensor | None) -> None:
        """Refuses the name of a namespace in which there is nothing. A collective."""
        for name in [namespace] if isinstance(namespace, str) else namespace if isinstance(namespace, Sequence) else ():
            if isinstance(name, str):
                number = np.array([namespace_number(name)])
                here = sum(len(bank.shard.slots_of(number)) for bank in self.banks.values())
                if not any(self.group.all_gather_object(here)):  # what `generate` wrote is no experience
                    self.experiences.known(name)
