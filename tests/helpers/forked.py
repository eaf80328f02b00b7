"""Processes that are forked from a server which has done nothing but import: each costs a tenth of a second, not seconds.

The server has a single thread when it forks, so there is no lock that a child could find held. It is started by the first
process of a test run and keeps the environment of that moment, so whoever needs another hands it over.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.process
import os
from collections.abc import Callable
from typing import Any

# What ranks would otherwise import by the time they train; what is not installed is passed over.
PRELOADED = ["tests.helpers.small_job", "lmcode.train.loop", "lmcode.cli.command", "deepspeed.runtime.zero.stage_1_and_2",
             "deepspeed.runtime.zero.muon.muon_optimizer", "faiss", "safetensors.numpy", "torch.utils.tensorboard",
             "torch._inductor.compile_fx", "setuptools", "hypothesis", "pytest", "lmcode.recipes.foreign"]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(PRELOADED)


def process(function: Callable[..., None], *args: Any) -> multiprocessing.process.BaseProcess:
    """A process, not yet started, that calls an importable function in today's environment and dies with its parent."""
    return CONTEXT.Process(target=_call, args=(dict(os.environ), function, args), daemon=True)


def _call(environment: dict[str, str], function: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    function(*args)
