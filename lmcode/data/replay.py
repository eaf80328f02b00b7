"""Experience replay: windows that were trained on, kept to be trained on again.

A `Replay` keeps tokens and loss of the last windows (of each piece of one, where documents share it), the same on every
rank: what is stored and drawn follows from the step and from losses that all ranks gather. `ReplaySampler` replaces the
rows of streams that pause (`Pauses`) by drawn spans. A replayed row starts from a blank state, and its namespace is -1, so
it neither reads nor writes a bank: the entries that were written from it would show it the tokens that it has to predict.
Letters: M slots, X tokens of a span (a window and the target of its last token).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection, Mapping
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lmcode.config import RunConfig
from lmcode.data.corpus import Documents
from lmcode.data.streams import IGNORED, Batch, PassStart, Pauses, StreamSampler
from lmcode.protocol import State

log = logging.getLogger("lmcode")

FILE = "replay.safetensors"
FORMAT = "1"
COLUMNS = {"number": np.int64, "namespace": np.int64, "step": np.int64, "length": np.int64, "importance": np.float32}
PACKING_PAYS = 0.03  # share of the positions of windows of one document that are padding; packed, a step costs no more
LEAST_IMPORTANCE = 1e-6  # of a span that is known by heart: it can still be drawn
Predicate = Callable[[Mapping[str, np.ndarray]], np.ndarray]


class Replay:
    """The last `slots` windows that were trained on.

    The oldest span leaves first, whatever its importance: a loss is as large as the model was bad when it was measured, so
    keeping the most important spans would keep those of the first steps for ever. Importance decides what is drawn, and is
    measured anew whenever a span is replayed.

    Args:
        slots: M, most spans kept.
        sequence_length: most tokens of a window, X - 1.
        vocab_size: ids are below it.
        sampler: how spans are drawn, all without replacement: "importance", with probability proportional to it (the mean
            token loss when the span was last seen); "uniform"; "recent", proportional to the place in the order of storage.
        seed: decides the draws, together with the step.

    Attributes:
        token_MX: int32, input tokens and the last target, zero beyond the length. A token that is no target is -1 - id (of a
            last one the id is not kept).
        columns: arrays over slots: number (order of storage, -1 where empty), namespace, step (last seen), length (targets)
            and importance.
        written: spans stored so far.
        version: changes with the content.
    """

    def __init__(self, *, slots: int, sequence_length: int, vocab_size: int, sampler: str, seed: int) -> None:
        self.slots, self.sequence_length, self.vocab_size = slots, sequence_length, vocab_size
        self.sampler, self.seed = sampler, seed
        self.token_MX = np.zeros((slots, sequence_length + 1), np.int32)
        self.columns = {name: np.zeros(slots, dtype) for name, dtype in COLUMNS.items()}
        self.columns["number"][:] = -1
        self.written = self.version = 0

    def __len__(self) -> int:
        return int((self.columns["number"] >= 0).sum())

    def draw(self, step: int, count: int) -> np.ndarray:
        """Slots of at most `count` different spans for `step`, int64, in the order they were drawn.

        An exponential race: each span runs for -log(u) / weight, and the first `count` win (Efraimidis and Spirakis 2006).
        """
        place_N = np.flatnonzero(self.columns["number"] >= 0)
        bits_M = np.random.PCG64([self.seed, step, 1]).random_raw(self.slots)  # raw: the same in every version of numpy
        uniform_N = ((bits_M[place_N] >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        race_N = -np.log(uniform_N) / self._weights(place_N)
        drawn_N: np.ndarray = place_N[np.lexsort((place_N, race_N))[:count]]
        return drawn_N

    def _weights(self, place_N: np.ndarray) -> np.ndarray:
        if self.sampler == "importance":
            importance_N: np.ndarray = self.columns["importance"][place_N].astype(np.float64)
            return importance_N
        if self.sampler == "recent":
            return 1.0 + np.argsort(np.argsort(self.columns["number"][place_N])).astype(np.float64)
        return np.ones(len(place_N))

    def store(self, batch: Batch, loss_BP: np.ndarray, step: int) -> None:
        """Keeps the pieces of `batch` that streams have read. `loss_BP`: mean token loss of each, nats."""
        length_BP = batch.by_piece(batch.valid_BT).long().numpy()
        kept_BP = (batch.by_piece(batch.counted_BT).numpy() > 0) & ~batch.replayed_B.numpy()[:, None] & np.isfinite(loss_BP)
        for row, piece in np.argwhere(kept_BP):
            place, length, start = self.written % self.slots, length_BP[row, piece], length_BP[row, :piece].sum()
            self.token_MX[place] = 0
            self.token_MX[place, :length] = batch.input_ids_BT[row, start:start + length]
            target_T = batch.targets_BT[row, start:start + length].numpy()
            self.token_MX[place, 1:length][target_T[:-1] == IGNORED] ^= -1  # -1 - id
            self.token_MX[place, length] = target_T[-1] if target_T[-1] != IGNORED else -1
            for name, value in (("number", self.written), ("namespace", int(batch.namespace_BP[row, piece])), ("step", step),
                                ("length", length), ("importance", max(LEAST_IMPORTANCE, loss_BP[row, piece]))):
                self.columns[name][place] = value
            self.written += 1
        self.version += 1

    def update(self, place_N: np.ndarray, loss_N: np.ndarray, step: int) -> None:
        """Books what was measured when the spans in these slots were replayed."""
        fine_N = np.isfinite(loss_N)
        self.columns["importance"][place_N[fine_N]] = np.maximum(LEAST_IMPORTANCE, loss_N[fine_N])
        self.columns["step"][place_N[fine_N]] = step
        self.version += 1

    def forget(self, namespaces: Collection[int] | None = None, *, predicate: Predicate | None = None) -> int:
        """Removes, for good, the spans that meet all given conditions; returns how many. Every rank does the same.

        Args:
            namespaces: of the streams that read them.
            predicate: from `columns` (arrays over slots, empty ones included) to a bool array.

        Raises:
            ValueError: without any condition.
        """
        if namespaces is None and predicate is None:
            raise ValueError("forget needs namespaces or a predicate: got neither (everything: a predicate that is True)")
        chosen_M = self.columns["number"] >= 0
        if namespaces is not None:
            chosen_M &= np.isin(self.columns["namespace"], list(namespaces))
        if predicate is not None:
            chosen_M &= predicate(self.columns)
        self.token_MX[chosen_M] = 0
        for name, column in self.columns.items():
            column[chosen_M] = -1 if name == "number" else 0
        self.version += 1
        return int(chosen_M.sum())


def ids_of(token: Any) -> Any:
    """The token ids behind what a `Replay` keeps, an array or a tensor."""
    return token ^ (token >> 31)


class Placed(NamedTuple):
    """A span in a batch: its row, which piece of it it is and where that begins; and its slot in the store."""

    row: int
    piece: int
    start: int
    place: int


class ReplaySampler:
    """Batches of a `StreamSampler` in which paused rows hold spans of a `Replay`, one each; packed, as many as there is
    room for.

    What a step reads is a function of the step and of what is stored. A row that finds no span is padding.
    """

    def __init__(self, streams: StreamSampler, replay: Replay) -> None:
        self.streams, self.replay = streams, replay
        self._mixed: tuple[tuple[int, int], Batch, list[Placed]] | None = None
        self._rows = self._replayed_rows = self._replayed_tokens = 0
        self._replayed_loss = 0.0

    @property
    def epochs(self) -> int | None:
        return self.streams.epochs

    @property
    def num_steps(self) -> int | None:
        """As `StreamSampler.num_steps`: replay stops when the streams have read everything."""
        return self.streams.num_steps

    def describe_padding(self) -> str:
        """That of the streams, between replayed rows."""
        return self.streams.describe_padding()

    def batch(self, step: int, *, rank: int = 0, world_size: int = 1, micro: int = 0, num_micro: int = 1) -> Batch:
        """As `StreamSampler.batch`, replayed rows filled in: their streams' places are marked by `replayed_B`."""
        part = self.streams.batch(step, rank=rank, world_size=world_size, micro=micro, num_micro=num_micro)
        size, (whole, _) = len(part.replayed_B), self._mix(step)
        first = (rank * num_micro + micro) * size
        return Batch._make([*(tensor[first:first + size] for tensor in whole[:-1]), whole.global_tokens])

    def global_tokens(self, step: int) -> int:
        """Targets that count in the whole global batch of `step`, replayed ones included."""
        return self._mix(step)[0].global_tokens

    def _mix(self, step: int) -> tuple[Batch, list[Placed]]:
        """The global batch and the spans in it."""
        key = step, self.replay.version
        if self._mixed is None or self._mixed[0] != key:
            batch = self.streams.batch(step)
            placed = self._fill(step, np.flatnonzero(batch.replayed_B.numpy()))
            for row, piece, start, place in placed:
                end = start + int(self.replay.columns["length"][place])
                token_X = torch.from_numpy(self.replay.token_MX[place, :end - start + 1].astype(np.int64))
                batch.input_ids_BT[row, start:end] = ids_of(token_X)[:-1]
                batch.targets_BT[row, start:end] = token_X[1:].masked_fill(token_X[1:] < 0, IGNORED)
                batch.valid_BT[row, start:end] = True
                batch.piece_BT[row, start:] = piece
            batch = batch._replace(reset_B=batch.reset_B | batch.replayed_B, global_tokens=int(batch.counted_BT.sum()))
            missing = 1 + max((one.piece for one in placed), default=0) - batch.namespace_BP.shape[1]
            if missing > 0:
                namespace_BP, document_BP, source_BP = (F.pad(table_BP, (0, missing), value=-1) for table_BP in (
                    batch.namespace_BP, batch.document_BP, batch.source_BP))
                batch = batch._replace(namespace_BP=namespace_BP, document_BP=document_BP, source_BP=source_BP)
            self._mixed = key, batch, placed
        return self._mixed[1], self._mixed[2]

    def _fill(self, step: int, row_N: np.ndarray) -> list[Placed]:
        """Where the spans go that are drawn for `step`: each into the first row with room for it."""
        if not self.streams.packed:
            drawn = self.replay.draw(step, len(row_N))
            return [Placed(row, 0, 0, place) for row, place in zip(row_N.tolist(), drawn.tolist(), strict=False)]
        used, pieces, placed = dict.fromkeys(row_N.tolist(), 0), dict.fromkeys(row_N.tolist(), 0), []
        for place in self.replay.draw(step, self.replay.slots).tolist() if len(row_N) else ():
            length = int(self.replay.columns["length"][place])
            row = next((row for row, filled in used.items() if filled + length <= self.streams.sequence_length), None)
            if row is not None:
                placed.append(Placed(row, pieces[row], used[row], place))
                used[row], pieces[row] = used[row] + length, pieces[row] + 1
        return placed

    def remember(self, step: int, loss_BP: Tensor) -> None:
        """Stores what the streams read in `step`, which was trained on, and measures what was replayed.

        Args:
            loss_BP: sum of the token losses of each piece of each row of the global batch, nats; the same on every rank.
        """
        batch, placed = self._mix(step)
        count_BP, loss_BP = batch.by_piece(batch.counted_BT), loss_BP.double().cpu()
        mean_BP = (loss_BP / count_BP.clamp(min=1)).numpy()
        row_N, piece_N, _, place_N = np.array(placed, dtype=np.int64).reshape(-1, 4).T
        self._rows += len(loss_BP)
        self._replayed_rows += len(set(row_N.tolist()))
        self._replayed_tokens += int(count_BP[row_N, piece_N].sum())
        self._replayed_loss += float(loss_BP[row_N, piece_N].sum())
        self.replay.update(place_N, mean_BP[row_N, piece_N], step)
        self.replay.store(batch, mean_BP, step)

    def take(self) -> dict[str, float]:
        """Share of the rows that were replayed since the last call, and their mean token loss (NaN if there were none)."""
        taken = {"train/replay_share": self._replayed_rows / max(1, self._rows),
                 "train/replay_loss": self._replayed_loss / self._replayed_tokens if self._replayed_tokens else float("nan")}
        self._rows = self._replayed_rows = self._replayed_tokens = 0
        self._replayed_loss = 0.0
        return taken


def make_replay(config: RunConfig) -> Replay | None:
    """The empty store of a run; None if it replays nothing."""
    train = config.train
    if not train.memory_sample_ratio:
        return None
    return Replay(slots=train.replay_slots, sequence_length=train.sequence_length, vocab_size=config.model.vocab_size,
                  sampler=train.replay_sampler, seed=train.seed)


def packs(config: RunConfig, documents: Documents) -> bool:
    """Whether documents share a window: as `data.packing` says, or, left to us, where that saves more than it costs."""
    if config.data.packing != "auto":
        return config.data.packing
    single = StreamSampler(documents, streams=1, sequence_length=config.train.sequence_length, seed=0)
    return single.unpacked_padding_share > PACKING_PAYS


def make_sampler(config: RunConfig, documents: Documents, replay: Replay | None, *, data_pass: PassStart,
                 epochs: int | None = None) -> StreamSampler | ReplaySampler:
    """What a run trains on: its streams, and with a `replay` spans between them."""
    train, pauses = config.train, None
    if replay is not None:
        ratio = Fraction(str(train.memory_sample_ratio))  # 0.2 is meant as one fifth
        pauses = Pauses(ratio, train.streams, data_pass.first_pause)
    streams = StreamSampler(documents, streams=train.streams, sequence_length=train.sequence_length, seed=train.seed,
                            epochs=epochs, pauses=pauses, first_step=data_pass.first_step,
                            first_namespace=data_pass.first_namespace, packed=packs(config, documents),
                            weights=[source.weight for source in config.data.sources] or None)
    return streams if replay is None else ReplaySampler(streams, replay)


def keep_paused(before: State, after: State, replayed_B: Tensor) -> State:
    """The state after a step in which some streams paused: those have what they had before."""
    def choose(old: Any, new: Any) -> Any:
        if isinstance(new, tuple):
            return tuple(choose(*pair) for pair in zip(old, new, strict=True))
        return torch.where(replayed_B.view(-1, *[1] * (new.dim() - 1)), old.to(new.dtype), new)

    return type(after)(*choose(tuple(before), tuple(after)))


def replay_part(replay: Replay) -> Callable[[Path], None]:
    """How to write all spans, the oldest first, as safetensors; holds a copy of them. Not atomic: see `durable`."""
    from safetensors.numpy import save_file

    place_N = np.argsort(replay.columns["number"], kind="stable")[replay.slots - len(replay):]
    tensors = {"token": replay.token_MX[place_N], **{name: column[place_N] for name, column in replay.columns.items()}}
    return partial(save_file, tensors, metadata={"lmcode": FORMAT, "written": str(replay.written)})


def load_replay(path: Path, replay: Replay) -> None:
    """Fills an empty `replay` with what `replay_part` wrote; of more spans than it has slots the newest stay.

    Raises:
        ValueError: for a file that is not of this format, or holds what no run can have stored; nothing has changed then.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            header = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: not a readable replay file: {error}") from None
    if header.get("lmcode") != FORMAT or not header.get("written", "").isdecimal():
        raise ValueError(f"{path}: the header must give format {FORMAT} and the number written: got {header}")
    written = int(header["written"])
    _check_spans(path, found, written, replay)
    kept_N = found["number"] >= written - replay.slots
    place_N = found["number"][kept_N] % replay.slots
    replay.token_MX[place_N] = found["token"][kept_N]
    for name, column in replay.columns.items():
        column[place_N] = found[name][kept_N]
    replay.written, replay.version = written, replay.version + 1


def resume(replay: Replay | None, folder: Path, data_pass: PassStart, *, step: int) -> PassStart:
    """Fills `replay`, if the run has one, from a checkpoint of `step`; returns the pass that the run then continues.

    A checkpoint without spans is of a run that replayed nothing: pauses begin when a step has been stored.
    """
    if replay is None:
        return data_pass
    if (folder / FILE).exists():
        load_replay(folder / FILE, replay)
        return data_pass
    log.warning("'%s' holds nothing to replay: replay starts empty", folder)
    return dataclasses.replace(data_pass, first_pause=step - data_pass.first_step + 1)


def _check_spans(path: Path, found: Mapping[str, np.ndarray], written: int, replay: Replay) -> None:
    """Raises ValueError for columns that do not fit `replay` or contradict each other."""
    def require(condition: bool, rule: str) -> None:
        if not condition:
            raise ValueError(f"{path}: {rule}")

    require({*found} == {"token", *COLUMNS}, f"tensors must be {sorted(['token', *COLUMNS])}: got {sorted(found)}")
    number, width = found["number"], replay.sequence_length + 1
    for name, dtype in {"token": np.int32, **COLUMNS}.items():
        shape = (number.size, width) if name == "token" else (number.size,)
        require(found[name].dtype == dtype and found[name].shape == shape,
                f"'{name}' must be {np.dtype(dtype).name} {list(shape)}: got {found[name].dtype} {list(found[name].shape)}")
    token, length, importance = found["token"], found["length"], found["importance"]
    require(bool((np.diff(number) > 0).all() and (number >= 0).all() and (number < written).all()),
            f"numbers must ascend within 0..{written - 1}")
    require(bool(((length >= 1) & (length < width)).all()), f"lengths must lie in 1..{width - 1}")
    require(bool(((ids_of(token) < replay.vocab_size) & (token[:, :1] >= 0)).all()),
            f"tokens must lie in 0..{replay.vocab_size - 1}")
    require(not token[np.arange(width) > length[:, None]].any(), "tokens beyond a span's length must be 0")
    require(bool((found["namespace"] >= 0).all() and (found["step"] >= 0).all()), "namespaces and steps must be 0 or more")
    require(bool(np.isfinite(importance).all() and (importance > 0).all()), "importance must be positive and finite")
