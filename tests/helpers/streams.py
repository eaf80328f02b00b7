"""Documents in which every token is unique, streams of them, and what their windows spell."""

from __future__ import annotations

import random

import numpy as np
import torch

from lmcode.data.corpus import Documents
from lmcode.data.streams import Batch, StreamSampler

END = 999
G, T = 24, 4


def make_documents(lengths: list[int]) -> Documents:
    """Documents of these lengths, end marks included, in which every inner token is unique."""
    offsets = np.cumsum([0, *lengths])
    tokens = np.arange(offsets[-1], dtype=np.uint32) + 1000
    tokens[offsets[:-1]] = tokens[offsets[1:] - 1] = END
    return Documents(tokens, offsets, [f"d{i}" for i in range(len(lengths))])


def make_sampler(documents: Documents, **settings: object) -> StreamSampler:
    return StreamSampler(documents, **{"streams": G, "sequence_length": T, "seed": 7, **settings})


LENGTHS = [random.Random(3).randint(2, 40) for _ in range(50)]
DOCUMENTS = make_documents(LENGTHS)


def equal(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a[:-1], b[:-1], strict=True)) and a.global_tokens == b.global_tokens


def visits(batches: list[Batch]) -> dict[int, list[tuple[int, Batch, int]]]:
    """By namespace: (step, batch, row) of its windows in the order of steps."""
    found: dict[int, list[tuple[int, Batch, int]]] = {}
    for step, batch in enumerate(batches):
        for row, namespace in enumerate(batch.namespace_B.tolist()):
            if namespace >= 0:
                found.setdefault(namespace, []).append((step, batch, row))
    return found


def read_back(windows: list[tuple[int, Batch, int]]) -> list[int]:
    """The document that these windows spell: their inputs and the very last target."""
    inputs = [i for _, batch, row in windows for i in batch.input_ids_BT[row][batch.valid_BT[row]].tolist()]
    _, batch, row = windows[-1]
    return [*inputs, batch.targets_BT[row][batch.valid_BT[row]][-1].item()]
