"""The training job from top to bottom: batch -> forward -> backward -> step -> commit -> log, then a summary.

Every rank runs these lines in the same order, so every collective inside them is issued by all. The banks are written in
one place only, in `update`, once per optimizer step, after the update was applied.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch

from lmcode import dist
from lmcode.backbone import forward_batch, token_losses
from lmcode.config import RunConfig, flatten
from lmcode.data.replay import ReplaySampler, keep_paused
from lmcode.data.streams import Batch
from lmcode.dist import Group, Rank
from lmcode.eval.held_out import EvalResult, evaluate, void_controls
from lmcode.eval.reading import CLOSING
from lmcode.files import durable
from lmcode.jobs import network, preempt
from lmcode.jobs.clock import Clock
from lmcode.jobs.preempt import Preempted, Request, agreed, noticing
from lmcode.jobs.watch import NullWatch, digest_of, watching
from lmcode.memory.states import COUNTERS
from lmcode.protocol import LayerMemory, State
from lmcode.train import health, observe, resuming, saving, summary
from lmcode.train.ds_config import resolve
from lmcode.train.engine import synchronise
from lmcode.train.profiling import ProfilerWindow
from lmcode.train.progress import Progress
from lmcode.train.schedule import learning_rate
from lmcode.train.session import Session, StepResult
from lmcode.train.start import open_run, set_up

log = logging.getLogger("lmcode")


def run(config: RunConfig, *, resume: str | None = None) -> int:
    """Trains as `config` says and leaves a run folder. Returns the exit code: 1 if the last checkpoint was not saved, 75 if
    the job was asked to end and may be started again.

    Args:
        resume: None, "none", "auto" or a path: see `open_run`.

    Raises:
        ConfigError: for settings that cannot work on this number of ranks, data that cannot be read, or a run that
            cannot be resumed.
    """
    me = dist.discover()
    config.check_trains()
    config.check_world_size(me.world_size)
    resolve(config, me.world_size)
    clock = Clock()
    with (noticing() as request, dist.running(step=lambda: clock.step) as me,
          watching(clock, Group.world(), heartbeat_s=config.train.heartbeat_s, alike=(health.Diverged,)) as watch):
        return _run(config, me, watch, request, resume)


def _run(config: RunConfig, me: Rank, watch: NullWatch, request: Request, resume: str | None) -> int:
    clock, start = watch.clock, open_run(config, watch.group, resume)
    watch.stacks = dist.log_into(start.run_folder / "logs", me, step=lambda: clock.step)
    network.announce(watch.group)
    if start.finished and start.checkpoint is not None:
        log.info("'%s' has already finished (%s): nothing to do", start.run_folder, start.checkpoint.name)
        start.close()
        return 0
    if me.rank == 0:
        request.look_for(start.run_folder / preempt.FILE)
    try:
        session = set_up(config, me, start=start, watch=watch, request=request)
    except Preempted:
        log.warning("asked to end by %s before the first step: nothing to save; start again with --resume auto",
                    request.reason)
        request.honoured()
        start.close()
        return preempt.REQUEUE
    try:
        with clock("training"):
            fit(session)
        with clock("finishing"):
            finish(session, session.training_seconds)
    except Preempted:
        return save_and_end(session)
    return 0 if session.saved == resuming.place_of(session) else 1


def fit(session: Session) -> None:
    """Trains from `session.step` to `session.last_step`, with evaluations, logging and checkpoints in between. A collective.

    Raises:
        Preempted: on every rank, if any was asked to save and end; the session is then as after `session.step` steps.
    """
    config, clock = session.config, session.clock
    seconds_before, began = session.training_seconds, time.perf_counter()
    last_step = session.last_step
    profile = ProfilerWindow(config.train.profile_steps, session.run_folder, rank=session.me.rank)
    progress = Progress(total=last_step, start=session.step, enabled=session.me.rank == 0)
    clock.step = session.step
    if session.owes_evaluation:
        evaluate_midway(session)
    while session.step < last_step:
        profile.before(session.step + 1)
        started = time.perf_counter()
        result = train_step(session)
        log_now = session.step % config.train.log_every == 0 or session.step == last_step
        if log_now:  # a step ends when its loss is known; what a GPU has left to do then is the next one's, until asked
            synchronise(session.engine.device)
        seconds = time.perf_counter() - started
        clock.add("step", seconds)
        profile.after(session.step, ends=result.asked or session.step == last_step)
        progress.step(session.step, loss=result.loss, tokens_per_s=result.tokens / seconds, log_line=log_now)
        if log_now:
            observe.log_step(session, result)
            saving.settle(session)
        session.report(session.step, digest(session, result, whole=log_now))
        session.owes_evaluation = is_due(config.eval.every, session.step) and session.step < last_step
        if session.owes_evaluation and not result.asked:
            evaluate_midway(session)
        session.training_seconds = seconds_before + time.perf_counter() - began
        if result.asked:
            raise Preempted
        if is_due(config.train.save_every, session.step):
            with clock("saving"):
                saving.start(session)
    with clock("saving"):
        saving.settle(session, wait=True)
    progress.close()


def is_due(interval: int, step: int) -> bool:
    """Whether what happens every `interval` steps (0: never) happens after `step`."""
    return interval > 0 and step % interval == 0


def train_step(session: Session) -> StepResult:
    """One whole step: update, commit, the step counted, and what is due after it. A collective.

    Raises:
        Diverged: on every rank, if too many updates in a row were refused; the step is counted then, too.
    """
    result = session.last = update(session)
    session.step += 1
    session.clock.step = session.step
    health.check(session, result)
    if result.applied:  # a refused step leaves no trace
        consolidate(session)
    return result


def update(session: Session) -> StepResult:
    """The update of the weights over the whole global batch, and the commit of what was read and what that offers to
    write. Counts nothing: only `train_step` calls it."""
    config, engine, group, clock = session.config, session.engine, session.group, session.clock
    accumulation = config.train.gradient_accumulation_steps
    engine.set_learning_rate(learning_rate(config.train, session.step))
    reads: dict[int, list[LayerMemory]] = {layer: [] for layer in session.model.banks}
    states: dict[int, State] = {}
    losses_BP: list[torch.Tensor] = []
    by_source_2X = torch.zeros(2, max(1, len(config.data.sources)), dtype=torch.float64, device=engine.device)
    loss_sum, applied = torch.zeros((), dtype=torch.float64, device=engine.device), False
    tokens = session.sampler.global_tokens(session.step)
    for micro in range(accumulation):
        with clock("data"):
            batch = session.sampler.batch(session.step, rank=group.rank, world_size=group.size, micro=micro,
                                          num_micro=accumulation).to(engine.device)
        with clock("forward"):
            state, reset_B = carried(session, micro, batch)
            output = forward_batch(engine.forward, batch._replace(reset_B=reset_B), state)
        loss_BT = token_losses(output)
        local_sum = loss_BT.sum()
        with clock("backward"):
            # DeepSpeed averages over ranks and accumulation steps; the loss is a mean over the tokens of the whole batch.
            engine.backward(local_sum * (group.size * accumulation / max(1, tokens)))
        with clock("optimizer"):
            applied = engine.step()
        states[micro] = (output.state if session.replay is None or state is None
                         else keep_paused(state, output.state, batch.replayed_B))
        losses_BP.append(batch.by_piece(loss_BT.detach()))
        by_source_2X += sums_by_source(batch, losses_BP[-1], sources=by_source_2X.shape[1])
        loss_sum += local_sum.detach().double()
        for layer, layer_reads in reads.items():
            layer_reads.append(output.memory[layer])
    with clock("commit"):
        local = torch.stack([loss_sum, loss_sum.new_tensor(float(session.request.asked()))])
        loss_sum, asked, *by_source = group.all_reduce(torch.cat([local, by_source_2X.flatten()]), phase="loss").tolist()
        loss = loss_sum / max(1, tokens)
        session.states = states if applied else {}  # what a refused step carried may not be finite: streams start afresh
        if applied:
            session.model.memories.commit(reads, step=session.step)
            remember(session, losses_BP)
    return StepResult(loss, applied, tokens, reads, asked > 0, source_losses(config, by_source))


def sums_by_source(batch: Batch, loss_BP: torch.Tensor, *, sources: int) -> torch.Tensor:
    """Sums of token losses and numbers of targets of what each source gave to a micro-batch, [2, S]; replay left out."""
    both_2BP = torch.stack([loss_BP, batch.by_piece(batch.counted_BT)])
    of_X = [(batch.source_BP == source).double() for source in range(sources)]
    return torch.stack([(both_2BP * of_BP).sum((1, 2)) for of_BP in of_X], dim=1)


def source_losses(config: RunConfig, sums: list[float]) -> dict[str, float]:
    """Mean token loss by name of the source, of those that the step has read."""
    names = [source.name for source in config.data.sources]
    return {name: loss / tokens for name, loss, tokens in zip(names, sums, sums[len(names):], strict=False) if tokens}


def carried(session: Session, micro: int, batch: Batch) -> tuple[State | None, torch.Tensor]:
    """The state that a micro-batch starts from, and which of its streams start afresh.

    A stream that has read a token since it started has something pending. One that has not, though it is within a
    document, lost its state to a refused step, and then paused.
    """
    state = session.states.get(micro)
    if state is None and session.replay is not None:
        state = session.model.blank_state(len(batch.reset_B), device=session.engine.device)
    return state, batch.reset_B if state is None else batch.reset_B | ~state.pending_valid_B


def remember(session: Session, losses_BP: list[torch.Tensor]) -> None:
    """Keeps what was trained on for replay: the tokens are known everywhere, the losses are gathered. A collective."""
    if isinstance(session.sampler, ReplaySampler):
        session.sampler.remember(session.step, session.group.all_gather(torch.cat(losses_BP), phase="replay"))


def consolidate(session: Session) -> None:
    """Merges similar entries of every bank after each `train.memory_consolidation_interval` steps. A collective."""
    if not is_due(session.config.train.memory_consolidation_interval, session.step):
        return
    with session.clock("commit"), session.clock("consolidation"):
        reports = session.model.memories.consolidate(session.config.memory.consolidation_threshold)
        for layer, report in reports.items():
            log.info("consolidation after step %d, layer %d: %d entries within %g of another were merged, %d are left",
                     session.step, layer, report.merged, report.threshold, report.after)


def held_out_loss(session: Session, mode: str, windows: int) -> EvalResult:
    """Held-out loss of the model as it is now. A collective.

    Raises:
        Preempted: on every rank, if any was asked to save and end.
    """
    with session.clock("evaluation"):
        return evaluate(session.engine.module, session.examined, banks=session.model.banks, group=session.group, mode=mode,
                        windows=windows, slots=session.config.eval.slots,
                        between=lambda: agreed(session.request, session.group))


def evaluate_midway(session: Session) -> None:
    """The evaluation that `eval.every` asks for after the current step. A collective."""
    results = {mode: held_out_loss(session, mode, session.config.eval.windows) for mode in ("on", "off")}
    observe.log_evaluation(session, results)
    session.owes_evaluation = False


def digest(session: Session, result: StepResult, *, whole: bool) -> int:
    """What the watch compares between ranks; the weights are part of it if `whole`."""
    counters = [getattr(bank, name) for bank in session.model.banks.values() for name in COUNTERS]
    return digest_of(result.loss, result.applied, counters, session.engine.module.parameters() if whole else ())


def save_and_end(session: Session) -> int:
    """Ends a job that was asked to end, with a checkpoint of its last step. Returns the exit code: 1 if that step could not
    be saved. A collective."""
    log.warning("asked to end by %s", session.request.reason or "another rank")
    with session.clock("saving"):
        saving.settle(session, wait=True)
        if session.step and session.saved != resuming.place_of(session):
            saving.save(session)
    safe = not session.step or session.saved == resuming.place_of(session)
    if safe:
        log.warning("stopped after step %d: resume with --resume auto train.run_dir=%s", session.step, session.run_folder)
        session.request.honoured()
    session.close()
    return preempt.REQUEUE if safe else 1


def finish(session: Session, training_seconds: float) -> None:
    """Saves, measures the memory against its controls, and prints what a person wants to know. A collective."""
    if session.saved != resuming.place_of(session):
        with session.clock("saving"):
            saving.save(session)
    windows, void = session.config.eval.final_windows, {}
    if session.model.banks:
        void = void_controls(session.examined, scope=session.config.memory.scope, windows=windows)
    modes = [mode for mode in CLOSING if mode not in void] if session.model.banks else ["on"]
    results = {mode: held_out_loss(session, mode, windows) for mode in modes}
    observe.log_evaluation(session, results)
    facts = summary.collect(session, results, void, training_seconds, session.saved or Path("none"))
    if session.me.rank == 0:
        session.metrics.hyperparameters(flatten(session.config.model_dump(mode="json")), observe.result_tags(results))
        session.metrics.text(session.step, "sample", facts.sample)
        text = summary.render(facts)
        durable.replace_text(session.folder / "summary.txt", text)
        log.info("done\n%s", text)
    session.close()
