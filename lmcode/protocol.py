"""The words that the model and the memory share: what a read returns, what a write takes, who can answer a read.

The model asks a `Retriever` and hands out `Candidates`; it never learns where entries live or how many ranks hold them.
Everything here is a named tuple, because DeepSpeed walks through tuples to find the tensors a module returns.

A tensor's shape is in its name: `key_HND` is [H, N, D]. These are the capital letters of the whole package (digits are
sizes):

    B  streams of a batch                    N  queries, or candidates for entries
    T  tokens of a window, or of one         K  hits, or the best of something else
       segment of it                         M  slots or rows of a table: of a bank, of one virtual shard, those
    P  pieces of a window, each of              that a search looks through, of the short-term memory, of the
       another document                         replay store
    H  heads                                 E  entries
    D  width of a vector: the model's,       X  any other axis; the line, or the docstring of the file, says which
       or a head's key or value
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

NO_SCORE = -1e30  # score of an invalid hit: finite, so that exp, max and subtraction stay free of NaN


class Hits(NamedTuple):
    """What a search found for each head and query, ordered by (score descending, id ascending).

    score_HNK: fp32 logits; `NO_SCORE` where invalid.
    id_HNK: int64 ids; -1 where invalid.
    ticket: private to the retriever that made it (which winners this rank holds); None elsewhere.
    credit_HN: fp32, the attention that each query paid to its hits, which the retriever credits them with; 1 where None.
    """

    score_HNK: Tensor
    id_HNK: Tensor
    ticket: Any = None
    credit_HN: Tensor | None = None

    @property
    def valid_HNK(self) -> Tensor:
        """bool, False where fewer than K entries could be seen; invalid hits come last."""
        return self.id_HNK >= 0


class Candidates(NamedTuple):
    """Entries that a forward pass offers for writing; nothing is stored until the loop commits them.

    key_HND: fp32 or bf16, L2-normalised, detached.
    value_HND: same dtype, detached.
    namespace_N: int64, the document or stream each belongs to.
    surprise_N: fp32, the token loss in nats of predicting the value's token; 0 where unknown.
    valid_N: bool; False rows (padding, the first token of a document) are never written.
    document_N: int64, the text each was read from, the same whenever it is read again; negative, or None: unknown.
    """

    key_HND: Tensor
    value_HND: Tensor
    namespace_N: Tensor
    surprise_N: Tensor
    valid_N: Tensor
    document_N: Tensor | None = None


class LayerMemory(NamedTuple):
    """One memory layer's traffic in one forward pass; all detached. N = B * ceil(T / retrieval_stride), b-major.

    hits: what the retriever found, one row per query, and the attention paid to it.
    candidates: what may be written, one row per token (B * T, b-major).
    gate_BT: fp32, the sigmoid gate of each token.
    share_HN: fp32, share of the joint softmax that went to the hits; the mean over the tokens that share a query.
    null_share_HN: fp32, the same for the null slot. The rest went to the sequence's own past.
    """

    hits: Hits
    candidates: Candidates
    gate_BT: Tensor
    share_HN: Tensor
    null_share_HN: Tensor


class EntryShape(NamedTuple):
    """The entries of one layer: in each of `heads` heads a key and a value of these widths."""

    heads: int
    key_width: int
    value_width: int


class State(Protocol):
    """What a batch of streams carries from one window to the next: a named tuple of tensors [B, ...], or of tuples of
    them; all detached. Whoever carries it on knows no more of it."""

    @property
    def pending_valid_B(self) -> Tensor:
        """bool, False until a stream has seen a token."""
        ...

    def _asdict(self) -> dict[str, Any]: ...

    def __iter__(self) -> Iterator[Any]: ...


class Output(Protocol):
    """What a window's forward pass returns: a named tuple, for DeepSpeed.

    logits: [B, T, X], X ids of the vocabulary. loss: fp32 scalar, mean over counted targets; None without targets.
    token_loss: fp32 [B, T], nats, 0 where ignored; None without targets.
    state: for the streams' next window.
    memory: by number of the memory layer.
    """

    @property
    def logits(self) -> Tensor: ...

    @property
    def loss(self) -> Tensor | None: ...

    @property
    def token_loss(self) -> Tensor | None: ...

    @property
    def state(self) -> Any: ...

    @property
    def memory(self) -> dict[int, LayerMemory]: ...


class Retriever(Protocol):
    """Answers reads. Every rank of a memory group must make the same calls in the same order, with zero rows if need be."""

    top_k: int

    def search(self, query_HND: Tensor, namespace_N: Tensor, document_N: Tensor | None = None) -> Hits:
        """The best `top_k` entries for each head and query, by query . key + log-importance; without gradient.

        Args:
            query_HND: queries already scaled by the temperature, so that a score is a softmax logit.
            namespace_N: int64; a negative namespace sees nothing (padding).
            document_N: int64, the text that each query was made from. It does not see entries that were written when the
                same text was read under another namespace, which could hold the very token it is to predict. Negative, or
                None: unknown, nothing is hidden.
        """
        ...

    def attend(self, query_HND: Tensor, hits: Hits) -> tuple[Tensor, Tensor]:
        """Softmax attention over `hits`: (value_HND, logsumexp_HN), differentiable with respect to the query.

        A query without a valid hit gets value 0 and logsumexp `NO_SCORE`.
        """
        ...

    def fetch(self, hits: Hits) -> tuple[Tensor, ...]:
        """Keys and values of `hits`, fp32 [H, N, K, D] each, zero where invalid; without gradient."""
        ...

    def look_up(self, query_HND: Tensor, namespace_N: Tensor, document_N: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What `attend` returns for a fresh `search`, where nobody needs the hits; without gradient.

        `InTwoSteps` has it for retrievers that know no faster way.
        """
        ...


class InTwoSteps:
    """A retriever that looks up by searching and attending."""

    @torch.no_grad()
    def look_up(self: Retriever, query_HND: Tensor, namespace_N: Tensor,
                document_N: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.attend(query_HND, self.search(query_HND, namespace_N, document_N))


class ConsolidationReport(NamedTuple):
    """What one consolidation did over all ranks: live entries `before` it, and how many were `merged` into another."""

    threshold: float
    before: int
    merged: int

    @property
    def after(self) -> int:
        """Live entries that are left."""
        return self.before - self.merged


def check_threshold(threshold: float) -> None:
    """Raises ValueError for a distance that is not in (0, 2]."""
    if not 0.0 < threshold <= 2.0:
        raise ValueError(f"a consolidation threshold is a cosine distance in (0, 2]: got {threshold}")


class NullRetriever(InTwoSteps):
    """A retriever that finds nothing: the model without a bank, with equal parameters; and what stands at a layer without
    a long-term memory, so that all layers can be asked to consolidate theirs."""

    def __init__(self, top_k: int = 1) -> None:
        self.top_k = top_k

    def search(self, query_HND: Tensor, namespace_N: Tensor, document_N: Tensor | None = None) -> Hits:
        H, N, _ = query_HND.shape
        score_HNK = torch.full((H, N, self.top_k), NO_SCORE, dtype=torch.float32, device=query_HND.device)
        return Hits(score_HNK, torch.full_like(score_HNK, -1, dtype=torch.int64))

    def attend(self, query_HND: Tensor, hits: Hits) -> tuple[Tensor, Tensor]:
        H, N, _ = query_HND.shape
        return torch.zeros_like(query_HND), torch.full((H, N), NO_SCORE, dtype=torch.float32, device=query_HND.device)

    def fetch(self, hits: Hits) -> tuple[Tensor, ...]:
        """Nothing, hence of width 0."""
        return (hits.score_HNK.new_zeros(*hits.score_HNK.shape, 0),) * 2

    def consolidate_memories(self, threshold: float = 0.1) -> ConsolidationReport:
        """There is nothing to merge. ValueError for a threshold that is not in (0, 2]."""
        check_threshold(threshold)
        return ConsolidationReport(threshold, 0, 0)


class RecordingRetriever(NullRetriever):
    """Finds nothing, and keeps what it was asked: the query_HND of every search, in order."""

    def __init__(self, top_k: int = 1) -> None:
        super().__init__(top_k)
        self.queries: list[Tensor] = []

    def search(self, query_HND: Tensor, namespace_N: Tensor, document_N: Tensor | None = None) -> Hits:
        self.queries.append(query_HND)
        return super().search(query_HND, namespace_N, document_N)
