"""What each test finds as it was: no launcher around it, the environment, the program's log, and this worker's group of one.

Commands run in the test's own process set RANK and MASTER_PORT, turn the log and end the process group; DeepSpeed keeps
the group it saw first, so a second command in the same process would speak to one that is gone.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from lmcode import dist

LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_RANK",
             "OMPI_COMM_WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")

LONG = ("tests/test_readme.py",)  # minutes: begun first, so that no process is left alone with it at the end

# No verdict may depend on how fast a machine is.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files in `LONG` come first; all others keep their order."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Puts back os.environ and the log after the test; a group of one stays until the process ends."""
    environment = dict(os.environ)
    log = logging.getLogger("lmcode")
    handlers, propagate, level = list(log.handlers), log.propagate, log.level
    monkeypatch.setattr(dist, "stop", lambda: None)
    for name in LAUNCHERS:
        os.environ.pop(name, None)
    yield
    os.environ.clear()
    os.environ.update(environment)
    log.handlers[:], log.propagate = handlers, propagate
    log.setLevel(level)
