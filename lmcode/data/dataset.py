"""What a `MemoryAwareTrainer` trains on: samples in memory, each a document, with the share of each batch that is replayed.

A sample of token ids is used as it is, without end tokens; a text is tokenized and gets an end token before and after it,
as in a corpus. Nothing here knows a model: ids above its vocabulary are refused by the trainer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lmcode.config import ConfigError, TrainConfig, build, near_match
from lmcode.data.corpus import Documents
from lmcode.data.tokenizer import Tokenizer, as_tokenizer

SAMPLERS = get_args(TrainConfig.model_fields["replay_sampler"].annotation)
PHRASES, PHRASE_TOKENS = 64, 8  # of the language of `create_synthetic_dataset`
PHRASES_PER_SAMPLE = 3


class MemoryDataset(Dataset[Tensor]):
    """Samples to train on, with experience replay.

    Args:
        data: a tensor of ids [N, L]; a list of id sequences (lists, arrays or tensors of integers), which may differ in
            length; or a list of texts.
        memory_sample_ratio: share of each batch that is replayed from spans that were trained on before; 0 replays none.
        sampler: how spans are drawn: "importance" (by their loss), "uniform" or "recent".
        tokenizer: for texts.
        slots: spans kept; the oldest leaves first.

    `len` is the number of samples and item i is sample i, int64 [L].

    Raises:
        ConfigError: no sample; one of fewer than 2 tokens, of another kind or dtype, or with a negative id; texts without a
            tokenizer, or both texts and ids; a ratio outside [0, 1); an unknown sampler.
    """

    def __init__(self, data: Tensor | Sequence[Any], memory_sample_ratio: float = 0.2, sampler: str = "importance", *,
                 tokenizer: Tokenizer | None = None, slots: int = 2048) -> None:
        if sampler not in SAMPLERS:
            raise ConfigError(f"sampler must be one of {', '.join(SAMPLERS)}: got {sampler!r}."
                              + near_match(str(sampler), SAMPLERS))
        build(TrainConfig, {"memory_sample_ratio": memory_sample_ratio, "replay_slots": slots})
        tokenizer = None if tokenizer is None else as_tokenizer(tokenizer)
        self.memory_sample_ratio, self.sampler, self.slots, self.tokenizer = memory_sample_ratio, sampler, slots, tokenizer
        samples = _samples(data, tokenizer)
        self._tokens = np.concatenate(samples)
        self._offsets = np.cumsum([0, *(len(sample) for sample in samples)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> Tensor:
        if not -len(self) <= index < len(self):
            raise IndexError(f"a sample's index must lie in {-len(self)}..{len(self) - 1}: got {index}")
        index %= len(self)
        return torch.from_numpy(self._tokens[self._offsets[index]:self._offsets[index + 1]].copy())

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return int(np.diff(self._offsets).max())

    @property
    def largest_id(self) -> int:
        return int(self._tokens.max())

    def as_documents(self) -> Documents:
        """The samples as the documents that streams read."""
        return Documents(self._tokens, self._offsets, [f"sample {index}" for index in range(len(self))])

    def digest(self) -> str:
        """Equal for equal samples in the same order."""
        total = hashlib.blake2b(digest_size=16)
        for part in (self._offsets, self._tokens):
            total.update(part.tobytes())
        return total.hexdigest()


def as_dataset(data: Any, *, memory_sample_ratio: float = 0.0, tokenizer: Tokenizer | None = None) -> MemoryDataset:
    """`data` itself if it is a `MemoryDataset`, else one made of it."""
    if isinstance(data, MemoryDataset):
        return data
    return MemoryDataset(data, memory_sample_ratio, tokenizer=tokenizer)


def create_synthetic_dataset(num_samples: int = 1000, seq_len: int = 50, vocab_size: int = 256, seed: int = 0) -> Tensor:
    """Samples of a small artificial language, int64 [num_samples, seq_len]; the same for the same arguments.

    The language has 64 phrases of 8 random tokens, fixed by `vocab_size`. A sample draws 3 of them and strings copies of
    these together, beginning anywhere in the first. So there is structure to learn (how a phrase continues, shared by all
    samples and seeds: another seed gives held-out samples of the same language) and something to remember (which phrases
    this sample repeats). What phrase comes next is random: no model reaches a loss of 0. A trainer reads a sample of this
    length in one window; the bank matters with a smaller `sequence_length`, or with the memory scope "global".

    Raises:
        ConfigError: fewer than 1 sample, 2 tokens or 2 ids; a negative seed.
    """
    for name, value, lowest in (("num_samples", num_samples, 1), ("seq_len", seq_len, 2), ("vocab_size", vocab_size, 2),
                                ("seed", seed, 0)):
        if value < lowest:
            raise ConfigError(f"{name} must be at least {lowest}: got {value}")
    phrase_XX = torch.randint(vocab_size, (PHRASES, PHRASE_TOKENS), generator=torch.Generator().manual_seed(vocab_size))
    draws = torch.Generator().manual_seed(seed)
    pieces = seq_len // PHRASE_TOKENS + 2
    own_N3 = torch.randint(PHRASES, (num_samples, PHRASES_PER_SAMPLE), generator=draws)
    which_NX = own_N3.gather(1, torch.randint(PHRASES_PER_SAMPLE, (num_samples, pieces), generator=draws))
    start_N1 = torch.randint(PHRASE_TOKENS, (num_samples, 1), generator=draws)
    return phrase_XX[which_NX].flatten(1).gather(1, start_N1 + torch.arange(seq_len))


def _samples(data: Tensor | Sequence[Any], tokenizer: Tokenizer | None) -> list[np.ndarray]:
    if isinstance(data, (str, bytes)) or not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise ConfigError(f"data must be a tensor [N, L], or a list of id sequences or texts: got {type(data).__name__}")
    if len(data) == 0:
        raise ConfigError("data must hold at least one sample: got none")
    items: list[Any] = [data[place] for place in range(len(data))]
    texts = sum(isinstance(item, str) for item in items)
    if texts:
        if tokenizer is None:
            raise ConfigError("data of texts needs a tokenizer: give tokenizer=")
        if texts < len(items):
            raise ConfigError(f"data must be all texts or all ids: got {texts} texts among {len(items)} samples")
        end = tokenizer.end_id
        items = [[end, *ids, end] if ids else [] for ids in tokenizer.encode_batch(items)]
    return [_ids(item, place) for place, item in enumerate(items)]


def _ids(item: Any, place: int) -> np.ndarray:
    try:
        ids = np.asarray(item.cpu() if isinstance(item, Tensor) else item)
    except ValueError:  # numpy on lists of lists of unequal length
        ids = np.empty((0, 0))
    if ids.ndim == 1 and len(ids) < 2:
        raise ConfigError(f"sample {place} needs at least 2 tokens, one to predict from the other: got {len(ids)}")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ConfigError(f"sample {place} must be one-dimensional and of integers: got {ids.dtype} {list(ids.shape)}")
    if ids.min() < 0 or ids.max() >= 2**31:
        raise ConfigError(f"token ids must lie in 0..{2**31 - 1}: sample {place} has {ids.min()}..{ids.max()}")
    return ids.astype(np.int64)
