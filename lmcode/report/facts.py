"""What the report says, as plain values: gathered once from a model, then turned into a page by a pure function."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lmcode.backbone import Backbone
from lmcode.data.tokenizer import Tokenizer
from lmcode.memories.experiences import namespace_number, spelled
from lmcode.memory.placement import capacity_of, rank_of, virtual_shard_of
from lmcode.report.analysis import analyze_memory_capacity, attention_received, compute_memory_efficiency, entry_columns
from lmcode.report.history import Curves
from lmcode.report.reading import ReadDocuments, read_documents
from lmcode.report.sequences import tokenizer_of

THRESHOLDS = (0.05, 0.1, 0.2)  # cosine distances at which near-duplicates are counted
MOST_COPIED = 300_000  # entries; above this near-duplicates take too long to count for a report
LISTED = 8  # namespaces and entries that are listed
CAPACITY_TOKENS = 32_768  # of text that the capacity curve stores
READ_DOCUMENTS, READ_TOKENS = 4, 4096  # what is read for examples: documents, tokens of each


@dataclass(frozen=True)
class BankFacts:
    """One bank. age_E, received_E, importance_E: of every live entry, in id order: steps since it was written, units of
    attention, importance. shard_live_X, shard_slots_X, shard_rank_X: of every virtual shard. namespaces: name and entries
    of the largest. most_read: the entries read most. temperature_H, bias_H, null_H: learned numbers of the read by head,
    empty where they are not at hand (ZeRO-3, other models)."""

    layer: int
    stats: dict[str, Any]
    efficiency: dict[str, Any]
    age_E: np.ndarray
    received_E: np.ndarray
    importance_E: np.ndarray
    shard_live_X: list[int]
    shard_slots_X: list[int]
    shard_rank_X: list[int]
    namespaces: list[tuple[str, int]]
    most_read: list[dict[str, float]]
    temperature_H: list[float]
    bias_H: list[float]
    null_H: list[float]


@dataclass(frozen=True)
class ExperienceFacts:
    """What was stored by `store_experience`. newest: id, namespace, importance and text of the last few."""

    stored: int
    slots: int
    newest: list[tuple[int, str, float, str]]


@dataclass(frozen=True)
class ReportFacts:
    """Everything on the page. `notes` say what could not be shown, and why."""

    title: str
    step: int | None
    ranks: int
    efficiency: dict[str, Any]
    banks: tuple[BankFacts, ...]
    reading: ReadDocuments | None = None
    capacity: dict[str, Any] | None = None
    curves: Curves = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    experiences: ExperienceFacts | None = None
    notes: tuple[str, ...] = ()


def gather(model: Backbone, sequences: Sequence[Sequence[int]], *, title: str, names: Sequence[str] | None = None,
           tokenizer: Tokenizer | None = None, step: int | None = None, ranks: int | None = None,
           length: int | None = None, curves: Curves | None = None, settings: Mapping[str, Any] | None = None,
           notes: Iterable[str] = ()) -> ReportFacts:
    """Measures a model for a report. A collective; the model and its banks are left as they are.

    Args:
        sequences: text to read as token ids, at least two each; without any there are no examples and no capacity curve.
        names: what to call them.
        step: of the checkpoint; ages count from it, or from the newest entry when None.
        ranks: that share the bank, or shared it in training; those of one memory group of the model when None.
        length: tokens of a window in which text is read; the model's context when None.
        curves: of the training, by the names of metrics.jsonl.
        settings: flat, by dotted name.
    """
    few = all(bank.stats()["live"] <= MOST_COPIED for bank in model.banks.values())
    efficiency = compute_memory_efficiency(model, thresholds=THRESHOLDS if few else ())
    notes = [*notes] if few else [*notes, f"Near-duplicates are counted in banks of up to {MOST_COPIED:,} entries."]
    ranks = ranks or model.memory_config.ranks_per_group(model.group.size)
    banks = tuple(bank_facts(model, layer, efficiency["layers"][layer], step, ranks) for layer in model.banks)
    reading = capacity = None
    if sequences and model.banks:
        chosen = worth_reading(sequences)
        window = length or model.config.context_length
        reading = read_documents(model, [sequences[one] for one in chosen], length=length, windows=-(-READ_TOKENS // window),
                                 names=None if names is None else [names[one] for one in chosen],
                                 tokenizer=tokenizer_of(model, tokenizer))
        stored = up_to(sequences, CAPACITY_TOKENS)
        shortest = model.config.retrieval_stride + 2  # of a text that has an item
        if model.offers_by_token and max(map(len, stored)) >= shortest:
            capacity = analyze_memory_capacity(model, stored)
    return ReportFacts(title, step, ranks, efficiency, banks, reading, capacity, curves or {}, settings or {},
                       experience_facts(model), tuple(notes))


def worth_reading(sequences: Sequence[Sequence[int]]) -> list[int]:
    """Places of a few sequences: spread over those of at least half the tokens that are read of one, or else the longest."""
    enough = [place for place, one in enumerate(sequences) if len(one) >= READ_TOKENS // 2]
    if len(enough) < READ_DOCUMENTS:
        return sorted(range(len(sequences)), key=lambda place: (-len(sequences[place]), place))[:READ_DOCUMENTS]
    return [enough[(2 * one + 1) * len(enough) // (2 * READ_DOCUMENTS)] for one in range(READ_DOCUMENTS)]


def up_to(sequences: Sequence[Sequence[int]], tokens: int) -> list[Sequence[int]]:
    """The first sequences, the last one cut, that have this many tokens together."""
    chosen: list[Sequence[int]] = []
    for one in sequences:
        room = tokens - sum(map(len, chosen))
        if room >= 2:
            chosen.append(one[:room])
    return chosen


def experience_facts(model: Backbone) -> ExperienceFacts | None:
    """The experiences of a model; None if nothing was ever stored. A collective."""
    if not model.has_experiences:
        return None
    held = model.experiences.all()
    newest = [(one.id, str(one.namespace), one.importance, one.text) for one in held[:-LISTED - 1:-1]]
    return ExperienceFacts(len(held), model.experiences.bank.slots, newest)


def bank_facts(model: Backbone, layer: int, efficiency: dict[str, Any], step: int | None, ranks: int) -> BankFacts:
    """The facts of one bank. A collective."""
    bank = model.banks[layer]
    learned = model.learned_numbers(layer)
    columns, shards = entry_columns(bank), bank.config.virtual_shards
    names = {namespace_number(one): str(one) for one in model.experiences.namespaces()} if model.has_experiences else {}
    now = step if step is not None else int(columns["step"].max(initial=0))
    live_X = np.bincount(virtual_shard_of(columns["id"], shards), minlength=shards)
    return BankFacts(
        layer=layer, stats=bank.stats(), efficiency=efficiency, age_E=now - columns["step"],
        received_E=attention_received(columns), importance_E=columns["importance"], shard_live_X=live_X.tolist(),
        shard_slots_X=[capacity_of(shard, bank.slots, shards) for shard in range(shards)],
        shard_rank_X=rank_of(np.arange(shards), ranks).tolist(), namespaces=largest_namespaces(columns, names),
        most_read=most_read(columns, now, names), temperature_H=learned.get("temperature", []),
        bias_H=learned.get("bias", []), null_H=learned.get("null", []))


def largest_namespaces(columns: Mapping[str, np.ndarray], names: Mapping[int, str]) -> list[tuple[str, int]]:
    """Name (or number) and entries of the namespaces with most entries, the lower number first among equals."""
    numbers, counts = np.unique(columns["namespace"], return_counts=True)
    return [(names.get(int(numbers[one]), spelled(int(numbers[one]))), int(counts[one]))
            for one in np.lexsort((numbers, -counts))[:LISTED]]


def most_read(columns: Mapping[str, np.ndarray], now: int, names: Mapping[int, str]) -> list[dict[str, Any]]:
    """The entries that received most attention, the smaller id first among equals; those never hit are left out."""
    received = attention_received(columns)
    order = [one for one in np.lexsort((columns["id"], -received))[:LISTED] if received[one] > 0]
    return [{"id": int(columns["id"][one]), "received": float(received[one]),
             "namespace": names.get(int(columns["namespace"][one]), spelled(int(columns["namespace"][one]))),
             "importance": float(columns["importance"][one]), "age": now - int(columns["step"][one]),
             "last_hit": now - int(columns["last_hit"][one]), "count": int(columns["count"][one])} for one in order]
