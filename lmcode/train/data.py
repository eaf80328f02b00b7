"""Token file to batches: streams that walk documents in order, so that memory across windows means something.

Each of the global batch's G streams reads a document window by window, T tokens a step; when it ends, the stream takes
the next document of one queue that all streams share (the stream that is free first goes first, the lower number at a
tie). A window never spans two documents. The state is one integer, the step: `StreamSampler.batch(step, ...)` is a pure
function of its arguments, so resuming is asking for the next step, and what a step reads does not depend on the number
of ranks. Experience replay takes rows away from streams, which pause for that step; `Pauses` says which, again by the step
alone. Letters: B streams of one micro-batch, T tokens of a window.
"""

from __future__ import annotations

import heapq
from array import array
from bisect import bisect_right
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lmcode.train.corpus import Documents

IGNORED = -100  # target that cross-entropy leaves out


class Batch(NamedTuple):
    """One micro-batch of one rank.

    input_ids_BT: int64; padding, always trailing, holds the end mark.
    targets_BT: int64, the token after each input, across windows too; -100 for padding.
    valid_BT: bool, True where the input is a token of the document.
    reset_B: bool, True where a document starts with this window: the stream's state must be cleared before it.
    namespace_B: int64, the visit: the place in the endless queue of documents, so that what one reading of a document has
        written can be told from what other readings have. -1 for a stream that has run out of documents.
    document_B: int64, what the document says, as `Documents.identity`: the same in every visit. -1 without a document.
    window_B: int64, how many windows of its document came before this one; -1 for a stream that has run out.
    replayed_B: bool, True where the stream pauses: the row belongs to replay, and the stream's state must outlive it.
    global_tokens: targets that are not padding in the whole global batch: all ranks, all micro-batches.
    """

    input_ids_BT: Tensor
    targets_BT: Tensor
    valid_BT: Tensor
    reset_B: Tensor
    namespace_B: Tensor
    document_B: Tensor
    window_B: Tensor
    replayed_B: Tensor
    global_tokens: int

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        *tensors, global_tokens = self
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in tensors), global_tokens)


@dataclass(frozen=True)
class Pass:
    """Where the current reading of a dataset began. A job from the command line has one; a trainer may have several.

    first_step: the step of its first batch.
    first_namespace: that of its first visit; the smaller ones belong to what was written before.
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
        """The first step before which `stream` has read so many windows."""
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

    Raises:
        ValueError: if a count is not positive, the seed negative, or a document too short.
    """

    def __init__(self, documents: Documents, *, streams: int, sequence_length: int, seed: int,
                 epochs: int | None = None, shuffle: bool = True, pauses: Pauses | None = None, first_step: int = 0,
                 first_namespace: int = 0) -> None:
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
        self.documents, self.streams, self.sequence_length = documents, streams, sequence_length
        self.epochs, self.pauses = epochs, pauses or Pauses(Fraction(0), streams)
        self.first_step, self.first_namespace = first_step, first_namespace
        self._schedule = _Schedule(-(-self._targets // sequence_length), streams=streams, seed=seed, epochs=epochs,
                                   shuffle=shuffle)

    @cached_property
    def num_steps(self) -> int | None:
        """Steps from the first batch until every stream has run out of documents; None when endless."""
        if self.epochs is None:
            return None
        return max(self.pauses.end(stream, windows) for stream, windows in enumerate(self._schedule.ends()))

    @cached_property
    def padding_share(self) -> float:
        """Share of positions that hold no token: over all `num_steps` steps, idle and paused streams included, or, when
        endless, over the windows of one pass through the documents."""
        targets = int(self._targets.sum())
        if self.num_steps is None:
            return 1.0 - targets / (int(self._schedule.windows.sum()) * self.sequence_length)
        return 1.0 - targets * self.epochs / (self.num_steps * self.streams * self.sequence_length)

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
        return self._assemble(windows[first:first + size], sum(window.length for window in windows))

    def global_tokens(self, step: int) -> int:
        """Targets that are not padding in the whole global batch of `step`."""
        return sum(window.length for window in self._windows(step))

    def _windows(self, step: int) -> list[_Window]:
        """What each of all the streams reads in `step`."""
        if step < self.first_step:
            rule = f"lie at or beyond the first, {self.first_step}" if self.first_step else "not be negative"
            raise ValueError(f"step must {rule}: got {step}")
        return [self._window(stream, step - self.first_step) for stream in range(self.streams)]

    def _window(self, stream: int, step: int) -> _Window:
        """What one stream reads so many steps into the pass."""
        if self.pauses.at(stream, step):
            return _PAUSE
        visit, document, number = self._schedule.at(stream, step - self.pauses.before(stream, step))
        if visit < 0:
            return _NO_WINDOW
        start = number * self.sequence_length
        length = min(self.sequence_length, int(self._targets[document]) - start)
        return _Window(self.first_namespace + visit, self.documents.identity(document), number,
                       int(self.documents.offsets[document]) + start, length)

    def _assemble(self, windows: list[_Window], global_tokens: int) -> Batch:
        shape = (len(windows), self.sequence_length)
        inputs_BT = np.full(shape, self.documents.end_id, dtype=np.int64)
        targets_BT = np.full(shape, IGNORED, dtype=np.int64)
        for row, (_, _, _, start, length, _) in enumerate(windows):
            inputs_BT[row, :length] = self.documents.tokens[start:start + length]
            targets_BT[row, :length] = self.documents.tokens[start + 1:start + length + 1]
        namespace_B, document_B, window_B, _, _, paused_B = (torch.tensor(column) for column in zip(*windows, strict=True))
        return Batch(torch.from_numpy(inputs_BT), torch.from_numpy(targets_BT), torch.from_numpy(targets_BT != IGNORED),
                     window_B == 0, namespace_B, document_B, window_B, paused_B, global_tokens)


class _Window(NamedTuple):
    """What one stream reads in one step: `length` inputs from position `start` of the token file."""

    namespace: int
    document: int
    number: int  # within its document
    start: int
    length: int
    paused: bool = False


_NO_WINDOW = _Window(-1, -1, -1, 0, 0)  # of a stream that has run out of documents
_PAUSE = _Window(-1, -1, -1, 0, 0, True)


class _Schedule:
    """Which document each stream reads at which step, pauses left out. Grows on demand, always in the same order."""

    def __init__(self, windows: np.ndarray, *, streams: int, seed: int, epochs: int | None, shuffle: bool) -> None:
        self.windows = windows
        self._seed, self._shuffle = seed, shuffle
        self._limit = None if epochs is None else epochs * len(windows)
        self._free = [(0, stream) for stream in range(streams)]  # heap of (step at which it is free, stream)
        self._visits = 0
        self._order: np.ndarray = np.empty(0, dtype=np.int64)
        # per stream and visit, ascending: first step, visit, document (arrays: a long run makes millions of visits)
        self._starts = [array("q") for _ in range(streams)]
        self._visit = [array("q") for _ in range(streams)]
        self._document = [array("q") for _ in range(streams)]

    def at(self, stream: int, step: int) -> tuple[int, int, int]:
        """(visit, document, window of the document); visit -1 for a stream that has run out of documents."""
        while self._free[0][0] <= step and self._visits != self._limit:
            self._advance()
        place = bisect_right(self._starts[stream], step) - 1
        if place < 0:
            return -1, 0, 0
        document, number = self._document[stream][place], step - self._starts[stream][place]
        return (self._visit[stream][place], document, number) if number < self.windows[document] else (-1, 0, 0)

    def ends(self) -> list[int]:
        """The step at which each stream has run out; only for a limited number of epochs."""
        while self._visits != self._limit:
            self._advance()
        return [step for step, _ in sorted(self._free, key=lambda free: free[1])]

    def _advance(self) -> None:
        """Gives the next document of the queue to the stream that is free first."""
        epoch, place = divmod(self._visits, len(self.windows))
        if place == 0:
            self._order = self._epoch_order(epoch)
        document = int(self._order[place])
        step, stream = self._free[0]
        self._starts[stream].append(step)
        self._visit[stream].append(self._visits)
        self._document[stream].append(document)
        self._visits += 1
        heapq.heapreplace(self._free, (step + int(self.windows[document]), stream))

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if not self._shuffle:
            return np.arange(len(self.windows))
        # sorting raw bits, because numpy may change permutation() between versions but not a bit generator's stream
        return np.argsort(np.random.PCG64([self._seed, epoch]).random_raw(len(self.windows)), kind="stable")
