"""Where numbers go beside metrics.jsonl and TensorBoard: Weights & Biases and MLflow. The one importer of both.

A writer has the methods of `NullMetrics`. A service's own errors become OSError, which `Metrics` logs and survives.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from lmcode.config import ConfigError
from lmcode.files.durable import replace_text

PROJECT = "lmcode"  # the services' own environment variables may name another
IDS = "tracking.json"  # in the run folder: the id that a service gave this run, so that a resumed run continues there


class NullMetrics:
    """Takes everything and keeps nothing."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def histogram(self, step: int, tag: str, values: Tensor) -> None: ...

    def text(self, step: int, tag: str, value: str) -> None: ...

    def hyperparameters(self, settings: Mapping[str, Any], results: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class WandbWriter(NullMetrics):
    """One run of Weights & Biases, whose files lie in the run folder.

    Raises:
        ConfigError: without the package, or if the service does not let the run begin.
    """

    def __init__(self, run_folder: Path) -> None:
        try:
            import wandb
        except ImportError:
            raise _missing("wandb") from None
        self._histogram, self._errors = wandb.Histogram, (wandb.Error,)
        with _refusing("wandb", self._errors):
            self._run = wandb.init(project=PROJECT, name=run_folder.name, dir=str(run_folder), resume="allow",
                                   id=_ids(run_folder).get("wandb"))
        _remember(run_folder, "wandb", self._run.id)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        with _as_os_error(self._errors):
            self._run.log(_finite(values), step=step)

    def histogram(self, step: int, tag: str, values: Tensor) -> None:
        if values.numel():
            with _as_os_error(self._errors):
                self._run.log({tag: self._histogram(values.detach().float().cpu().numpy())}, step=step)

    def hyperparameters(self, settings: Mapping[str, Any], results: Mapping[str, float]) -> None:
        with _as_os_error(self._errors):
            self._run.config.update(dict(settings), allow_val_change=True)
            self._run.summary.update(_finite(results))

    def close(self) -> None:
        with _as_os_error(self._errors):
            self._run.finish()


class MlflowWriter(NullMetrics):
    """One run of MLflow, in the experiment "lmcode"; histograms are left out.

    Raises:
        ConfigError: without the package, or if the server does not let the run begin.
    """

    def __init__(self, run_folder: Path) -> None:
        try:
            import mlflow
        except ImportError:
            raise _missing("mlflow") from None
        self._errors = (mlflow.exceptions.MlflowException,)
        with _refusing("mlflow", (*self._errors, OSError)):
            self._client = mlflow.MlflowClient()
            self._run_id = _ids(run_folder).get("mlflow") or self._begin(run_folder.name)
        _remember(run_folder, "mlflow", self._run_id)

    def _begin(self, name: str) -> str:
        experiment = self._client.get_experiment_by_name(PROJECT)
        number = self._client.create_experiment(PROJECT) if experiment is None else experiment.experiment_id
        run_id: str = self._client.create_run(number, run_name=name).info.run_id
        return run_id

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        with _as_os_error(self._errors):
            for tag, value in _finite(values).items():
                self._client.log_metric(self._run_id, tag, value, step=step)

    def text(self, step: int, tag: str, value: str) -> None:
        with _as_os_error(self._errors):
            self._client.log_text(self._run_id, value, f"{tag}-{step}.txt")

    def hyperparameters(self, settings: Mapping[str, Any], results: Mapping[str, float]) -> None:
        with _as_os_error(self._errors):
            for name, value in settings.items():
                self._client.log_param(self._run_id, name, value)

    def close(self) -> None:
        with _as_os_error(self._errors):
            self._client.set_terminated(self._run_id)


WRITERS = {"wandb": WandbWriter, "mlflow": MlflowWriter}


def _finite(values: Mapping[str, float]) -> dict[str, float]:
    return {tag: value for tag, value in values.items() if math.isfinite(value)}


def _ids(run_folder: Path) -> dict[str, str]:
    file = run_folder / IDS
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _remember(run_folder: Path, service: str, name: str) -> None:
    replace_text(run_folder / IDS, json.dumps({**_ids(run_folder), service: name}))


def _missing(package: str) -> ConfigError:
    return ConfigError(f"train.log_to names {package}, which is not installed: pip install 'lmcode[{package}]'")


@contextmanager
def _refusing(service: str, errors: tuple[type[Exception], ...]) -> Iterator[None]:
    try:
        yield
    except errors as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"train.log_to names {service}, which does not begin a run: {reason}") from None


@contextmanager
def _as_os_error(errors: tuple[type[Exception], ...]) -> Iterator[None]:
    try:
        yield
    except errors as error:
        raise OSError(str(error)) from error
