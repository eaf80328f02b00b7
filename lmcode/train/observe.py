"""What a running job tells: the words of metrics.jsonl and TensorBoard, and how each number is made.

Losses, times and shares are averaged over ranks, by a few collectives per logged step; rank 0 writes them. Its own are
`perf/bytes_received` and `memory/L*/age_p50`, the median age of the hits that rank 0's shard supplied (the monitor's, of the
same name, is over all hits).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from lmcode.backbone import Backbone
from lmcode.config import RunConfig
from lmcode.data.replay import ReplaySampler
from lmcode.dist import Rank
from lmcode.eval.held_out import EvalResult
from lmcode.jobs.clock import PHASES
from lmcode.memory import measure, planning
from lmcode.train import flops
from lmcode.train.engine import count_parameters
from lmcode.train.session import Session, StepResult
from lmcode.version import __version__

log = logging.getLogger("lmcode")

EVAL_TAGS = {"on": "eval/loss", "off": "eval/loss_memory_off", "shuffled": "eval/loss_memory_shuffled",
             "random": "eval/loss_memory_random"}


def describe_start(config: RunConfig, me: Rank, model: Backbone) -> str:
    """One line: who trains what on how many ranks, and how many of the weights serve the memory."""
    total = count_parameters(model.parameters())
    memory = count_parameters(p for name, p in model.named_parameters() if "_term" in name or name.startswith("recipe."))
    layers = ", ".join(str(layer) for layer in model.banks) or "none"
    in_group = config.memory.ranks_per_group(me.world_size)
    groups = f", {me.world_size // in_group} memory groups of {in_group} rank(s)" if in_group < me.world_size else ""
    return (f"lmcode {__version__}: preset {config.preset}, {total:,} parameters ({100 * memory / total:.1f} % for memory), "
            f"{me.world_size} rank(s) by {me.launcher}, {config.train.deepspeed}, {config.train.precision}; banks in layers "
            f"{layers} of {config.model.long_term_memory_slots:,} slots, {config.memory.tier} search, "
            f"{config.memory.exchange} exchange, {config.memory.fetch} fetch, {config.memory.scope} scope{groups}")


def log_step(session: Session, result: StepResult) -> None:
    """Records the last logged stretch of steps. A collective."""
    steps = session.step % session.config.train.log_every or session.config.train.log_every
    timings = session.clock.take()
    values = {
        "train/loss": result.loss,
        "train/grad_norm": session.engine.gradient_norm(),
        "train/learning_rate": session.engine.learning_rate,
        "train/skipped_steps": float(session.engine.skipped_steps),
        "perf/tokens_per_s": result.tokens / max(timings["step"] / steps, 1e-9),
    }
    if session.config.train.peak_tflops is not None:
        values["perf/mfu"] = flops_share(session, values["perf/tokens_per_s"], session.config.train.peak_tflops)
    values.update({f"train/loss/{name}": loss for name, loss in result.by_source.items()})
    times = phase_times(session, timings, steps)
    session.costs.add(times, steps)
    values.update(times)
    peak = torch.tensor([flops.peak_memory_mib(session.engine.device)], device=session.engine.device)
    values["perf/peak_memory_mib"] = float(session.group.all_gather(peak, phase="metrics").max())
    if isinstance(session.sampler, ReplaySampler):
        values.update(session.sampler.take())
    for layer in session.model.banks:
        values.update(layer_metrics(session, result, layer))
    session.metrics.scalars(session.step, values)
    forget_costs(session)


def flops_share(session: Session, tokens_per_s: float, peak_tflops: float) -> float:
    """Share of the operations that all ranks could do which the model needs for its targets ("model FLOPs utilisation")."""
    needed = flops.flops_per_token(count_parameters(session.model.parameters()), session.config.model,
                                   session.config.train.sequence_length)
    return needed * tokens_per_s / (peak_tflops * 1e12 * session.group.size)


def forget_costs(session: Session) -> None:
    """Drops what was counted outside of steps, so that measuring and evaluating are not taken for training."""
    session.group.take()
    for bank in session.model.banks.values():
        bank.reader.stopwatch.take()


def phase_times(session: Session, timings: Mapping[str, float], steps: int) -> dict[str, float]:
    """Milliseconds per step by phase, mean over ranks. Search and exchange happen inside the other phases and are taken
    out of them, so that the phases add up to about the step."""
    banks, group = session.model.banks.values(), session.group
    search = sum(bank.reader.stopwatch.take() for bank in banks)
    exchange, received = group.take()
    raw = {**dict.fromkeys(PHASES, 0.0), **timings, "search": search, "exchange": sum(exchange.values())}
    inside_forward = search + sum(exchange.get(phase, 0.0) for phase in ("queries", "hits", "values"))
    raw["forward"] -= inside_forward
    raw["backward"] -= exchange.get("gradients", 0.0)
    raw["commit"] -= sum(exchange.get(phase, 0.0) for phase in ("writes", "loss", "replay"))
    ms = torch.tensor([1000 * raw[phase] / steps for phase in PHASES], device=session.engine.device)
    ms = group.all_reduce(ms, phase="metrics") / group.size
    named = {f"perf/{phase}_ms": value for phase, value in zip(PHASES, ms.tolist(), strict=True)}
    return {**named, "perf/bytes_received": sum(received.values()) / steps}


def layer_metrics(session: Session, result: StepResult, layer: int) -> dict[str, float]:
    """The `memory/L{layer}/...` numbers of one bank, with their histograms, without what was not measured. A collective."""
    bank, group, reads = session.model.banks[layer], session.group, result.reads[layer]
    gate = torch.cat([read.gate_BT.flatten() for read in reads])
    share = torch.cat([read.share_HN.flatten() for read in reads])
    null = torch.cat([read.null_share_HN.flatten() for read in reads])
    ages = torch.cat([measure.ages(read.hits, step=session.step) for read in reads]).float()
    local = torch.tensor([gate.mean(), share.mean(), null.mean()], device=gate.device)
    gate_mean, hit_mass, null_mass = (group.all_reduce(local, phase="metrics") / group.size).tolist()
    stats = bank.stats()
    prefix = f"memory/L{layer}"
    scores = torch.cat([read.hits.score_HNK[read.hits.valid_HNK] for read in reads])
    for name, sample in (("scores", scores), ("ages", ages), ("gates", gate)):
        session.metrics.histogram(session.step, f"{prefix}/{name}", sample)
    recall = planning.review(bank)
    return {
        **({} if recall is None else {f"{prefix}/recall_at_k": recall}),
        f"{prefix}/fill": stats["live"] / stats["slots"],
        f"{prefix}/gate_mean": gate_mean,
        f"{prefix}/hit_mass": hit_mass,
        f"{prefix}/null_mass": null_mass,
        f"{prefix}/age_p50": float(ages.median()) if ages.numel() else float("nan"),
        f"{prefix}/evicted": float(stats["evicted"]),
        f"{prefix}/second_chance_share": stats["chances"] / max(1, stats["live"]),
        f"{prefix}/spared_share": stats["spared"] / max(1, stats["live"]),
        f"{prefix}/merged": float(stats["merged"]),
        f"{prefix}/rejected": float(stats["rejected"]),
    }


def result_tags(results: Mapping[str, EvalResult]) -> dict[str, float]:
    """Held-out losses under their metric names."""
    tags = {EVAL_TAGS[mode]: result.loss for mode, result in results.items()}
    if "on" in results:
        tags.update({f"eval/loss/{name}": loss for name, loss in results["on"].by_source.items()})
    return tags


def log_evaluation(session: Session, results: Mapping[str, EvalResult]) -> None:
    """Records held-out losses and says them in one line."""
    session.metrics.scalars(session.step, result_tags(results))
    log.info("held-out loss after step %d: %s", session.step,
             "  ".join(f"memory {mode} {result.loss:.4f}" for mode, result in results.items()))
    forget_costs(session)
