"""`lmcode eval --suite`: trials of a size, run one after the other, and their numbers as JSON and Markdown."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lmcode.config import EVICTIONS, ConfigError, near_match
from lmcode.eval.continual import ContinualTrial, domains_of, run_continual, worse_name
from lmcode.eval.learning import Training
from lmcode.eval.tasks.needles import Needles
from lmcode.eval.tasks.recall import KeyValueRecall
from lmcode.eval.tasks.shared import SharedFacts
from lmcode.eval.tasks.task import Ids
from lmcode.eval.tasks.worlds import Worlds
from lmcode.eval.texts import SHAPE as TEXT_SHAPE
from lmcode.eval.texts import TextTrial, run_text, sentences_of
from lmcode.eval.trial import Measured, Say, Summary, Taught, Trial, run_trial, summarised
from lmcode.version import MADE_BY, __version__

# So many cases that none is read twice: a lesson that is read over and over is learned by heart.
NEAR = KeyValueRecall(count=4000, pairs=8, between=0, questions=8, jitter=16)  # within one window: what to look for
FAR = KeyValueRecall(count=2000, pairs=32, between=64, questions=32, jitter=63)  # beyond it
BY_TOKEN = {"memory_key_tokens": 1, "memory_temperature": 16.0}
SMALL_BANK = {**BY_TOKEN, "vocab_size": 768, "long_term_memory_slots": 4096}
LARGE_BANK = {**BY_TOKEN, "vocab_size": 3072, "long_term_memory_slots": 16384}
NEEDLE_MODEL = {**LARGE_BANK, "vocab_size": 512, "memory_key_tokens": 2, "memory_values": "token"}
GLOBAL = {"scope": "global"}
READ_BY_ALL = ("on", "off", "random")  # the modes of a global scope, in which another document's memory is everybody's
ABLATIONS: dict[str, dict[str, Any]] = {
    "own values": {"model": {"successor_values": False}}, "one head": {"model": {"memory_heads": 1}},
    "four heads": {"model": {"memory_heads": 4}}, "both layers": {"model": {"memory_layers": (0, 1)}},
    "K = 4": {"model": {"memory_top_k": 4}}, "a read for 4 tokens": {"model": {"retrieval_stride": 4}},
    "bias 0": {"model": {"memory_bias": 0.0}}, "no importance": {"memory": {"importance_weight": 0.0}},
    "every 4th token": {"memory": {"write": "every_nth"}}, "the surprising quarter": {"memory": {"write": "surprise"}}}
# Keys of one token have a mean cosine of 0.995 or more to each other, those of different tokens up to 0.986.
NEWEST = {"merge_above": 0.99, "merge_keep": "newest"}
WORLD_MODEL = {**LARGE_BANK, "vocab_size": 1024, "memory_layers": (0, 1), "memory_key_tokens": 2, "memory_values": "token"}
NEWEST_PLACE = {"newest in place of older": {"merge_above": 0.95, "merge_keep": "newest"}}
RETENTION_SLOTS = 2048  # 8 streams with 16 facts each, read twice with a pause, fill half of it
AnyTrial = Trial | TextTrial | ContinualTrial


class Given(NamedTuple):
    """Text of the user's own, for the trials that need some: prose, and domains by name; they are left out without it."""

    books: Path | None = None
    domains: Sequence[tuple[str, str]] = ()


def smoke(_: Given) -> dict[str, AnyTrial]:
    """Two trials of seconds each, to see that everything works."""
    training = Training(steps=150, model=SMALL_BANK)
    lessons = ((NEAR, 0.5), (FAR, 0.5))
    return {
        "recall": Trial("values by their keys, a window and more back", "pairs", training, lessons,
                        {n: KeyValueRecall(count=8, pairs=n, between=128, questions=n) for n in (4, 32)}, target=0.99),
        "shared": Trial("facts that other documents state", "facts", training, lessons,
                        {256: SharedFacts(facts=256, questions=64)}, asked_memory=GLOBAL, parts=(2,), target=0.99,
                        modes=READ_BY_ALL, rivals=()),
    }


def small(given: Given) -> dict[str, AnyTrial]:
    """Trials of about a minute of training each, measured at several points; on text where some is given."""
    training, lessons = Training(steps=800, model=LARGE_BANK), ((NEAR, 0.4), (FAR, 0.6))
    text, cache = Training(steps=400, learning_rate=2e-3, warmup=40, model=TEXT_SHAPE), Path("runs/suite-corpora")
    trials: dict[str, AnyTrial] = {
        "recall": Trial("values by their keys, two windows and more back", "pairs", training, lessons,
                        {n: KeyValueRecall(count=8, pairs=n, between=128, questions=min(n, 64))
                         for n in (4, 16, 64, 256, 512)}, target=0.99),
        "shared": Trial("facts that other documents state", "facts", training, lessons,
                        {n: SharedFacts(facts=n) for n in (256, 1024)}, asked_memory=GLOBAL, parts=(2, 4), target=0.99,
                        modes=READ_BY_ALL, rivals=()),
        "retention": Trial("facts that were read twice, after other writes, by policy of eviction", "tokens read since",
                           training, lessons,
                           {n: KeyValueRecall(count=8, pairs=16, between=n, questions=16, rehearsed=16, between_readings=64)
                            for n in (0, 64, 128, 256, 1024, 12500)},
                           slots=RETENTION_SLOTS, modes=(), rivals=(),
                           policies={f"eviction {name}": {"eviction": name} for name in EVICTIONS},
                           expected={"(1 - 8/N)^t": lambda t: (1 - 8 / RETENTION_SLOTS)**t}),
        "last value": Trial("the second value of keys that have two", "pairs", training, lessons,
                            {n: KeyValueRecall(count=8, pairs=n, between=128, questions=n, again=n) for n in (16, 64)},
                            target=0.95, rivals=("no bank",), policies={"newest replaces": NEWEST}),
        "needles": Trial("names of two tokens and what they stand for, in long texts", "tokens of text",
                         Training(steps=1000, model=NEEDLE_MODEL),
                         ((Needles(count=4000, needles=8, length=0, width=2), 0.6),
                          (Needles(count=2000, needles=8, length=160, width=2), 0.4)),
                         {n: Needles(count=8, needles=8, length=n, width=2) for n in (256, 1024, 4096, 16384)}, slots=262144,
                         target=0.99, rivals=("no bank",)),
        "code": TextTrial("the source of Python's standard library", None, cache, text, sizes=(1024, 4096, 16384)),
    }
    trials |= worlds(None if given.books is None else partial(sentences_of, str(given.books), cache))
    trials["one bank for all"] = TextTrial("code, one bank over all documents, those of training too", None, cache,
                                           text.changed(memory=GLOBAL), modes=READ_BY_ALL, rivals=())
    trials["ablations"] = TextTrial("code, with parts of the memory left out or changed", None, cache, text, modes=("on",),
                                    rivals=("no bank",), variants={
                                        name: text.changed(**changes) for name, changes in ABLATIONS.items()})
    if given.books is not None:
        trials["books"] = TextTrial("books", str(given.books), cache, text, sizes=(1024, 4096, 16384))
    if given.domains:
        trials["continual"] = ContinualTrial("domains learned one after the other", given.domains, cache,
                                             text.changed(steps=100))
    return trials


def worlds(sentences: Callable[[int], Sequence[Ids]] | None) -> dict[str, AnyTrial]:
    """What a model that says of a thing who has it, and then where that is, answers of people, of things, and of people who
    went somewhere again; and what one does that is to say at once where a thing is."""
    far = Worlds(count=2000, people=8, length=160, jitter=63, hops=None, aloud=True, sentences=sentences)
    near, one_hop = replace(far, count=4000, people=4, length=0, jitter=16), replace(far, count=8, jitter=0, hops=1)
    two_hops = replace(one_hop, hops=2)
    trial = Trial("", "tokens of other sentences", Training(steps=500, model=WORLD_MODEL), ((near, 0.5), (far, 0.5)), {},
                  slots=262144, rivals=("no bank",))
    at_once = replace(trial, training=trial.training.changed(steps=1500),
                      lessons=[(replace(lesson, aloud=False), 0.5) for lesson in (near, far)])
    asked = {"one hop": ("where people are", trial, one_hop), "two hops": ("who has a thing, and where", trial, two_hops),
             "two hops at once": ("where things are", at_once, replace(two_hops, aloud=False)),
             "moved again": ("where people are who went somewhere again", replace(trial, policies=NEWEST_PLACE),
                             replace(one_hop, again=8))}
    return {name: replace(one, title=f"{title}, told among other sentences",
                          asked={n: replace(task, length=n) for n in (0, 1024, 4096, 16384)})
            for name, (title, one, task) in asked.items()}


SUITES = {"smoke": (smoke, (0,)), "small": (small, (0, 1, 2))}


def run_one(name: str, trial: AnyTrial, *, seeds: Sequence[int], say: Say, known: Taught) -> list[Measured]:
    """Runs a trial of any kind."""
    if isinstance(trial, ContinualTrial):
        return run_continual(name, trial, seeds=seeds, say=say)
    if isinstance(trial, TextTrial):
        return run_text(name, trial, seeds=seeds, say=say)
    return run_trial(name, trial, seeds=seeds, say=say, known=known)


def tables_of(name: str, trial: AnyTrial) -> dict[str, dict[str, Any]]:
    """What JSON says of a trial's tables, by name."""
    about = {"title": trial.title, "varied": trial.varied, "target": trial.target, "unit": "share"}
    if isinstance(trial, ContinualTrial):
        return {name: {**about, "target": None, "unit": "nats"},
                worse_name(name): {**about, "title": "old domains at the end, at most so much worse", "unit": "worse"}}
    return {name: {**about, "unit": "nats"} if isinstance(trial, TextTrial) else about}


def run_suite(name: str, *, only: Sequence[str] = (), seeds: Sequence[int] | None = None, books: Path | None = None,
              domains: Sequence[str] = (), say: Say = lambda _: None) -> dict[str, Any]:
    """Runs a suite on this process, and returns what JSON holds: what was run where, and every number.

    Args:
        only: names of its trials; all when empty.
        seeds: those of the suite when None.
        books: file, folder or glob of prose, for the trials that need some.
        domains: of several domains of text the same, or NAME=PATH, in the order in which they are to be learned.
        say: called with a line of progress.

    Raises:
        ConfigError: for a name that is not known, or domains that cannot be learned in turn.
    """
    if name not in SUITES:
        raise ConfigError(f"--suite must be one of {', '.join(SUITES)}: got '{name}'.{near_match(name, SUITES)}")
    make, usual = SUITES[name]
    trials = make(Given(books, domains_of(domains) if domains else ()))
    seeds = usual if seeds is None else seeds
    for one in only:
        if one not in trials:
            raise ConfigError(f"the suite {name} has the trials {', '.join(trials)}: got '{one}'.{near_match(one, trials)}")
    chosen = {one: trials[one] for one in trials if not only or one in only}
    known: Taught = {}
    found = [one for key, trial in chosen.items() for one in run_one(key, trial, seeds=seeds, say=say, known=known)]
    return {"made_by": MADE_BY, "suite": name, "version": __version__, "torch": torch.__version__,
            "machine": platform.machine(), "threads": torch.get_num_threads(), "seeds": list(seeds),
            "trials": {table: about for key, trial in chosen.items() for table, about in tables_of(key, trial).items()},
            "measured": [one._asdict() for one in found]}


def measured_in(result: Mapping[str, Any]) -> list[Measured]:
    """The numbers of a result of `run_suite`, from JSON or not."""
    return [Measured(**one) for one in result["measured"]]


def to_markdown(result: Mapping[str, Any]) -> str:
    """A table for each trial: a row for each control, a column for each point; the mean over seeds, and the spread."""
    summaries = summarised(measured_in(result))
    lines = [f"Suite {result['suite']}, seeds {', '.join(map(str, result['seeds']))}; means over seeds (largest minus "
             "smallest) of the share of answers that are right, in per cent, of nats per token, or of per cent worse"]
    for name, trial in result["trials"].items():
        target = "" if trial["target"] is None else f"; target {100 * trial['target']:g} %"
        mine = {key[1:]: one for key, one in summaries.items() if key[0] == name}
        points = list(dict.fromkeys(point for _, point in mine))
        heads = " | ".join(map(pointed, points))
        lines += ["", f"**{name}**: {trial['title']}{target}", "", f"| {trial['varied']} | {heads} |",
                  "|---" * (len(points) + 1) + "|"]
        for control in dict.fromkeys(control for control, _ in mine):
            cells = [shown(mine[control, point], trial["unit"]) if (control, point) in mine else "" for point in points]
            lines.append(f"| {worded(control)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def shown(one: Summary, unit: str) -> str:
    """'99.2 (0.4)', in per cent, or '4.1234 (0.0012)', in nats; without the spread where there is one seed."""
    value, spread = ((f"{one.nats:.4f}", f"{one.nats_spread:.4f}") if unit == "nats"
                     else (f"{100 * one.score:.1f}", f"{100 * one.spread:.1f}"))
    return value + (f" ({spread})" if one.seeds > 1 else "")


def pointed(point: float | str) -> str:
    """A column's name."""
    return point if isinstance(point, str) else f"{point:g}"


def worded(control: str) -> str:
    """A row's name."""
    return {"on": "**with its bank**", "off": "the same, memory off", "shuffled": "the same, another document's memory",
            "random": "the same, entries drawn by lot"}.get(control, control)


def missed(result: Mapping[str, Any]) -> list[str]:
    """A line for each point at which the model with a bank is below the target."""
    lines = []
    for (name, control, point), one in summarised(measured_in(result)).items():
        target = result["trials"][name]["target"]
        if control == "on" and target is not None and one.score < target:
            at = f"{name}, {result['trials'][name]['varied']} {pointed(point)}"
            lines.append(f"{at}: {100 * one.score:.1f} % of {100 * target:g} %")
    return lines

