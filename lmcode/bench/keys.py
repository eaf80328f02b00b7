"""Keys and queries to measure a search with: those of a trained model, which are clustered, and random ones, which are not.

A trained model's are collected by letting it read its own corpus: the keys that it offers for writing, and the queries that
it asks, which find nothing meanwhile. Queries come from documents that were held out, so they are not among the keys.
Letters: P keys, N queries.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lmcode.backbone import Backbone, forward_batch
from lmcode.config import ConfigError
from lmcode.data.corpus import Documents, load_corpus
from lmcode.data.streams import StreamSampler
from lmcode.model.mode import in_eval_mode
from lmcode.opening import Opened, open_model
from lmcode.protocol import RecordingRetriever

TEMPERATURE = 7.389  # length of a random query: a unit vector times the model's first temperature


class Vectors(NamedTuple):
    """fp32 keys [P, D] and queries [N, D] of one memory head."""

    key_MD: Tensor
    query_ND: Tensor


def random_vectors(keys: int, queries: int, width: int, *, seed: int) -> Vectors:
    """Directions without any structure."""
    generator = torch.Generator().manual_seed(seed)
    key_MD, query_ND = (F.normalize(torch.randn(count, width, generator=generator), dim=-1) for count in (keys, queries))
    return Vectors(key_MD, TEMPERATURE * query_ND)


def trained_vectors(path: str | Path, keys: int, queries: int) -> Vectors:
    """Those of the first memory layer's first head of the model in a run or checkpoint.

    Raises:
        ConfigError: where there is no such model, or its corpus is too short for so many keys.
    """
    opened = open_model(path, memory=False)
    if not opened.model.banks:
        raise ConfigError(f"the model in '{path}' has no bank whose keys could be measured")
    corpus = load_corpus(opened.config)
    key_MD, _ = _collect(opened, corpus.train, keys, queries=0)
    _, query_ND = _collect(opened, corpus.held_out, 0, queries=queries)
    if len(key_MD) < keys or len(query_ND) < queries:
        raise ConfigError(f"the corpus of '{path}' must give {keys} keys and {queries} queries: got {len(key_MD)} and "
                          f"{len(query_ND)}")
    return Vectors(key_MD[:keys], query_ND[:queries])


@torch.no_grad()
def _collect(opened: Opened, documents: Documents, keys: int, *, queries: int) -> tuple[Tensor, Tensor]:
    """At least so many keys and queries, or all that a pass over the documents gives."""
    model, train = opened.model, opened.config.train
    sampler = StreamSampler(documents, streams=train.streams, sequence_length=train.sequence_length, seed=train.seed,
                            epochs=1, shuffle=False)
    recorder, state, found = RecordingRetriever(), None, list[Tensor]()
    with in_eval_mode(model), model.reading_from({layer: recorder for layer in list(model.banks)[:1]}):
        for step in range(sampler.num_steps or 0):
            if sum(map(len, found)) >= keys and sum(part.shape[1] for part in recorder.queries) >= queries:
                break
            output = forward_batch(model, sampler.batch(step), state)
            state, candidates = output.state, output.memory[_first(model)].candidates
            found.append(candidates.key_HND[0, candidates.valid_N].float())
    return torch.cat(found), torch.cat(recorder.queries, dim=1)[0].float()


def _first(model: Backbone) -> int:
    return next(iter(model.banks))
