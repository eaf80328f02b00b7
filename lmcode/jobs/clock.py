"""Wall time by phase: the phase that the main thread is in, the seconds of each phase since they were last read, and their
totals over a job.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

# Search and exchange happen inside the other phases and are reported apart.
PHASES = ("step", "data", "forward", "backward", "search", "exchange", "optimizer", "commit")


class Clock:
    """Sums wall seconds by name. `take` returns the sums since the last call and starts anew.

    step: steps behind us, for others to see; set by the loop.
    phase: the innermost stretch we are in; after an exception the one that it came from.
    moves: stretches entered and left so far.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self.step, self.phase, self.moves = 0, "preparing", 0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        outer, self.phase = self.phase, name
        self.moves += 1
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - start)
        self.phase = outer
        self.moves += 1

    def add(self, name: str, seconds: float) -> None:
        """Adds seconds that somebody else has measured."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def take(self) -> dict[str, float]:
        """The sums since the last call, in seconds."""
        seconds, self._seconds = self._seconds, {}
        return seconds


@dataclass
class Costs:
    """Sums over the logged stretches of a job: steps, milliseconds by phase, bytes received per rank."""

    steps: int = 0
    ms: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    bytes: float = 0.0

    def add(self, values: Mapping[str, float], steps: int) -> None:
        """Adds one stretch of `steps` steps, given per step under metric names."""
        self.steps += steps
        self.bytes += steps * values["perf/bytes_received"]
        for phase in PHASES:
            self.ms[phase] += steps * values[f"perf/{phase}_ms"]

    def per_step(self) -> tuple[dict[str, float], float]:
        """Mean milliseconds by phase and bytes, per step."""
        steps = max(1, self.steps)
        return {phase: total / steps for phase, total in self.ms.items()}, self.bytes / steps
