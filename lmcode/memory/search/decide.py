"""Where candidates become hits, in every tier that proposes some: exact scores pair by pair, then the total order.

A pair's score is the inner product of query and key, by a routine that sees one pair at a time, plus the row's addend, in
which importance and validity are. So it has the same bits whatever else is in the batch, wherever the row sits and whoever
proposed it, and nothing that an index keeps can be stale.
Letters: N queries, M rows, X candidates of a query.
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


def decide(query_ND: Tensor, rows: HeadRows, row_NX: Tensor, k: int) -> Found:
    """The k best of each query's candidates, in total order: (score_NK, id_NK, row_NK).

    Args:
        query_ND: fp32.
        row_NX: int64, positions of rows, none twice for a query; -1: no candidate.
    """
    id_NX = rows.id_M[row_NX.clamp(min=0)].where(row_NX >= 0, -1)
    return in_order(score_pairs(query_ND, rows, row_NX), id_NX, row_NX, k)


def score_pairs(query_ND: Tensor, rows: HeadRows, row_NX: Tensor) -> Tensor:
    """Scores of given pairs, fp32 [N, X]; of a row -1 some number."""
    key_MD, row_NX = rows.key_MD, row_NX.clamp(min=0)
    if key_MD.dtype == torch.float32 and faiss_index.on_cpu(key_MD.device):
        dot_NX = faiss_index.inner_products(query_ND, key_MD, row_NX)
    else:
        step = max(1, PAIRS_AT_ONCE // max(1, row_NX.shape[1]))
        parts = [_products(query_ND[start:start + step], key_MD, row_NX[start:start + step])
                 for start in range(0, len(query_ND), step)]
        dot_NX = torch.cat(parts) if parts else torch.zeros_like(row_NX, dtype=torch.float32)
    return dot_NX + rows.addend_M[row_NX]


def _products(query_ND: Tensor, key_MD: Tensor, row_NX: Tensor) -> Tensor:
    """The same from copies of the keys in fp32; without FAISS on a CPU in fp64, which hides how the sum was split."""
    copy_XD = key_MD.index_select(0, row_NX.flatten())
    if faiss_index.on_cpu(key_MD.device):
        at_NX = torch.arange(len(copy_XD), device=copy_XD.device).view(row_NX.shape)
        return faiss_index.inner_products(query_ND, copy_XD.float(), at_NX)
    return torch.einsum("qld,qd->ql", copy_XD.view(*row_NX.shape, -1).double(), query_ND.double()).float()


def in_order(score_X: Tensor, id_X: Tensor, slot_X: Tensor, k: int) -> Found:
    """The first k hits of the total order with their slots."""
    order_K = order_hits(score_X, id_X)[..., :k]
    return finish(score_X.gather(-1, order_K), id_X.gather(-1, order_K), slot_X.gather(-1, order_K), k)


def finish(score_X: Tensor, id_X: Tensor, slot_X: Tensor, k: int) -> Found:
    """Marks hits on empty slots as invalid and makes lists k long; the order stays as it is."""
    real_X = (score_X > REAL) & (id_X >= 0)
    found = score_X.where(real_X, NO_SCORE), id_X.where(real_X, -1), slot_X.where(real_X, -1)
    short = k - score_X.shape[-1]
    if short <= 0:
        return found[0][..., :k], found[1][..., :k], found[2][..., :k]
    return (F.pad(found[0], (0, short), value=NO_SCORE), F.pad(found[1], (0, short), value=-1),
            F.pad(found[2], (0, short), value=-1))


def no_hits(shape: tuple[int, ...], device: torch.device) -> Found:
    """Lists of invalid hits."""
    return (torch.full(shape, NO_SCORE, device=device), torch.full(shape, -1, device=device),
            torch.full(shape, -1, device=device))
