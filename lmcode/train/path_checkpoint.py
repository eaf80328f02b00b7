"""A checkpoint at a path of its own, whatever its name: what `MemoryAwareTrainer.save_checkpoint` writes.

It is the commit of `saved.checkpoint` under another name, put in place as `files.replace` describes: a kill while an old
one is replaced leaves both next to the path, where `find` looks.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from lmcode.config import ConfigError
from lmcode.data.corpus import Corpus, Documents
from lmcode.data.tokenizer import load_tokenizer
from lmcode.dist import on_rank_0
from lmcode.files import durable
from lmcode.files.replace import beside, make_way, take_place
from lmcode.train import saving
from lmcode.train.session import Session


def save(session: Session, path: Path) -> None:
    """Commits the checkpoint of the current step as `path`; what was there stays until the new one is whole. A collective.

    Raises:
        ConfigError: if something is there that is no checkpoint, or holds a file that is not of it.
        SaveFailed: if the file system refuses; the old checkpoint is as it was.
    """
    path = path.resolve()
    on_rank_0(session.group, lambda: _make_way(path))
    saving.commit(session, beside(path) / "new")
    on_rank_0(session.group, lambda: take_place(path))
    session.saved = path


def _make_way(path: Path) -> None:
    """Refuses a place that is taken by something else, and finishes or removes what a kill has left."""
    if os.path.lexists(path):
        try:
            durable.verify(path)
        except durable.DamagedCheckpoint as error:
            raise ConfigError(f"'{path}' exists and is no checkpoint of this program: give another path ({error})") from None
    make_way(path)


def corpus_of(folder: Path) -> tuple[dict[str, Any], Corpus]:
    """The trainer.json of a verified checkpoint, and its corpus as far as it is known: the digest and the tokenizer.

    The documents are a placeholder of two tokens: the caller that continues training passes the samples.
    """
    trainer = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))
    nothing = Documents(np.zeros(2, np.int64), np.array([0, 2]), ["samples that are yet to come"])
    return trainer, Corpus(nothing, nothing, load_tokenizer(folder / "tokenizer"), folder, {"digest": trainer["corpus"]})
