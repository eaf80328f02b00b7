"""How a job starts: its run folder, new or resumed, and the session with corpus, model, banks and engine.

Whatever is wrong is found here, before the first step, and reported alike on every rank.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from lmcode import dist
from lmcode.config import ConfigError, RunConfig, to_yaml
from lmcode.dist import Group, Rank
from lmcode.eval.held_out import held_out_sampler
from lmcode.lmcode import LMCODE
from lmcode.train import checkpoint, durable, observe
from lmcode.train.corpus import Corpus, load_corpus
from lmcode.train.data import StreamSampler
from lmcode.train.durable import Lock
from lmcode.train.engine import Engine
from lmcode.train.metrics import Metrics, NullMetrics
from lmcode.train.session import Session

log = logging.getLogger("lmcode")


@dataclass(frozen=True)
class Start:
    """Where a job starts: its folder, the verified checkpoint it goes on from (None: step 0), whether nothing is left to
    do, and, on rank 0, the right to write into the folder."""

    run_folder: Path
    checkpoint: Path | None = None
    finished: bool = False
    lock: Lock | None = None

    def close(self) -> None:
        """Gives the run folder back."""
        if self.lock is not None:
            self.lock.close()


def open_run(config: RunConfig, group: Group, resume: str | None = None) -> Start:
    """Makes the run folder, or finds in it what to go on from, and locks it. A collective.

    Args:
        resume: None or 'none' for a new folder; 'auto' for the newest checkpoint in `train.run_dir` that verifies, or
            step 0 if there is none; else the path of a run folder or of one checkpoint in it.

    Raises:
        ConfigError: a new run in a folder that has one; nothing to resume from, or nothing that verifies; a checkpoint of
            another shape or number of ranks; another process that writes into the folder.
    """
    held: list[Lock] = []
    try:
        found = checkpoint.on_rank_0(group, lambda: _open(config, group.size, None if resume == "none" else resume, held))
    except ConfigError:
        for lock in held:
            lock.close()
        raise
    return Start(*found, lock=held[0] if held else None)


def _open(config: RunConfig, world_size: int, resume: str | None, held: list[Lock]) -> tuple[Path, Path | None, bool]:
    name = config.train.run_dir
    if resume == "auto" and name is None:
        raise ConfigError("--resume auto needs train.run_dir, the run folder to go on in")
    run, chosen = Path(name or f"runs/{config.preset}-{time.strftime('%Y%m%d-%H%M%S')}"), None
    if resume not in (None, "auto"):
        run, chosen = checkpoint.locate(Path(resume))
        if name is not None and Path(name).resolve() != run.resolve():
            log.warning("going on in '%s', where the checkpoint is; train.run_dir says '%s'", run, name)
    run.mkdir(parents=True, exist_ok=True)
    held.append(Lock(run))
    if resume is None and (run / "config.yaml").exists():
        raise ConfigError(f"'{run}' already holds a run; give another train.run_dir, or --resume auto to go on with it")
    if resume == "auto":
        chosen = checkpoint.newest(run)
    elif resume is not None:
        chosen = checkpoint.find(chosen or run)
    if chosen is not None:
        step = checkpoint.check_resumable(config, chosen, world_size)
        if step >= config.train.total_steps and (run / "summary.txt").exists():
            return run, chosen, True
    log.info("'%s': %s", run, f"resuming from {chosen.name}" if chosen else "starting at step 0")
    return run, chosen, False


def set_up(config: RunConfig, me: Rank, *, start: Start | None = None) -> Session:
    """Builds the session: run folder, corpus, model with banks, engine; and puts it where its checkpoint was, if `start`
    names one. A collective."""
    group = Group.world()
    start = start or open_run(config, group)
    corpus = shared_corpus(config, group)
    log.info("corpus: %s", corpus.describe())
    torch.manual_seed(config.train.seed)  # the same initial weights on every rank
    device = dist.device()
    model = LMCODE(config.model, memory=config.memory, group=group, device=device)
    model.activation_checkpointing = config.train.activation_checkpointing
    engine = Engine(model, config, world_size=me.world_size)
    sampler = StreamSampler(corpus.train, streams=config.train.streams, sequence_length=config.train.sequence_length,
                            seed=config.train.seed)
    session = Session(config=config, me=me, group=group, run_folder=start.run_folder, corpus=corpus, model=model,
                      engine=engine, sampler=sampler, held_out=held_out_sampler(corpus.held_out, config),
                      metrics=NullMetrics(), lock=start.lock)
    if start.checkpoint is not None:
        checkpoint.restore(session, start.checkpoint)
    if me.rank == 0:
        durable.replace_text(start.run_folder / "config.yaml", to_yaml(config))
        session.metrics = Metrics(start.run_folder, resumed_step=session.step)
        checkpoint.write_json(start.run_folder / "ds_config.json", engine.ds_config)
    log.info("%s", observe.describe_start(config, me, model))
    if config.train.warmup_steps > config.train.total_steps:
        log.warning("train.warmup_steps (%d) exceeds train.total_steps (%d): the learning rate never reaches its peak",
                    config.train.warmup_steps, config.train.total_steps)
    return session


def shared_corpus(config: RunConfig, group: Group) -> Corpus:
    """Rank 0 tokenizes the corpus, the others wait and open it; all fail alike if that fails. A collective."""
    opened: list[Corpus] = []
    checkpoint.on_rank_0(group, lambda: opened.append(load_corpus(config)))
    corpus = opened[0] if opened else load_corpus(config)
    digests = group.all_gather_object(corpus.meta["digest"])
    if len(set(digests)) > 1:
        raise ConfigError(f"every rank must read the same corpus: got {len(set(digests))} different ones on {len(digests)} "
                          "ranks; put it on a shared folder and name that in data.path and data.cache")
    return corpus
