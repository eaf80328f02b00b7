"""A window of steps under torch's profiler: a Chrome trace of every rank, since a slow rank shows only beside the others."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

log = logging.getLogger("lmcode")


class ProfilerWindow:
    """Records the steps from the first to the last of `window` ("10:12", counted from 1) into profile/rank-00000.json.

    A job that starts behind the first step records the rest of the window. Without a window, or a folder, nothing happens.
    """

    def __init__(self, window: str | None, run_folder: Path | None, *, rank: int) -> None:
        if window and run_folder is None:
            log.warning("train.profile_steps = %s has no effect without a run folder: set train.run_dir", window)
        self._first, self._last = (int(part) for part in window.split(":")) if window and run_folder else (1, 0)
        self._file = (run_folder or Path()) / "profile" / f"rank-{rank:05d}.json"
        self._running: profile | None = None

    def before(self, step: int) -> None:
        """To be called before each step."""
        if self._running is None and self._first <= step <= self._last:
            activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * torch.cuda.is_available()]
            self._running = profile(activities=activities)
            self._running.start()

    def after(self, step: int, *, ends: bool) -> None:
        """To be called after each step. ends: no other one follows, though the window may not be over."""
        if self._running is None or (step < self._last and not ends):
            return
        self._running.stop()
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._running.export_chrome_trace(str(self._file))
            log.info("'%s': a trace of the steps up to %d, for chrome://tracing or ui.perfetto.dev", self._file, step)
        except (OSError, RuntimeError) as error:  # the run is worth more
            log.warning("'%s', a trace of the steps up to %d, was not written: %s", self._file, step, error)
        self._running = None
