"""Where a run's numbers go: metrics.jsonl and TensorBoard, under the same words. The one importer of tensorboard.

Only rank 0 writes; every other rank holds a `NullMetrics` with the same methods, so callers never ask who they are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor


class NullMetrics:
    """Takes everything and keeps nothing."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def histogram(self, step: int, tag: str, values: Tensor) -> None: ...

    def text(self, step: int, tag: str, value: str) -> None: ...

    def hyperparameters(self, settings: Mapping[str, Any], results: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Metrics(NullMetrics):
    """Writes `metrics.jsonl` (one object per call of `scalars`) and `tensorboard/` in the run folder.

    A non-finite number becomes null in the JSON and is left out of TensorBoard.
    """

    def __init__(self, run_folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._lines = (run_folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run_folder / "tensorboard"))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        row = {"step": step, **{k: (v if math.isfinite(v) else None) for k, v in values.items()}}
        self._lines.write(json.dumps(row) + "\n")
        self._lines.flush()
        for tag, value in values.items():
            if math.isfinite(value):
                self._board.add_scalar(tag, value, step)

    def histogram(self, step: int, tag: str, values: Tensor) -> None:
        if values.numel():
            self._board.add_histogram(tag, values.detach().float().cpu(), step)

    def text(self, step: int, tag: str, value: str) -> None:
        self._board.add_text(tag, "    " + value.replace("\n", "\n    "), step)  # indented: Markdown keeps it verbatim

    def hyperparameters(self, settings: Mapping[str, Any], results: Mapping[str, float]) -> None:
        flat = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in settings.items()}
        self._board.add_hparams(flat, dict(results), run_name="hparams")

    def close(self) -> None:
        self._lines.close()
        self._board.close()


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'train': {'seed': 0}} -> {'train.seed': 0}."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
