"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from lmcode.config import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """Rate of the 0-based `step`: linear warm-up to the peak, then as `train.schedule` says.

    Every schedule but "constant" has come down to `min_learning_rate` of the peak after `total_steps`, and stays there.
    "cosine": half a cosine (Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR 2017, one
    cycle). "linear": a straight line. "wsd": the peak, then a straight line in the last `decay_share` of the steps
    ("warmup-stable-decay", Hu et al., "MiniCPM", 2024).
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    floor = config.min_learning_rate
    return config.learning_rate * (floor + (1.0 - floor) * height(config, step))


def height(config: TrainConfig, step: int) -> float:
    """What a schedule has left of the way from the peak, 1, to the floor, 0, at a `step` after the warm-up."""
    if config.schedule == "constant":
        return 1.0
    start = config.warmup_steps
    if config.schedule == "wsd":
        start = max(start, config.total_steps - max(1, round(config.decay_share * config.total_steps)))
    progress = min(1.0, max(0, step - start) / max(1, config.total_steps - start))
    return 0.5 * (1.0 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1.0 - progress
