"""Brute-force search by FAISS over a shard's own rows, in place, and the choice between it and `exact`.

FAISS scores depend on the batch by an ulp or so, and its order among equals is arbitrary. So FAISS only proposes one
hit more than asked for; each proposal is scored again pair by pair, and where the k-th is not clear of everything that
was not proposed, the query is redone over all rows. What leaves this module is exact, in total order and independent
of how rows are spread. Raw FAISS ids stay here: its -1 becomes an invalid hit.
Letters: E = D + 1, the width of a stored key; L proposals.
"""

from __future__ import annotations

import importlib.util
import logging
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmcode.config import FAISS_GPU_MAX_K, ConfigError, MemoryConfig
from lmcode.memory.search.exact import (
    ROUNDING,
    candidates_above,
    in_order,
    kth_largest,
    no_hits,
)
from lmcode.memory.search.tier import Found, Hidden, Rows, Tier, tier_of
from lmcode.protocol import NO_SCORE

log = logging.getLogger("lmcode")

AUTO_FAISS_SLOTS = 5_000  # from here on tier = auto leaves a global search to FAISS (measured, see README)
REDO_BLOCK = 64  # queries that are redone at once


def available(device: torch.device) -> bool:
    """Whether FAISS is installed and can search tensors on `device`."""
    if importlib.util.find_spec("faiss") is None:
        return False
    return device.type == "cpu" or _gpu_resources() is not None


def check_top_k(k: int) -> None:
    """Raises ConfigError for a K that FAISS cannot return on every device."""
    if not 1 <= k <= FAISS_GPU_MAX_K:
        raise ConfigError(f"top_k must lie in 1..{FAISS_GPU_MAX_K}: got {k}")


def search_flat(query_HNE: Tensor, key_HME: Tensor, id_M: Tensor, k: int, *, hidden: Hidden = ()) -> Found:
    """The k best rows for each head and query, in total order; arguments and result as in `exact.search_exact`.

    bf16 rows are converted to fp32 on a CPU; of rows of which some are hidden, a head's at a time are copied.

    Raises:
        ConfigError: if k lies outside 1..2048.
    """
    check_top_k(k)
    heads = [_search_groups(query_NE, key_ME.float().contiguous(), id_M, k, hidden)
             for query_NE, key_ME in zip(query_HNE, key_HME, strict=True)]
    score_HNK, id_HNK, slot_HNK = (torch.stack(parts) for parts in zip(*heads, strict=True))
    return score_HNK, id_HNK, slot_HNK


def _search_groups(query_NE: Tensor, key_ME: Tensor, id_M: Tensor, k: int, hidden: Hidden) -> Found:
    """One head's queries: those that the same rows are hidden from together, for FAISS knows no mask for single pairs.

    Hidden rows are empty slots then.
    """
    if not hidden:
        return _search_head(query_NE.contiguous(), key_ME, id_M, k)
    found, key_ME = no_hits((len(query_NE), k), query_NE.device), key_ME.clone()
    sees_all_N = torch.ones(len(query_NE), dtype=torch.bool, device=query_NE.device)
    sees_all_N[torch.cat([query_Q for query_Q, _ in hidden])] = False
    for query_Q, row_P in [(sees_all_N.nonzero().squeeze(1), id_M.new_empty(0)), *hidden]:
        addend_P = key_ME[row_P, -1]
        key_ME[row_P, -1] = NO_SCORE
        for whole, part in zip(found, _search_head(query_NE[query_Q], key_ME, id_M, k), strict=True):
            whole[query_Q] = part
        key_ME[row_P, -1] = addend_P
    return found


def _search_head(query_NE: Tensor, key_ME: Tensor, id_M: Tensor, k: int) -> Found:
    N, M = len(query_NE), len(key_ME)
    if N == 0 or M == 0:
        return no_hits((N, k), query_NE.device)
    wanted = min(k + 1, M, FAISS_GPU_MAX_K)
    raw_score_NL, slot_NL = _knn(query_NE, key_ME, wanted)
    score_NL = _score_pairs(query_NE, key_ME, slot_NL)
    id_NL = id_M[slot_NL.clamp(min=0)].where(slot_NL >= 0, -1)
    found = in_order(score_NL, id_NL, slot_NL, k)
    if wanted == M:
        return found
    # Everything that FAISS left out scored at most its last proposal, give or take the rounding of both.
    slack_N = ROUNDING * (query_NE.norm(dim=1) * key_ME[:, :-1].norm(dim=1).max() + 10.0)
    unclear_N = (found[0][:, -1] <= raw_score_NL[:, -1] + 2 * slack_N) & (raw_score_NL[:, -1] > -1e29)
    unclear_Q = unclear_N.nonzero().squeeze(1)
    for start in range(0, len(unclear_Q), REDO_BLOCK):
        rows_Q = unclear_Q[start:start + REDO_BLOCK]
        for whole, part in zip(found, _redo(query_NE[rows_Q], key_ME, id_M, k), strict=True):
            whole[rows_Q] = part
    return found


def _redo(query_QE: Tensor, key_ME: Tensor, id_M: Tensor, k: int) -> Found:
    """The same, scoring every pair."""
    slot_QM = torch.arange(len(key_ME), device=key_ME.device).expand(len(query_QE), -1)
    score_QM = _score_pairs(query_QE, key_ME, slot_QM)
    return in_order(*candidates_above(score_QM, kth_largest(score_QM, k), id_M), k)


def _knn(query_NE: Tensor, key_ME: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What FAISS proposes, best first by its own scores: fp32 [N, L] and slots int64 [N, L]."""
    import faiss

    if query_NE.device.type == "cpu":
        faiss.omp_set_num_threads(torch.get_num_threads())
        score_NL, slot_NL = faiss.knn(query_NE.numpy(), key_ME.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)
        return torch.from_numpy(score_NL), torch.from_numpy(slot_NL)
    import faiss.contrib.torch_utils  # noqa: F401  (lets knn_gpu take tensors)

    return faiss.knn_gpu(_gpu_resources(), query_NE, key_ME, k, metric=faiss.METRIC_INNER_PRODUCT)


def _score_pairs(query_NE: Tensor, key_ME: Tensor, slot_NL: Tensor) -> Tensor:
    """Scores of given pairs by a routine that sees one pair at a time: fp32 [N, L], whatever else is in the batch."""
    if query_NE.device.type != "cpu":  # fp64 hides how the sum was split
        rows_NLE = key_ME[slot_NL.clamp(min=0)].double()
        return torch.einsum("nle,ne->nl", rows_NLE, query_NE.double()).float()
    import faiss

    N, L = slot_NL.shape
    score_NL = np.empty((N, L), dtype=np.float32)
    arrays = score_NL, query_NE.numpy(), key_ME.numpy(), np.ascontiguousarray(slot_NL.numpy())
    faiss.fvec_inner_products_by_idx(*(  # type: ignore[attr-defined]  # faiss adds it when it is loaded
        faiss.swig_ptr(array) for array in arrays), key_ME.shape[1], N, L)
    return torch.from_numpy(score_NL)


class FlatTier(Tier):
    """`search_flat`, which keeps nothing."""

    @staticmethod
    def check(device: torch.device) -> None:
        if not available(device):
            raise ConfigError(f"memory.tier = faiss-flat needs a FAISS build for {device.type}: found none")

    def search(self, query_HQE: Tensor, rows: Rows, k: int, *, hidden: Hidden = ()) -> Found:
        return search_flat(query_HQE, rows.key_HPE, rows.id_P, k, hidden=hidden)


def choose_tier(config: MemoryConfig, scope: str, slots: int, device: torch.device) -> str:
    """The tier of searches with this scope. `auto` looks at settings only, so that every number of ranks decides alike.

    Raises:
        ConfigError: if the tier that is asked for cannot search on `device`.
    """
    if config.tier != "auto":
        tier_of(config.tier).check(device)
        return config.tier
    if scope != "global" or slots < AUTO_FAISS_SLOTS:
        return "exact"
    usable = available(device)
    if not usable and config.scope == "global":
        log.warning("memory.tier = auto: no FAISS build for %s, so torch searches %d slots", device.type, slots)
    return "faiss-flat" if usable else "exact"


@cache
def _gpu_resources() -> Any:
    """FAISS's GPU scratch space, limited to 256 MiB; None without a GPU build or a GPU."""
    import faiss

    if not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() == 0:
        return None
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(256 * 2**20)
    return resources
