"""The held-out documents of a saved run, in the tokens of its model.

A corpus trains its own tokenizer, so text that is not the run's (or the run's text on a machine that has another version of
it) would come in tokens that mean nothing to the model: it is read with the tokenizer that was saved with the weights.
"""

from __future__ import annotations

import json
import logging
from typing import Any, NamedTuple

from lmcode.config import ConfigError, DataConfig, RunConfig
from lmcode.data.corpus import Documents, load_corpus
from lmcode.data.sources import SHARE
from lmcode.opening import Opened
from lmcode.presets import load_run_config
from lmcode.saved.places import Kind

log = logging.getLogger("lmcode")

OWN_TOKENIZERS = ("bytes", "bpe")  # those of a corpus that needs no file
OTHER_CORPUS = ("The corpus is not the one that this run was trained on: what is read here as held out may have been seen "
                "in training.")


class HeldOut(NamedTuple):
    """Documents to measure a model on.

    same_corpus: whether their corpus is the one that the run was trained on.
    whole: whether they are all documents of a text that was named for this, and not those that a run held out.
    """

    documents: Documents
    same_corpus: bool
    whole: bool


def held_out_documents(opened: Opened) -> HeldOut:
    """The documents that the settings of an opened run hold out of its corpus; or all documents of another text that they
    name, as they must for a saved model.

    Raises:
        ConfigError: for a run that was trained on samples given in Python, unless `config` names a text; for another
            tokenizer than the model's; and what `load_corpus` raises.
    """
    checkpoint, config, data = opened.folder, opened.config, opened.config.data
    if opened.place.kind in (Kind.SAVED_MODEL, Kind.HUGGING_FACE):
        if not _texts(data):
            raise ConfigError(f"a saved model has no text of its own to hold out: name one by data.path= for '{checkpoint}'")
        own_tokens = data.model_copy(update={"tokenizer": str(checkpoint)})
        return HeldOut(_all_documents(config, own_tokens, RunConfig()), False, True)
    saved = load_run_config(checkpoint / "config.yaml")
    if data.tokenizer != saved.data.tokenizer:
        raise ConfigError("a saved model keeps its tokenizer: leave data.tokenizer out, it was "
                          f"'{saved.data.tokenizer}' and cannot become '{data.tokenizer}'")
    if saved.preset == "trainer" and not _texts(data):
        raise ConfigError(f"'{checkpoint}' was trained on samples given in Python, so there are no held-out documents to "
                          "find: name a text by data.path=")
    trained_on = json.loads((checkpoint / "trainer.json").read_text(encoding="utf-8"))["corpus"]
    if data.model_copy(update={"cache": saved.data.cache}) == saved.data and data.tokenizer in OWN_TOKENIZERS:
        corpus = load_corpus(config)
        if corpus.meta["digest"] == trained_on:
            return HeldOut(corpus.held_out, True, False)
    own_tokens = data.model_copy(update={"tokenizer": str(checkpoint / "tokenizer")})
    other_text = _texts(data) != _texts(saved.data)
    try:
        corpus = load_corpus(config.model_copy(update={"data": own_tokens}))
        if corpus.meta["digest"] == trained_on or not other_text:
            return HeldOut(corpus.held_out, corpus.meta["digest"] == trained_on, False)
    except ConfigError:
        if not other_text:
            raise
    return HeldOut(_all_documents(config, own_tokens, saved), False, True)


def _texts(data: DataConfig) -> tuple[Any, ...]:
    """The settings by which text is named."""
    return tuple(value for value in (data.path, data.hf, data.held_out, data.sources) if value)


def _all_documents(config: RunConfig, data: DataConfig, saved: RunConfig) -> Documents:
    """Every document of the text that `data` names and `saved` does not: what is to be held out, if that is new."""
    if data.held_out not in (None, SHARE, saved.data.held_out):
        data = data.model_copy(update={"path": data.held_out, "hf": None})
    corpus = load_corpus(config.model_copy(update={"data": data}), whole=True)
    if len(corpus.passed_over):
        log.warning("%s: %s", corpus.meta["title"], corpus.passed_over.describe())
    return corpus.held_out
