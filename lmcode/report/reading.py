"""Reading text with forked banks and keeping where each entry came from, so that hits can be shown as text.

Entries hold vectors and no words. A fork, which starts empty or as a copy, gives every token that it reads an id; from those
ids a hit is mapped back to a position in the text. The model's own banks are never written. Everything here is a collective:
all ranks read the same documents. Letters: N queries at known positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lmcode.backbone import Backbone, token_losses
from lmcode.data.corpus import Documents
from lmcode.data.streams import Batch, StreamSampler
from lmcode.data.tokenizer import Tokenizer
from lmcode.eval import reading as eval_reading
from lmcode.memory.bank import LongTermMemory
from lmcode.memory.entry import choose
from lmcode.protocol import Candidates, LayerMemory, Output
from lmcode.report.sequences import as_documents, as_text, device_of

STREAMS = 4  # documents that are read side by side
BEFORE, AFTER = 20, 5  # tokens of text that an example shows up to a place and after it
SHOWN_HITS, SHOWN_LAYERS = 3, 3
STRONGEST, BLIND = 4, 2  # examples of a layer: where the memory got most attention, and at places chosen blindly
APART = 48  # tokens between two examples of one document


class Position(NamedTuple):
    """A token: which document, and which of its tokens."""

    document: int
    token: int


class LayerQueries(NamedTuple):
    """The queries of one layer that had a place, over all windows, in reading order.

    place_N: the token that asked. score_HNK, id_HNK: its hits. share_HN, null_share_HN: of the read's softmax.
    gate_X: fp32, the gate of every token.
    """

    place_N: np.ndarray
    score_HNK: np.ndarray
    id_HNK: np.ndarray
    share_HN: np.ndarray
    null_share_HN: np.ndarray
    gate_X: np.ndarray


@dataclass(frozen=True)
class LayerReading:
    """What one memory layer did. gate_X: fp32, the gate of every token. own_share, hit_share, null_share: mean shares of the
    read's softmax. first_right: share of best hits that were followed by the right token, among those whose text is known;
    nan if there were none."""

    gate_X: np.ndarray
    own_share: float
    hit_share: float
    null_share: float
    first_right: float


@dataclass(frozen=True)
class ShownHit:
    """One hit of an example. weight: its share of the softmax over the hits. before, after: text up to the entry's key and
    from its successor on, None where the text is not known. right: whether the successor is the token that came."""

    score: float
    weight: float
    source: str
    before: str | None
    after: str | None
    right: bool


@dataclass(frozen=True)
class Example:
    """A token, what came after it, and what the memory said. share: of the read's softmax, that went to hits in this head.
    loss_on, loss_off: nats, of the token that came, with the memory and without retrieval."""

    layer: int
    head: int
    blind: bool
    source: str
    before: str
    came: str
    share: float
    loss_on: float
    loss_off: float
    hits: tuple[ShownHit, ...]


@dataclass(frozen=True)
class ReadDocuments:
    """Documents read with the memory and without retrieval. loss_on, loss_off: nats, means over `tokens` predictions."""

    names: tuple[str, ...]
    tokens: int
    loss_on: float
    loss_off: float
    layers: dict[int, LayerReading]
    examples: tuple[Example, ...]


def read_documents(model: Backbone, sequences: Sequence[Sequence[int]], *, names: Sequence[str] | None = None,
                   tokenizer: Tokenizer | None = None, length: int | None = None, windows: int = 16) -> ReadDocuments:
    """Reads documents side by side, window by window, with the memory and again without retrieval. A collective.

    Args:
        sequences: token ids of each document, at least two.
        names: what to call them.
        length: tokens of a window; the model's context when None.
        windows: most windows that are read.
    """
    documents = as_documents(sequences, names)
    length = min(length or model.config.context_length, max(map(len, sequences)) - 1)
    stride = model.config.retrieval_stride
    sampler = StreamSampler(documents, streams=min(STREAMS, len(documents)), seed=0, epochs=1, shuffle=False,
                            sequence_length=-(-length // stride) * stride)
    reader = _Reader(model, documents)
    for step in range(min(windows, sampler.num_steps or 0)):
        reader.read(sampler.batch(step).to(device_of(model)), step)
    return reader.result(tokenizer)


class _Reader:
    """The state of a reading: streams, forks, and what has been seen so far."""

    def __init__(self, model: Backbone, documents: Documents) -> None:
        self.model, self.documents = model, documents
        self.on, self.off = eval_reading.Reading(model), eval_reading.Reading(model, mode="off")
        self.origin: dict[int, dict[int, Position]] = {layer: {} for layer in model.banks}
        self.seen: dict[int, list[LayerQueries]] = {layer: [] for layer in model.banks}
        self.losses: dict[Position, tuple[float, float]] = {}

    def read(self, batch: Batch, step: int) -> None:
        on, off = (one.read(batch, batch.namespace_B.tolist()) for one in (self.on, self.off))
        place_BT = places(batch)
        self._keep_losses(batch, place_BT, on, off)
        for layer, fork in self.on.forks.items():
            self.seen[layer].append(asked(on.memory[layer], place_BT, batch.valid_BT.cpu().numpy(),
                                           self.model.config.retrieval_stride))
            self._commit(fork, on.memory[layer], place_BT, layer, step)

    def _keep_losses(self, batch: Batch, place_BT: np.ndarray, on: Output, off: Output) -> None:
        valid_BT = batch.valid_BT.cpu().numpy()
        both = zip(*(token_losses(one).cpu().numpy()[valid_BT] for one in (on, off)), strict=True)
        for (document, token), (loss_on, loss_off) in zip(place_BT[valid_BT].tolist(), both, strict=True):
            self.losses[Position(document, token)] = float(loss_on), float(loss_off)

    def _commit(self, fork: LongTermMemory, memory: LayerMemory, place_BT: np.ndarray, layer: int, step: int) -> None:
        """Writes what a training step would write, and notes which token each new entry's key came from."""
        candidates, first = memory.candidates, fork.next_id
        # Hits are not booked: with all ranks reading the same text, each would count once per rank.
        fork.commit([only_once(candidates, fork)], [], step=step)
        if not self.model.offers_by_token:
            return
        valid_N = candidates.valid_N.cpu().numpy()
        chosen_E = choose(candidates.surprise_N.cpu().numpy()[valid_N], fork.config)
        place_E = place_BT.reshape(-1, 2)[valid_N][chosen_E]
        for number, (document, token) in enumerate(place_E.tolist()):
            self.origin[layer][first + number] = Position(document, token - self.model.config.successor_values)

    def result(self, tokenizer: Tokenizer | None) -> ReadDocuments:
        on, off = np.array(list(self.losses.values()), float).T
        whole = {layer: LayerQueries(*(np.concatenate(part, axis=1 if part[0].ndim == 3 or name.endswith("HN") else 0)
                                       for name, part in zip(LayerQueries._fields, zip(*parts, strict=True), strict=True)))
                 for layer, parts in self.seen.items()}
        layers = {layer: summary(one, self.origin[layer], self.documents) for layer, one in whole.items()}
        shown = sorted(whole)[:: max(1, -(-len(whole) // SHOWN_LAYERS))]
        examples = [example for layer in shown for example in self._examples(layer, whole[layer], tokenizer)]
        used = sorted({place.document for place in self.losses})
        return ReadDocuments(tuple(self.documents.names[one] for one in used), len(on), float(on.mean()), float(off.mean()),
                             layers, tuple(examples))

    def _examples(self, layer: int, one: LayerQueries, tokenizer: Tokenizer | None) -> Iterator[Example]:
        weight_HNK = softmax(one)
        for head, query, blind in pick(one):
            place = Position(*one.place_N[query].tolist())
            loss_on, loss_off = self.losses[place]
            tell = _Teller(self.documents, tokenizer, place)
            rows = zip(one.score_HNK[head, query].tolist(), weight_HNK[head, query].tolist(),
                       one.id_HNK[head, query].tolist(), strict=True)
            hits = tuple(tell.hit(score, weight, entry, self.origin[layer].get(entry))
                         for score, weight, entry in rows if entry >= 0)
            yield Example(layer, head, blind, tell.where(place), tell.before(place), tell.after(place, 1),
                          float(one.share_HN[head, query]), loss_on, loss_off, hits[:SHOWN_HITS])


def only_once(candidates: Candidates, bank: LongTermMemory) -> Candidates:
    """The candidates of rank 0, none of the others': all ranks read the same text, and it is to be written once."""
    return candidates._replace(valid_N=candidates.valid_N & (bank.group.rank == 0))


def places(batch: Batch) -> np.ndarray:
    """Document and token of every input, int64 [B, T, 2]; the documents of one unshuffled pass are its visits."""
    B, T = batch.input_ids_BT.shape
    token_BT = batch.window_B.cpu()[:, None] * T + torch.arange(T)
    return torch.stack([batch.namespace_B.cpu()[:, None].expand(B, T), token_BT], dim=-1).numpy()


def asked(memory: LayerMemory, place_BT: np.ndarray, valid_BT: np.ndarray, stride: int) -> LayerQueries:
    """The queries of one window that a token of a document asked; padding is left out."""
    B, T, _ = place_BT.shape
    asks_X = np.arange(-(-T // stride)) * stride - int(stride > 1)  # -1 is before the first chunk: nobody asks
    place_NT = place_BT[:, asks_X].reshape(-1, 2)
    kept_N = (valid_BT[:, asks_X] & (asks_X >= 0)).reshape(-1)
    share_HN, null_share_HN = (by_token(part, len(kept_N)).mean(-1).cpu().numpy()[:, kept_N]
                               for part in (memory.share_HN.float(), memory.null_share_HN.float()))
    score_HNK, id_HNK = (by_token(part, len(kept_N))[:, :, 0].cpu().numpy()[:, kept_N] for part in memory.hits[:2])
    return LayerQueries(place_NT[kept_N], score_HNK, id_HNK, share_HN, null_share_HN,
                        memory.gate_BT.cpu().numpy()[valid_BT])


def by_token(part_HN: Tensor, tokens: int) -> Tensor:
    """What was asked, [H, N, ...], as [H, tokens, G, ...], where G query heads of a token share a memory head."""
    asked_HTX: Tensor = part_HN.unflatten(1, (tokens, -1))
    return asked_HTX


def summary(one: LayerQueries, origin: dict[int, Position], documents: Documents) -> LayerReading:
    """What the layer did on average. The shares of the softmax add up to 1."""
    hit, null = float(one.share_HN.mean()), float(one.null_share_HN.mean())
    known = right = 0
    for query, (document, token) in enumerate(one.place_N.tolist()):
        came = successor(documents, Position(document, token))
        for entry in one.id_HNK[:, query, 0].tolist():
            if entry in origin:
                known += 1
                right += successor(documents, origin[entry]) == came
    return LayerReading(one.gate_X, 1.0 - hit - null, hit, null, right / known if known else float("nan"))


def successor(documents: Documents, place: Position) -> int:
    """The token after a place."""
    return int(documents.document(place.document)[place.token + 1])


def softmax(one: LayerQueries) -> np.ndarray:
    """Weights of the hits among themselves, fp64 [H, N, K]; 0 where invalid, and all 0 without a hit."""
    valid_HNK = one.id_HNK >= 0
    score_HNK = one.score_HNK.astype(np.float64)
    power_HNK = np.where(valid_HNK, np.exp(score_HNK - score_HNK.max(-1, keepdims=True)), 0.0)
    weight_HNK: np.ndarray = power_HNK / np.maximum(power_HNK.sum(-1, keepdims=True), 1.0)
    return weight_HNK


def pick(one: LayerQueries) -> list[tuple[int, int, bool]]:
    """(head, query, blind) of the examples: first where a single hit got the largest share of a head's softmax, apart from
    each other and at most two of a document; then queries at even distances among those with hits, whatever came of them,
    in the head that was surest of its hit."""
    share_HN = one.share_HN * softmax(one)[..., 0]
    share_N, head_N = share_HN.max(0), share_HN.argmax(0)
    usable = np.flatnonzero((one.id_HNK[:, :, 0] >= 0).all(0))
    chosen: list[int] = []
    for query in usable[np.argsort(-share_N[usable], kind="stable")].tolist():
        document, token = one.place_N[query]
        others = [one.place_N[other][1] for other in chosen if one.place_N[other][0] == document]
        if len(chosen) < STRONGEST and len(others) < 2 and all(abs(token - other) >= APART for other in others):
            chosen.append(query)
    blind = [int(usable[(place + 1) * len(usable) // (BLIND + 1)]) for place in range(BLIND)] if len(usable) else []
    return [(int(head_N[query]), query, at >= len(chosen)) for at, query in enumerate([*chosen, *blind])]


@dataclass(frozen=True)
class _Teller:
    """Turns places into text, as seen from the token that asks."""

    documents: Documents
    tokenizer: Tokenizer | None
    asking: Position

    def before(self, place: Position) -> str:
        ids = self.documents.document(place.document)[max(0, place.token + 1 - BEFORE):place.token + 1]
        return as_text(self.tokenizer, ids.tolist())

    def after(self, place: Position, count: int) -> str:
        return as_text(self.tokenizer, self.documents.document(place.document)[place.token + 1:][:count].tolist())

    def where(self, place: Position) -> str:
        return f"{self.documents.names[place.document]}, token {place.token:,}"

    def hit(self, score: float, weight: float, entry: int, place: Position | None) -> ShownHit:
        if place is None:
            return ShownHit(score, weight, f"entry {entry:,}, written while training", None, None, False)
        back = f"{self.asking.token - place.token:,} tokens earlier"
        source = back if place.document == self.asking.document else self.where(place)
        right = successor(self.documents, place) == successor(self.documents, self.asking)
        return ShownHit(score, weight, source, self.before(place), self.after(place, AFTER), right)
