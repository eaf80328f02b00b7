"""Linear maps of a few rows, which is all that decoding multiplies: each weight is read once per token.

BLAS is made for many rows: on a CPU its product of 8 rows with a [512, 2048] matrix takes as long as that of 40. A `Product`
may keep a copy of its weight in a layout that is fast for its number of rows, which costs the weight's memory once more.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

FEW_ROWS = 3  # up to here a product with the transposed matrix runs through memory in order, and is as fast as memory
SMALL = 2**16  # weights of a map for which oneDNN's overhead of 15 us is more than it saves


class Product:
    """x -> norm(x) W^T + b for inputs [B, I] of `rows` rows.

    Args:
        weight_OI: the weight as linear layers hold it.
        bias_O: what is added; None: nothing.
        norm: what the inputs pass through first; None: nothing.
        copy: keep a copy of the weight in the fastest layout, the norm's factors multiplied in; only where that helps, with
            fp32 on a CPU.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None, *, norm: nn.RMSNorm | None = None, rows: int,
                 copy: bool) -> None:
        self._bias_O, self._factor_I, self._floor, self._packed = bias_O, None, None, False
        if norm is not None:
            # x / sqrt(|x|^2 / I + eps) = sqrt(I) x / hypot(|x|, sqrt(I eps)): three operations instead of ten.
            self._factor_I = norm.weight.float() * math.sqrt(norm.weight.numel())
            epsilon = torch.finfo(norm.weight.dtype).eps if norm.eps is None else norm.eps
            self._floor = torch.tensor(math.sqrt(norm.weight.numel() * epsilon), device=weight_OI.device)
        if not copy or weight_OI.device.type != "cpu" or weight_OI.dtype != torch.float32:
            self._weight = weight_OI.t()
            return
        if self._factor_I is not None:
            weight_OI, self._factor_I = weight_OI * self._factor_I, None
        self._packed = rows > FEW_ROWS and weight_OI.numel() > SMALL and torch.backends.mkldnn.is_available()
        self._weight = (torch.ops.mkldnn._reorder_linear_weight(weight_OI, rows) if self._packed
                        else weight_OI.t().contiguous())

    def normed(self, x_BI: Tensor) -> Tensor:
        """What is multiplied by the weight."""
        if self._floor is None:
            return x_BI
        length_B1 = torch.linalg.vector_norm(x_BI, dim=-1, keepdim=True, dtype=torch.float32)
        unit_BI = x_BI / torch.hypot(length_B1, self._floor)  # fp32
        return (unit_BI if self._factor_I is None else unit_BI * self._factor_I).to(x_BI.dtype)

    def __call__(self, x_BI: Tensor) -> Tensor:
        """The product, [B, O] in the dtype of x."""
        x_BI = self.normed(x_BI)
        if self._packed:
            product_BO: Tensor = torch.ops.mkldnn._linear_pointwise(x_BI, self._weight, self._bias_O, "none", [], "")
            return product_BO
        return x_BI @ self._weight if self._bias_O is None else torch.addmm(self._bias_O, x_BI, self._weight)

    def added(self, to_BO: Tensor, x_BI: Tensor) -> Tensor:
        """`to_BO` plus the product, of maps without bias and norm."""
        if self._packed:
            sum_BO: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x_BI, to_BO, self._weight, None, "add")
            return sum_BO
        return torch.addmm(to_BO, x_BI, self._weight)
