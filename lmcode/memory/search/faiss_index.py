"""The one file that calls FAISS: nearest rows by brute force, on CPU and GPU, inner products of pairs, k-means.

FAISS scores depend on the batch by an ulp or so, and its order among equals is arbitrary: whatever comes from here is a
proposal, and `decide` makes hits of it. Raw FAISS ids stay here: its -1 becomes an invalid candidate.
Letters: N queries, M rows, K proposals, X rows of a query or vectors of a sample.
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


def knn(query_ND: Tensor, key_MD: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What FAISS proposes, best first by its own inner products: fp32 [N, K] and rows int64 [N, K]."""
    import faiss

    if query_ND.device.type == "cpu":
        faiss.omp_set_num_threads(torch.get_num_threads())
        score_NK, row_NK = faiss.knn(query_ND.numpy(), key_MD.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)
        return torch.from_numpy(score_NK), torch.from_numpy(row_NK)
    import faiss.contrib.torch_utils  # noqa: F401  (lets knn_gpu take tensors)

    return faiss.knn_gpu(_gpu_resources(), query_ND, key_MD, k, metric=faiss.METRIC_INNER_PRODUCT)


def on_cpu(device: torch.device) -> bool:
    """Whether FAISS can work on tensors there as on arrays."""
    return device.type == "cpu" and available(device)


def inner_products(query_ND: Tensor, key_MD: Tensor, row_NX: Tensor) -> Tensor:
    """Of given pairs, by a routine that sees one pair at a time: fp32 [N, X], whatever else is in the batch."""
    import faiss

    (N, X), query_ND, key_MD = row_NX.shape, query_ND.contiguous(), key_MD.contiguous()
    faiss.omp_set_num_threads(torch.get_num_threads())
    dot_NX = np.empty((N, X), dtype=np.float32)
    arrays = dot_NX, query_ND.numpy(), key_MD.numpy(), np.ascontiguousarray(row_NX.numpy())
    faiss.fvec_inner_products_by_idx(*(  # type: ignore[attr-defined]  # faiss adds it when it is loaded
        faiss.swig_ptr(array) for array in arrays), key_MD.shape[1], N, X)
    return torch.from_numpy(dot_NX)


def centroids(vector_XD: Tensor, count: int, *, seed: int) -> Tensor:
    """Centroids of unit length by k-means over directions, fp32 [count, D] on the CPU.

    Args:
        vector_XD: fp32 on the CPU, of unit length; at least as many as centroids.
    """
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    X, D = vector_XD.shape
    means = faiss.Kmeans(D, count, niter=KMEANS_ROUNDS, seed=seed, spherical=True, min_points_per_centroid=1,
                         max_points_per_centroid=X)
    means.train(vector_XD.numpy())
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
