"""What users ask a model to remember: experiences stored, found, deleted and looked at, whatever the model.

The one thing to know: an experience is there whole or not at all, its text in the experience bank and its token entries in
the banks of the layers (see `experiences`); here both are written and removed together. Every method is a collective.
"""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lmcode.config import LMCODEConfig
from lmcode.data.tokenizer import Tokenizer, as_tokenizer, check_vocab
from lmcode.dist import Group, check_same
from lmcode.memories.experience_input import Content, comparable, contents_of, experiences_of, read_content
from lmcode.memories.experiences import (
    Experience,
    Experiences,
    Namespace,
    Retrieved,
    delete_token_entries,
    live_token_entries,
    namespace_number,
    write_token_entries,
)
from lmcode.memories.memories import Memories
from lmcode.memory.bank import LongTermMemory
from lmcode.model.reading import read_texts

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


class Remembering:
    """The part of a model that stores and finds what users ask it to remember: over its `memories`, its `tokenizer`, and
    what whoever trains it keeps in `replay`."""

    config: LMCODEConfig
    memories: Memories
    replay: Spans | None
    _tokenizer: Tokenizer | None

    @abstractmethod
    def storing(self) -> AbstractContextManager[None]:
        """See `Backbone.storing`."""

    @property
    def banks(self) -> dict[int, LongTermMemory]:
        """The long-term memories by layer, ascending."""
        return self.memories.banks

    @property
    def group(self) -> Group:
        """The ranks that share the banks."""
        return self.memories.group

    @property
    def experiences(self) -> Experiences:
        """The experience bank with its texts."""
        return self.memories.experiences

    @property
    def has_experiences(self) -> bool:
        """Whether anything was ever stored; the same on every rank."""
        return self.memories.has_experiences

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
            with self.storing():
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
        """The stored experiences that say most of what a text asks for, best first, and their ids, int64 [hits]. Collective.

        What is compared are words and runs of letters, the rarer the more (BM25), not what the model makes of them: see
        `memories.lexicon`.

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
