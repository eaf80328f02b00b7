"""Where a run's numbers go: metrics.jsonl and TensorBoard, under the same words. The one importer of tensorboard.

Only rank 0 writes; every other rank holds a `NullMetrics` with the same methods, so callers never ask who they are.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from lmcode.files.durable import replace_text

log = logging.getLogger("lmcode")


class NullMetrics:
    """Takes everything and keeps nothing."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def histogram(self, step: int, tag: str, values: Tensor) -> None: ...

    def text(self, step: int, tag: str, value: str) -> None: ...

    def hyperparameters(self, settings: Mapping[str, Any], results: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Metrics(NullMetrics):
    """Writes `metrics.jsonl` (one object per call of `scalars`) and `tensorboard/` in the run folder.

    A non-finite number becomes null in the JSON and is left out of TensorBoard. What the file system refuses (a full
    disk) is lost with a warning; training goes on.

    Args:
        resumed_step: a run that goes on behind this step drops what an earlier process recorded beyond it.
    """

    def __init__(self, run_folder: Path, *, resumed_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        again = (run_folder / "metrics.jsonl").exists()
        if again:
            drop_rows_beyond(run_folder / "metrics.jsonl", resumed_step)
        self._lines = (run_folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run_folder / "tensorboard"), purge_step=resumed_step + 1 if again else None)
        self.lost = 0

    @contextmanager
    def _tolerant(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.lost += 1
            log.warning("metrics were not recorded (%d times so far): %s", self.lost, error)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        row = {"step": step, **{k: (v if math.isfinite(v) else None) for k, v in values.items()}}
        with self._tolerant():
            self._lines.write(json.dumps(row) + "\n")
            self._lines.flush()
        with self._tolerant():
            for tag, value in values.items():
                if math.isfinite(value):
                    self._board.add_scalar(tag, value, step)

    def histogram(self, step: int, tag: str, values: Tensor) -> None:
        if values.numel():
            with self._tolerant():
                self._board.add_histogram(tag, values.detach().float().cpu(), step)

    def text(self, step: int, tag: str, value: str) -> None:
        with self._tolerant():  # indented: Markdown keeps it verbatim
            self._board.add_text(tag, "    " + value.replace("\n", "\n    "), step)

    def hyperparameters(self, settings: Mapping[str, Any], results: Mapping[str, float]) -> None:
        flat = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in settings.items()}
        with self._tolerant():
            self._board.add_hparams(flat, dict(results), run_name="hparams")

    def close(self) -> None:
        for writer in (self._lines, self._board):
            with self._tolerant():
                writer.close()


def drop_rows_beyond(path: Path, step: int) -> None:
    """Keeps the whole rows of a metrics.jsonl up to `step`; a line that a kill cut short is no row."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, TypeError, KeyError):
            log.warning("dropped an unreadable line of %s", path)
    replace_text(path, "".join(kept))
