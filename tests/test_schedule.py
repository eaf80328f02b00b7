"""The learning rate: continuous, highest at the end of the warm-up, never below its floor."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lmcode.config import TrainConfig
from lmcode.train.schedule import learning_rate


@given(st.integers(0, 50), st.integers(1, 200), st.floats(0, 1))
def test_warm_up_peak_and_floor(warmup: int, total: int, floor: float) -> None:
    config = TrainConfig(learning_rate=1.0, warmup_steps=warmup, total_steps=total, min_learning_rate=floor)
    rates = [learning_rate(config, step) for step in range(total + 20)]
    assert all(0 < rate <= 1 or (floor == 0 and rate >= 0) for rate in rates)
    assert all(a <= b for a, b in zip(rates[:warmup], rates[1:warmup], strict=False)), "rises"
    after = rates[warmup:]
    assert all(a >= b for a, b in zip(after, after[1:], strict=False)), "falls"
    if warmup < total:
        assert abs(learning_rate(config, total) - floor) < 1e-6
