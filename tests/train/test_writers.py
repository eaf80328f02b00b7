"""Weights & Biases and MLflow, as modules that only note what is asked of them: the same numbers as in metrics.jsonl."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lmcode.config import ConfigError, TrainConfig, build
from lmcode.train.metrics import Metrics

VALUES = {"train/loss": 1.5, "memory/L1/age_p50": float("nan")}


class Broken(Exception):
    """What a service raises."""


class FakeRun:
    def __init__(self, told: list, **how: Any) -> None:
        self.id, self.told, self.how, self.config, self.summary = how["id"] or "run-1", told, how, self, self

    def log(self, values: dict, step: int) -> None:
        if "broken" in values:
            raise Broken("no network")
        self.told.append((step, values))

    def update(self, values: dict, **_: Any) -> None:
        self.told.append(("update", values))

    def finish(self) -> None:
        self.told.append("finish")


class FakeClient:
    def __init__(self, told: list) -> None:
        self.told = told

    def get_experiment_by_name(self, _name: str) -> None: ...

    def create_experiment(self, name: str) -> str:
        return f"experiment {name}"

    def create_run(self, experiment: str, run_name: str) -> SimpleNamespace:
        self.told.append((experiment, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id="run-1"))

    def log_metric(self, run: str, tag: str, value: float, step: int) -> None:
        if tag == "broken":
            raise Broken("no network")
        self.told.append((run, tag, value, step))

    def log_text(self, run: str, text: str, file: str) -> None:
        self.told.append((run, text, file))

    def log_param(self, run: str, name: str, value: Any) -> None:
        self.told.append((run, name, value))

    def set_terminated(self, run: str) -> None:
        self.told.append((run, "ended"))


@pytest.fixture()
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, list]:
    found: dict[str, list] = {"wandb": [], "mlflow": [], "init": []}

    def init(**how: Any) -> FakeRun:
        found["init"].append(how)
        return FakeRun(found["wandb"], **how)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Histogram=lambda values: len(values), Error=Broken))
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(
        MlflowClient=lambda: FakeClient(found["mlflow"]), exceptions=SimpleNamespace(MlflowException=Broken)))
    return found


def record(metrics: Metrics) -> None:
    metrics.scalars(3, VALUES)
    metrics.histogram(3, "scores", torch.ones(5))
    metrics.text(4, "sample", "some text")
    metrics.hyperparameters({"train.seed": 0, "train.betas": [0.9, 0.95]}, {"eval/loss": 2.0})
    metrics.close()


def test_each_writer_gets_the_numbers_that_are_finite(told: dict, tmp_path: Path) -> None:
    record(Metrics(tmp_path, log_to=["wandb", "mlflow"]))
    settings = {"train.seed": 0, "train.betas": "[0.9, 0.95]"}
    assert told["wandb"] == [(3, {"train/loss": 1.5}), (3, {"scores": 5}), ("update", settings),
                             ("update", {"eval/loss": 2.0}), "finish"]
    assert told["mlflow"] == [("experiment lmcode", tmp_path.name), ("run-1", "train/loss", 1.5, 3),
                              ("run-1", "some text", "sample-4.txt"), ("run-1", "train.seed", 0),
                              ("run-1", "train.betas", "[0.9, 0.95]"), ("run-1", "ended")]
    row, = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert row == {"step": 3, "train/loss": 1.5, "memory/L1/age_p50": None}
    assert not (tmp_path / "tensorboard").exists()


def test_a_resumed_run_goes_on_where_it_was(told: dict, tmp_path: Path) -> None:
    for _ in range(2):
        Metrics(tmp_path, log_to=["wandb", "mlflow"]).close()
    assert [how["id"] for how in told["init"]] == [None, "run-1"]
    assert [one for one in told["mlflow"] if one[0] == "experiment lmcode"] == [("experiment lmcode", tmp_path.name)]


@pytest.mark.parametrize("service", ["wandb", "mlflow"])
def test_a_service_that_fails_costs_numbers_and_no_run(service: str, told: dict, tmp_path: Path,
                                                       caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics(tmp_path, log_to=[service])
    metrics.scalars(1, {"broken": 1.0})
    metrics.scalars(2, {"fine": 1.0})
    assert metrics.lost == 1 and "no network" in caplog.text
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    metrics.close()


@pytest.mark.parametrize("service", ["wandb", "mlflow"])
def test_a_package_that_is_missing_is_one_line_with_its_extra(service: str, tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, service, None)
    with pytest.raises(ConfigError, match=rf"pip install 'lmcode\[{service}\]'$"):
        Metrics(tmp_path, log_to=[service])


def test_a_service_that_lets_no_run_begin_is_one_line(told: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise Broken("no key\nconfigured")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(ConfigError, match="wandb, which does not begin a run: no key configured"):
        Metrics(tmp_path, log_to=["wandb"])


def test_tensorboard_alone_unless_asked(tmp_path: Path) -> None:
    assert TrainConfig().log_to == ("tensorboard",)
    record(Metrics(tmp_path))
    assert any((tmp_path / "tensorboard").iterdir()) and not (tmp_path / "tracking.json").exists()
    with pytest.raises(ConfigError, match="log_to"):
        build(TrainConfig, {"log_to": ["comet"]})
