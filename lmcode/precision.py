"""Where `torch.autocast` and faster products end: scores, softmaxes and log-sum-exps are fp32 whatever is switched on.

Linear maps, and torch's fused attention, which sums in fp32 by itself, may run in autocast's dtype. Products that give
scores, or mix values by them, may not: autocast would round them to bf16, and a log-sum-exp of 20 is then off by up to 0.06.
`torch.set_float32_matmul_precision` below "highest" does the same to products of fp32, TF32 on a GPU and bf16 on some
processors, while the bounds of a search count on fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

DEVICE_TYPES = ("cpu", "cuda", "xpu", "mps")  # on which torch has autocast


@contextmanager
def without_autocast() -> Iterator[None]:
    """Inside, operations take their inputs in the dtype that these have, on every kind of device, and products of fp32 are
    in fp32. A decorator, too."""
    with ExitStack() as stack:
        if (precision := torch.get_float32_matmul_precision()) != "highest":
            torch.set_float32_matmul_precision("highest")
            stack.callback(torch.set_float32_matmul_precision, precision)
        for device_type in DEVICE_TYPES:
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield
