"""What a run says about its processor: traces of chosen steps from every rank, model FLOPs, peak memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lmcode import dist
from lmcode.config import ConfigError, LMCODEConfig, RunConfig, TrainConfig, build
from lmcode.model.lm import MemoryLM
from lmcode.train import loop
from lmcode.train.flops import flops_per_token, peak_memory_mib
from lmcode.train.profiling import ProfilerWindow
from lmcode.train.start import set_up
from tests.helpers.ranks import run_on_ranks
from tests.helpers.small_run import settings, write_corpus


def train(jobs: list[dict]) -> list[tuple[float, int]]:
    """Last loss and number of weights of each job."""
    found = []
    for values in jobs:
        session = set_up(build(RunConfig, values), dist.discover())
        loop.fit(session)
        found.append((session.last.loss, sum(one.numel() for one in session.model.parameters())))
        session.close()
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[tuple[float, int]]]]:
    folder = tmp_path_factory.mktemp("profiling")
    write_corpus(folder)
    profiled = {"profile_steps": "2:3", "peak_tflops": 0.5}
    jobs = [settings(folder, name, train={"total_steps": 4, **changes})
            for name, changes in (("profiled", profiled), ("plain", {}))]
    return folder / "runs", run_on_ranks(train, 2, jobs)


def test_every_rank_leaves_a_trace_of_its_window_and_only_if_asked(runs: tuple) -> None:
    folder, found = runs
    traces = sorted((folder / "profiled" / "profile").iterdir())
    assert [trace.name for trace in traces] == ["rank-00000.json", "rank-00001.json"]
    for trace in traces:
        names = [event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]]
        assert sum(name == "aten::_log_softmax" for name in names) == 2, "one forward pass of each of two steps"
    assert not (folder / "plain" / "profile").exists()
    assert found[0][0] == found[0][1], "looking changes nothing"


def test_the_share_of_the_peak_is_tokens_times_operations(runs: tuple) -> None:
    folder, found = runs
    for name in ("profiled", "plain"):
        for row in map(json.loads, (folder / name / "metrics.jsonl").read_text().splitlines()):
            assert 50 < row["perf/peak_memory_mib"] < 10_000
            assert ("perf/mfu" in row) == (name == "profiled"), "only where a peak is given"
            if name == "profiled":
                each = 6 * found[0][0][1] + 12 * 2 * 32 * 16
                assert row["perf/mfu"] == pytest.approx(each * row["perf/tokens_per_s"] / (2 * 0.5e12))


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_six_operations_for_each_weight_are_those_of_the_products(positions: str) -> None:
    """Held against what torch counts in a forward and backward pass of a model without memory."""
    from torch.utils.flop_counter import FlopCounterMode

    config = LMCODEConfig(vocab_size=300, hidden_size=64, num_layers=2, num_heads=4, context_length=32, positions=positions,
                          short_term_memory_size=0, long_term_memory_slots=0, memory_layers=())
    model, ids = MemoryLM(config), torch.randint(300, (2, 32))
    with FlopCounterMode(display=False) as counter:
        model(ids, targets_BT=ids).loss.backward()
    counted = counter.get_total_flops() / ids.numel()
    stated = flops_per_token(sum(one.numel() for one in model.parameters()), config, 32)
    assert stated == pytest.approx(counted, rel=0.1)


def test_peak_memory_only_grows() -> None:
    before = peak_memory_mib(torch.device("cpu"))
    held = torch.ones(2**26)
    assert peak_memory_mib(torch.device("cpu")) >= before > 50 and held.numel()


@pytest.mark.parametrize("window", ["10", "3:2", "0:4", "a:b", "1:2:3", ":"])
def test_another_window_is_refused(window: str) -> None:
    with pytest.raises(ConfigError, match="profile_steps"):
        build(TrainConfig, {"profile_steps": window})


def test_a_job_that_ends_within_its_window_leaves_what_it_has(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    profile = ProfilerWindow("2:9", tmp_path, rank=3)
    for step in (1, 2, 3):
        profile.before(step)
        torch.ones(2) + 1
        profile.after(step, ends=step == 3)
    assert json.loads((tmp_path / "profile" / "rank-00003.json").read_text())["traceEvents"]
    ProfilerWindow("2:9", None, rank=0).before(2)
    assert "has no effect without a run folder" in caplog.text


def test_a_trace_that_cannot_be_written_costs_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "profile").write_text("in the way")
    profile = ProfilerWindow("1:1", tmp_path, rank=0)
    profile.before(1)
    profile.after(1, ends=False)
    assert "was not written" in caplog.text
