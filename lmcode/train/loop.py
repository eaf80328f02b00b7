"""The training job from top to bottom: batch -> forward -> backward -> step -> commit -> log, then a summary.

Every rank runs these lines in the same order, so every collective inside them is issued by all. The banks are written in
one place only: `commit` below, once per optimizer step, after the update was applied.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch

from lmcode import dist
from lmcode.config import RunConfig
from lmcode.dist import Group
from lmcode.eval.held_out import MODES, EvalResult, evaluate
from lmcode.model.lm import LayerMemory, StreamState
from lmcode.retrieval import Candidates, Hits
from lmcode.train import checkpoint, durable, observe, summary
from lmcode.train.ds_config import resolve
from lmcode.train.engine import synchronise
from lmcode.train.metrics import flatten
from lmcode.train.progress import Progress
from lmcode.train.schedule import learning_rate
from lmcode.train.session import Session, StepResult
from lmcode.train.start import open_run, set_up

log = logging.getLogger("lmcode")


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


def fit(session: Session) -> None:
    """Trains from `session.step` to the end, evaluating, logging and saving on the way. A collective."""
    config, clock = session.config, session.clock
    seconds_before, began = session.training_seconds, time.perf_counter()
    progress = Progress(total=config.train.total_steps, start=session.step, enabled=session.me.rank == 0)
    while session.step < config.train.total_steps:
        started = time.perf_counter()
        result = session.last = train_step(session)
        session.step += 1
        consolidate(session)
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
    states: dict[int, StreamState] = {}
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
        states[micro] = output.state
        loss_sum += local_sum.detach().double()
        for layer, layer_reads in reads.items():
            layer_reads.append(output.memory[layer])
    with clock("commit"):
        loss = float(group.all_reduce(loss_sum, phase="loss")) / max(1, tokens)
        session.states = states if applied else {}  # what a refused step carried may not be finite: streams start afresh
        if applied:
            commit(session, reads)
    return StepResult(loss, applied, tokens, reads)


def commit(session: Session, reads: dict[int, list[LayerMemory]]) -> None:
    """Writes what the step offers into every bank, once, and books the hits it had."""
    for layer, bank in session.model.banks.items():
        candidates: list[Candidates] = [read.candidates for read in reads[layer]]
        hits: list[Hits] = [read.hits for read in reads[layer]]
        bank.commit(candidates, hits, step=session.step)


def consolidate(session: Session) -> None:
    """Merges similar entries of every bank after each `train.memory_consolidation_interval` steps. A collective."""
    interval = session.config.train.memory_consolidation_interval
    if not interval or session.step % interval:
        return
    with session.clock("commit"):
        for layer, bank in session.model.banks.items():
            report = bank.consolidate(session.config.memory.consolidation_threshold)
            log.info("consolidation after step %d, layer %d: %d entries within %g of another were merged, %d are left",
                     session.step, layer, report.merged, report.threshold, report.after)


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
