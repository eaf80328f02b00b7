"""Brute force by FAISS over a shard's own rows: FAISS proposes, `decide` decides.

FAISS is asked, block by block of rows, for one hit more than wanted; each proposal is scored again pair by pair, and where
the k-th is not clear of everything that was not proposed, the query is redone over all rows. So hits are exact and do not
depend on how rows are spread. The addends lie beside the keys; a block with both side by side is made for FAISS, so that
importance, empty slots and what is hidden take part in its ranking.
Letters: N queries, M rows, K proposals, X = D + 1, the width of a key with its addend.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lmcode.config import FAISS_GPU_MAX_K, ConfigError
from lmcode.memory.search import faiss_index
from lmcode.memory.search.decide import decide, no_hits
from lmcode.memory.search.exact import ROUNDING, search_head
from lmcode.memory.search.tier import Found, HeadRows, Hidden, Rows, Tier
from lmcode.protocol import NO_SCORE

ROW_BLOCK = 65536  # rows that FAISS sees at once
QUERY_BLOCK = 8192  # queries whose proposals of all blocks are held at once


class FlatTier(Tier):
    """`search_flat`, which keeps nothing."""

    @staticmethod
    def check(device: torch.device) -> None:
        if not faiss_index.available(device):
            raise ConfigError(f"memory.tier = faiss-flat needs a FAISS build for {device.type}: found none")

    def search(self, query_HND: Tensor, rows: Rows, k: int, *, hidden: Hidden = ()) -> Found:
        return search_flat(query_HND, rows, k, hidden=hidden)


def search_flat(query_HND: Tensor, rows: Rows, k: int, *, hidden: Hidden = ()) -> Found:
    """The k best rows for each head and query, in total order; arguments and result as in `exact.search_exact`.

    Raises:
        ConfigError: if k lies outside 1..2048.
    """
    faiss_index.check_top_k(k)
    heads = [_search_groups(query_ND, rows.of_head(head), k, hidden) for head, query_ND in enumerate(query_HND)]
    score_HNK, id_HNK, row_HNK = (torch.stack(parts) for parts in zip(*heads, strict=True))
    return score_HNK, id_HNK, row_HNK


def _search_groups(query_ND: Tensor, rows: HeadRows, k: int, hidden: Hidden) -> Found:
    """One head's queries: those that the same rows are hidden from together, for FAISS knows no mask for single pairs.

    Hidden rows are empty slots then.
    """
    if not hidden:
        return _search_head(query_ND, rows, k)
    found = no_hits((len(query_ND), k), query_ND.device)
    sees_all_N = torch.ones(len(query_ND), dtype=torch.bool, device=query_ND.device)
    sees_all_N[torch.cat([queries for queries, _ in hidden])] = False
    for queries, unseen in [(sees_all_N.nonzero().squeeze(1), rows.id_M.new_empty(0)), *hidden]:
        seen = rows._replace(addend_M=rows.addend_M.index_fill(0, unseen, NO_SCORE))
        for whole, part in zip(found, _search_head(query_ND[queries], seen, k), strict=True):
            whole[queries] = part
    return found


def _search_head(query_ND: Tensor, rows: HeadRows, k: int) -> Found:
    N, M = len(query_ND), len(rows.id_M)
    if N == 0 or M == 0:
        return no_hits((N, k), query_ND.device)
    if N > QUERY_BLOCK:
        parts = [_search_head(block_ND, rows, k) for block_ND in query_ND.split(QUERY_BLOCK)]
        score_NK, id_NK, row_NK = (torch.cat(part) for part in zip(*parts, strict=True))
        return score_NK, id_NK, row_NK
    wanted = min(k + 1, M, FAISS_GPU_MAX_K)
    row_NK, bound_N, longest = _proposals(query_ND, rows, wanted)
    found = decide(query_ND, rows, row_NK, k)
    if wanted == M:
        return found
    # Everything that FAISS left out scored at most its last proposal, give or take the rounding of both.
    slack_N = ROUNDING * (query_ND.norm(dim=1) * longest + 10.0)
    unclear_N = (found[0][:, -1] <= bound_N + 2 * slack_N) & (bound_N > -1e29)
    unclear = unclear_N.nonzero().squeeze(1)
    for whole, part in zip(found, search_head(query_ND[unclear], rows, k), strict=True):
        whole[unclear] = part
    return found


def _proposals(query_ND: Tensor, rows: HeadRows, wanted: int) -> tuple[Tensor, Tensor, float]:
    """Of all blocks of rows: candidates int64 [N, K], what a row that is none can score at most, fp32 [N], and the length of
    the longest key."""
    query_NX = F.pad(query_ND, (0, 1), value=1.0)
    bound_N, longest, proposed = query_ND.new_full((len(query_ND),), -torch.inf), 0.0, []
    for start in range(0, len(rows.id_M), ROW_BLOCK):
        block = slice(start, start + ROW_BLOCK)
        key_MX = torch.cat([rows.key_MD[block].float(), rows.addend_M[block, None]], dim=1)
        proposals = min(wanted, len(key_MX))
        raw_NK, row_NK = faiss_index.knn(query_NX, key_MX, proposals)
        proposed.append(torch.where(row_NK >= 0, row_NK + start, -1))
        if proposals < len(key_MX):
            bound_N = torch.maximum(bound_N, raw_NK[:, -1])
        longest = max(longest, float(key_MX[:, :-1].norm(dim=1).max()))
    return torch.cat(proposed, dim=1), bound_N, longest
