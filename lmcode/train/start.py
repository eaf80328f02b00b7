"""How a job starts: its run folder, new or resumed, and the session with corpus, model, banks and engine.

Every error that can be known beforehand is found here, before the first step, and reported alike on every rank.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lmcode import dist
from lmcode.config import ConfigError, RunConfig, expanded, to_yaml
from lmcode.data.corpus import Corpus, load_corpus
from lmcode.data.replay import make_replay, make_sampler
from lmcode.data.streams import PassStart
from lmcode.dist import Group, Rank, on_rank_0
from lmcode.effects import without_effect
from lmcode.eval.held_out import held_out_sampler
from lmcode.files import durable
from lmcode.files.durable import Lock
from lmcode.jobs.clock import Clock
from lmcode.jobs.preempt import Preempted, Request, agreed
from lmcode.jobs.watch import NullWatch
from lmcode.opening import init_from, make_model
from lmcode.processor import BF16_IS_SLOW, has_bf16
from lmcode.saved import checkpoint
from lmcode.train import observe, resuming
from lmcode.train.engine import Engine
from lmcode.train.metrics import Metrics
from lmcode.train.session import Session
from lmcode.train.writers import NullMetrics

log = logging.getLogger("lmcode")


@dataclass(frozen=True)
class Start:
    """Where a job starts: its folder, the verified checkpoint it resumes from (None: step 0), whether nothing is left to
    do, the settings that a reshard has changed, and, on rank 0, the right to write into the folder."""

    run_folder: Path
    checkpoint: Path | None = None
    finished: bool = False
    resharded: Mapping[str, int] = field(default_factory=dict)
    lock: Lock | None = None

    def close(self) -> None:
        """Unlocks the run folder."""
        if self.lock is not None:
            self.lock.close()


def open_run(config: RunConfig, group: Group, resume: str | None = None) -> Start:
    """Makes the run folder, or finds the checkpoint in it to resume from, and locks it. A collective.

    Args:
        resume: None or 'none' for a new folder; 'auto' for the newest checkpoint in `train.run_dir` that verifies, or
            step 0 if there is none; else the path of a run folder or of one checkpoint in it.

    Raises:
        ConfigError: a new run in a folder that has one; nothing to resume from, or nothing that verifies; a checkpoint of
            another shape or number of ranks; another process that writes into the folder.
    """
    held: list[Lock] = []
    try:
        found = on_rank_0(group, lambda: _open(config, group.size, None if resume == "none" else resume, held))
    except ConfigError:
        for lock in held:
            lock.withdraw()
        raise
    run, chosen, finished, resharded = found
    return Start(run, chosen, finished, resharded, lock=held[0] if held else None)


def _open(config: RunConfig, world_size: int, resume: str | None, held: list[Lock]
          ) -> tuple[Path, Path | None, bool, dict[str, int]]:
    name, resharded = config.train.run_dir, {}
    if resume == "auto" and name is None:
        raise ConfigError("--resume auto needs train.run_dir, the run folder to resume in")
    run, chosen = (None if name is None else expanded("train.run_dir", name)), None
    if resume not in (None, "auto"):
        former, (run, chosen) = run, checkpoint.locate(expanded("--resume", resume))
        if former is not None and former.resolve() != run.resolve():
            log.warning("resuming in '%s', where the checkpoint is; train.run_dir says '%s'", run, name)
    run = run or free_folder(Path("runs"), f"{config.preset}-{time.strftime('%Y%m%d-%H%M%S')}")
    _check_ours(run)
    durable.make_folder(run)
    held.append(Lock(run))
    if resume is None and (run / "config.yaml").exists():
        raise ConfigError(f"'{run}' already holds a run; give another train.run_dir, or --resume auto to resume it")
    if resume == "auto":
        chosen = checkpoint.newest(run)
    elif resume is not None:
        chosen = checkpoint.find(chosen or run)
    if chosen is not None:
        resharded = checkpoint.since_resharded(config, chosen)
        for setting, number in resharded.items():
            log.warning("'%s' was resharded: %s = %d, whatever the settings say", chosen, setting, number)
        config = checkpoint.with_numbers(config, resharded)
        config.check_world_size(world_size)
        step = checkpoint.check_resumable(config, chosen, world_size)
        if step >= config.train.total_steps and (run / "summary.txt").exists():
            return run, chosen, True, resharded
    log.info("'%s': %s", run, f"resuming from {chosen.name}" if chosen else "starting at step 0")
    return run, chosen, False, resharded


def free_folder(parent: Path, name: str) -> Path:
    """Makes a folder that nobody else has: `name`, or name-2, name-3 and so on where runs start in the same second."""
    durable.make_folder(parent)
    for number in itertools.count(1):
        folder = parent / (name if number == 1 else f"{name}-{number}")
        with suppress(FileExistsError):
            folder.mkdir()
            durable.sync(parent)
            return folder
    raise AssertionError("numbers do not end")


def _check_ours(run: Path) -> None:
    """Refuses a folder in which a run would write over files that no run has written.

    Raises:
        ConfigError: for a config.yaml that is not as a run leaves it, and without one for any other of a run's files.
    """
    settings = run / "config.yaml"
    if not settings.exists():
        theirs = [name for name in ("ds_config.json", "metrics.jsonl", "summary.txt") if os.path.lexists(run / name)]
    else:
        theirs = [] if settings.read_bytes() == _as_dumped(settings) else [settings.name]
    if theirs:
        raise ConfigError(f"'{run / theirs[0]}' was not written by a run and is not replaced: give another train.run_dir")


def _as_dumped(path: Path) -> bytes | None:
    """What `config.to_yaml` makes of the mapping in a YAML file, whatever settings this version has; None if it is none."""
    import yaml

    try:
        values = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    known = isinstance(values, dict) and {"preset", "model", "train"} <= values.keys()
    return yaml.safe_dump(values, sort_keys=False).encode() if known else None


def set_up(config: RunConfig, me: Rank, *, start: Start | None = None, watch: NullWatch | None = None,
           request: Request | None = None) -> Session:
    """Builds the session: run folder, corpus, model with banks, engine; and puts it where its checkpoint was, if `start`
    names one. A collective.

    Raises:
        Preempted: on every rank, if `request` was made on any.
    """
    watch, request = watch or NullWatch(Clock(), Group.world()), request or Request()
    group = watch.group
    start = start or open_run(config, group)
    config = checkpoint.with_numbers(config, start.resharded)
    corpus = shared_corpus(config, group, request)
    log.info("corpus: %s", corpus.describe())
    torch.manual_seed(config.train.seed)  # the same initial weights on every rank
    device = dist.device()
    model = make_model(config, group=group, device=device)
    if config.train.init_from is not None and start.checkpoint is None:
        init_from(model, config.train.init_from, memory=config.train.init_memory)
    model.activation_checkpointing = config.train.activation_checkpointing
    model.tokenizer = corpus.tokenizer
    engine = Engine(model, config, world_size=me.world_size)
    if config.model.dropout:
        resuming.seed_rank(config, step=0, rank=me.rank)
    agreed(request, group)
    replay, data_pass = make_replay(config), PassStart(first_namespace=model.memories.free_visit())
    session = Session(config=config, me=me, group=group, run_folder=start.run_folder, corpus=corpus, model=model,
                      engine=engine, sampler=make_sampler(config, corpus.train, replay, data_pass=data_pass),
                      held_out=held_out_sampler(corpus.held_out, config), metrics=NullMetrics(), replay=replay,
                      data_pass=data_pass, lock=start.lock, clock=watch.clock, request=request, report=watch.report)
    if start.checkpoint is not None:
        resuming.restore(session, start.checkpoint)
    agreed(request, group)
    on_rank_0(group, lambda: _record(session))
    announce(session)
    return session


def _record(session: Session) -> None:
    session.metrics = record_in(session.folder, session)


def record_in(run_folder: Path, session: Session) -> Metrics:
    """Leaves a job's resolved settings in its run folder and opens its metrics; rank 0 only."""
    durable.replace_text(run_folder / "config.yaml", to_yaml(session.config))
    durable.write_json(run_folder / "ds_config.json", session.engine.ds_config)
    return Metrics(run_folder, resumed_step=session.step, log_to=session.config.train.log_to)


def announce(session: Session) -> None:
    """Says what starts, and warns of what a user may not have meant: a learning rate that will stay below its peak, settings
    without effect, a precision that this processor emulates."""
    log.info("%s", observe.describe_start(session.config, session.me, session.model))
    if session.me.rank == 0:
        for line in without_effect(session.config, session.me.world_size):
            log.warning("%s", line)
    if session.config.train.precision == "bf16" and session.engine.device.type == "cpu" and has_bf16() is False:
        log.warning("train.precision = bf16, and %s", BF16_IS_SLOW)
    log.info("windows: %s", session.sampler.describe_padding())
    if session.config.train.warmup_steps > session.last_step:
        log.warning("train.warmup_steps (%d) exceeds the steps of this job (%d): the learning rate never reaches its peak",
                    session.config.train.warmup_steps, session.last_step)


def shared_corpus(config: RunConfig, group: Group, request: Request) -> Corpus:
    """Rank 0 tokenizes the corpus, the others wait and open it; all fail alike if that fails, and give way alike if asked
    to. A collective."""
    opened: list[Corpus] = []

    def prepare() -> None:
        with suppress(Preempted):  # the others hear of it below
            opened.append(load_corpus(config, progress=request.raise_if_asked))

    on_rank_0(group, prepare)
    agreed(request, group)
    corpus = opened[0] if opened else load_corpus(config)
    digests = group.all_gather_object(corpus.meta["digest"])
    if len(set(digests)) > 1:
        raise ConfigError(f"every rank must read the same corpus: got {len(set(digests))} different ones on {len(digests)} "
                          "ranks; put it on a shared folder and name that in data.path and data.cache")
    return corpus
