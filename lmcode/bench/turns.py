"""Timing peers that take turns, so that what disturbs a machine disturbs all of them; and the table and file of it.

A number is a median over rounds. On a machine that does other work at the same time wall time says little: processor time is
measured beside it.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from lmcode.config import ConfigError
from lmcode.files import durable
from lmcode.files.replace import is_free
from lmcode.version import MADE_BY


class Spent(NamedTuple):
    """Seconds on the wall, and of processors; of one call, or medians."""

    wall: float
    cpu: float


Way = Callable[[], Spent]
Result = TypeVar("Result")


def timed(action: Callable[[], object]) -> Spent:
    """What a call costs this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    return Spent(time.perf_counter() - wall, time.process_time() - cpu)


def in_turns(ways: Mapping[str, Callable[[], Result]], rounds: int) -> dict[str, list[Result]]:
    """What every way returns in its turn of each round, after a round that does not count."""
    results: dict[str, list[Result]] = {name: [] for name in ways}
    for round_ in range(rounds + 1):
        for name, way in ways.items():
            result = way()
            if round_:
                results[name].append(result)
    return results


def take_turns(ways: Mapping[str, Way], rounds: int) -> dict[str, Spent]:
    """Medians over the rounds of `in_turns`."""
    return {name: Spent(*(statistics.median(part) for part in zip(*some, strict=True)))
            for name, some in in_turns(ways, rounds).items()}


def medians(some: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each number its median."""
    return {name: statistics.median(one[name] for one in some) for name in some[0]}


def to_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Aligned text; the columns are the keys of the first row."""
    cells = [[str(name) for name in rows[0]], *([_spelled(row.get(name)) for name in rows[0]] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) if at else cell.ljust(width)
                               for at, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip()
                     for line in cells)


def _spelled(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.3f}" if abs(value) < 10 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def check_result(path: Path, option: str = "--out") -> None:
    """Raises ConfigError where a result may not be written: no such folder, or a file that is no result of ours."""
    if not path.parent.is_dir():
        raise ConfigError(f"{option} must lie in a folder that exists: got '{path}'")
    if not is_free(path, MADE_BY):
        raise ConfigError(f"'{path}' exists and is no result of lmcode bench: give another file")


def write_json(path: Path, settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """The same as a file, with what was asked for and where it ran."""
    import torch

    about = {"machine": platform.machine(), "processor": platform.processor(), "python": platform.python_version(),
             "torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability()}
    content = {"made_by": MADE_BY, "settings": dict(settings), "about": about, "rows": [dict(row) for row in rows]}
    durable.replace_text(path, json.dumps(content, indent=1, default=str))
