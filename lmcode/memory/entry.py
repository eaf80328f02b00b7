"""What an entry is, and the pure rules that a candidate passes before it becomes one: chosen, finite, not too long.

Letters: E entries of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lmcode.config import MemoryConfig
from lmcode.protocol import Candidates, Hits

MAX_IMPORTANCE = 10.0  # however much attention an entry receives
MAX_CREDIT = 1e6  # of one query's hits: mass stays far from the end of int64
MASS_UNIT = 2**20  # hit mass is counted in 1/MASS_UNIT of a unit of attention: integers add up the same in any order

# Everything kept beside an entry's key and value, and how it is stored.
METADATA = {"id": np.int64, "namespace": np.int64, "document": np.int64, "importance": np.float32, "step": np.int64,
            "last_hit": np.int64, "hit_mass": np.int64, "count": np.int64, "chance": np.bool_}
UNKNOWN = -1  # document of entries that belong to none, or nobody knows to which
EMPTY = {name: kind(-1) if name in ("id", "document") else kind(0) for name, kind in METADATA.items()}
ADDED = ("document",)  # columns that states saved by earlier versions lack; they are then as in an empty slot
_LOW = 2**32 - 1  # the half of an int64 that holds the bits of a fp32


class CommitReport(NamedTuple):
    """What one commit did over all ranks, `evicted_here` excepted.

    offered: valid candidates. written: entries that entered. rejected: chosen, but not finite or without a namespace.
    clipped: entries with a vector that was scaled down. evicted_here: entries that this rank's shard gave up.
    """

    offered: int
    written: int
    rejected: int
    clipped: int
    evicted_here: int


class Entries(NamedTuple):
    """A batch of entries, in id order. Vectors are on the bank's device, the rest is on the CPU.

    key_EHD, value_EHD: fp32; the bank stores them in its own dtype.
    id_E: int64, global, never reused.
    namespace_E: int64, at least 0.
    document_E: int64, the text that the entry was written from, whatever the namespace it was read under; `UNKNOWN`; below
        it those of experiences (`experiences.document_of`), above it those of documents.
    importance_E: fp32 in (0, `MAX_IMPORTANCE`].
    step_E: int64, the step that wrote the entry; also its last hit until it has one.
    """

    key_EHD: Tensor
    value_EHD: Tensor
    id_E: np.ndarray
    namespace_E: np.ndarray
    document_E: np.ndarray
    importance_E: np.ndarray
    step_E: np.ndarray

    def take(self, index: np.ndarray) -> Entries:
        """The entries at these positions."""
        on_device = torch.from_numpy(index).to(self.key_EHD.device)
        return Entries(self.key_EHD[on_device], self.value_EHD[on_device], *(column[index] for column in self[2:]))

    def metadata(self) -> dict[str, np.ndarray]:
        """Columns of `METADATA` for entries that were never hit; the second chance is the shard's to give."""
        E = len(self.id_E)
        return {"id": self.id_E, "namespace": self.namespace_E, "document": self.document_E,
                "importance": self.importance_E, "step": self.step_E, "last_hit": self.step_E,
                "hit_mass": np.zeros(E, np.int64), "count": np.ones(E, np.int64), "chance": np.zeros(E, np.bool_)}


def choose(surprise_E: np.ndarray, config: MemoryConfig) -> np.ndarray:
    """Which candidates become entries, bool [E].

    `config.write` decides: all of them, every `write_every`-th by position, or the `write_share` with the greatest
    surprise (rounded up; the earlier of equals; NaN never).
    """
    E = len(surprise_E)
    if config.write == "all":
        return np.ones(E, dtype=bool)
    if config.write == "every_nth":
        return np.asarray(np.arange(E) % config.write_every == 0)
    chosen_E = np.zeros(E, dtype=bool)
    chosen_E[np.argsort(-surprise_E, kind="stable")[:math.ceil(config.write_share * E)]] = True
    chosen_E &= ~np.isnan(surprise_E)
    return chosen_E


class Inspected(NamedTuple):
    """Vectors as they may be stored, and what was found: fp32 key_EHD and value_EHD, none of them longer than allowed; bool
    finite_E, rows of which every number is finite; bool long_E, rows with a vector that was scaled down."""

    key_EHD: Tensor
    value_EHD: Tensor
    finite_E: Tensor
    long_E: Tensor


def inspect(key_EHD: Tensor, value_EHD: Tensor, max_norm: float) -> Inspected:
    """Judges each row by its own numbers alone, whatever else is in the batch."""
    finite_E = key_EHD.isfinite().flatten(1).all(1) & value_EHD.isfinite().flatten(1).all(1)
    key_EHD, long_key_E = clip_norm(key_EHD, max_norm)
    value_EHD, long_value_E = clip_norm(value_EHD, max_norm)
    return Inspected(key_EHD, value_EHD, finite_E, long_key_E | long_value_E)


class Criteria(NamedTuple):
    """What decides which candidates become entries, and under which ids: on the CPU, known to every rank.

    namespace_E, document_E: int64. surprise_E: fp32. finite_E, long_E: bool, as in `Inspected`.
    """

    namespace_E: np.ndarray
    document_E: np.ndarray
    surprise_E: np.ndarray
    finite_E: np.ndarray
    long_E: np.ndarray


def stack_candidates(candidates: Sequence[Candidates], *, heads: int, head_dim: int, dtype: torch.dtype,
                     device: torch.device, max_norm: float) -> tuple[Tensor, Tensor]:
    """The valid rows of a list of candidates, in order, as two tensors that can travel.

    Returns:
        vector_E2HD: key and value as they may be stored, in the bank's dtype.
        criteria_E3: int64, the namespace, the document, and the bits of the fp32 surprise with two flags above them.
    """
    vectors = [torch.empty(0, 2, heads, head_dim, dtype=dtype, device=device)]
    criteria = [torch.empty(0, 3, dtype=torch.int64, device=device)]
    for one in candidates:
        vector_2EHD = torch.stack([one.key_HND, one.value_HND]).transpose(1, 2)[:, one.valid_N].to(device, dtype)
        checked = inspect(vector_2EHD[0], vector_2EHD[1], max_norm)
        vectors.append(torch.stack([checked.key_EHD, checked.value_EHD], dim=1).to(dtype))
        bits_N = one.surprise_N.float().contiguous().view(torch.int32).long() & _LOW
        document_N = torch.full_like(bits_N, UNKNOWN) if one.document_N is None else one.document_N
        criteria_E3 = torch.stack([one.namespace_N, document_N, bits_N], dim=1)[one.valid_N].to(device)
        criteria_E3[:, 2] |= (checked.finite_E.long() << 32) | (checked.long_E.long() << 33)
        criteria.append(criteria_E3)
    return torch.cat(vectors), torch.cat(criteria)


def unpack_criteria(criteria_E3: Tensor) -> Criteria:
    """The criteria of `stack_candidates`."""
    namespace_E, document_E, bits_E = criteria_E3.cpu().unbind(1)
    surprise_E = (bits_E & _LOW).int().view(torch.float32)
    return Criteria(namespace_E.numpy(), document_E.numpy(), surprise_E.numpy(), ((bits_E >> 32) & 1).bool().numpy(),
                 ((bits_E >> 33) & 1).bool().numpy())


def credit_of(hits: Hits, rows: int) -> Tensor:
    """What each query's hits are to be credited with, fp32 [rows, H], zero in the rows beyond N.

    Whatever is no finite amount counts as none.

    Raises:
        ValueError: for a `credit_HN` of another shape than the hits have.
    """
    H, N, _ = hits.score_HNK.shape
    credit_HN = hits.score_HNK.new_ones(H, N) if hits.credit_HN is None else hits.credit_HN
    if credit_HN.shape != (H, N):
        raise ValueError(f"the credit of hits must be [{H}, {N}], one number for each query: got {tuple(credit_HN.shape)}")
    credit_HN = credit_HN.float().nan_to_num(0.0, 0.0, 0.0).clamp(0.0, MAX_CREDIT)
    return F.pad(credit_HN.transpose(0, 1), (0, 0, 0, rows - N))


def importance_of(surprise_E: np.ndarray) -> np.ndarray:
    """Initial importance 0.5 + s / (1 + s) of surprise s >= 0 (in nats), fp32 in [0.5, 1.5); NaN and Inf give NaN."""
    surprise_E = np.where(np.isfinite(surprise_E), np.maximum(surprise_E, 0.0), np.nan)
    return (0.5 + surprise_E / (1.0 + surprise_E)).astype(np.float32)


def check_batch(key_HED: Tensor, value_HED: Tensor, *columns_E: Tensor, heads: int, head_dim: int) -> None:
    """Raises ValueError for a batch whose shapes do not fit a bank or each other."""
    H, E, D = key_HED.shape
    if ((H, D) != (heads, head_dim) or value_HED.shape != key_HED.shape
            or any(column_E.shape != (E,) for column_E in columns_E)):
        raise ValueError(f"keys and values must be [{heads}, E, {head_dim}], the rest [E]: "
                         f"got {[tuple(part.shape) for part in (key_HED, value_HED, *columns_E)]}")


def acceptable(finite_E: np.ndarray, namespace_E: np.ndarray, importance_E: np.ndarray) -> np.ndarray:
    """Rows that may enter a bank, bool [E]: every number finite, importance positive, namespace at least 0."""
    good_E: np.ndarray = finite_E & np.isfinite(importance_E) & (importance_E > 0) & (namespace_E >= 0)
    return good_E


def clip_norm(vector_EHD: Tensor, max_norm: float) -> tuple[Tensor, Tensor]:
    """Scales vectors longer than `max_norm` down to it, in fp32; returns them and bool [E], rows that were too long.

    Finite input gives finite output, even where the square of a component overflows.
    """
    vector_EHD = vector_EHD.float()
    largest_EH1 = vector_EHD.abs().amax(-1, keepdim=True).clamp(min=1.0)
    unit_EHD = vector_EHD / largest_EH1
    norm_EH1 = unit_EHD.norm(dim=-1, keepdim=True)
    long_EH1 = norm_EH1 * (largest_EH1 / max_norm) > 1.0
    clipped_EHD = torch.where(long_EH1, unit_EHD * (max_norm / norm_EH1), vector_EHD)
    return clipped_EHD, long_EH1.flatten(1).any(1)


def admit(key_EHD: Tensor, value_EHD: Tensor, namespace_E: np.ndarray, importance_E: np.ndarray, *, first_id: int,
          step: int, max_norm: float, document_E: np.ndarray | None = None) -> tuple[Entries, np.ndarray, int]:
    """Turns a batch into entries with consecutive ids: those acceptable, which rows they are, how many were clipped.

    Without documents they are `UNKNOWN`.
    """
    checked = inspect(key_EHD, value_EHD, max_norm)
    accepted_E = acceptable(checked.finite_E.cpu().numpy(), namespace_E, importance_E)
    clipped = int((checked.long_E.cpu().numpy() & accepted_E).sum())
    id_E = first_id + np.arange(len(namespace_E), dtype=np.int64)
    document_E = np.full_like(id_E, UNKNOWN) if document_E is None else document_E
    entries = Entries(checked.key_EHD, checked.value_EHD, id_E, namespace_E, document_E,
                      np.minimum(importance_E, np.float32(MAX_IMPORTANCE)), np.full_like(id_E, step))
    return entries.take(np.flatnonzero(accepted_E)), accepted_E, clipped
