"""What a training job is made of, on one rank: values that its parts hand to each other, and nothing that acts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lmcode.config import RunConfig
from lmcode.dist import Group, Rank
from lmcode.lmcode import LMCODE
from lmcode.model.lm import LayerMemory, StreamState
from lmcode.train.clock import Clock, Costs
from lmcode.train.corpus import Corpus
from lmcode.train.data import StreamSampler
from lmcode.train.durable import Lock
from lmcode.train.engine import Engine
from lmcode.train.metrics import NullMetrics


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
    costs: Costs = field(default_factory=Costs)
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
