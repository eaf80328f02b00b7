"""The trial on text: a small language model with a bank and its controls, on code or on any folder; held-out loss in nats
per token, in all, on words that come back from beyond a window, far into a document, and by the size of the bank.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from lmcode.backbone import Backbone
from lmcode.config import DataConfig
from lmcode.data.corpus import Corpus, prepare_corpus
from lmcode.eval.language import EDGES, profile, words_of
from lmcode.eval.learning import Training, learn
from lmcode.eval.reading import MODES
from lmcode.eval.tasks.task import Ids
from lmcode.eval.trial import Measured, Say, rivals

SHAPE = {"vocab_size": 1024, "hidden_size": 96, "num_layers": 2, "num_heads": 4, "context_length": 128,
         "memory_head_dim": 48, "memory_bias": -4.0, "memory_top_k": 32, "long_term_memory_slots": 32768}
SENTENCE_ENDS, SENTENCES_OF = ".!?", 500_000  # tokens of a text that sentences are taken from
ALL, RETURNING = "all", "returning words"


@dataclass(frozen=True)
class TextTrial:
    """What text, and how much of it is learned and read.

    path: file, folder or glob; None: the default corpus, the standard library's source.
    sizes: slots of the bank that the trained model is asked with, beside those it was trained with.
    variants: other models with a bank, by name.
    """

    title: str
    path: str | None
    cache: Path
    training: Training
    sizes: Sequence[int] = ()
    variants: Mapping[str, Training] = field(default_factory=dict)
    windows: int = 24
    streams: int = 8
    modes: Sequence[str] = tuple(MODES)
    rivals: Sequence[str] = ("no bank", "no bank, same time", "cache of equal bytes")
    varied: str = "held-out tokens"
    target: float | None = None


def run_text(name: str, trial: TextTrial, *, seeds: Iterable[int], say: Say = lambda _: None) -> list[Measured]:
    """Trains and measures, with every control."""
    vocab_size = trial.training.configs()[0].vocab_size
    corpus = prepare_corpus(DataConfig(path=trial.path, tokenizer="bpe"), vocab_size=vocab_size, folder=trial.cache)
    words = words_of([corpus.tokenizer.decode([token]) for token in range(vocab_size)])
    found: list[Measured] = []
    for seed in seeds:
        with_bank = learn(trial.training, [(corpus.train, 1.0)], seed=seed)
        say(f"{name}, seed {seed}: {with_bank.steps} steps, {with_bank.seconds:.0f} s, loss {with_bank.loss:.4f}")
        for mode in trial.modes:
            found += measured(name, trial, with_bank.model, corpus, words, mode, seed, mode=mode)
        for slots in trial.sizes:
            found += measured(name, trial, with_bank.model, corpus, words, f"bank of {slots} slots", seed, slots=slots)
        seconds: dict[str, float] = {}
        for control, training in itertools.chain(trial.variants.items(), rivals(trial, with_bank, seconds)):
            rival = learn(training, [(corpus.train, 1.0)], seed=seed)
            seconds[control] = rival.seconds
            say(f"{name}, seed {seed}, {control}: {rival.steps} steps, {rival.seconds:.0f} s, loss {rival.loss:.4f}")
            found += measured(name, trial, rival.model, corpus, words, control, seed)
    return found


def measured(name: str, trial: TextTrial, model: Backbone, corpus: Corpus, words: np.ndarray, control: str, seed: int, *,
             mode: str = "on", slots: int | None = None) -> list[Measured]:
    """A profile of the held-out documents, as numbers by what was counted."""
    found = profile(model, corpus.held_out, words=words, mode=mode, streams=trial.streams, windows=trial.windows,
                    slots=slots)
    far = [f"from token {edge}" for edge in EDGES]
    named = {ALL: found.loss, RETURNING: found.returning, **dict(zip(far, found.by_position[1:], strict=True))}
    return [Measured(name, control, point, seed, math.exp(-loss), loss) for point, loss in named.items() if loss is not None]


@cache
def sentences_of(path: str, folder: Path, vocab_size: int) -> list[Ids]:
    """Sentences of a text, in a vocabulary of so many ids that is made for it and kept in `folder`."""
    corpus = prepare_corpus(DataConfig(path=path), vocab_size=vocab_size, folder=folder)
    ends = np.array([any(mark in corpus.tokenizer.decode([token]) for mark in SENTENCE_ENDS) for token in range(vocab_size)])
    tokens = np.asarray(corpus.train.tokens[:SENTENCES_OF])
    return [tuple(part.tolist()) for part in np.split(tokens, 1 + np.flatnonzero(ends[tokens])) if len(part)]
