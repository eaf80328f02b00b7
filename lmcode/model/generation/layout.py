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
    """x -> norm(x) W^T + b for inputs [B, D] of `rows` rows.

    Args:
        weight_XD: the weight as linear layers hold it.
        bias_X: what is added; None: nothing.
        norm: what the inputs pass through first; None: nothing.
        copy: keep a copy of the weight in the fastest layout, the norm's factors multiplied in; only where that helps, with
            fp32 on a CPU.
    """

    def __init__(self, weight_XD: Tensor, bias_X: Tensor | None = None, *, norm: nn.RMSNorm | None = None, rows: int,
                 copy: bool) -> None:
        self._bias_X, self._factor_D, self._floor, self._packed = bias_X, None, None, False
        if norm is not None:
            # x / sqrt(|x|^2 / I + eps) = sqrt(I) x / hypot(|x|, sqrt(I eps)): three operations instead of ten.
            self._factor_D = norm.weight.float() * math.sqrt(norm.weight.numel())
            epsilon = torch.finfo(norm.weight.dtype).eps if norm.eps is None else norm.eps
            self._floor = torch.tensor(math.sqrt(norm.weight.numel() * epsilon), device=weight_XD.device)
        if not copy or weight_XD.device.type != "cpu" or weight_XD.dtype != torch.float32:
            self._weight = weight_XD.t()
            return
        if self._factor_D is not None:
            weight_XD, self._factor_D = weight_XD * self._factor_D, None
        self._packed = rows > FEW_ROWS and weight_XD.numel() > SMALL and torch.backends.mkldnn.is_available()
        self._weight = (torch.ops.mkldnn._reorder_linear_weight(weight_XD, rows) if self._packed
                        else weight_XD.t().contiguous())

    def normed(self, x_BD: Tensor) -> Tensor:
        """What is multiplied by the weight."""
        if self._floor is None:
            return x_BD
        length_B1 = torch.linalg.vector_norm(x_BD, dim=-1, keepdim=True, dtype=torch.float32)
        unit_BD = x_BD / torch.hypot(length_B1, self._floor)  # fp32
        return (unit_BD if self._factor_D is None else unit_BD * self._factor_D).to(x_BD.dtype)

    def __call__(self, x_BD: Tensor) -> Tensor:
        """The product, [B, X] in the dtype of x."""
        x_BD = self.normed(x_BD)
        if self._packed:
            product_BX: Tensor = torch.ops.mkldnn._linear_pointwise(x_BD, self._weight, self._bias_X, "none", [], "")
            return product_BX
        return x_BD @ self._weight if self._bias_X is None else torch.addmm(self._bias_X, x_BD, self._weight)

    def added(self, to_BX: Tensor, x_BD: Tensor) -> Tensor:
        """`to_BX` plus the product, of maps without bias and norm."""
        if self._packed:
            sum_BX: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x_BD, to_BX, self._weight, None, "add")
            return sum_BX
        return torch.addmm(to_BX, x_BD, self._weight)
