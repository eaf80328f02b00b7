"""Training and evaluation mode, entered for a while: whatever ends the block, every module is as it was before.

Each module's own mode is kept: a user may have set some parts of a model to evaluation mode (frozen dropout) and not others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def keeping_mode(module: nn.Module) -> Iterator[None]:
    """Gives `module` and all modules in it the mode back that each has now."""
    former = [(one, one.training) for one in module.modules()]
    try:
        yield
    finally:
        for one, training in former:
            one.training = training


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Puts `module` into evaluation mode for the block."""
    with keeping_mode(module):
        module.eval()
        yield
