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
from typing import Any, NamedTuple

from lmcode.files import durable
from lmcode.version import MADE_BY


class Spent(NamedTuple):
    """Seconds on the wall, and of processors; of one call, or medians."""

    wall: float
    cpu: float


Way = Callable[[], Spent]


def timed(action: Callable[[], object]) -> Spent:
    """What a call costs this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    return Spent(time.perf_counter() - wall, time.process_time() - cpu)


def take_turns(ways: Mapping[str, Way], rounds: int) -> dict[str, Spent]:
    """Medians over rounds in which every way has its turn, after one that does not count."""
    spent: dict[str, list[Spent]] = {name: [] for name in ways}
    for round_ in range(rounds + 1):
        for name, way in ways.items():
            one = way()
            if round_:
                spent[name].append(one)
    return {name: Spent(*(statistics.median(part) for part in zip(*some, strict=True))) for name, some in spent.items()}


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


def write_json(path: Path, settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """The same as a file, with what was asked for and where it ran."""
    import torch

    about = {"machine": platform.machine(), "processor": platform.processor(), "python": platform.python_version(),
             "torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability()}
    content = {"made_by": MADE_BY, "settings": dict(settings), "about": about, "rows": [dict(row) for row in rows]}
    durable.replace_text(path, json.dumps(content, indent=1, default=str))
