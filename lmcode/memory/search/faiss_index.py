"""The one file that calls FAISS: nearest rows by brute force, on CPU and GPU, inner products of pairs, k-means, graphs.

FAISS scores depend on the batch by an ulp or so, and its order among equals is arbitrary: whatever comes from here is a
proposal, and `decide` makes hits of it. Raw FAISS ids stay here: its -1 becomes an invalid candidate. No file of FAISS's own
format is read or written: its reader trusts what it reads.
Letters: N queries, M rows, K proposals, X rows of a query or vectors of a sample; of graphs E nodes, X neighbours of all
nodes on all levels, one behind the other.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lmcode.config import FAISS_GPU_MAX_K, ConfigError

KMEANS_ROUNDS = 10
LINKS = 16  # neighbours of a node on each level of a graph; twice as many on the lowest, which has all nodes
KEPT = 100  # nodes that the search for a newcomer's neighbours keeps in view (efConstruction)
ADDED_AT_ONCE = 2048  # nodes between two looks at whether a graph is still wanted; part of what a graph is


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


class Links(NamedTuple):
    """A graph without its keys, as plain arrays.

    level_E: int32, on how many levels each node is. neighbour_X: int32, nodes, -1 where there is none. entry: the node that
    a search begins at.
    """

    level_E: np.ndarray
    neighbour_X: np.ndarray
    entry: int


def version() -> str:
    """FAISS's own; another one may make other graphs."""
    import faiss

    return str(faiss.__version__)


def build_graph(key_ED: np.ndarray, *, unwanted: Callable[[], bool]) -> Any:
    """A graph over keys by inner product, the same for the same keys in the same order; None if it is `unwanted` meanwhile.

    One thread makes it, whatever torch's threads are: several would find other neighbours each time. Y. Malkov and D.
    Yashunin, Efficient and robust approximate nearest neighbor search using hierarchical navigable small world graphs, 2016.

    Args:
        key_ED: fp32, at least one, contiguous.
        unwanted: asked every `ADDED_AT_ONCE` nodes.
    """
    import faiss

    faiss.omp_set_num_threads(1)  # of the calling thread only
    graph = _empty_graph(key_ED.shape[1])
    for start in range(0, len(key_ED), ADDED_AT_ONCE):
        if unwanted():
            return None
        graph.add(key_ED[start:start + ADDED_AT_ONCE])
    return graph


def ask_graph(graph: Any, query_ND: Tensor, count: int) -> np.ndarray:
    """The `count` nodes that a search of a graph finds nearest, int64 [N, count]; -1 where it finds fewer.

    Every query goes by itself, so what it finds does not hang on the others.

    Args:
        query_ND: fp32 on the CPU, at least one.
    """
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    settings = faiss.SearchParametersHNSW(efSearch=count)  # type: ignore[attr-defined]  # faiss adds it when it is loaded
    node_NX: np.ndarray = graph.search(query_ND.contiguous().numpy(), count, params=settings)[1]
    return node_NX


def links_of(graph: Any) -> Links:
    """A graph as arrays."""
    import faiss

    return Links(faiss.vector_to_array(graph.hnsw.levels), faiss.vector_to_array(graph.hnsw.neighbors),
                 int(graph.hnsw.entry_point))


def graph_of(links: Links, key_ED: np.ndarray) -> Any:
    """The graph over these keys that has these links.

    Raises:
        ValueError: for links that are none of a graph of so many nodes. FAISS would follow them out of its memory.
    """
    import faiss

    graph = _empty_graph(key_ED.shape[1])
    end_by_level = faiss.vector_to_array(graph.hnsw.cum_nneighbor_per_level).astype(np.int64)
    E, (level_E, neighbour_X, entry) = len(key_ED), links
    if level_E.dtype != np.int32 or level_E.shape != (E,) or level_E.min() < 1 or level_E.max() >= len(end_by_level):
        raise ValueError(f"levels must be int32 [{E}] in 1..{len(end_by_level) - 1}")
    start_E = np.concatenate([[0], end_by_level[level_E].cumsum()])
    if neighbour_X.dtype != np.int32 or neighbour_X.shape != (start_E[-1],):
        raise ValueError(f"neighbours must be int32 [{start_E[-1]}]: got {neighbour_X.dtype} {neighbour_X.shape}")
    if neighbour_X.min() < -1 or neighbour_X.max() >= E or not 0 <= entry < E or level_E[entry] != level_E.max():
        raise ValueError(f"neighbours must be nodes, below {E}, or -1, and the entry a node of the highest level")
    for level in range(1, level_E.max()):  # on level 0 is every node
        there_E = np.flatnonzero(level_E > level)
        at = start_E[there_E][:, None] + np.arange(end_by_level[level], end_by_level[level + 1])
        if (level_E[neighbour_X[at]] <= level)[neighbour_X[at] >= 0].any():
            raise ValueError(f"neighbours on level {level} must be on that level themselves")
    for vector, array in ((graph.hnsw.levels, level_E), (graph.hnsw.offsets, start_E.astype(np.uint64)),
                          (graph.hnsw.neighbors, neighbour_X)):
        faiss.copy_array_to_vector(np.ascontiguousarray(array), vector)
    graph.hnsw.entry_point, graph.hnsw.max_level = entry, int(level_E.max()) - 1
    graph.storage.add(key_ED)
    graph.ntotal = E
    return graph


def _empty_graph(width: int) -> Any:
    import faiss

    graph = faiss.IndexHNSWFlat(width, LINKS, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction = KEPT
    return graph
