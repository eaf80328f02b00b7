"""Where a run's numbers go: metrics.jsonl, and TensorBoard or other writers, under the same words. The one importer of
tensorboard.

Only rank 0 writes; every other rank holds a `NullMetrics` with the same methods, so callers never ask who they are.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from lmcode.files.durable import replace_text
from lmcode.train.writers import WRITERS, NullMetrics

log = logging.getLogger("lmcode")


class Metrics(NullMetrics):
    """Writes `metrics.jsonl` (one object per call of `scalars`) in the run folder, and to the writers of `log_to`.

    A non-finite number becomes null in the JSON and is left out elsewhere. What the file system (a full disk) or a service
    refuses is lost with a warning; training continues.

    Args:
        resumed_step: a run that is resumed from this step drops what an earlier process recorded after it.
        log_to: "tensorboard" (a folder of this name in the run folder) and the names of `WRITERS`.

    Raises:
        ConfigError: for a writer that is not installed, or cannot begin.
    """

    def __init__(self, run_folder: Path, *, resumed_step: int = 0, log_to: Sequence[str] = ("tensorboard",)) -> None:
        again = (run_folder / "metrics.jsonl").exists()
        if again:
            drop_rows_beyond(run_folder / "metrics.jsonl", resumed_step)
        purge_step = resumed_step + 1 if again else None
        self._writers = [_TensorBoard(run_folder / "tensorboard", purge_step) if name == "tensorboard"
                         else WRITERS[name](run_folder) for name in dict.fromkeys(log_to)]
        self._lines = (run_folder / "metrics.jsonl").open("a", encoding="utf-8")
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
        for writer in self._writers:
            with self._tolerant():
                writer.scalars(step, values)

    def histogram(self, step: int, tag: str, values: Tensor) -> None:
        for writer in self._writers:
            with self._tolerant():
                writer.histogram(step, tag, values)

    def text(self, step: int, tag: str, value: str) -> None:
        for writer in self._writers:
            with self._tolerant():
                writer.text(step, tag, value)

    def hyperparameters(self, settings: Mapping[str, Any], results: Mapping[str, float]) -> None:
        flat = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in settings.items()}
        for writer in self._writers:
            with self._tolerant():
                writer.hyperparameters(flat, results)

    def close(self) -> None:
        with self._tolerant():
            self._lines.close()
        for writer in self._writers:
            with self._tolerant():
                writer.close()


class _TensorBoard(NullMetrics):
    """A folder of TensorBoard's."""

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(folder), purge_step=purge_step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            if math.isfinite(value):
                self._board.add_scalar(tag, value, step)

    def histogram(self, step: int, tag: str, values: Tensor) -> None:
        if values.numel():
            self._board.add_histogram(tag, values.detach().float().cpu(), step)

    def text(self, step: int, tag: str, value: str) -> None:
        self._board.add_text(tag, "    " + value.replace("\n", "\n    "), step)  # indented: Markdown keeps it verbatim

    def hyperparameters(self, settings: Mapping[str, Any], results: Mapping[str, float]) -> None:
        self._board.add_hparams(dict(settings), dict(results), run_name="hparams")

    def close(self) -> None:
        self._board.close()


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
