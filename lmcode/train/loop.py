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
from lmcode.train import checkpoint, observe, summary
from lmcode.train.clock import Clock
from lmcode.train.corpus import Corpus, load_corpus
from lmcode.train.data import StreamSampler
from lmcode.train.ds_config import resolve
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
    costs: observe.Costs = field(default_factory=observe.Costs)


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did: global mean loss in nats per token, whether the update was applied, the targets of the
    global batch, and each memory layer's traffic by micro-batch."""

    loss: float
    applied: bool
    tokens: int
    reads: dict[int, list[LayerMemory]]


def run(config: RunConfig) -> int:
    """Trains as `config` says and leaves a run folder. Returns the exit code.

    Raises:
        ConfigError: for settings that cannot work on this number of ranks, or data that cannot be read.
    """
    me = dist.discover()
    config.check_world_size(me.world_size)
    resolve(config, me.world_size)
    with dist.running() as me:
        session = set_up(config, me)
        started = time.perf_counter()
        fit(session)
        finish(session, time.perf_counter() - started)
    return 0


def set_up(config: RunConfig, me: Rank) -> Session:
    """Builds the session: run folder, corpus, model with banks, engine. A collective."""
    group = Group.world()
    run_folder, corpus = shared_start(config, group)
    log.info("corpus: %s", corpus.describe())
    torch.manual_seed(config.train.seed)  # the same initial weights on every rank
    device = dist.device()
    model = LMCODE(config.model, memory=config.memory, group=group, device=device)
    model.activation_checkpointing = config.train.activation_checkpointing
    engine = Engine(model, config, world_size=me.world_size)
    sampler = StreamSampler(corpus.train, streams=config.train.streams, sequence_length=config.train.sequence_length,
                            seed=config.train.seed)
    metrics: NullMetrics = Metrics(run_folder) if me.rank == 0 else NullMetrics()
    if me.rank == 0:
        checkpoint.write_json(run_folder / "ds_config.json", engine.ds_config)
    log.info("%s", observe.describe_start(config, me, model))
    if config.train.warmup_steps > config.train.total_steps:
        log.warning("train.warmup_steps (%d) exceeds train.total_steps (%d): the learning rate never reaches its peak",
                    config.train.warmup_steps, config.train.total_steps)
    return Session(config=config, me=me, group=group, run_folder=run_folder, corpus=corpus, model=model, engine=engine,
                   sampler=sampler, held_out=held_out_sampler(corpus.held_out, config), metrics=metrics)


def shared_start(config: RunConfig, group: Group) -> tuple[Path, Corpus]:
    """Rank 0 makes the run folder and tokenizes the corpus, the others wait; all fail alike if that fails."""
    corpus, message, run_folder = None, None, None
    if group.rank == 0:
        try:
            name = config.train.run_dir or f"runs/{config.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
            run_folder = checkpoint.make_run_folder(Path(name))
            (run_folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
            corpus = load_corpus(config)
        except (ConfigError, OSError) as error:
            message = str(error)
    message, run_folder = group.all_gather_object((message, run_folder))[0]
    if message is not None:
        raise ConfigError(message)
    corpus = corpus or load_corpus(config)
    digests = group.all_gather_object(corpus.meta["digest"])
    if len(set(digests)) > 1:
        raise ConfigError(f"every rank must read the same corpus: got {len(set(digests))} different ones on {len(digests)} "
                          "ranks; put it on a shared folder and name that in data.path and data.cache")
    return run_folder, corpus


def fit(session: Session) -> None:
    """Trains from `session.step` to the end, evaluating, logging and saving on the way. A collective."""
    config, clock = session.config, session.clock
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
    path = checkpoint.save(session)
    modes = MODES if session.model.banks else ("on",)
    results = {mode: held_out_loss(session, mode, session.config.eval.final_windows) for mode in modes}
    observe.log_evaluation(session, results)
    facts = summary.collect(session, results, training_seconds, path)
    if session.me.rank == 0:
        session.metrics.hyperparameters(flatten(session.config.model_dump(mode="json")), observe.result_tags(results))
        session.metrics.text(session.step, "sample", facts.sample)
        text = summary.render(facts)
        (session.run_folder / "summary.txt").write_text(text, encoding="utf-8")
        log.info("done\n%s", text)
    session.metrics.close()
