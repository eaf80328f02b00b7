"""A trial: a task, the lessons by which a small model learns it, and its controls; measured over seeds.

Every number stands beside the same model without a bank (equal parameters and steps), without a bank in the same processor
time, with a cache of former windows of equal bytes instead, and with its memory off, shuffled and random; where a task needs
one memory for all, beside private ones, too. Lessons and questions come from different seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from lmcode.backbone import Backbone
from lmcode.eval.equal_bytes import bank_bytes, windows_of
from lmcode.eval.learning import Learned, Training, learn
from lmcode.eval.reading import MODES
from lmcode.eval.tasks.task import Case, Task, documents_of, run_task

ASKED = 20_000  # questions are drawn from seeds from here on, lessons from those below
Say = Callable[[str], None]


class Measured(NamedTuple):
    """One number: of a trial and a control, at a point of what is varied, with one seed."""

    trial: str
    control: str
    point: float | str
    seed: int
    score: float
    nats: float


@dataclass(frozen=True)
class Trial:
    """What is learned and what is asked.

    title: what is shown, in one line. varied: what the points are.
    training: the model with a bank. lessons: tasks to learn from with their share of the steps, in turn.
    asked: by point. asked_memory: settings of the memory that differ from those of training when it is asked.
    slots: of the memory when it is asked; those of training when None.
    policies: further settings of the memory to ask with, by name, in place of the modes.
    expected: a score by point to set beside the others, by name.
    parts: numbers of private memories to ask with, too. target: the score that is aimed at; None: none.
    """

    title: str
    varied: str
    training: Training
    lessons: Sequence[tuple[Task, float]]
    asked: Mapping[float, Task]
    asked_memory: Mapping[str, Any] = field(default_factory=dict)
    slots: int | None = None
    policies: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    expected: Mapping[str, Callable[[float], float]] = field(default_factory=dict)
    parts: Sequence[int] = ()
    target: float | None = None
    streams: int = 8
    modes: Sequence[str] = tuple(MODES)
    rivals: Sequence[str] = ("no bank", "no bank, same time", "cache of equal bytes")


Taught = dict[str, Learned]  # by training, lessons and seed


def run_trial(name: str, trial: Trial, *, seeds: Iterable[int], say: Say = lambda _: None,
              known: Taught | None = None) -> list[Measured]:
    """Trains and asks, with every control. Models that are in `known` are not trained again; what is made goes there."""
    known = {} if known is None else known
    found: list[Measured] = []
    for seed in seeds:
        with_bank = taught(trial, trial.training, seed, known)
        say(f"{name}, seed {seed}: {with_bank.steps} steps, {with_bank.seconds:.0f} s, loss {with_bank.loss:.4f}")
        model = asked_with(trial, with_bank.model, trial.asked_memory)
        found += [one for mode in trial.modes for one in answers(name, trial, model, mode, seed, mode=mode)]
        for policy, settings in trial.policies.items():
            other = asked_with(trial, with_bank.model, {**trial.asked_memory, **settings})
            found += answers(name, trial, other, policy, seed)
        found += [Measured(name, curve, point, seed, score(point), 0.0) for curve, score in trial.expected.items()
                  for point in trial.asked]
        for parts in trial.parts:
            found += answers(name, trial, model, f"{parts} private banks", seed, parts=parts)
        seconds: dict[str, float] = {}
        for control, training in rivals(trial, with_bank, seconds):
            rival = taught(trial, training, seed, known)
            seconds[control] = rival.seconds
            say(f"{name}, seed {seed}, {control}: {rival.steps} steps, {rival.seconds:.0f} s, loss {rival.loss:.4f}")
            found += answers(name, trial, rival.model, control, seed)
    return found


def taught(trial: Trial, training: Training, seed: int, known: Taught) -> Learned:
    """A model that has had the lessons."""
    key = repr((training, trial.lessons, seed))
    if key not in known:
        vocab_size = training.configs()[0].vocab_size
        stages = [(documents_of(cases_of(task, seed * 100 + number, vocab_size)), share)
                  for number, (task, share) in enumerate(trial.lessons)]
        known[key] = learn(training, stages, seed=seed)
    return known[key]


def cases_of(task: Task, seed: int, vocab_size: int) -> list[Case]:
    """Cases to learn from; their seeds are never those of questions."""
    if seed >= ASKED:
        raise ValueError(f"lessons are drawn with seeds below {ASKED}: got {seed}")
    return list(task.cases(seed, vocab_size=vocab_size))


class Rivalled(Protocol):
    """What trains a model with a bank and compares it with rivals."""

    @property
    def training(self) -> Training: ...

    @property
    def rivals(self) -> Sequence[str]: ...

    @property
    def streams(self) -> int: ...


def rivals(trial: Rivalled, with_bank: Learned, seconds: Mapping[str, float]) -> Iterable[tuple[str, Training]]:
    """The models that the one with a bank must beat, by name; each is made when the one before it has been trained."""
    training, (shape, memory) = trial.training, trial.training.configs()
    without = training.changed(model={"long_term_memory_slots": 0})
    for name in trial.rivals:
        if name == "no bank":
            yield name, without
        elif name == "no bank, same time":
            faster = with_bank.seconds / max(seconds["no bank"], 1e-9)
            yield name, without.changed(steps=max(training.steps, round(faster * training.steps)))
        elif name == "cache of equal bytes":
            windows = windows_of(bank_bytes(shape, memory, trial.streams), shape)
            yield name, without.changed(model={"cache_windows": windows})
        else:
            raise ValueError(f"a rival is 'no bank', 'no bank, same time' or 'cache of equal bytes': got '{name}'")


def asked_with(trial: Trial, model: Backbone, settings: Mapping[str, Any]) -> Backbone:
    """The model with other settings of its memory, which is empty; the model itself where there are none."""
    if not settings:
        return model
    other = trial.training.changed(memory=dict(settings)).model_of()
    other.load_state_dict(model.state_dict())
    return other.eval()


def answers(name: str, trial: Trial, model: Backbone, control: str, seed: int, *, mode: str = "on",
            parts: int = 1) -> list[Measured]:
    """The scores of a model's answers at every point."""
    found = []
    for point, task in trial.asked.items():
        result = run_task(model, task, seed=ASKED + seed, mode=mode, streams=trial.streams, parts=parts, slots=trial.slots)
        found.append(Measured(name, control, point, seed, result.score, result.nats))
    return found


class Summary(NamedTuple):
    """Over seeds: the mean of a score and its spread (the largest minus the smallest), and both of the nats."""

    score: float
    spread: float
    nats: float
    nats_spread: float
    seeds: int


def summarised(found: Iterable[Measured]) -> dict[tuple[str, str, float | str], Summary]:
    """By trial, control and point, in the order of measuring."""
    grouped: dict[tuple[str, str, float | str], list[Measured]] = {}
    for one in found:
        grouped.setdefault((one.trial, one.control, one.point), []).append(one)
    return {key: Summary(*mean_and_spread([one.score for one in many]), *mean_and_spread([one.nats for one in many]),
                         len(many)) for key, many in grouped.items()}


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and the largest minus the smallest."""
    return statistics.fmean(values), max(values) - min(values)
