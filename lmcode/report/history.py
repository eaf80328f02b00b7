"""A training history as curves, whichever way it comes: lists by name, or rows of a metrics.jsonl."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

STEPS = ("step", "eval_step")
TAGS = {"loss": "train/loss", "learning_rate": "train/learning_rate", "grad_norm": "train/grad_norm",
        "tokens_per_s": "perf/tokens_per_s", "eval_loss": "eval/loss", "eval_loss_memory_off": "eval/loss_memory_off"}
RENAMED = {"perf/bytes_sent": "perf/bytes_received"}  # by earlier versions, which called it what it was not
Curves = dict[str, tuple[list[float], list[float]]]  # name -> x (steps) and y, without gaps


def curves_of(history: Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]]) -> Curves:
    """The curves of a history, by name. None and nan are left out, and so is a curve of nothing else.

    A dict of lists may have `step`, and `eval_step` for lists that are called eval_...: a list as long as its steps belongs
    to them point by point, a shorter one (one number per epoch) is spread over them evenly, the last number at the last
    step. Without `step` numbers are counted from 1.

    Raises:
        ValueError: nothing to draw, rows without a step, or values that are no numbers.
    """
    if isinstance(history, Mapping):
        curves = _from_lists(history)
    elif isinstance(history, Sequence) and not isinstance(history, str) and all(isinstance(r, Mapping) for r in history):
        curves = _from_rows(history)
    else:
        raise ValueError(f"a history is a dict of lists or a list of rows with 'step': got {type(history).__name__}")
    if not curves:
        raise ValueError("the history holds nothing to draw: expected numbers beside 'step', got none")
    return curves


def tagged(curves: Curves) -> Curves:
    """The same curves, those of a trainer's history under the names that a metrics.jsonl gives them."""
    return {TAGS.get(name, name): curve for name, curve in curves.items()}


def _from_lists(history: Mapping[str, Sequence[Any]]) -> Curves:
    for name, values in history.items():
        if isinstance(values, (str, bytes)) or not hasattr(values, "__len__"):
            raise ValueError(f"a history's values are lists of numbers: '{name}' is {type(values).__name__}")
    longest = max((len(values) for values in history.values()), default=0)
    counted = [float(count + 1) for count in range(longest)]
    every = [_number("step", value) for value in history.get("step", [])] or counted
    seen = [_number("eval_step", value) for value in history.get("eval_step", [])] or every
    curves: Curves = {}
    for name, values in history.items():
        if name in STEPS or not len(values):
            continue
        steps = seen if name.startswith("eval_") else every
        if len(values) > len(steps):
            raise ValueError(f"'{name}' has more values than there are steps: {len(values)} > {len(steps)}")
        at = np.arange(1, len(values) + 1) * len(steps) // len(values) - 1
        _add(curves, name, [steps[place] for place in at], values)
    return curves


def _from_rows(rows: Sequence[Mapping[str, Any]]) -> Curves:
    found: dict[str, tuple[list[float], list[Any]]] = {}
    for place, row in enumerate(rows):
        if "step" not in row:
            raise ValueError(f"every row of a history needs 'step': row {place} has {sorted(row)}")
        for name, value in row.items():
            if name != "step":
                x, y = found.setdefault(name, ([], []))
                x.append(_number("step", row["step"]))
                y.append(value)
    curves: Curves = {}
    for name, (x, y) in found.items():
        _add(curves, name, x, y)
    return curves


def _add(curves: Curves, name: str, x: Sequence[float], y: Sequence[Any]) -> None:
    points = [(one, _number(name, value)) for one, value in zip(x, y, strict=True)]
    kept = [(one, value) for one, value in points if math.isfinite(value)]
    if kept:
        curves[name] = [one for one, _ in kept], [value for _, value in kept]


def _number(name: str, value: Any) -> float:
    """nan for None."""
    try:
        return math.nan if value is None else float(value)
    except (TypeError, ValueError):
        raise ValueError(f"a history's values are numbers: '{name}' has {value!r}") from None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, under today's names; none if there is no such file. A line that a kill cut short is left
    out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append({RENAMED.get(str(name), str(name)): value for name, value in row.items()})
    return rows
