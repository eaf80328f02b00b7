"""Queries and rows for searches: with ties on purpose, with twins; and whether two searches found the same bits."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from lmcode.memory.search.tier import Found, Rows
from lmcode.protocol import NO_SCORE


def whole_numbers(seed: int, N: int, M: int, *, H: int = 2, D: int = 6) -> tuple[Tensor, Rows]:
    """Queries and keys of small whole numbers (products are exact, ties are everywhere), a tenth of the slots empty."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randint(-2, 3, (H, N, D), generator=generator).float()
    key = torch.randint(-2, 3, (H, M, D), generator=generator).float()
    ids = torch.randperm(4 * M + 1, generator=generator)[:M]
    empty = torch.rand(M, generator=generator) < 0.1
    key[:, empty] = 0
    return query, Rows(key, torch.where(empty, NO_SCORE, 0.0), torch.where(empty, -1, ids))


def with_twins(seed: int, N: int, M: int, *, H: int = 2, D: int = 64) -> tuple[Tensor, Rows]:
    """Real vectors, each with a twin that has another id."""
    generator = torch.Generator().manual_seed(seed)
    query = F.normalize(torch.randn(H, N, D, generator=generator), dim=-1) * 7.4
    key = F.normalize(torch.randn(H, M, D, generator=generator), dim=-1)
    addend, twin = torch.rand(M, generator=generator), torch.randperm(M - M // 2, generator=generator)
    key[:, M // 2:], addend[M // 2:] = key[:, twin], addend[twin]
    return query, Rows(key, addend, torch.randperm(5 * M, generator=generator)[:M])


def taken(rows: Rows, index: Tensor) -> Rows:
    """Some rows in this order."""
    return Rows(rows.key_HMD[:, index], rows.addend_M[index], rows.id_M[index])


def in_bf16(rows: Rows) -> Rows:
    """With keys of bf16."""
    return replace(rows, key_HMD=rows.key_HMD.bfloat16())


def in_fp32(rows: Rows) -> Rows:
    """With keys of fp32."""
    return replace(rows, key_HMD=rows.key_HMD.float())


def assert_same(found: Found, wanted: Found) -> None:
    for part, wanted_part in zip(found, wanted, strict=True):
        assert torch.equal(part, wanted_part)
