"""The one file that calls FAISS: nearest rows by brute force, on CPU and GPU, inner products of pairs, k-means.

FAISS scores depend on the batch by an ulp or so, and its order among equals is arbitrary: whatever comes from here is a
proposal, and `decide` makes hits of it. Raw FAISS ids stay here: its -1 becomes an invalid candidate.
Letters: N queries, P rows, L proposals.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmcode.config import FAISS_GPU_MAX_K, ConfigError

KMEANS_ROUNDS = 10


def available(device: torch.device) -> bool:
    """Whether FAISS is installed and can search tensors on `device`."""
    if importlib.util.find_spec("faiss") is None:
        return False
    return device.type == "cpu" or _gpu_resources() is not None


def check_top_k(k: int) -> None:
    """Raises ConfigError for a K that FAISS cannot return on every device."""
    if not 1 <= k <= FAISS_GPU_MAX_K:
        raise ConfigError(f"top_k must lie in 1..{FAISS_GPU_MAX_K}: got {k}")


def knn(query_NE: Tensor, key_PE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What FAISS proposes, best first by its own inner products: fp32 [N, L] and rows int64 [N, L]."""
    import faiss

    if query_NE.device.type == "cpu":
        faiss.omp_set_num_threads(torch.get_num_threads())
        score_NL, row_NL = faiss.knn(query_NE.numpy(), key_PE.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)
        return torch.from_numpy(score_NL), torch.from_numpy(row_NL)
    import faiss.contrib.torch_utils  # noqa: F401  (lets knn_gpu take tensors)

    return faiss.knn_gpu(_gpu_resources(), query_NE, key_PE, k, metric=faiss.METRIC_INNER_PRODUCT)


def on_cpu(device: torch.device) -> bool:
    """Whether FAISS can work on tensors there as on arrays."""
    return device.type == "cpu" and available(device)


def inner_products(query_ND: Tensor, key_PD: Tensor, row_NL: Tensor) -> Tensor:
    """Of given pairs, by a routine that sees one pair at a time: fp32 [N, L], whatever else is in the batch."""
    import faiss

    (N, L), query_ND, key_PD = row_NL.shape, query_ND.contiguous(), key_PD.contiguous()
    faiss.omp_set_num_threads(torch.get_num_threads())
    dot_NL = np.empty((N, L), dtype=np.float32)
    arrays = dot_NL, query_ND.numpy(), key_PD.numpy(), np.ascontiguousarray(row_NL.numpy())
    faiss.fvec_inner_products_by_idx(*(  # type: ignore[attr-defined]  # faiss adds it when it is loaded
        faiss.swig_ptr(array) for array in arrays), key_PD.shape[1], N, L)
    return torch.from_numpy(dot_NL)


def centroids(vector_SD: Tensor, count: int, *, seed: int) -> Tensor:
    """Centroids of unit length by k-means over directions, fp32 [count, D] on the CPU.

    Args:
        vector_SD: fp32 on the CPU, of unit length; at least as many as centroids.
    """
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    S, D = vector_SD.shape
    means = faiss.Kmeans(D, count, niter=KMEANS_ROUNDS, seed=seed, spherical=True, min_points_per_centroid=1,
                         max_points_per_centroid=S)
    means.train(vector_SD.numpy())
    return torch.from_numpy(means.centroids)


@cache
def _gpu_resources() -> Any:
    """FAISS's GPU scratch space, limited to 256 MiB; None without a GPU build or a GPU."""
    import faiss

    if not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() == 0:
        return None
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(256 * 2**20)
    return resources
