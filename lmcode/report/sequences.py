"""The inputs of an analysis as lists of token ids: texts, id sequences, tensors or a dataset of these."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmcode.backbone import Backbone
from lmcode.data.corpus import Documents
from lmcode.data.tokenizer import Tokenizer, as_tokenizer


def tokenizer_of(model: Backbone, tokenizer: Tokenizer | None = None) -> Tokenizer | None:
    """The given tokenizer, else the model's own; None if it has none."""
    return as_tokenizer(tokenizer) if tokenizer is not None else getattr(model, "tokenizer", None)


def token_sequences(model: Backbone, data: Iterable[Any], *, tokenizer: Tokenizer | None = None,
                    shortest: int = 2) -> list[list[int]]:
    """Each item of `data` as token ids.

    Args:
        data: texts, lists or 1-D integer tensors of ids, or mappings with `input_ids`; an integer tensor [N, T]; or anything
            with a length and items of these kinds.
        tokenizer: for texts; the model's own when None.
        shortest: tokens that an item needs.

    Raises:
        ValueError: no item; one that is too short, of another kind, or with ids outside the vocabulary; a text without a
            tokenizer.
    """
    if isinstance(data, (str, bytes, Mapping)) or not (hasattr(data, "__len__") or hasattr(data, "__iter__")):
        raise ValueError(f"expected a list, tensor or dataset of texts or id sequences: got {type(data).__name__}")
    source: Any = data  # a dataset need not be a Sequence
    sized = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    items = [source[place] for place in range(len(source))] if sized else list(data)
    if not items:
        raise ValueError("expected at least one text or id sequence: got none")
    return [_ids(model, item, place, tokenizer_of(model, tokenizer), shortest) for place, item in enumerate(items)]


def _ids(model: Backbone, item: Any, place: int, tokenizer: Tokenizer | None, shortest: int) -> list[int]:
    if isinstance(item, Mapping):
        if "input_ids" not in item:
            raise ValueError(f"item {place} is a mapping and must have 'input_ids': got {sorted(map(str, item))}")
        item = item["input_ids"]
    if isinstance(item, str):
        if tokenizer is None:
            raise ValueError(f"item {place} is a text and the model has no tokenizer: give tokenizer=, or token ids")
        item = tokenizer.encode(item)
    if not isinstance(item, (Tensor, np.ndarray, Sequence)):
        raise ValueError(f"item {place} must be a text or a sequence of token ids: got {type(item).__name__}")
    array = np.asarray(item.cpu() if isinstance(item, Tensor) else item)
    if array.ndim != 1 or len(array) and array.dtype.kind not in "iu":
        raise ValueError(f"item {place} must be a text or a one-dimensional sequence of integer token ids: "
                         f"got shape {array.shape} of {array.dtype}")
    if len(array) < shortest:
        raise ValueError(f"item {place} needs at least {shortest} tokens: got {len(array)}")
    if array.min() < 0 or array.max() >= model.config.vocab_size:
        raise ValueError(f"token ids must lie in 0..{model.config.vocab_size - 1}: item {place} has "
                         f"{array.min()}..{array.max()}")
    ids: list[int] = array.tolist()
    return ids


def as_documents(sequences: Sequence[Sequence[int]], names: Sequence[str] | None = None) -> Documents:
    """Token sequences as the documents that a `StreamSampler` reads."""
    offsets = np.cumsum([0, *(len(one) for one in sequences)], dtype=np.int64)
    tokens = np.concatenate([np.asarray(one, np.int64) for one in sequences])
    return Documents(tokens, offsets, names or [f"sequence {place + 1}" for place in range(len(sequences))])


def as_text(tokenizer: Tokenizer | None, ids: Iterable[int]) -> str:
    """Readable text of some ids; without a tokenizer the ids themselves."""
    return tokenizer.decode(ids) if tokenizer is not None else "".join(f"<{one}>" for one in ids)


def device_of(model: Backbone) -> torch.device:
    """Where the model computes."""
    return next(model.parameters()).device
