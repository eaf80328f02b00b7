"""Resuming from a checkpoint: everything in it becomes the state of a session again. `saving` writes what is read here.

A checkpoint holds, all of the same step: the weights, the optimizer's state (whole parameters, spread over one file per
rank), every bank (one file per virtual shard), the streams' short-term state (one file per rank, by stream), the spans
kept for replay, the random number generators of each rank, the tokenizer and the resolved config. Nothing in it depends
on the number of ranks or the ZeRO stage but the generators, and nothing is a pickle. `durable` makes it a commit.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lmcode.config import ConfigError, RunConfig
from lmcode.data import replay
from lmcode.data.streams import PassStart
from lmcode.dist import on_rank_0
from lmcode.files import durable
from lmcode.memories.files import load_memory
from lmcode.saved.checkpoint import IDENTITY
from lmcode.train import optimizer_files
from lmcode.train.engine import MOMENTS
from lmcode.train.session import Session
from lmcode.train.stream_files import load_streams

log = logging.getLogger("lmcode")
RNG_FOLDER = "rng"


def place_of(session: Session) -> Path:
    """The folder of the checkpoint of the current step."""
    if session.saved is not None and durable.step_of(session.saved)[0] == session.step:
        return session.saved  # perhaps a later revision of the step
    return durable.step_folder(session.folder / "checkpoints", session.step)


def rng_file(rank: int) -> str:
    """The file with a rank's random number generators, relative to the checkpoint."""
    return f"{RNG_FOLDER}/rank-{rank:05d}.safetensors"


def restore(session: Session, folder: Path) -> None:
    """Puts a new session where the run was when `folder`, a verified checkpoint, was saved. A collective.

    Raises:
        ConfigError: if the corpus is not the one that the run read so far.
    """
    trainer = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))
    if trainer["corpus"] != session.corpus.meta["digest"]:
        raise ConfigError(f"the corpus is not the one that '{folder}' was trained on: its tokens have another digest")
    load_into(session, folder, trainer)
    session.saved = folder
    on_rank_0(session.group, lambda: set_the_future_aside(session))


def load_into(session: Session, folder: Path, trainer: Mapping[str, Any]) -> None:
    """Everything of a verified checkpoint into `session`; `trainer` is its trainer.json. A collective."""
    config, rank = session.config, session.group.rank
    if (identity := folder / IDENTITY).is_file():
        session.model.check_identity(json.loads(identity.read_text(encoding="utf-8")))
    weights = load_file(folder / "model.safetensors")
    session.engine.load(trainer["updates"], optimizer_files.reader(folder, weights, MOMENTS))
    load_memory(folder, session.model.memories)
    session.states = load_streams(folder / "streams", type(session.model.blank_state(1)), rank=rank,
                                  world_size=session.group.size, device=session.engine.device,
                                  num_micro=config.train.gradient_accumulation_steps)
    session.step, session.training_seconds = trainer["step"], trainer["training_seconds"]
    session.engine.skipped_steps, session.failed_saves = trainer["skipped_steps"], trainer["failed_saves"]
    session.skipped_in_a_row = trainer.get("skipped_in_a_row", 0)  # older checkpoints do not say
    session.owes_evaluation = trainer.get("owes_evaluation", False)
    session.resharded = trainer.get("resharded", {})
    session.data_pass = replay.resume(session.replay, folder, PassStart(**trainer.get("pass", {})), step=session.step)
    session.sampler = replay.make_sampler(config, session.corpus.train, session.replay, data_pass=session.data_pass,
                                          epochs=session.sampler.epochs)
    _set_random_state(session, folder / rng_file(rank))


def seed_rank(config: RunConfig, *, step: int, rank: int) -> None:
    """Seeds this rank's generators, so that no two ranks drop the same places."""
    torch.manual_seed(hash((config.train.seed, step, rank)))


def _set_random_state(session: Session, file: Path) -> None:
    """Sets this rank's generators; those of a rank that did not exist start from seed, step and rank."""
    if not file.exists():
        seed_rank(session.config, step=session.step, rank=session.group.rank)
        return
    random = load_file(file)
    torch.set_rng_state(random["cpu"])
    if "cuda" in random and session.engine.device.type == "cuda":
        torch.cuda.set_rng_state(random["cuda"], session.engine.device)


def set_the_future_aside(session: Session) -> None:
    """Sets checkpoints beyond the current step aside: this run is about to write its own, and 'auto' must not mix them."""
    kept = max(durable.step_of(session.saved), (session.step, 0)) if session.saved is not None else (session.step, 0)
    for path in durable.steps(session.folder / "checkpoints"):
        if durable.step_of(path) > kept and (path / durable.MANIFEST).is_file():  # else somebody has made it by hand
            log.warning("%s is beyond the step to resume from: kept as %s", path, durable.set_aside(path).name)
    (session.folder / "summary.txt").unlink(missing_ok=True)
