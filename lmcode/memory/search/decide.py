"""Where candidates become hits, in every tier that proposes some: exact scores pair by pair, then the total order.

A pair's score is the inner product of query and key, by a routine that sees one pair at a time, plus the row's addend, in
which importance and validity are. So it has the same bits whatever else is in the batch, wherever the row sits and whoever
proposed it, and nothing that an index keeps can be stale.
Letters: N queries, P rows, L candidates of a query.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lmcode.memory.merge import order_hits
from lmcode.memory.search import faiss_index
from lmcode.memory.search.tier import Found, HeadRows
from lmcode.protocol import NO_SCORE

REAL = NO_SCORE / 2  # scores below come from empty slots
PAIRS_AT_ONCE = 65536  # whose keys are gathered at once


def decide(query_ND: Tensor, rows: HeadRows, row_NL: Tensor, k: int) -> Found:
    """The k best of each query's candidates, in total order: (score_NK, id_NK, row_NK).

    Args:
        query_ND: fp32.
        row_NL: int64, positions of rows, none twice for a query; -1: no candidate.
    """
    id_NL = rows.id_P[row_NL.clamp(min=0)].where(row_NL >= 0, -1)
    return in_order(score_pairs(query_ND, rows, row_NL), id_NL, row_NL, k)


def score_pairs(query_ND: Tensor, rows: HeadRows, row_NL: Tensor) -> Tensor:
    """Scores of given pairs, fp32 [N, L]; of a row -1 some number."""
    key_PD, row_NL = rows.key_PD, row_NL.clamp(min=0)
    if key_PD.dtype == torch.float32 and faiss_index.on_cpu(key_PD.device):
        dot_NL = faiss_index.inner_products(query_ND, key_PD, row_NL)
    else:
        step = max(1, PAIRS_AT_ONCE // max(1, row_NL.shape[1]))
        parts = [_products(query_ND[start:start + step], key_PD, row_NL[start:start + step])
                 for start in range(0, len(query_ND), step)]
        dot_NL = torch.cat(parts) if parts else torch.zeros_like(row_NL, dtype=torch.float32)
    return dot_NL + rows.addend_P[row_NL]


def _products(query_QD: Tensor, key_PD: Tensor, row_QL: Tensor) -> Tensor:
    """The same from copies of the keys in fp32; without FAISS on a CPU in fp64, which hides how the sum was split."""
    key_WD = key_PD.index_select(0, row_QL.flatten())
    if faiss_index.on_cpu(key_PD.device):
        at_QL = torch.arange(len(key_WD), device=key_WD.device).view(row_QL.shape)
        return faiss_index.inner_products(query_QD, key_WD.float(), at_QL)
    return torch.einsum("qld,qd->ql", key_WD.view(*row_QL.shape, -1).double(), query_QD.double()).float()


def in_order(score_L: Tensor, id_L: Tensor, slot_L: Tensor, k: int) -> Found:
    """The first k hits of the total order with their slots."""
    order_K = order_hits(score_L, id_L)[..., :k]
    return finish(score_L.gather(-1, order_K), id_L.gather(-1, order_K), slot_L.gather(-1, order_K), k)


def finish(score_L: Tensor, id_L: Tensor, slot_L: Tensor, k: int) -> Found:
    """Marks hits on empty slots as invalid and makes lists k long; the order stays as it is."""
    real_L = (score_L > REAL) & (id_L >= 0)
    found = score_L.where(real_L, NO_SCORE), id_L.where(real_L, -1), slot_L.where(real_L, -1)
    short = k - score_L.shape[-1]
    if short <= 0:
        return found[0][..., :k], found[1][..., :k], found[2][..., :k]
    return (F.pad(found[0], (0, short), value=NO_SCORE), F.pad(found[1], (0, short), value=-1),
            F.pad(found[2], (0, short), value=-1))


def no_hits(shape: tuple[int, ...], device: torch.device) -> Found:
    """Lists of invalid hits."""
    return (torch.full(shape, NO_SCORE, device=device), torch.full(shape, -1, device=device),
            torch.full(shape, -1, device=device))
