"""How stale keys become: keys that a model made of some texts during training, compared with those that it makes of the
same texts at the end.

A stored key stays as it was written while the weights change. Its cosine with the key that the same token would be given
now says how far apart they are; whether a token's fresh key still finds its own stored one first says what that costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lmcode.backbone import Backbone
from lmcode.eval.learning import Learned, Stages, Training, learn
from lmcode.model.reading import read_texts


class Staleness(NamedTuple):
    """Of keys some steps old: their mean cosine with fresh ones, and the share of fresh ones that find their own."""

    age: int
    cosine: float
    found: float


def learn_and_compare(training: Training, stages: Stages, texts: Sequence[Sequence[int]], *, seed: int,
                      moments: int = 8) -> tuple[Learned, dict[int, list[Staleness]]]:
    """Trains a model, takes the keys of the texts at so many moments, evenly spread, and compares each with the end.

    Returns:
        What was learned, and by memory layer a comparison for each moment, the oldest first; the last one is of the end.
    """
    taken: dict[int, dict[int, Tensor]] = {}
    every = max(1, training.steps // moments)

    def watch(step: int, model: Backbone) -> None:
        if step % every == 0:
            taken[step] = keys_of(model, texts)

    learned = learn(training, stages, seed=seed, watch=watch)
    taken[learned.steps] = keys_of(learned.model, texts)
    fresh = taken[learned.steps]
    return learned, {layer: [compare(keys[layer], fresh[layer], learned.steps - step)
                             for step, keys in sorted(taken.items())] for layer in fresh}


def keys_of(model: Backbone, texts: Sequence[Sequence[int]]) -> dict[int, Tensor]:
    """The keys that a model makes of texts, each read from its start: by memory layer, fp32 [H, N, D]."""
    offered = read_texts(model, texts)
    return {layer: torch.cat([one[layer].key_HND.float() for one in offered], dim=1) for layer in offered[0]}


def compare(stored_HND: Tensor, fresh_HND: Tensor, age: int) -> Staleness:
    """Keys of the same tokens, stored and fresh. Tokens whose fresh keys are equal may find each other's."""
    stored_HND, fresh_HND = F.normalize(stored_HND, dim=-1), F.normalize(fresh_HND, dim=-1)
    score_HNN = fresh_HND @ stored_HND.transpose(1, 2)
    own_HN = score_HNN.diagonal(dim1=1, dim2=2)
    found_HN = own_HN >= score_HNN.amax(dim=2) - 1e-6
    return Staleness(age, float(own_HN.mean()), float(found_HN.float().mean()))
