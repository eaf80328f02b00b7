"""The learning rate: continuous, highest at the end of the warm-up, never below its floor, whatever the schedule."""

from __future__ import annotations

import math
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcode.config import ConfigError, TrainConfig, build
from lmcode.train.schedule import learning_rate

SCHEDULES = get_args(TrainConfig.model_fields["schedule"].annotation)
ALL = st.sampled_from(SCHEDULES)
SHARES = st.floats(0.01, 1)


def rates(schedule: str, *, warmup: int, total: int, floor: float, share: float = 0.1, beyond: int = 20) -> list[float]:
    config = TrainConfig(learning_rate=1.0, warmup_steps=warmup, total_steps=total, min_learning_rate=floor,
                         schedule=schedule, decay_share=share)
    return [learning_rate(config, step) for step in range(total + beyond)]


@given(ALL, st.integers(0, 50), st.integers(1, 200), st.floats(0, 1), SHARES)
def test_warm_up_peak_and_floor(schedule: str, warmup: int, total: int, floor: float, share: float) -> None:
    found = rates(schedule, warmup=warmup, total=total, floor=floor, share=share)
    assert all(0 < rate <= 1 or (floor == 0 and rate >= 0) for rate in found)
    assert all(a <= b for a, b in zip(found[:warmup], found[1:warmup], strict=False)), "rises"
    after = found[warmup:]
    assert all(a >= b for a, b in zip(after, after[1:], strict=False)), "falls"
    if warmup < total:
        assert after[0] == pytest.approx(1), "meets the peak at which the warm-up ends"
        assert found[total:] == pytest.approx([1 if schedule == "constant" else floor] * 20)


@given(ALL, st.integers(0, 50), st.integers(1, 200), st.floats(0, 1), SHARES)
def test_no_step_is_larger_than_a_straight_line_of_its_decay_allows(schedule: str, warmup: int, total: int, floor: float,
                                                                    share: float) -> None:
    after = rates(schedule, warmup=warmup, total=total, floor=floor, share=share)[warmup:]
    steps = {"constant": math.inf, "wsd": max(1, min(total - warmup, round(share * total)))}.get(schedule, total - warmup)
    steepest = (math.pi / 2 if schedule == "cosine" else 1) * (1 - floor) / max(1, steps)
    assert all(a - b <= steepest + 1e-9 for a, b in zip(after, after[1:], strict=False))


@given(st.integers(0, 50), st.integers(100, 200), SHARES)
def test_wsd_is_stable_and_then_decays(warmup: int, total: int, share: float) -> None:
    found = rates("wsd", warmup=warmup, total=total, floor=0.1, share=share)
    start = max(warmup, total - max(1, round(share * total)))
    assert found[warmup:start + 1] == pytest.approx([1.0] * (start + 1 - warmup))
    assert all(a > b for a, b in zip(found[start:total], found[start + 1:total + 1], strict=True))
    assert found[(start + total) // 2] == pytest.approx(1 - 0.9 * ((start + total) // 2 - start) / (total - start))


def test_half_way_through_its_decay_each_has_its_shape() -> None:
    half = {schedule: rates(schedule, warmup=10, total=110, floor=0.2, share=0.2) for schedule in SCHEDULES}
    assert {name: round(found[60], 9) for name, found in half.items()} == {"cosine": 0.6, "linear": 0.6, "constant": 1.0,
                                                                           "wsd": 1.0}
    assert half["cosine"][35] > half["linear"][35] and half["wsd"][99] == pytest.approx(0.6)


def test_the_default_is_half_a_cosine_bit_for_bit() -> None:
    config = TrainConfig(learning_rate=2e-3, warmup_steps=50, total_steps=400)
    for step in range(50, 400):
        assert learning_rate(config, step) == 2e-3 * (0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * ((step - 50) / 350))))


def test_a_share_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="decay_share"):
        build(TrainConfig, {"schedule": "wsd", "decay_share": 0})
