"""What is printed while a run trains: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time

log = logging.getLogger("lmcode")


class Progress:
    """Shows loss, tokens per second and the time left. Only rank 0 makes an enabled one."""

    def __init__(self, *, total: int, start: int = 0, enabled: bool = True) -> None:
        self._total, self._start, self._began = total, start, time.perf_counter()
        self._bar = None
        self._enabled = enabled
        if enabled and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True)

    def step(self, done: int, *, loss: float, tokens_per_s: float, log_line: bool) -> None:
        """Reports that `done` steps are behind us; without a terminal only when `log_line` is True."""
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{loss:.3f}", tokens_per_s=f"{tokens_per_s:,.0f}", refresh=False)
            self._bar.update(done - self._start - (self._bar.n - self._bar.initial))
        elif self._enabled and log_line:
            per_step = (time.perf_counter() - self._began) / max(1, done - self._start)
            minutes, seconds = divmod(round((self._total - done) * per_step), 60)
            log.info("step %d/%d  loss %.4f  %s tokens/s  ETA %d:%02d", done, self._total, loss,
                     f"{tokens_per_s:,.0f}", minutes, seconds)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
