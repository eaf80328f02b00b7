"""Saving a job's checkpoint: what it contains, and when training waits for it. `files.commit` writes it.

`start` copies the state of a step, and training continues; `settle`, called at every logged step, checks whether the commit
is complete and records it. `save` waits for it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import platform
import time
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lmcode.config import to_yaml
from lmcode.data import replay
from lmcode.files import durable
from lmcode.files.commit import Commit, SaveFailed
from lmcode.files.durable import CommitFacts, DamagedCheckpoint, Parts, write_json
from lmcode.memories.files import memory_folders, memory_parts
from lmcode.saved.checkpoint import IDENTITY
from lmcode.train import optimizer_files, stream_files
from lmcode.train.resuming import RNG_FOLDER, place_of, rng_file
from lmcode.train.session import Session
from lmcode.version import __version__

log = logging.getLogger("lmcode")


def _begin(session: Session, final: Path) -> Commit:
    folders = (optimizer_files.FOLDER, RNG_FOLDER, stream_files.FOLDER, *memory_folders(session.model.memories))
    return Commit(session.group, final, needed=expected_bytes(session, final.parent), folders=folders,
                  snapshot=partial(snapshot, session), facts=_facts(session), keep=session.config.train.save_total_limit)


def commit(session: Session, final: Path) -> None:
    """Saves the current step as `final` and waits for it. A collective.

    Raises:
        SaveFailed: if any rank's file system refuses; there is no new commit then.
    """
    started = _begin(session, final)
    try:
        started.advance(wait=True)
    except SaveFailed:
        started.sweep()
        raise


def save(session: Session) -> Path | None:
    """Saves the checkpoint of the current step and waits for it; its folder, or None on every rank if that failed. A
    collective. For what failure means see `settle`."""
    start(session)
    settle(session, wait=True)
    return session.saved if session.saved == place_of(session) else None


def start(session: Session) -> None:
    """Starts to save the checkpoint of the current step, when an earlier one is through. A collective."""
    settle(session, wait=True)
    began = time.perf_counter()
    try:
        session.saving = _begin(session, place_of(session))
    except SaveFailed as error:
        _fail(session, session.step, error)
    pause = 1000 * (time.perf_counter() - began)
    session.metrics.scalars(session.step, {"perf/save_pause_ms": pause})


def settle(session: Session, *, wait: bool = False) -> None:
    """Advances a save that is in progress, and records its end. A collective.

    A failure is logged and counted (`train/failed_saves`); the older checkpoints stay as they are, and training continues.
    """
    saving = session.saving
    if saving is None:
        return
    try:
        if not saving.advance(wait=wait):
            return
    except SaveFailed as error:
        saving.sweep()
        _fail(session, saving.facts.step, error)
    else:
        session.saved = saving.final
        log.info("saved %s", saving.final)
    session.saving = None


def _fail(session: Session, step: int, error: SaveFailed) -> None:
    session.failed_saves += 1
    log.error("the checkpoint of step %d was not saved (failed saves so far: %d): %s", step, session.failed_saves, error)
    session.metrics.scalars(session.step, {"train/failed_saves": float(session.failed_saves)})


def expected_bytes(session: Session, folder: Path) -> int:
    """About what a checkpoint takes: as much as the last one in `folder`, else by the sizes of what goes into it."""
    for path in reversed(durable.steps(folder)):
        try:
            return durable.read_manifest(path).total_bytes
        except DamagedCheckpoint:
            continue
    weights = sum(getattr(p, "ds_numel", p.numel()) for p in session.engine.module.parameters())
    slot_bytes = sum(bank.slots * bank.heads * bank.head_dim * 2 * (2 if bank.config.dtype == "bf16" else 4)
                     for bank in session.model.banks.values())
    return 12 * weights + slot_bytes  # fp32 weights and two moments


def _facts(session: Session) -> CommitFacts:
    settings = to_yaml(session.config).encode()
    versions = {"lmcode": __version__, "torch": str(torch.__version__), "python": platform.python_version()}
    return CommitFacts(step=session.step, world_size=session.group.size, versions=versions,
                       virtual_shards=session.config.memory.virtual_shards,
                       config=hashlib.blake2b(settings, digest_size=32).hexdigest())


def snapshot(session: Session) -> Parts:
    """Every file of the current step that this rank writes, with a copy in host memory of what goes into it. A
    collective."""
    config, rank, ranks = session.config, session.group.rank, session.group.size
    weights, moments = optimizer_files.divide(session.engine.parameters(), rank=rank, ranks=ranks)
    parts: Parts = {rng_file(rank): partial(save_file, _random_state(session.engine.device))}
    if moments:
        parts[optimizer_files.part_file(rank)] = partial(save_file, moments)
    parts.update(stream_files.stream_parts(session.states, first=rank * (config.train.streams // ranks)))
    parts.update(memory_parts(session.model.memories))
    if rank == 0:
        trainer = {"step": session.step, "updates": session.engine.updates, "skipped_steps": session.engine.skipped_steps,
                   "skipped_in_a_row": session.skipped_in_a_row, "failed_saves": session.failed_saves,
                   "training_seconds": session.training_seconds,
                   "owes_evaluation": session.owes_evaluation, "resharded": session.resharded,
                   "corpus": session.corpus.meta["digest"], "pass": dataclasses.asdict(session.data_pass)}
        parts["model.safetensors"] = partial(save_file, weights)
        parts["config.yaml"] = partial(_write_text, text=to_yaml(config))
        if (identity := session.model.identity()) is not None:
            parts[IDENTITY] = partial(write_json, value=identity)
        parts["trainer.json"] = partial(write_json, value=trainer)
        parts["tokenizer"] = session.corpus.tokenizer.save  # a folder, sealed when the commit is published
        if session.replay is not None:
            parts[replay.FILE] = replay.replay_part(session.replay)
    return parts


def _write_text(path: Path, *, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return {**state, "cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state
