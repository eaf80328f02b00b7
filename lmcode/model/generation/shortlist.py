"""The best few logits of a large vocabulary, exact, while half as many bytes of weights are read.

With one stream a step of decoding is mostly the reading of weights, and half of these belong to the head. Where only the k
best logits decide (greedy and top-k decoding), rough ones from bf16 weights rule out all rows that cannot be among them,
and the rest is computed in fp32. Nothing is approximate about the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

# By how much a rough logit may be off, relative to |w| |x|: both factors are rounded to bf16 (2 x 2^-9), so is the sum
# (2^-9), and fp32 accumulation over some thousand terms adds less than 2^-12.
ROUGHNESS = 3 * 2**-9 + 2**-12
MOST = 4096  # rows for which reading them one by one is still faster than reading all


def multiplies_bf16() -> bool:
    """Whether this CPU multiplies bf16 fast, and oneDNN, which the environment may restrict to older instructions, can."""
    return (torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()
            and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def worthwhile(weight_XD: Tensor, rows: int) -> bool:
    """Whether the shortlist is faster than the product: one stream, fp32 on a CPU that multiplies bf16, many words."""
    return (rows == 1 and weight_XD.device.type == "cpu" and weight_XD.dtype == torch.float32 and len(weight_XD) > 4 * MOST
            and multiplies_bf16())


class Shortlist:
    """Logits of one stream, of which the k best are right and the others may be -inf.

    Args:
        weight_XD: fp32, the head; it is read anew at each call, and kept in bf16 besides.
    """

    def __init__(self, weight_XD: Tensor) -> None:
        self._weight_XD = weight_XD
        self._rough = torch.ops.mkldnn._reorder_linear_weight(weight_XD.bfloat16(), 1)
        self._longest = float(torch.linalg.vector_norm(weight_XD, dim=1).max())

    def __call__(self, x_1D: Tensor, k: int) -> Tensor:
        """fp32 [1, vocabulary] for an input of the head, fp32 [1, D]."""
        rough_1X = torch.ops.mkldnn._linear_pointwise(x_1D.bfloat16(), self._rough, None, "none", [], "").float()
        slack = 2 * ROUGHNESS * self._longest * float(torch.linalg.vector_norm(x_1D))
        bound = rough_1X.topk(min(k, rough_1X.shape[1])).values[0, -1] - slack
        row_K = (rough_1X[0] >= bound).nonzero()[:, 0]
        if not 0 < len(row_K) <= MOST:  # none: x or a weight is not finite
            return x_1D @ self._weight_XD.t()
        logits_1K = x_1D @ self._weight_XD.index_select(0, row_K).t()
        return torch.full_like(rough_1X, -torch.inf).index_copy_(1, row_K, logits_1K)
