"""The held-out documents of a saved run, in the tokens of its model.

A corpus trains its own tokenizer, so text that is not the run's (or the run's text on a machine that has another version of
it) would come in tokens that mean nothing to the model: it is read with the tokenizer that was saved with the weights.
"""

from __future__ import annotations

import json
from pathlib import Path

from lmcode.config import ConfigError, RunConfig
from lmcode.presets import load_run_config
from lmcode.train.corpus import Documents, load_corpus

OWN_TOKENIZERS = ("bytes", "bpe")  # those of a corpus that needs no file
OTHER_CORPUS = ("The corpus is not the one that this run was trained on: what is read here as held out may have been seen "
                "in training.")


def held_out_documents(checkpoint: Path, config: RunConfig) -> tuple[Documents, bool]:
    """The documents that `config` holds out, and whether their corpus is the one that the run was trained on.

    Args:
        checkpoint: a verified one.
        config: its own with overrides, such as where the text is now.

    Raises:
        ConfigError: for a run that was trained on samples given in Python, unless `config` names a text; for another
            tokenizer than the model's; and what `load_corpus` raises.
    """
    saved, data = load_run_config(checkpoint / "config.yaml"), config.data
    if data.tokenizer != saved.data.tokenizer:
        raise ConfigError("a saved model keeps its tokenizer: leave data.tokenizer out, it was "
                          f"'{saved.data.tokenizer}' and cannot become '{data.tokenizer}'")
    if saved.preset == "trainer" and data.path is None and data.hf is None:
        raise ConfigError(f"'{checkpoint}' was trained on samples given in Python, so there are no held-out documents to "
                          "find: name a text by data.path=")
    trained_on = json.loads((checkpoint / "trainer.json").read_text(encoding="utf-8"))["corpus"]
    if data.model_copy(update={"cache": saved.data.cache}) == saved.data and data.tokenizer in OWN_TOKENIZERS:
        corpus = load_corpus(config)
        if corpus.meta["digest"] == trained_on:
            return corpus.held_out, True
    data = data.model_copy(update={"tokenizer": str(checkpoint / "tokenizer")})
    corpus = load_corpus(config.model_copy(update={"data": data}))
    return corpus.held_out, corpus.meta["digest"] == trained_on
