"""Copies of linear layers' weights in a layout that is fast for a few rows on a CPU, for as long as a text is being written.

Decoding reads every weight once per token, for as many rows as there are streams. BLAS is made for many rows: its product of
8 rows with a [512, 2048] matrix takes as long as that of 40. The copies take the weights' memory once more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

FEW_ROWS = 3  # up to here a product with the transposed matrix runs through memory in order, and is as fast as memory
SMALL = 2**16  # weights of a layer for which oneDNN's overhead of 15 us is more than it saves


@contextmanager
def laid_out(model: nn.Module, *, rows: int) -> Iterator[None]:
    """Inside, the model's linear layers multiply by such copies, made for inputs of `rows` rows; weights stay as they are.

    Layers whose weights are not fp32 on a CPU or are elsewhere (ZeRO-3), or whose forward somebody has replaced, are left
    alone.
    """
    chosen = [module for module in model.modules() if type(module) is nn.Linear and "forward" not in vars(module)
              and module.weight.device.type == "cpu" and module.weight.dtype == torch.float32
              and module.weight.shape == (module.out_features, module.in_features)]
    for module in chosen:
        weight_OI, packed = module.weight.detach(), rows > FEW_ROWS and module.weight.numel() > SMALL
        if packed and torch.backends.mkldnn.is_available():
            weight = torch.ops.mkldnn._reorder_linear_weight(weight_OI, rows)
            module.forward = partial(_times_packed, weight=weight, bias_O=module.bias)
        else:
            module.forward = partial(_times, weight_IO=weight_OI.t().contiguous(), bias_O=module.bias)
    try:
        yield
    finally:
        for module in chosen:
            vars(module).pop("forward", None)


def _times(x_BTI: Tensor, *, weight_IO: Tensor, bias_O: Tensor | None) -> Tensor:
    """A linear layer; I inputs, O outputs."""
    product_BTO = x_BTI @ weight_IO
    return product_BTO if bias_O is None else product_BTO + bias_O


def _times_packed(x_BTI: Tensor, *, weight: Tensor, bias_O: Tensor | None) -> Tensor:
    """The same by oneDNN, with a weight in its own layout."""
    return torch.ops.mkldnn._linear_pointwise(x_BTI, weight, bias_O, "none", [], "")
