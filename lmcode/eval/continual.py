"""The trial of continual learning: a small model learns domains of text one after the other, with and without replay, with a
bank and without; the held-out loss of every domain after each, and how much worse the old ones have become.

Replayed is what was learned from before, never another part of its domain; a stage has as many steps with replay as without,
so it takes the place of what is new. A model that learns all domains at once, mixed, in as many steps as all stages have,
shows what they could have been. With `memory.scope=document`, the default, a text finds nothing of other texts in a bank:
what it is worth here is its help within a text.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from lmcode.backbone import Backbone
from lmcode.config import ConfigError, DataConfig, SourceConfig
from lmcode.data.corpus import Documents, prepare_corpus
from lmcode.eval.language import profile
from lmcode.eval.learning import Learned, Training, learn
from lmcode.eval.trial import Measured, Say

AT_ONCE = "all at once"
Piece = tuple[int, int]  # where in the tokens of a corpus it begins and ends


@dataclass(frozen=True)
class ContinualTrial:
    """Which domains are learned in turn, and how.

    domains: a name, and a file, folder or glob, of each.
    training: of the model with a bank; its steps are those of one domain.
    replayed: shares of a stage's windows that come from the domains before it; each is another model.
    piece: tokens of the pieces that documents are cut into, at most. held_out: tokens of each domain to measure, about.
    target: how much worse an old domain may become.
    """

    title: str
    domains: Sequence[tuple[str, str]]
    cache: Path
    training: Training
    replayed: Sequence[float] = (0.0, 0.2)
    piece: int = 1024
    held_out: int = 8192
    streams: int = 8
    varied: str = "held-out loss of"
    target: float | None = 0.11

    @property
    def models(self) -> dict[str, Training]:
        """What is trained, by name."""
        return {"bank": self.training, "no bank": self.training.changed(model={"long_term_memory_slots": 0})}


def domains_of(given: Sequence[str]) -> list[tuple[str, str]]:
    """Names and paths of domains: of NAME=PATH, or of PATH, whose last part is the name.

    Raises:
        ConfigError: for one domain alone, or two of a name.
    """
    found = []
    for one in given:
        name, _, path = one.partition("=")
        if not path or re.fullmatch(r"[\w.-]+", name) is None:
            name, path = re.sub(r"[^\w.-]+", "-", Path(one).name), one
        found.append((name, path))
    if len({name for name, _ in found}) < max(2, len(found)):
        raise ConfigError("--domains must be two or more of different names (NAME=PATH gives one): got "
                          f"{', '.join(name for name, _ in found)}")
    return found


def run_continual(name: str, trial: ContinualTrial, *, seeds: Iterable[int], say: Say = lambda _: None) -> list[Measured]:
    """Trains every model on all domains, in turn and at once, and measures: a table of losses, and one of `worse_name`."""
    shape = trial.training.configs()[0]
    sources = tuple(SourceConfig(name=domain, path=path) for domain, path in trial.domains)
    corpus = prepare_corpus(DataConfig(sources=sources), vocab_size=shape.vocab_size, folder=trial.cache)
    pieces = in_pieces(corpus.train, trial.piece)
    held_out = [joined(corpus.held_out, spread(own, trial.held_out)) for own in in_pieces(corpus.held_out, trial.piece)]
    windows, length = trial.training.steps * trial.training.streams, shape.context_length
    found: list[Measured] = []
    for seed in seeds:
        for model, training in trial.models.items():
            steps = training.steps * len(pieces)
            alone = stages_of(pieces, 0.0, windows=windows, length=length, seed=seed)
            mixed = joined(corpus.train, [piece for stage in alone for piece in stage])
            learned, (at_once,) = learned_in_turn(training.changed(steps=steps), [mixed], held_out, trial, seed)
            say(f"{name}, seed {seed}, {model}, {AT_ONCE}: {learned.steps} steps, {learned.seconds:.0f} s")
            found += in_row(name, f"{model}, {AT_ONCE}", trial, at_once, seed)
            for share in trial.replayed:
                stages = stages_of(pieces, share, windows=windows, length=length, seed=seed)
                label = f"{model}, {100 * share:g} % replayed"
                learned, losses = learned_in_turn(training.changed(steps=steps, restarts=True),
                                                  [joined(corpus.train, stage) for stage in stages], held_out, trial, seed)
                say(f"{name}, seed {seed}, {label}: {learned.steps} steps, {learned.seconds:.0f} s")
                for (domain, _), row in zip(trial.domains, losses, strict=True):
                    found += in_row(name, f"{label}; after {domain}", trial, row, seed)
                right_after = [row[number] for number, row in enumerate(losses)]
                found += compared(name, f"{label}; than right after", trial, losses[-1], right_after, seed)
                found += compared(name, f"{label}; than {AT_ONCE}", trial, losses[-1], at_once, seed)
    return found


def learned_in_turn(training: Training, stages: Sequence[Documents], held_out: Sequence[Documents], trial: ContinualTrial,
                    seed: int) -> tuple[Learned, list[list[float]]]:
    """A model that has learned from the stages in turn, in equal shares of the steps; and after each the loss of every
    domain."""
    losses, every = [], training.steps // len(stages)

    def watch(step: int, model: Backbone) -> None:
        if step and step % every == 0:
            losses.append([loss_of(model, documents, trial.streams) for documents in held_out])

    learned = learn(training, [(documents, 1 / len(stages)) for documents in stages], seed=seed, watch=watch)
    watch(learned.steps, learned.model)
    return learned, losses


def loss_of(model: Backbone, documents: Documents, streams: int) -> float:
    """The mean loss of all the documents, in nats per token."""
    none = np.zeros(model.config.vocab_size, bool)
    found = profile(model, documents, words=none, streams=streams, windows=len(documents.tokens))
    return float(found.loss or 0.0)


def in_pieces(documents: Documents, length: int) -> list[list[Piece]]:
    """The documents of each source cut evenly, into pieces of at most `length` tokens; half of that at least, or whole."""
    found, first = [], 0
    for count in (documents.sources or {"": len(documents)}).values():
        own: list[Piece] = []
        for start, end in pairwise(documents.offsets[first:first + count + 1].tolist()):
            number = -(-(end - start) // length)
            own += pairwise(start + (end - start) * part // number for part in range(number + 1))
        found.append(own)
        first += count
    return found


def spread(pieces: Sequence[Piece], tokens: int) -> list[Piece]:
    """Pieces from all over, of about so many tokens in all."""
    wanted = max(1, min(len(pieces), round(tokens * len(pieces) / sum(end - start for start, end in pieces))))
    return [pieces[len(pieces) * number // wanted] for number in range(wanted)]


def joined(documents: Documents, pieces: Sequence[Piece]) -> Documents:
    """The pieces as documents."""
    place = np.concatenate([np.arange(*piece) for piece in pieces])
    offsets = np.cumsum([0, *(end - start for start, end in pieces)], dtype=np.int64)
    counted = None if documents.counted is None else documents.counted[place]
    return Documents(documents.tokens[place], offsets, [f"piece at {start}" for start, _ in pieces], counted=counted)


def stages_of(pieces: Sequence[Sequence[Piece]], replayed: float, *, windows: int, length: int,
              seed: int) -> list[list[Piece]]:
    """What is read in each stage, so many windows of `length` tokens: of its domain, and the share `replayed` of what was
    read of the domains before it, of each alike."""
    draw = random.Random(seed)
    learned: list[list[Piece]] = []
    stages: list[list[Piece]] = []
    for own in pieces:
        share = replayed if learned else 0.0
        new = drawn(own, (1 - share) * windows, length, draw)
        old = [piece for before in learned for piece in drawn(before, share * windows / len(learned), length, draw)]
        learned.append(new)
        stages.append([*new, *old])
    return stages


def drawn(pieces: Sequence[Piece], windows: float, length: int, draw: random.Random) -> list[Piece]:
    """Pieces that take so many windows, the last one in part; none twice before all were drawn."""
    found: list[Piece] = []
    order: list[Piece] = []
    while windows > 0:
        order = order or draw.sample(pieces, len(pieces))
        found.append(order.pop())
        windows -= -(-(found[-1][1] - found[-1][0] - 1) // length)
    return found


def worse_name(name: str) -> str:
    """The table of how much worse old domains have become."""
    return f"{name}, worse"


def in_row(name: str, control: str, trial: ContinualTrial, losses: Sequence[float], seed: int) -> list[Measured]:
    """The losses of all domains as numbers."""
    return [Measured(name, control, domain, seed, math.exp(-loss), loss)
            for (domain, _), loss in zip(trial.domains, losses, strict=True)]


def compared(name: str, control: str, trial: ContinualTrial, losses: Sequence[float], before: Sequence[float],
             seed: int) -> list[Measured]:
    """How much worse each domain but the last is than before, and their mean: of the perplexity, and of the nats. The nats
    of these numbers are the difference in nats."""
    old = [domain for domain, _ in trial.domains[:-1]]
    pairs = [*zip(losses, before, strict=True)][:-1]
    more = [now - then for now, then in pairs]
    worse, found = {"perplexity": [math.expm1(nats) for nats in more], "nats": [now / then - 1 for now, then in pairs]}, []
    for of, shares in worse.items():
        cells = [*zip(old, shares, more, strict=True), ("mean", float(np.mean(shares)), float(np.mean(more)))]
        found += [Measured(worse_name(name), f"{control}, {of}", point, seed, share, nats) for point, share, nats in cells]
    return found
