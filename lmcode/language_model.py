"""`LMCODE`: the language model together with its memories, as users know it.

The joint between two packages that do not know each other: `model/` (a plain module that asks a retriever) and `memory/`
(banks that know no model). Everything public about a model with memory is reached from here.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from lmcode.backbone import Backbone
from lmcode.config import LMCODEConfig, MemoryConfig
from lmcode.data.tokenizer import MIN_BPE_VOCAB, ByteTokenizer, Tokenizer, as_tokenizer, check_vocab
from lmcode.dist import Group, check_same, on_rank_0
from lmcode.memories.experience_input import Content, comparable, contents_of, experiences_of, read_content
from lmcode.memories.experiences import (
    Experience,
    Namespace,
    Retrieved,
    delete_token_entries,
    is_number_of_a_name,
    live_token_entries,
    namespace_number,
    write_token_entries,
)
from lmcode.memories.memories import Memories
from lmcode.model.generation.generate import Generation, Prompts, generate
from lmcode.model.generation.sampling import Decoding
from lmcode.model.lm import LMCODEOutput, MemoryLM, StreamState
from lmcode.model.reading import read_texts
from lmcode.presets import load_run_config
from lmcode.saved import checkpoint, pretrained
from lmcode.saved.places import is_run_or_checkpoint

log = logging.getLogger("lmcode")
STORED_AT_ONCE = 256  # experiences whose token entries are in memory at the same time


class Spans(Protocol):
    """Texts that are kept to be trained on again."""

    def forget(self, namespaces: Collection[int]) -> int:
        """Removes those of these namespaces, for good, on every rank; returns how many there were."""
        ...


class Deleted(NamedTuple):
    """What a deletion removed: experiences, entries of the layers' banks (theirs and others), and spans kept for replay."""

    experiences: int
    entries: int
    spans: int


class LMCODE(MemoryLM, Backbone):
    """A `MemoryLM` that owns one bank per memory layer, sliced over the ranks of `group`.

    Args:
        config: shape of the model; `long_term_memory_slots` = 0 leaves the banks out (the read keeps its local part).
        memory: how the banks store, search and exchange: see `Memories`.
        group: the ranks that share the banks; this process alone by default.
        device: where the banks' rows live; the CPU by default.

    The banks are plain attributes, neither parameters nor buffers: `state_dict`, casts and ZeRO leave them alone.

    Attributes:
        masters: while the model is trained, and after that, what gives the fp32 weight behind a parameter, whole, on the
            CPU (a collective): in bf16, or sharded by ZeRO-3, the parameters are not what is to be saved. None otherwise.
        replay: what whoever trains the model keeps of its texts; deletion goes there, too.
    """

    def __init__(self, config: LMCODEConfig, *, memory: MemoryConfig | None = None, group: Group | None = None,
                 device: torch.device | str = "cpu") -> None:
        self.memories = Memories(config, memory, group=group, device=device)
        super().__init__(config, self.memories.banks)
        self.masters: Callable[[torch.nn.Parameter], Tensor] | None = None
        self._tokenizer: Tokenizer | None = ByteTokenizer() if config.vocab_size >= MIN_BPE_VOCAB else None
        self.replay: Spans | None = None

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
                a single prompt. What the model was trained on is in others: see `namespace_number`.
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
            entries = write_token_entries(self.banks, batch[part], offered, first_id=self.experiences.bank.next_id,
                                          step=step)
            stored, gone = self.experiences.store(
                [replace(one, entries=ranges) for one, ranges in zip(batch[part], entries, strict=True)])
            delete_token_entries(self.banks, gone)
            ids += stored
        return ids

    def query_memory(self, text: Content, top_k: int = 5, namespace: Namespace | None = None
                     ) -> tuple[list[Retrieved], Tensor]:
        """The stored experiences that share most with a text, best first, and their ids, int64 [hits]. Collective.

        What is compared are words and runs of letters, not what the model makes of them: see `memories.lexical`.

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
                           older_than: float | None = None) -> Deleted:
        """Removes, for good and with all their token entries, the experiences that meet all given conditions. Collective.

        A namespace alone goes as a whole: also what was generated or trained on in it ("visit:N" for the N-th document that
        training read), experiences or not. Spans that are kept for replay (`replay`) have neither an experience's id nor a
        time of day: all go that are in a namespace in which something was removed.

        Consolidation keeps the entries of one experience apart from all others, so nothing of a deleted text is left in the
        means of another. Entries that a former version has merged cannot be told apart any more: those go whose ids are
        those of the experience.

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
        if ids is not None and not len(ids):
            raise ValueError("ids must name at least one experience: got none")
        if namespace is not None and ids is None and older_than is None:
            return self._delete_namespace(namespace)
        before = None if older_than is None else math.ceil(self._now() - older_than)
        return self._delete(self.experiences.all(ids=ids, namespace=namespace, before=before))

    def _delete_namespace(self, namespace: Namespace) -> Deleted:
        number = namespace_number(namespace)
        gone = self._delete([one for one in self.experiences.all() if namespace_number(one.namespace) == number])
        others = sum(bank.delete(namespace=number) for bank in self.banks.values())
        spans = self._forget_spans({number})
        gone = Deleted(gone.experiences, gone.entries + others, gone.spans + spans)
        if not any(gone):
            self.experiences.known(namespace)  # says that there is nothing, and what there is
        return gone

    def _delete(self, chosen: Sequence[Experience]) -> Deleted:
        entries = delete_token_entries(self.banks, self.experiences.remove(chosen))
        return Deleted(len(chosen), entries, self._forget_spans({namespace_number(one.namespace) for one in chosen}))

    def _forget_spans(self, namespaces: Collection[int]) -> int:
        return self.replay.forget(namespaces) if self.replay is not None and namespaces else 0

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
            return checkpoint.read_model(folder, cls, config, group=group, device=device, memory=include_memory).eval()
        folder = pretrained.find(pretrained_model_name_or_path, group, revision=revision, cache_dir=cache_dir, token=token,
                                 force_download=force_download, local_files_only=local_files_only)
        return pretrained.read(folder, cls, include_memory=include_memory, group=group, device=device)

    def push_to_hub(self, repo_id: str, *, include_memory: bool = True, private: bool | None = None,
                    token: str | None = None, commit_message: str | None = None) -> str:
        """Saves the model in a temporary folder, which rank 0 uploads; returns the commit's address.
        See `save_pretrained`."""
        check_same(self.group, "push_to_hub", repo_id, include_memory)
        return pretrained.push(self, repo_id, include_memory=include_memory, private=private, token=token,
                               commit_message=commit_message)

    def _check_has_banks(self) -> None:
        if not self.banks:
            raise ValueError("a model without a long-term memory has no experiences: "
                             f"long_term_memory_slots = {self.config.long_term_memory_slots}, "
                             f"memory_layers = {self.config.memory_layers}")

    def _now(self) -> int:
        """The Unix second on rank 0."""
        now: int = self.group.all_gather_object(int(time.time()))[0]
        return now

    def _check_same(self, name: str, *arguments: Any) -> None:
        """Refuses, on all ranks, arguments that differ between ranks: what follows is then refused by all or by none."""
        if self.group.size > 1:  # one rank need not spell out its prompts
            check_same(self.group, name, comparable(arguments))

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
                here = sum(len(bank.shard.slots_of(number)) for bank in self.banks.values())
                if not any(self.group.all_gather_object(here)):  # what `generate` wrote is no experience
                    self.experiences.known(name)
