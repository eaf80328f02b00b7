"""Experiences: texts that a model was told to remember, found again by what they say and returned verbatim.

The one thing to know: an experience is there whole or not at all. It is an entry of the experience bank, a `LongTermMemory`
with one head, which gives it its id and its place and takes both again; its text stands beside that entry on the rank that
holds it, where it is found by its words (`memories.lexicon`); and its token entries are in the banks of the layers, where
generation reads them. Whatever removes one of the three (eviction from the experience bank, deletion, expiry) removes them
all. The entry's key is made from the text, too (`memories.lexical`): former versions of this package, which read the same
files, search by it.

In the experience bank the step of an entry is the Unix second in which it was stored. All methods that say so are
collectives: every rank passes the same arguments and gets the same answer.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Union

import numpy as np
import torch
from torch import Tensor

from lmcode.config import ConfigError, LMCODEConfig, MemoryConfig, near_match
from lmcode.dist import Group
from lmcode.memories.lexical import text_key
from lmcode.memories.lexicon import Entry, Lexicon, question_of, summed
from lmcode.memory.bank import LongTermMemory
from lmcode.memory.entry import MAX_IMPORTANCE, UNKNOWN, choose, importance_of
from lmcode.memory.placement import virtual_shard_of
from lmcode.protocol import Candidates

# The namespaces that users number lie below those of names, and these below those that training takes, one for each visit
# of a document. So what is stored under a number, or under none (0), is never mixed with what was trained on.
NAMES, VISITS = 2**61, 2**62
KEY_DIM = 256  # components of a key
MOST = 2048  # hits of one question

Namespace = Union[int, str]  # noqa: UP007  (evaluated at run time)
Ranges = dict[int, tuple[int, int]]  # layer -> ids of token entries in its bank, first and end


@dataclass(frozen=True)
class Retrieved:
    """A retrieved experience.

    text: verbatim, or what the tokenizer decodes if ids were stored.
    score: how much of what was asked for is in the text, rare words weighing most: 0 where they share nothing, 1 for the
        text itself (see `memories.lexicon`); plus the (small) weighted log of the importance.
    id: of the experience; never reused.
    layer: the layers whose banks received its token entries, ascending.
    namespace: the number or name that it was stored under.
    importance: in (0, 10].
    age: seconds since it was stored.
    """

    text: str
    score: float
    id: int
    layer: tuple[int, ...]
    namespace: Namespace
    importance: float
    age: int


@dataclass(frozen=True)
class Experience:
    """What is stored, and where. `ids` are the token ids if those were given instead of text; `stored_at` is a Unix
    second; `id` is -1 and `entries` empty until it is stored."""

    text: str
    ids: tuple[int, ...] | None = None
    namespace: Namespace = 0
    importance: float = 1.0
    stored_at: int = 0
    id: int = -1
    entries: Ranges | None = None

    @property
    def searchable(self) -> str:
        """The text that a key is made from: its own, or the ids in figures where they decode to nothing."""
        return self.text if self.text.strip() or self.ids is None else " ".join(map(str, self.ids))

    def row(self) -> dict[str, Any]:
        """What makes the same experience elsewhere: an object of the JSONL that export writes and import reads."""
        content = {"text": self.text} if self.ids is None else {"ids": list(self.ids)}
        return {**content, "namespace": self.namespace, "importance": self.importance, "stored_at": self.stored_at}


def namespace_number(namespace: Namespace) -> int:
    """The number of a namespace: its own, or for a name a hash from `NAMES` on, or for the name "visit:N" that of the N-th
    document, from 0 on, that training has read (one that is read again has another number), which is `VISITS` + N.

    A run that was started before the visits of documents had a range of their own numbers them from 0 on, and continues to:
    there 0 is both the first document and what was stored without a namespace, as it was when it was saved.

    Raises:
        ValueError: for a negative number, another type, and a name that is empty or a number.
    """
    if isinstance(namespace, str):
        if visit := re.fullmatch(r"visit:([0-9]{1,18})", namespace):
            return VISITS + int(visit[1])
        if not namespace.strip() or namespace.strip().lstrip("+-").isdigit():
            raise ValueError(f"a namespace is a number from 0 on, or a name that is no number: got {namespace!r}")
        digest = hashlib.blake2b(namespace.encode("utf-8"), digest_size=8).digest()
        return NAMES + int.from_bytes(digest, "little") % (VISITS - NAMES)
    if isinstance(namespace, bool) or not isinstance(namespace, int | np.integer) or not 0 <= namespace < NAMES:
        raise ValueError(f"a namespace is a number from 0 to 2^61 - 1, or a name that is no number: got {namespace!r}")
    return int(namespace)


def is_number_of_a_name(namespace: Any) -> bool:
    """Whether it is what `namespace_number` makes of names."""
    return isinstance(namespace, int) and NAMES <= namespace < 2**63


def document_of(id: int) -> int:
    """What entries of an experience have in the column `document`, apart from `UNKNOWN` and from the documents of texts that
    are trained on: consolidation keeps the entries of one document apart from all others."""
    return UNKNOWN - 1 - id


def spelled(number: int) -> str:
    """A namespace's number as users write it; that of a name, which cannot be told from its hash, in figures."""
    return f"visit:{number - VISITS}" if number >= VISITS else str(number)


def check_importance(importance: float) -> float:
    """The importance as fp32 keeps it, in its shortest spelling; ValueError outside (0, 10]."""
    number = isinstance(importance, int | float | np.number) and not isinstance(importance, bool)
    if not number or not 0 < importance <= MAX_IMPORTANCE or np.float32(importance) == 0:
        raise ValueError(f"importance must lie in (0, {MAX_IMPORTANCE:g}]: got {importance!r}")
    return float(str(np.float32(importance)))


class Experiences:
    """The experience bank of one model with the texts of this rank.

    Attributes:
        group: all ranks.
        bank: the entries' keys, sharded, evicted and stored like any other bank.
        held: this rank's experiences by id, exactly those whose entries it holds; `hold` replaces them all.
    """

    def __init__(self, model: LMCODEConfig, memory: MemoryConfig, *, group: Group, device: torch.device) -> None:
        # The trade of likeness against importance that the model's own reads start with, for keys of length 1.
        weight = memory.importance_weight / model.memory_temperature
        config = memory.model_copy(update={"scope": "global", "dtype": "fp32", "importance_weight": weight})
        self.bank = LongTermMemory(heads=1, head_dim=KEY_DIM, slots=memory.experience_slots, top_k=1, config=config,
                                   group=group, device=device)
        self.group = group
        self.hold({})

    def hold(self, held: dict[int, Experience]) -> None:
        """Takes these for all the experiences of this rank: those whose entries the bank now holds."""
        self.held = held
        self._lexicon, self._unread = Lexicon(), dict(held)  # indexed when somebody asks

    def store(self, batch: Sequence[Experience]) -> tuple[list[int], list[Ranges]]:
        """Stores experiences; returns their ids, and the token entries of those that had to go. Collective."""
        ids: list[int] = []
        start = 0
        for end in range(1, len(batch) + 1):
            if end == len(batch) or batch[end].stored_at != batch[start].stored_at:  # a write is of one moment
                ids += self._write(batch[start:end])
                start = end
        return ids, self._drop_what_is_gone()

    def _write(self, batch: Sequence[Experience]) -> list[int]:
        key_1ED = torch.from_numpy(np.stack([text_key(one.searchable, KEY_DIM) for one in batch])).unsqueeze(0)
        namespace_E = torch.tensor([namespace_number(one.namespace) for one in batch])
        importance_E = torch.tensor([one.importance for one in batch], dtype=torch.float32)
        document_E = torch.tensor([document_of(self.bank.next_id + place) for place in range(len(batch))])
        ids = self.bank.write(key_1ED, torch.zeros_like(key_1ED), namespace_E, importance_E, document_E=document_E,
                              step=batch[0].stored_at).tolist()
        mine = set(self.bank.owned)
        shard_E = virtual_shard_of(np.array(ids), self.bank.config.virtual_shards).tolist()
        new = {id: replace(one, id=id) for id, one, shard in zip(ids, batch, shard_E, strict=True) if shard in mine}
        self.held.update(new)
        self._unread.update(new)
        return ids

    def _drop_what_is_gone(self) -> list[Ranges]:
        """Forgets the texts whose entries are gone; returns the token entries of those on all ranks. Collective."""
        live = set(self.bank.shard.columns["id"].tolist())
        gone = {id: self.held.pop(id).entries or {} for id in self.held.keys() - live}
        self._lexicon.remove(gone)
        self._unread = {id: one for id, one in self._unread.items() if id not in gone}
        everyones = {id: ranges for part in self.bank.inside.all_gather_object(gone) for id, ranges in part.items()}
        return [everyones[id] for id in sorted(everyones)]

    def find(self, text: str, *, top_k: int, namespace: Namespace | None, now: int) -> list[Retrieved]:
        """The best experiences for a text, best first, equal ones by id; fewer than `top_k` if there are fewer. Collective.

        Raises:
            ValueError: for text without words, an unknown namespace, or `top_k` outside 1..2048.
        """
        if not 1 <= top_k <= MOST:
            raise ValueError(f"top_k must be an integer in 1..{MOST}: got {top_k!r}")
        number = None if namespace is None else self.known(namespace)
        asked, lexicon = question_of(text), self._indexed()
        rarity = summed(self.bank.inside.all_gather_object(lexicon.rarity(asked, number)))
        id_E, score_E = lexicon.scores(asked, rarity, number)
        best_E = np.lexsort((id_E, -score_E))[:top_k]
        ids, scores = id_E[best_E].tolist(), score_E[best_E].tolist()
        mine = [(-score, id, self.held[id]) for id, score in zip(ids, scores, strict=True)]
        everyones = sorted(itertools.chain(*self.bank.inside.all_gather_object(mine)), key=lambda hit: hit[:2])
        return [_retrieved(one, -score, now) for score, _, one in everyones[:top_k]]

    def _indexed(self) -> Lexicon:
        """The lexicon of what is held."""
        weight = self.bank.config.importance_weight
        self._lexicon.add([Entry(id, one.searchable, namespace_number(one.namespace), weight * math.log(one.importance))
                           for id, one in self._unread.items()])
        self._unread = {}
        return self._lexicon

    def known(self, namespace: Namespace) -> int:
        """The number of a namespace; ConfigError, with near matches, if there is no experience in it. Collective."""
        number, known = namespace_number(namespace), self.namespaces()
        if number not in {namespace_number(one) for one in known}:
            names = ", ".join(map(str, list(known)[:8])) + (", ..." if len(known) > 8 else "")
            raise ConfigError(f"nothing is stored under the namespace {namespace!r}: expected one of {names or 'none yet'}."
                              f"{near_match(str(namespace), map(str, known))}")
        return number

    def namespaces(self) -> dict[Namespace, int]:
        """How many experiences each namespace holds, by its name or number, numbers first. Collective."""
        counts: Counter[Namespace] = Counter()
        for part in self.bank.inside.all_gather_object(Counter(one.namespace for one in self.held.values())):
            counts.update(part)
        return dict(sorted(counts.items(), key=lambda item: (isinstance(item[0], str), item[0])))

    def all(self, *, ids: Sequence[int] | None = None, namespace: Namespace | None = None,
            before: int | None = None) -> list[Experience]:
        """The experiences that meet all given conditions, on every rank, by id. Collective.

        Args:
            before: the Unix second before which they were stored.

        Raises:
            ValueError: for an id or namespace that is not stored.
        """
        everyones = {id: one for part in self.bank.inside.all_gather_object(self.held) for id, one in part.items()}
        wanted = everyones.keys() if ids is None else {*ids}
        if unknown := sorted(wanted - everyones.keys()):
            raise ValueError(f"there is no experience with the id {', '.join(map(str, unknown[:8]))}; "
                             f"{len(everyones)} are stored")
        number = None if namespace is None else self.known(namespace)
        return [one for id, one in sorted(everyones.items())
                if id in wanted and (number is None or namespace_number(one.namespace) == number)
                and (before is None or one.stored_at < before)]

    def virtual_shard(self, id: int) -> int:
        """The virtual shard of an experience."""
        return int(virtual_shard_of(np.array([id]), self.bank.config.virtual_shards)[0])

    def remove(self, chosen: Sequence[Experience]) -> list[Ranges]:
        """Deletes these experiences for good; returns their token entries, which must go, too. Collective."""
        self.bank.delete(ids=[one.id for one in chosen])
        return self._drop_what_is_gone()


def _retrieved(one: Experience, score: float, now: int) -> Retrieved:
    return Retrieved(text=one.text, score=score, id=one.id, layer=tuple(sorted(one.entries or {})),
                     namespace=one.namespace, importance=one.importance, age=max(0, now - one.stored_at))


def write_token_entries(banks: Mapping[int, LongTermMemory], batch: Sequence[Experience],
                        offered: Sequence[Mapping[int, Candidates]], *, first_id: int, step: int) -> list[Ranges]:
    """Writes what the texts offer into the layers' banks; returns each text's ids. Collective.

    The write policy chooses within each text. An entry's importance is its initial one (from surprise) times its
    experience's.

    Args:
        first_id: of the experiences, which are about to be stored in this order.
    """
    ranges: list[Ranges] = [{} for _ in batch]
    for layer, bank in banks.items():
        keys: list[Tensor] = []
        values: list[Tensor] = []
        namespaces: list[np.ndarray] = []
        importances: list[np.ndarray] = []
        documents: list[np.ndarray] = []
        for id, (one, offers, places) in enumerate(zip(batch, offered, ranges, strict=True), start=first_id):
            candidates = offers[layer]
            surprise_N = candidates.surprise_N.float().cpu().numpy()
            chosen = choose(surprise_N, bank.config)
            first = bank.next_id + sum(len(part) for part in namespaces)
            places[layer] = (first, first + int(chosen.sum()))
            on_device = torch.from_numpy(chosen).to(candidates.key_HND.device)
            keys.append(candidates.key_HND[:, on_device])
            values.append(candidates.value_HND[:, on_device])
            namespaces.append(np.full(chosen.sum(), namespace_number(one.namespace), np.int64))
            importances.append(importance_of(surprise_N[chosen]) * np.float32(one.importance))
            documents.append(np.full(chosen.sum(), document_of(id), np.int64))
        namespace_E, importance_E, document_E = (torch.from_numpy(np.concatenate(parts))
                                                 for parts in (namespaces, importances, documents))
        bank.write(torch.cat(keys, dim=1).float(), torch.cat(values, dim=1).float(), namespace_E, importance_E,
                   document_E=document_E, step=step)
    return ranges


def name_documents(banks: Mapping[int, LongTermMemory], experiences: Experiences) -> None:
    """Tells entries from before there was a column `document` of which experience they are. Collective.

    What had been merged across experiences stays so: an entry is then its survivor's.
    """
    parts = experiences.group.all_gather_object([(one.id, one.entries or {}) for one in experiences.held.values()])
    everyones = dict(itertools.chain(*parts))  # memory groups hold the same
    for layer, bank in banks.items():
        _name(bank, sorted((*ranges[layer], document_of(id)) for id, ranges in everyones.items() if layer in ranges))
    _name(experiences.bank, [(id, id + 1, document_of(id)) for id in sorted(everyones)])


def _name(bank: LongTermMemory, ranges: Sequence[tuple[int, int, int]]) -> None:
    bank.shard.name_documents(*np.array(ranges, np.int64).reshape(-1, 3).T)


def delete_token_entries(banks: Mapping[int, LongTermMemory], gone: Sequence[Ranges]) -> int:
    """Removes the token entries of experiences from the layers' banks, for good; returns how many there were. Collective;
    all ranks pass the same."""
    ids = {layer: [np.arange(*ranges[layer]) for ranges in gone if layer in ranges] for layer in banks}
    return sum(banks[layer].delete(ids=np.concatenate(parts).tolist()) for layer, parts in ids.items() if parts)


def live_token_entries(bank: LongTermMemory, ids: tuple[int, int]) -> int:
    """How many of these ids are (still) in a bank. Collective."""
    id_M = bank.shard.columns["id"]
    return sum(bank.inside.all_gather_object(int(((id_M >= ids[0]) & (id_M < ids[1])).sum())))
