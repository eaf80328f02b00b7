"""Training the small model that a task needs: one process, plain torch, minutes on one thread.

The step is that of `train/loop.py` without all that a job needs: batch -> forward -> backward -> step -> commit. Every run
with the same arguments is the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lmcode.backbone import Backbone, forward_batch, token_losses
from lmcode.config import LMCODEConfig, MemoryConfig, RunConfig, build
from lmcode.data.corpus import Documents
from lmcode.data.streams import StreamSampler
from lmcode.dist import Group
from lmcode.opening import make_model

Stages = Sequence[tuple[Documents, float]]
SHAPE = {"vocab_size": 768, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "context_length": 64, "memory_layers": (1,),
         "short_term_memory_size": 0, "memory_heads": 2, "memory_head_dim": 32, "memory_top_k": 16, "memory_bias": 0.0,
         "long_term_memory_slots": 8192}


@dataclass(frozen=True)
class Training:
    """A small model and how it is trained.

    model, memory: settings that differ from `SHAPE` and from the defaults.
    steps: at most. seconds: at most, of the processor; None: no limit.
    restarts: whether the learning rate runs its course in each stage, instead of once.
    """

    steps: int = 400
    streams: int = 8
    learning_rate: float = 3e-3
    warmup: int = 20
    seconds: float | None = None
    restarts: bool = False
    model: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)

    def changed(self, *, model: dict[str, Any] | None = None, memory: dict[str, Any] | None = None,
                **changes: Any) -> Training:
        """The same with other settings."""
        return replace(self, model={**self.model, **(model or {})}, memory={**self.memory, **(memory or {})}, **changes)

    def model_of(self) -> Backbone:
        """An untrained model, of torch's global generator."""
        shape, memory = self.configs()
        length = {"sequence_length": shape.context_length}
        config = build(RunConfig, {"model": shape, "memory": memory, "train": length})
        return make_model(config, group=Group(), device=torch.device("cpu"))

    def configs(self) -> tuple[LMCODEConfig, MemoryConfig]:
        """The settings of model and memory; ConfigError for what cannot be."""
        return (build(LMCODEConfig, {**SHAPE, **self.model}),
                build(MemoryConfig, {"virtual_shards": 4, "recall_queries": 0, **self.memory}))


@dataclass(frozen=True)
class Learned:
    """A trained model, what it took, and the mean loss of the last tenth of the steps, in nats per counted target."""

    model: Backbone
    steps: int
    seconds: float
    loss: float


def learn(training: Training, stages: Stages, *, seed: int,
          watch: Callable[[int, Backbone], None] = lambda step, model: None) -> Learned:
    """Trains a model on documents, stage by stage; what is read stays in its banks.

    Args:
        stages: documents, read over and over, and the share of the steps that they take; the shares add up to 1.
        watch: called before each step with its number and the model, which it must leave as it is.
    """
    torch.manual_seed(seed)
    shape, model = training.configs()[0], training.model_of().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    started, step, losses, namespace, state = time.process_time(), 0, [], 0, None
    ends = [round(training.steps * sum(share for _, share in stages[:number + 1])) for number in range(len(stages))]
    for (documents, _), end in zip(stages, ends, strict=True):
        course = (step, end) if training.restarts else (0, training.steps)
        sampler = StreamSampler(documents, streams=training.streams, sequence_length=shape.context_length, seed=seed,
                                first_step=step, first_namespace=namespace)
        while step < end and not over(training, started):
            watch(step, model)
            batch = sampler.batch(step)
            output = forward_batch(model, batch, state)
            loss = token_losses(output).sum() / max(1, batch.global_tokens)
            optimizer.zero_grad()
            if batch.global_tokens:
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                for group in optimizer.param_groups:
                    group["lr"] = training.learning_rate * rate(step, *course, training.warmup)
                optimizer.step()
                losses.append(loss.item())
            model.memories.commit({layer: [read] for layer, read in output.memory.items()}, step=step)
            state, step = output.state, step + 1
            namespace = max(namespace, 1 + int(batch.namespace_BP.max()))
    tail = losses[-max(1, len(losses) // 10):]
    return Learned(model.eval(), step, time.process_time() - started, sum(tail) / max(1, len(tail)))


def rate(step: int, start: int, end: int, warmup: int) -> float:
    """The learning rate's share of its peak in a course of steps: a warm-up, then half a cosine down to a tenth."""
    if step - start < warmup:
        return (step - start + 1) / warmup
    done = (step - start - warmup) / max(1, end - start - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done)))


def over(training: Training, started: float) -> bool:
    """Whether the time is up."""
    return training.seconds is not None and time.process_time() - started > training.seconds
