"""The training job from top to bottom: set up, then batch -> forward -> backward -> step -> commit -> log, then a summary.

Every rank runs these lines in the same order, so every collective inside them is issued by all. The banks are written in
one place only: `commit` below, once per optimizer step, after the update was applied.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lmcode import dist
from lmcode.config import ConfigError, RunConfig, to_yaml
from lmcode.dist import Group, Rank
from lmcode.eval.held_out import MODES, EvalResult, evaluate, held_out_sampler
from lmcode.lmcode import LMCODE
from lmcode.model.lm import LayerMemory, StreamState
from lmcode.retrieval import Candidates, Hits
from lmcode.train import checkpoint, durable, observe, summary
from lmcode.train.clock import Clock
from lmcode.train.corpus import Corpus, load_corpus
from lmcode.train.data import StreamSampler
from lmcode.train.ds_config import resolve
from lmcode.train.durable import Lock
from lmcode.train.engine import Engine, synchronise
from lmcode.train.metrics import Metrics, NullMetrics, flatten
from lmcode.train.progress import Progress
from lmcode.train.schedule import learning_rate

log = logging.getLogger("lmcode")


@dataclass
class Session:
    """Everything one training job is made of, on one rank."""

    config: RunConfig
    me: Rank
    group: Group
    run_folder: Path
    corpus: Corpus
    model: LMCODE
    engine: Engine
    sampler: StreamSampler
    held_out: StreamSampler
    metrics: NullMetrics
    states: dict[int, StreamState] = field(default_factory=dict)  # by micro-batch
    step: int = 0  # optimizer steps behind us, skipped ones included
    clock: Clock = field(default_factory=Clock)
    last: StepResult | None = None
    costs: observe.Costs = field(default_factory=lambda: observe.Costs(ms=dict.fromkeys(observe.PHASES, 0.0)))
    lock: Lock | None = None  # rank 0: the right to write into the run folder
    saved: Path | None = None  # the newest checkpoint of this run
    failed_saves: int = 0
    training_seconds: float = 0.0  # in `fit`, over all the processes that the run has had

    def close(self) -> None:
        """Ends recording and gives the run folder back."""
        self.metrics.close()
        if self.lock is not None:
            self.lock.close()


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did: global mean loss in nats per token, whether the update was applied, the targets of the
    global batch, and each memory layer's traffic by micro-batch."""

    loss: float
    applied: bool
    tokens: int
    reads: dict[int, list[LayerMemory]]


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


def run(config: RunConfig, *, resume: str | None = None) -> int:
    """Trains as `config` says and leaves a run folder. Returns the exit code: 1 if the last checkpoint was not saved.

    Args:
        resume: None, "none", "auto" or a path: see `open_run`.

    Raises:
        ConfigError: for settings that cannot work on this number of ranks, data that cannot be read, or a run that
            cannot be resumed.
    """
    me = dist.discover()
    config.check_world_size(me.world_size)
    resolve(config, me.world_size)
    with dist.running() as me:
        start = open_run(config, Group.world(), resume)
        if start.finished:
            log.info("'%s' has already finished (%s): nothing to do", start.run_folder, start.checkpoint.name)
            start.close()
            return 0
        session = set_up(config, me, start=start)
        fit(session)
        finish(session, session.training_seconds)
    return 0 if session.saved == checkpoint.place_of(session) else 1


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


def fit(session: Session) -> None:
    """Trains from `session.step` to the end, evaluating, logging and saving on the way. A collective."""
    config, clock = session.config, session.clock
    seconds_before, began = session.training_seconds, time.perf_counter()
    progress = Progress(total=config.train.total_steps, start=session.step, enabled=session.me.rank == 0)
    while session.step < config.train.total_steps:
        started = time.perf_counter()
        result = session.last = train_step(session)
        session.step += 1
        synchronise(session.engine.device)
        seconds = time.perf_counter() - started
        clock.add("step", seconds)
        log_now = session.step % config.train.log_every == 0 or session.step == config.train.total_steps
        progress.step(session.step, loss=result.loss, tokens_per_s=result.tokens / seconds, log_line=log_now)
        if log_now:
            observe.log_step(session, result)
        if config.eval.every and session.step % config.eval.every == 0 and session.step < config.train.total_steps:
            results = {mode: held_out_loss(session, mode, config.eval.windows) for mode in ("on", "off")}
            observe.log_evaluation(session, results)
        session.training_seconds = seconds_before + time.perf_counter() - began
        if config.train.save_every and session.step % config.train.save_every == 0:
            checkpoint.save(session)
    progress.close()


def train_step(session: Session) -> StepResult:
    """One optimizer step over the whole global batch, and the commit of what it read and offers to write."""
    config, engine, group, clock = session.config, session.engine, session.group, session.clock
    accumulation = config.train.gradient_accumulation_steps
    engine.set_learning_rate(learning_rate(config.train, session.step))
    reads: dict[int, list[LayerMemory]] = {layer: [] for layer in session.model.banks}
    loss_sum, applied = torch.zeros((), dtype=torch.float64, device=engine.device), False
    tokens = session.sampler.global_tokens(session.step)
    for micro in range(accumulation):
        with clock("data"):
            batch = session.sampler.batch(session.step, rank=group.rank, world_size=group.size, micro=micro,
                                          num_micro=accumulation).to(engine.device)
        with clock("forward"):
            output = engine.forward(batch.input_ids_BT, targets_BT=batch.targets_BT, state=session.states.get(micro),
                                    reset_B=batch.reset_B, namespace_B=batch.namespace_B, valid_BT=batch.valid_BT)
        local_sum = output.token_loss.sum()
        with clock("backward"):
            # DeepSpeed averages over ranks and accumulation steps; the loss is a mean over the tokens of the whole batch.
            engine.backward(local_sum * (group.size * accumulation / max(1, tokens)))
        with clock("optimizer"):
            applied = engine.step()
        session.states[micro] = output.state
        loss_sum += local_sum.detach().double()
        for layer, layer_reads in reads.items():
            layer_reads.append(output.memory[layer])
    with clock("commit"):
        loss = float(group.all_reduce(loss_sum, phase="loss")) / max(1, tokens)
        if applied:
            commit(session, reads)
    return StepResult(loss, applied, tokens, reads)


def commit(session: Session, reads: dict[int, list[LayerMemory]]) -> None:
    """Writes what the step offers into every bank, once, and books the hits it had."""
    for layer, bank in session.model.banks.items():
        candidates: list[Candidates] = [read.candidates for read in reads[layer]]
        hits: list[Hits] = [read.hits for read in reads[layer]]
        bank.commit(candidates, hits, step=session.step)


def held_out_loss(session: Session, mode: str, windows: int) -> EvalResult:
    """Held-out loss of the model as it is now. A collective."""
    return evaluate(session.engine.module, session.held_out, banks=session.model.banks, group=session.group, mode=mode,
                    windows=windows, slots=session.config.eval.slots)


def finish(session: Session, training_seconds: float) -> None:
    """Saves, measures the memory against its controls, and prints what a person wants to know. A collective."""
    if session.saved != checkpoint.place_of(session):
        checkpoint.save(session)
    modes = MODES if session.model.banks else ("on",)
    results = {mode: held_out_loss(session, mode, session.config.eval.final_windows) for mode in modes}
    observe.log_evaluation(session, results)
    facts = summary.collect(session, results, training_seconds, session.saved or Path("none"))
    if session.me.rank == 0:
        session.metrics.hyperparameters(flatten(session.config.model_dump(mode="json")), observe.result_tags(results))
        session.metrics.text(session.step, "sample", facts.sample)
        text = summary.render(facts)
        durable.replace_text(session.run_folder / "summary.txt", text)
        log.info("done\n%s", text)
    session.close()
