"""Where `torch.autocast` ends: scores, softmaxes and log-sum-exps are fp32 whatever the caller has switched on.

Linear maps, and torch's fused attention, which sums in fp32 by itself, may run in autocast's dtype. Products that give
scores, or mix values by them, may not: autocast would round them to bf16, and a log-sum-exp of 20 is then off by up to 0.06.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

DEVICE_TYPES = ("cpu", "cuda", "xpu", "mps")  # on which torch has autocast


@contextmanager
def without_autocast() -> Iterator[None]:
    """Inside, operations take their inputs in the dtype that these have, on every kind of device. A decorator, too."""
    with ExitStack() as stack:
        for device_type in DEVICE_TYPES:
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield
