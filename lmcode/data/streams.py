"""Token file to batches: streams that walk documents in order, so that memory across windows means something.

Each of the global batch's G streams reads a document window by window, T tokens a step. At the end of a document it takes
the next one from a queue that all streams share (the stream that is free first is served first, on a tie the lower number).
A window holds one document, and padding after its end. With packing, the next document starts where one ends, and a window
is a sequence of pieces, each of another document. With several sources of text, the queue takes the next document from the
source that is furthest behind its share of the tokens.

The state is one integer, the step: `StreamSampler.batch(step, ...)` is a pure function of its arguments, so resuming is
asking for the next step, and what a step reads does not depend on the number of ranks. Experience replay takes rows away
from streams, which pause for that step; `Pauses` says which, again by the step alone.
Letters: B streams of one micro-batch, T tokens of a window, P most pieces of a window in the global batch.
"""

from __future__ import annotations

import heapq
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lmcode.data.corpus import Documents

IGNORED = -100  # target that cross-entropy leaves out


class Batch(NamedTuple):
    """One micro-batch of one rank.

    input_ids_BT: int64; padding, always trailing, holds the end mark.
    targets_BT: int64, the token after each input, across windows too; -100 for padding, and where that token is not to be
        learned (the prompts of instruction data).
    valid_BT: bool, True where the input is a token of the document.
    reset_B: bool, True where a document starts with this window: the stream's state must be cleared before it.
    namespace_B: int64, of the first piece (the only one, unless packed): the visit, which is the place in the endless queue
        of documents, so that what one reading of a document has written can be told from what other readings have. -1 for
        a stream that has run out of documents.
    document_B: int64, of the first piece: what the document says, as `Documents.identity`, the same in every visit. -1
        without a document.
    window_B: int64, of the first piece: how many windows of its document came before this one; -1 for a stream that has run
        out.
    replayed_B: bool, True where the stream pauses: the row belongs to replay, and the stream's state must outlive it.
    piece_BT: int64, the piece of the window that each token belongs to, ascending from 0; padding belongs to the last.
    namespace_BP, document_BP: of each piece; -1 where there is none.
    source_BP: int64, the number of the source that each piece comes from; -1 where there is none.
    global_tokens: targets that count in the whole global batch: all ranks, all micro-batches.
    """

    input_ids_BT: Tensor
    targets_BT: Tensor
    valid_BT: Tensor
    reset_B: Tensor
    namespace_B: Tensor
    document_B: Tensor
    window_B: Tensor
    replayed_B: Tensor
    piece_BT: Tensor
    namespace_BP: Tensor
    document_BP: Tensor
    source_BP: Tensor
    global_tokens: int

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        *tensors, global_tokens = self
        return Batch._make([*(tensor.to(device, non_blocking=True) for tensor in tensors), global_tokens])

    def reading(self) -> dict[str, Tensor]:
        """What a model must know about whose tokens it reads, as arguments of its forward pass."""
        if self.namespace_BP.shape[1] == 1:
            return {"namespace_B": self.namespace_B, "document_B": self.document_B}
        return {"namespace_B": self.namespace_BP, "document_B": self.document_BP, "piece_BT": self.piece_BT}

    @property
    def counted_BT(self) -> Tensor:
        """True where there is a target."""
        return self.targets_BT != IGNORED

    def by_piece(self, value_BT: Tensor) -> Tensor:
        """Sums of a value over the tokens of each piece, [B, P] in fp64."""
        if self.namespace_BP.shape[1] == 1:
            return value_BT.double().sum(1, keepdim=True)
        sum_BP = torch.zeros(self.namespace_BP.shape, dtype=torch.float64, device=value_BT.device)
        return sum_BP.scatter_add(1, self.piece_BT, value_BT.double())


@dataclass(frozen=True)
class PassStart:
    """Where the current reading of a dataset began. A job from the command line has one; a trainer may have several.

    first_step: the step of its first batch.
    first_namespace: that of its first visit; 0 in runs from before `experiences.VISITS`, which numbers them now.
    first_pause: steps into the pass before which no stream pauses, since nothing was stored to replay.
    over: whether it has ended because its epochs were read.
    """

    first_step: int = 0
    first_namespace: int = 0
    first_pause: int = 1
    over: bool = False


@dataclass(frozen=True)
class Pauses:
    """Which streams pause in which step; a pure function of the step.

    After n steps stream b of G has paused floor(n * ratio + b / G) times. So each stream pauses in a share `ratio` of its
    steps, evenly spread (a fixed choice of rows would stop some streams for ever), no two streams differ by more than one
    pause, and all together have paused floor(n * ratio * G) times (Hermite's identity): the share is exact from the first
    step on. `ratio` is a fraction, so nothing is rounded.

    first: steps before which there is no pause.
    """

    ratio: Fraction
    streams: int
    first: int = 1

    def before(self, stream: int, step: int) -> int:
        """Pauses of `stream` in the steps before `step`."""
        n = max(0, step - self.first)
        top, bottom = self.ratio.numerator, self.ratio.denominator
        return (n * top * self.streams + stream * bottom) // (bottom * self.streams)

    def at(self, stream: int, step: int) -> bool:
        """Whether `stream` pauses in `step`."""
        return self.before(stream, step + 1) > self.before(stream, step)

    def end(self, stream: int, windows: int) -> int:
        """The first step by which `stream` has read `windows` windows."""
        step = windows
        while (missing := windows - (step - self.before(stream, step))) > 0:
            step += missing
        return step


class StreamSampler:
    """Gives out the windows of `documents` in an order that only the arguments decide.

    A document of L tokens, end marks included, has L - 1 predictions and takes ceil((L - 1) / T) windows. A queue of
    epoch e holds every document once, shuffled by (seed, e). The cost is one heap operation per document, not per step.

    Args:
        documents: at least one, each of at least two tokens.
        streams: G, read side by side over all ranks.
        sequence_length: T.
        seed: decides the order; without effect if `shuffle` is off.
        epochs: passes over the documents; endless when None.
        shuffle: False reads documents in their stored order in every epoch.
        pauses: when streams do not read; their rows are then empty and marked for replay. None: never.
        first_step, first_namespace: of the first batch, and of the first visit.
        packed: let documents share a window.
        weights: of each source of `documents`: what the shares of their tokens are proportional to. None: one queue of all.

    Raises:
        ValueError: if a count is not positive, the seed negative, or a document too short; weights that are not one for each
            source, or with a number of epochs.
    """

    def __init__(self, documents: Documents, *, streams: int, sequence_length: int, seed: int,
                 epochs: int | None = None, shuffle: bool = True, pauses: Pauses | None = None, first_step: int = 0,
                 first_namespace: int = 0, packed: bool = False, weights: Sequence[float] | None = None) -> None:
        for name, value in (("streams", streams), ("sequence_length", sequence_length),
                            ("epochs", 1 if epochs is None else epochs), ("number of documents", len(documents))):
            if value < 1:
                raise ValueError(f"{name} must be at least 1: got {value}")
        if seed < 0:
            raise ValueError(f"seed must not be negative: got {seed}")
        self._targets = np.diff(documents.offsets) - 1  # predictions in each document
        if self._targets.min() < 1:
            index = int(self._targets.argmin())
            raise ValueError(f"a document needs at least 2 tokens: '{documents.names[index]}' has "
                             f"{self._targets[index] + 1}")
        sources = list((documents.sources or {"": len(documents)}).values())
        if weights is not None and (epochs is not None or len(weights) != len(sources)):
            raise ValueError(f"weights must be one for each of {len(sources)} sources, without a number of epochs: got "
                             f"{len(weights)}, epochs {epochs}")
        self.documents, self.streams, self.sequence_length = documents, streams, sequence_length
        self.epochs, self.pauses, self.packed = epochs, pauses or Pauses(Fraction(0), streams), packed
        self.first_step, self.first_namespace = first_step, first_namespace
        self._source = np.repeat(np.arange(len(sources)), sources)
        self._weights = None if weights is None else [weight / sum(weights) for weight in weights]
        self._unit = sequence_length if packed else 1  # positions of the schedule that a stream reads in a step
        self._windows_of = -(-self._targets // sequence_length)
        queue = _Queue(self._targets, sources if weights else [len(documents)], weights or [1.0], seed=seed,
                       shuffle=shuffle)
        self._schedule = _Schedule(self._targets if packed else self._windows_of, queue, streams=streams, epochs=epochs)

    @cached_property
    def num_steps(self) -> int | None:
        """Steps from the first batch until every stream has run out of documents; None when endless."""
        if self.epochs is None:
            return None
        return max(self.pauses.end(stream, -(-end // self._unit)) for stream, end in enumerate(self._schedule.ends()))

    @property
    def num_targets(self) -> int:
        """Predictions in one pass through the documents, those that do not count included."""
        return int(self._targets.sum())

    @cached_property
    def num_counted(self) -> int:
        """Targets that count in one pass through the documents."""
        if self.documents.counted is None:
            return self.num_targets
        return sum(self.documents.num_counted(start + 1, end) for start, end in pairwise(self.documents.offsets.tolist()))

    @cached_property
    def padding_share(self) -> float:
        """Share of positions that hold no token: over all `num_steps` steps, idle and paused streams included, or, when
        endless, over the windows of one pass through the documents."""
        if self.num_steps is None or self.epochs is None:
            return 0.0 if self.packed else self.unpacked_padding_share
        return 1.0 - self.num_targets * self.epochs / (self.num_steps * self.streams * self.sequence_length)

    @cached_property
    def unpacked_padding_share(self) -> float:
        """Share of the positions of endless windows of one document each that hold no token."""
        count = len(self._weights or (1,))
        source = self._source if self._weights else np.zeros_like(self._source)
        windows, targets = (np.bincount(source, column, count) for column in (self._windows_of, self._targets))
        return float(1.0 - 1.0 / (self.sequence_length * np.dot(self._weights or (1.0,), windows / targets)))

    def describe_padding(self) -> str:
        """One line: how many positions hold no token, and how many would if documents shared no window."""
        shared = f", packed (one document in each: {self.unpacked_padding_share:.1%})" if self.packed else ""
        return f"{self.padding_share:.1%} of the positions of {self.sequence_length} tokens hold none{shared}"

    def batch(self, step: int, *, rank: int = 0, world_size: int = 1, micro: int = 0, num_micro: int = 1) -> Batch:
        """The windows that `rank` reads in micro-batch `micro` of `step`; B = G / (world_size * num_micro) streams.

        Rank r has the r-th contiguous block of streams, and its micro-batches are consecutive parts of that block.
        After `num_steps` everything is padding.

        Raises:
            ValueError: if the streams do not divide evenly, or step, rank or micro is out of range.
        """
        if self.streams % (world_size * num_micro):
            raise ValueError("streams must be a multiple of ranks x micro-batches: "
                             f"{self.streams} % ({world_size} x {num_micro}) != 0")
        for name, value, limit in (("rank", rank, world_size), ("micro", micro, num_micro)):
            if not 0 <= value < limit:
                raise ValueError(f"{name} must lie in 0..{limit - 1}: got {value}")
        windows = self._windows(step)
        size = self.streams // (world_size * num_micro)
        first = (rank * num_micro + micro) * size
        return self._assemble(windows[first:first + size], self._counted(windows),
                              max(1, *(len(window.pieces) for window in windows)))

    def global_tokens(self, step: int) -> int:
        """Targets that count in the whole global batch of `step`."""
        return self._counted(self._windows(step))

    def _counted(self, windows: list[_Window]) -> int:
        return sum(self.documents.num_counted(piece.start + 1, piece.start + 1 + piece.length)
                   for window in windows for piece in window.pieces)

    def _windows(self, step: int) -> list[_Window]:
        """What each of all the streams reads in `step`."""
        if step < self.first_step:
            rule = f"lie at or beyond the first, {self.first_step}" if self.first_step else "not be negative"
            raise ValueError(f"step must {rule}: got {step}")
        return [self._window(stream, step - self.first_step) for stream in range(self.streams)]

    def _window(self, stream: int, step: int) -> _Window:
        """What one stream reads so many steps into the pass."""
        if self.pauses.at(stream, step):
            return _Window((), paused=True)
        start = (step - self.pauses.before(stream, step)) * self._unit
        scale = self.sequence_length // self._unit  # tokens to a position of the schedule
        pieces = []
        for visit, document, offset, length in self._schedule.read(stream, start, start + self._unit):
            first = offset * scale
            length = min(length * scale, int(self._targets[document]) - first)
            pieces.append(_Piece(self.first_namespace + visit, self.documents.identity(document),
                                 int(self._source[document]), first, int(self.documents.offsets[document]) + first, length))
        return _Window(tuple(pieces))

    def _assemble(self, windows: list[_Window], global_tokens: int, most_pieces: int) -> Batch:
        B, T = len(windows), self.sequence_length
        inputs_BT = np.full((B, T), self.documents.end_id, dtype=np.int64)
        targets_BT, piece_BT = np.full((B, T), IGNORED, dtype=np.int64), np.zeros((B, T), dtype=np.int64)
        valid_BT = np.zeros((B, T), dtype=bool)
        namespace_BP, document_BP, source_BP = np.full((3, B, most_pieces), -1, dtype=np.int64)
        for row, window in enumerate(windows):
            place = 0
            for number, piece in enumerate(window.pieces):
                end, after = place + piece.length, piece.start + piece.length
                inputs_BT[row, place:end] = self.documents.tokens[piece.start:after]
                targets_BT[row, place:end] = self.documents.tokens[piece.start + 1:after + 1]
                if self.documents.counted is not None:
                    targets_BT[row, place:end][self.documents.counted[piece.start + 1:after + 1] == 0] = IGNORED
                valid_BT[row, place:end] = True
                piece_BT[row, place:] = number
                namespace_BP[row, number], document_BP[row, number] = piece.namespace, piece.document
                source_BP[row, number] = piece.source
                place = end
        window_B = torch.tensor([window.number(T) for window in windows])
        names_BP, documents_BP = torch.from_numpy(namespace_BP), torch.from_numpy(document_BP)
        return Batch(torch.from_numpy(inputs_BT), torch.from_numpy(targets_BT), torch.from_numpy(valid_BT),
                     torch.tensor([window.starts for window in windows]), names_BP[:, 0].clone(), documents_BP[:, 0].clone(),
                     window_B, torch.tensor([window.paused for window in windows]), torch.from_numpy(piece_BT), names_BP,
                     documents_BP, torch.from_numpy(source_BP), global_tokens)


class _Piece(NamedTuple):
    """What a window holds of one document: `length` inputs from position `start` of the token file."""

    namespace: int
    document: int
    source: int
    offset: int  # within its document
    start: int
    length: int


class _Window(NamedTuple):
    """What one stream reads in one step: pieces of documents; none of a stream that pauses or has run out."""

    pieces: tuple[_Piece, ...]
    paused: bool = False

    @property
    def length(self) -> int:
        return sum(piece.length for piece in self.pieces)

    @property
    def starts(self) -> bool:
        """Whether a document begins with the window."""
        return bool(self.pieces) and self.pieces[0].offset == 0

    def number(self, sequence_length: int) -> int:
        """How many windows of the first document came before this one, which it then began at its end; -1 without any."""
        return -(-self.pieces[0].offset // sequence_length) if self.pieces else -1


class _Queue:
    """Which document comes next, endlessly: sources by turns, each in epochs that hold every document of it once."""

    def __init__(self, targets: np.ndarray, sources: Sequence[int], weights: Sequence[float], *, seed: int,
                 shuffle: bool) -> None:
        self._targets, self._weights, self._seed, self._shuffle = targets, weights, seed, shuffle
        self._first, self._count = np.cumsum([0, *sources]).tolist(), list(sources)
        self._taken, self._tokens = [0] * len(self._count), [0] * len(self._count)
        self._order: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * len(self._count)

    def take(self) -> int:
        """The next document, of the source with the fewest tokens for its weight (the first of these)."""
        source = min(range(len(self._count)), key=lambda one: self._tokens[one] / self._weights[one])
        epoch, place = divmod(self._taken[source], self._count[source])
        if place == 0:
            self._order[source] = self._epoch_order(epoch, source)
        document: int = self._first[source] + int(self._order[source][place])
        self._taken[source] += 1
        self._tokens[source] += int(self._targets[document])
        return document

    def _epoch_order(self, epoch: int, source: int = 0) -> np.ndarray:
        count = self._count[source]
        if not self._shuffle:
            return np.arange(count)
        # sorting raw bits, because numpy may change permutation() between versions but not a bit generator's stream
        bits = np.random.PCG64([self._seed, epoch, source] if source else [self._seed, epoch]).random_raw(count)
        return np.argsort(bits, kind="stable")


class _Schedule:
    """What each stream reads when, pauses left out. Grows on demand, always in the same order.

    A stream advances by positions: windows where each holds one document, else tokens. `sizes` are documents in these.
    """

    def __init__(self, sizes: np.ndarray, queue: _Queue, *, streams: int, epochs: int | None) -> None:
        self._sizes, self._queue = sizes, queue
        self._limit = None if epochs is None else epochs * len(sizes)
        self._free = [(0, stream) for stream in range(streams)]  # heap of (position at which it is free, stream)
        self._visits = 0
        # per stream and visit, ascending: first position, visit, document (arrays: a long run makes millions of visits)
        self._starts = [array("q") for _ in range(streams)]
        self._visit = [array("q") for _ in range(streams)]
        self._document = [array("q") for _ in range(streams)]

    def read(self, stream: int, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """(visit, document, first position of the document, how many) of what a stream reads from `start` to `end`."""
        while self._free[0][0] < end and self._visits != self._limit:
            self._advance()
        starts = self._starts[stream]
        for place in range(max(0, bisect_right(starts, start) - 1), bisect_left(starts, end)):
            document, offset = self._document[stream][place], max(0, start - starts[place])
            count = min(int(self._sizes[document]), end - starts[place]) - offset
            if count > 0:
                yield self._visit[stream][place], document, offset, count

    def ends(self) -> list[int]:
        """The position at which each stream has run out; only for a limited number of epochs."""
        while self._visits != self._limit:
            self._advance()
        return [position for position, _ in sorted(self._free, key=lambda free: free[1])]

    def _advance(self) -> None:
        """Gives the next document of the queue to the stream that is free first."""
        document = self._queue.take()
        position, stream = self._free[0]
        self._starts[stream].append(position)
        self._visit[stream].append(self._visits)
        self._document[stream].append(document)
        self._visits += 1
        heapq.heapreplace(self._free, (position + int(self._sizes[document]), stream))
