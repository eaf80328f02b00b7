"""The monitor: its numbers are those of the banks and the outputs, on any number of ranks, and watching changes nothing."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmcode.dist import Group
from lmcode.memory import measure
from lmcode.report.monitor import MEASURES, MemoryMonitor, summarise
from tests.helpers.models import TEXTS, ids_of, remember, small_model
from tests.helpers.ranks import run_on_ranks


def read(model: object) -> object:
    with torch.no_grad():
        return model(torch.tensor([ids_of(text)[:32] for text in TEXTS]))


def test_numbers_are_those_of_banks_and_outputs() -> None:
    model = small_model()
    remember(model, TEXTS)
    monitor = MemoryMonitor(model)
    output = read(model)
    before = {layer: bank.content_hash() for layer, bank in model.banks.items()}
    monitor.record_step(7, output)
    assert {layer: bank.content_hash() for layer, bank in model.banks.items()} == before, "watching changes nothing"
    for layer, bank in model.banks.items():
        stats, read_here = bank.stats(), output.memory[layer]
        row = {name: values[0] for name, values in monitor.history[layer].items()}
        assert (row["entries"], row["fill"], row["evicted"]) == (stats["live"], stats["fill"], stats["evicted"])
        assert row["gate_mean"] == pytest.approx(float(read_here.gate_BT.mean()))
        assert row["hit_share"] == pytest.approx(float(read_here.share_HN.mean()))
        scores = read_here.hits.score_HNK[read_here.hits.valid_HNK]
        assert row["score_mean"] == pytest.approx(float(scores.mean()), rel=1e-5)
        ages = measure.ages(read_here.hits, step=7)
        assert row["age_p50"] == float(ages.median()) and 0 < row["hit_share"] < 1


def test_statistics_sum_what_is_counted_and_average_the_rest() -> None:
    model = small_model()
    monitor = MemoryMonitor(model)
    for step in (0, 10, 20):
        remember(model, TEXTS, steps=1)
        monitor.record_step(step, read(model))
    statistics = monitor.get_statistics()
    assert (statistics["steps"], statistics["first_step"], statistics["last_step"]) == (3, 0, 20)
    assert set(statistics["overall"]) == set(MEASURES) and set(statistics["layers"]) == {0, 2}
    layers = [statistics["layers"][layer] for layer in (0, 2)]
    assert statistics["overall"]["entries"]["last"] == sum(one["entries"]["last"] for one in layers)
    assert statistics["overall"]["gate_mean"]["mean"] == pytest.approx(sum(one["gate_mean"]["mean"] for one in layers) / 2)
    entries = [bank.stats()["live"] for bank in model.banks.values()]
    assert [one["entries"]["last"] for one in layers] == entries and layers[0]["fill"]["trend"] > 0


@given(st.floats(-5, 5), st.floats(-3, 3), st.lists(st.integers(0, 10**6), min_size=2, max_size=20, unique=True))
def test_the_trend_of_a_line_is_its_slope(start: float, slope: float, steps: list[int]) -> None:
    steps = sorted(steps)
    summary = summarise(steps, [start + slope * step / 100 for step in steps])
    assert summary["trend"] == pytest.approx(slope, abs=1e-6)
    assert summary["min"] <= summary["mean"] + 1e-9 and summary["mean"] <= summary["max"] + 1e-9


def test_nan_is_left_out_and_one_point_has_no_trend() -> None:
    summary = summarise([1, 2, 3], [math.nan, 4.0, math.nan])
    assert summary["last"] == summary["mean"] == 4.0 and math.isnan(summary["trend"])
    assert all(math.isnan(value) for value in summarise([1], [math.nan]).values())


def test_an_empty_bank_has_no_hits_to_tell_about(tmp_path: Path) -> None:
    model = small_model()
    monitor = MemoryMonitor(model)
    monitor.record_step(0, read(model))
    last = {name: values["last"] for name, values in monitor.get_statistics()["overall"].items()}
    assert last["entries"] == last["fill"] == last["hit_share"] == 0.0
    assert math.isnan(last["age_p50"]) and math.isnan(last["score_mean"])
    monitor.plot_history(tmp_path / "empty.png")


def test_the_plot_is_written_and_returned(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model = small_model()
    monitor = MemoryMonitor(model)
    for step in range(3):
        remember(model, TEXTS, steps=1)
        monitor.record_step(step, read(model))
    figure = monitor.plot_history(tmp_path / "memory_stats.png")
    assert (tmp_path / "memory_stats.png").read_bytes().startswith(b"\x89PNG")
    assert all(axes.get_title(loc="left") and axes.get_ylabel() and len(axes.lines) == 2 for axes in figure.axes)
    with pytest.raises(ValueError, match=r"one of .*png.*: got '.*x\.pgn'\. Did you mean 'png'"):
        monitor.plot_history(tmp_path / "x.pgn")


def test_refusals() -> None:
    with pytest.raises(ValueError, match="needs a model with a bank"):
        MemoryMonitor(small_model(long_term_memory_slots=0))
    model = small_model()
    monitor = MemoryMonitor(model)
    for call in (monitor.get_statistics, monitor.plot_history):
        with pytest.raises(ValueError, match="nothing was recorded yet"):
            call()
    output = read(model)
    with pytest.raises(ValueError, match="memory of layers"):
        monitor.record_step(0, output._replace(memory={}))
    with pytest.raises(ValueError, match="what the model returns"):
        monitor.record_step(0, output.logits)
    monitor.record_step(3, output)
    with pytest.raises(ValueError, match="steps must ascend: got 3 after 3"):
        monitor.record_step(3, output)


def record_on_a_rank() -> list[dict]:
    histories = []
    for group_size in (0, 1):
        model = small_model(Group.world(), memory={"group_size": group_size})
        remember(model, TEXTS, count_hits=False)
        monitor = MemoryMonitor(model)
        monitor.record_step(5, read(model))
        histories.append(monitor.history)
    return histories


def test_two_ranks_record_what_one_does() -> None:
    (alone,), both = run_on_ranks(record_on_a_rank, 1), run_on_ranks(record_on_a_rank, 2)
    assert both[0] == both[1]
    for came, wanted in zip(both[0], alone, strict=True):
        for layer, row in came.items():
            for name in MEASURES:
                assert row[name] == pytest.approx(wanted[layer][name], rel=1e-5), (layer, name)
