"""What others do with the same keys in one process: FAISS's brute force, inverted file and graph, torch's brute force."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TORCH_BLOCK = 65536  # rows whose scores torch holds at once

Found = Callable[[], Tensor]  # ids int64 [N, K]


def faiss_knn(query_ND: Tensor, key_MD: Tensor, k: int, threads: int) -> Found:
    """`faiss.knn` over all keys."""
    import faiss

    def search() -> Tensor:
        faiss.omp_set_num_threads(threads)
        return torch.from_numpy(faiss.knn(query_ND.numpy(), key_MD.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)[1])
    return search


def faiss_ivf(query_ND: Tensor, key_MD: Tensor, k: int, threads: int, *, centroid_XD: Tensor, probes: int) -> Found:
    """`faiss.IndexIVFFlat` with these centroids, filled by slot as one that is overwritten in place must be."""
    import faiss

    lists, width = centroid_XD.shape
    quantizer = faiss.IndexFlatIP(width)
    quantizer.add(centroid_XD.numpy())
    index = faiss.IndexIVFFlat(quantizer, width, lists, faiss.METRIC_INNER_PRODUCT)
    index.is_trained = True
    index.set_direct_map_type(faiss.DirectMap.Array)  # type: ignore[attr-defined]  # faiss adds it when it is loaded
    index.add(key_MD.numpy())
    index.nprobe = probes

    def search() -> Tensor:
        faiss.omp_set_num_threads(threads)
        return torch.from_numpy(index.search(query_ND.numpy(), k)[1])
    return search


def faiss_hnsw(query_ND: Tensor, key_MD: Tensor, k: int, threads: int, *, links: int, kept: int, width: int) -> Found:
    """`faiss.IndexHNSWFlat` over all keys, made by all threads.

    Args:
        links, kept, width: M, efConstruction and efSearch.
    """
    import faiss

    faiss.omp_set_num_threads(threads)
    index = faiss.IndexHNSWFlat(key_MD.shape[1], links, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction, index.hnsw.efSearch = kept, width
    index.add(key_MD.numpy())

    def search() -> Tensor:
        faiss.omp_set_num_threads(threads)
        return torch.from_numpy(index.search(query_ND.numpy(), k)[1])
    return search


def torch_brute(query_ND: Tensor, key_MD: Tensor, k: int, threads: int) -> Found:
    """A product and `topk`, block by block of rows."""
    def search() -> Tensor:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        score, row = [], []
        for start in range(0, len(key_MD), TORCH_BLOCK):
            best = torch.mm(query_ND, key_MD[start:start + TORCH_BLOCK].T).topk(min(k, len(key_MD) - start), dim=1)
            score.append(best.values)
            row.append(best.indices + start)
        at_NK = torch.cat(score, dim=1).topk(k, dim=1).indices
        torch.set_num_threads(before)
        return torch.cat(row, dim=1).gather(1, at_NK)
    return search
