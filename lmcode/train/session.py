"""The state of a training job on one rank: the values that its parts share, without behaviour of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lmcode.backbone import Backbone
from lmcode.config import RunConfig
from lmcode.data.corpus import Corpus
from lmcode.data.replay import Replay, ReplaySampler
from lmcode.data.streams import PassStart, StreamSampler
from lmcode.dist import Group, Rank
from lmcode.files.commit import Commit
from lmcode.files.durable import Lock
from lmcode.jobs.clock import Clock, Costs
from lmcode.jobs.preempt import Request
from lmcode.protocol import LayerMemory, State
from lmcode.train.engine import Engine
from lmcode.train.writers import NullMetrics


def nothing(*_values: object) -> None:
    """Does nothing."""


@dataclass
class Session:
    """Everything one training job is made of, on one rank.

    run_folder: None where a trainer keeps no record on disk.
    sampler: gives out the batches; a `ReplaySampler` if there is a `replay`, the store of what was trained on.
    held_out: None where nothing was given to evaluate on.
    """

    config: RunConfig
    me: Rank
    group: Group
    run_folder: Path | None
    corpus: Corpus
    model: Backbone
    engine: Engine
    sampler: StreamSampler | ReplaySampler
    held_out: StreamSampler | None
    metrics: NullMetrics
    replay: Replay | None = None
    data_pass: PassStart = PassStart()
    states: dict[int, State] = field(default_factory=dict)  # by micro-batch
    step: int = 0  # optimizer steps behind us, skipped ones included
    clock: Clock = field(default_factory=Clock)
    last: StepResult | None = None
    costs: Costs = field(default_factory=Costs)
    lock: Lock | None = None  # rank 0: the right to write into the run folder
    saved: Path | None = None  # the newest checkpoint of this run
    saving: Commit | None = None  # a save that is under way
    failed_saves: int = 0
    skipped_in_a_row: int = 0
    request: Request = field(default_factory=Request)  # to save and end
    report: Callable[[int, int], None] = nothing  # tells the watch a step and its digest
    owes_evaluation: bool = False  # of the current step: there was no time for it
    resharded: dict[str, list[int]] = field(default_factory=dict)  # former numbers of settings that a reshard has changed
    training_seconds: float = 0.0  # in `fit`, over all the processes that the run has had

    @property
    def folder(self) -> Path:
        """The run folder, for what is done only where there is one.

        Raises:
            ValueError: if there is none.
        """
        if self.run_folder is None:
            raise ValueError("this job keeps no record on disk: it has no run folder")
        return self.run_folder

    @property
    def examined(self) -> StreamSampler:
        """The held-out documents, for what is done only where there are any.

        Raises:
            ValueError: if nothing was given to evaluate on.
        """
        if self.held_out is None:
            raise ValueError("this job has nothing to evaluate on")
        return self.held_out

    @property
    def last_step(self) -> int:
        """Steps behind the job when it ends: `train.total_steps`, or fewer if the data ends before."""
        total, steps = self.config.train.total_steps, self.sampler.num_steps
        return total if steps is None else min(total, self.data_pass.first_step + steps)

    def close(self) -> None:
        """Ends recording and gives the run folder back."""
        self.metrics.close()
        if self.lock is not None:
            self.lock.close()


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did: global mean loss in nats per token, whether the update was applied, the targets of the
    global batch, each memory layer's traffic by micro-batch, whether any rank was asked to save and end, and the loss by
    source where there are several."""

    loss: float
    applied: bool
    tokens: int
    reads: dict[int, list[LayerMemory]]
    asked: bool = False
    by_source: dict[str, float] = field(default_factory=dict)
