"""A dense, obvious retriever for tests: every stored entry in one matmul, scope by namespace, a full stable sort."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lmcode.config import LMCODEConfig
from lmcode.protocol import NO_SCORE, Hits, InTwoSteps


class OracleRetriever(InTwoSteps):
    """Holds M fixed entries with ids 0..M-1.

    Args:
        key_HMD: unit keys.
        value_HMD: values.
        namespace_M: int64, the document of each entry.
        top_k: hits per query.
        log_importance_M: added to an entry's score; 0 if None.
        scope: "document": a query sees its own namespace; "global": all entries. A negative namespace sees nothing.

    Attributes:
        num_searches, num_attends: calls so far.
        queries: the (query_HND, namespace_N) of each search.
    """

    def __init__(self, key_HMD: Tensor, value_HMD: Tensor, namespace_M: Tensor, *, top_k: int,
                 log_importance_M: Tensor | None = None, scope: str = "document") -> None:
        self.key_HMD, self.value_HMD, self.namespace_M = key_HMD, value_HMD, namespace_M
        self.log_importance_M = torch.zeros(len(namespace_M)) if log_importance_M is None else log_importance_M
        self.top_k, self.scope = top_k, scope
        self.num_searches = self.num_attends = 0
        self.queries: list[tuple[Tensor, Tensor]] = []

    def search(self, query_HND: Tensor, namespace_N: Tensor, document_N: Tensor | None = None) -> Hits:
        self.num_searches += 1
        self.queries.append((query_HND.clone(), namespace_N.clone()))
        with torch.no_grad():
            score_HNM = query_HND @ self.key_HMD.transpose(1, 2) + self.log_importance_M
            seen_NM = (namespace_N >= 0)[:, None].expand(-1, len(self.namespace_M))
            if self.scope == "document":
                seen_NM = seen_NM & (namespace_N[:, None] == self.namespace_M)
            score_HNM = score_HNM.masked_fill(~seen_NM, NO_SCORE)
            score_HNM = F.pad(score_HNM, (0, max(0, self.top_k - score_HNM.shape[2])), value=NO_SCORE)
            score_HNK, id_HNK = (part[..., :self.top_k]
                                 for part in score_HNM.sort(dim=2, descending=True, stable=True))
            return Hits(score_HNK, id_HNK.masked_fill(score_HNK == NO_SCORE, -1))

    def attend(self, query_HND: Tensor, hits: Hits) -> tuple[Tensor, Tensor]:
        self.num_attends += 1
        head_H11 = torch.arange(len(self.key_HMD))[:, None, None]
        id_HNK, valid_HNK = hits.id_HNK.clamp(min=0), hits.valid_HNK
        score_HNK = torch.einsum("hnd,hnkd->hnk", query_HND, self.key_HMD[head_H11, id_HNK])
        score_HNK = (score_HNK + self.log_importance_M[id_HNK]).masked_fill(~valid_HNK, NO_SCORE)
        weight_HNK = score_HNK.softmax(dim=2) * valid_HNK
        value_HND = torch.einsum("hnk,hnkd->hnd", weight_HNK, self.value_HMD[head_H11, id_HNK])
        return value_HND, score_HNK.logsumexp(dim=2).where(valid_HNK.any(dim=2), NO_SCORE)


def random_retriever(config: LMCODEConfig, *, num_entries: int, num_namespaces: int, seed: int = 0,
                     value_scale: float = 1.0) -> OracleRetriever:
    """Random unit keys, normal values; entry m is in namespace m mod `num_namespaces`."""
    generator = torch.Generator().manual_seed(seed)
    shape = (config.memory_heads, num_entries, config.memory_head_dim)
    key_HMD = F.normalize(torch.randn(shape, generator=generator), dim=-1)
    return OracleRetriever(key_HMD, value_scale * torch.randn(shape, generator=generator),
                           torch.arange(num_entries) % num_namespaces, top_k=config.memory_top_k)
