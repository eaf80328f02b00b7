"""`lmcode bench step`: training steps of a model with its bank beside the same model without one, on the same documents.

Every rank, a process of one thread, holds both models with an engine each, and all ranks train them in turns. The bank is
full before anybody is timed, of entries that no document of the corpus wrote, so that every write evicts somebody. Where
the time goes is said by the counters that a run's `perf/` metrics come from: searching and exchanging are taken out of the
phases that they happen in. Somebody else's model is a further peer where it is installed: see `memorizing`.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lmcode import dist
from lmcode.bench import memorizing
from lmcode.bench.banks import fill
from lmcode.bench.turns import in_turns, medians, timed
from lmcode.bench.workers import Workers
from lmcode.config import ConfigError, RunConfig
from lmcode.dist import Group
from lmcode.jobs.clock import PHASES, Clock
from lmcode.jobs.watch import NullWatch
from lmcode.train import loop, observe
from lmcode.train.engine import synchronise
from lmcode.train.session import Session
from lmcode.train.start import Start, set_up

WITH, WITHOUT = "with its bank", "without a bank"


@dataclass(frozen=True)
class Settings:
    """What `lmcode bench step` was asked for; `steps` of each model before the other has its turn."""

    config: RunConfig
    ranks: int
    steps: int
    rounds: int


class Pair:
    """What one worker holds: its part of both jobs."""

    def __init__(self, configs: dict[str, RunConfig], folder: str, seed: int) -> None:
        self.sessions: dict[str, Session] = {}
        for number, (name, config) in enumerate(configs.items()):
            start = Start(Path(folder) / str(number))
            self.sessions[name] = set_up(config, dist.discover(), start=start, watch=NullWatch(Clock(), Group.world()))
        for bank in self.sessions[WITH].model.banks.values():
            fill(bank, seed=seed)
        self.others: memorizing.Memorizing | None = None
        if not memorizing.missing():
            group, corpus = Group.world(), self.sessions[WITH].corpus
            self.others = memorizing.Memorizing(configs[WITH], corpus.train, group, Path(folder) / f"others-{group.rank}")

    def notes(self) -> dict[str, str]:
        """What a reader should know of each way: how full the banks are, and how large somebody else's model is."""
        stats = [bank.stats() for bank in self.sessions[WITH].model.banks.values()]
        live, slots = (sum(one[name] for one in stats) for name in ("live", "slots"))
        others = memorizing.missing() if self.others is None else f"another model, of {self.others.weights:,} weights"
        return {WITH: f"{live:,} of {slots:,} slots taken", WITHOUT: "", memorizing.NAME: others}

    def turn(self, name: str, steps: int) -> dict[str, float]:
        """Some steps of one model: tokens of all ranks, seconds on the wall and of the processor, milliseconds a step by
        phase, and the bytes received a step; the last two of our own models."""
        if name == memorizing.NAME:
            assert self.others is not None
            return self.others.turn(steps)
        session, tokens = self.sessions[name], list[int]()
        session.clock.take()
        observe.forget_costs(session)
        session.group.barrier()

        def train() -> None:
            tokens.extend(loop.train_step(session).tokens for _ in range(steps))
            synchronise(session.engine.device)

        spent = timed(train)
        session.clock.add("step", spent.wall)
        times = observe.phase_times(session, session.clock.take(), steps)
        return {"tokens": float(sum(tokens)), "wall": spent.wall, "cpu": spent.cpu, **times}


def run(settings: Settings) -> list[dict[str, Any]]:
    """A row for each model: medians of tokens a second, of the speed beside the model without a bank, and of milliseconds a
    step by phase. Somebody else's has one, too, if only to say that it was left out.

    Raises:
        ConfigError: for settings without a bank, or that cannot be trained with on so many ranks; a corpus that cannot be
            had.
    """
    config = settings.config
    if not config.model.long_term_memory_slots or not config.model.memory_layer_indices:
        raise ConfigError("model.long_term_memory_slots must be 1 or more and model.memory_layers name a layer, as the peer "
                          f"is the same model without a bank: got {config.model.long_term_memory_slots} slots, layers "
                          f"{[*config.model.memory_layer_indices]}")
    config.check_trains()
    config.check_world_size(settings.ranks)
    config = config.model_copy(update={"train": config.train.model_copy(update={"log_to": ()})})
    shape = config.model.model_copy(update={"long_term_memory_slots": 0})
    configs = {WITH: config, WITHOUT: config.model_copy(update={"model": shape})}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(len(configs)):
            (Path(folder) / str(number)).mkdir()
        with Workers(settings.ranks, Pair, configs, folder, config.train.seed) as workers:
            names = [*configs, *([] if memorizing.missing() else [memorizing.NAME])]
            turns = in_turns({name: partial(_turn, workers, name, settings.steps) for name in names}, settings.rounds)
            notes = workers.call("notes")[0]
    found = {name: medians(some) for name, some in turns.items()}
    return [{"way": name, **(_row(found[name], found[WITHOUT], settings.steps) if name in found else {}), "note": note}
            for name, note in notes.items()]


def _turn(workers: Workers, name: str, steps: int) -> dict[str, float]:
    """Seconds of the slowest rank, processor time of all; the other numbers are the same on every rank, or its own."""
    by_rank = workers.call("turn", name, steps)
    return {**by_rank[0], "wall": max(one["wall"] for one in by_rank), "cpu": sum(one["cpu"] for one in by_rank)}


def _row(mine: dict[str, float], beside: dict[str, float], steps: int) -> dict[str, Any]:
    speed = (mine["tokens"] / mine["wall"]) / (beside["tokens"] / beside["wall"])
    return {"tokens/s": mine["tokens"] / mine["wall"], "speed": speed, "cpu ms": 1000 * mine["cpu"] / steps,
            "step ms": 1000 * mine["wall"] / steps,
            **{f"{phase} ms": mine.get(f"perf/{phase}_ms") for phase in PHASES if phase != "step"},
            "bytes": round(mine["perf/bytes_received"]) if "perf/bytes_received" in mine else None}
