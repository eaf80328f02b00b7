"""Queries and rows for searches: with ties on purpose, with twins; and whether two searches found the same bits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lmcode.memory.search.exact import Found
from lmcode.protocol import NO_SCORE


def whole_numbers(seed: int, N: int, M: int, *, H: int = 2, D: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys of small whole numbers (products are exact, ties are everywhere), a tenth of the slots empty."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randint(-2, 3, (H, N, D), generator=generator).float()
    key = torch.randint(-2, 3, (H, M, D), generator=generator).float()
    ids = torch.randperm(4 * M + 1, generator=generator)[:M]
    empty = torch.rand(M, generator=generator) < 0.1
    key[:, empty] = 0
    last = torch.where(empty, NO_SCORE, 0.0).expand(H, M).unsqueeze(-1)
    return F.pad(query, (0, 1), value=1.0), torch.cat([key, last], -1), torch.where(empty, -1, ids)


def with_twins(seed: int, N: int, M: int, *, H: int = 2, D: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Real vectors, each with a twin that has another id."""
    generator = torch.Generator().manual_seed(seed)
    query = F.normalize(torch.randn(H, N, D, generator=generator), dim=-1) * 7.4
    key = F.normalize(torch.randn(H, M, D, generator=generator), dim=-1)
    key = torch.cat([key, torch.rand(H, M, 1, generator=generator)], -1)
    key[:, M // 2:] = key[:, :M - M // 2][:, torch.randperm(M - M // 2, generator=generator)]
    return F.pad(query, (0, 1), value=1.0), key, torch.randperm(5 * M, generator=generator)[:M]


def assert_same(found: Found, wanted: Found) -> None:
    for part, wanted_part in zip(found, wanted, strict=True):
        assert torch.equal(part, wanted_part)
