"""What memory is worth on text: the loss of held-out documents by how far into them a token stands, and on words that were
last seen more than a window ago, which attention over the window cannot know and a memory can.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lmcode.backbone import Backbone, token_losses
from lmcode.data.corpus import Documents
from lmcode.data.streams import StreamSampler
from lmcode.eval.reading import Reading

EDGES = (64, 256, 1024, 4096, 16384, 65536)  # positions in the document at which a new mean begins


class LossProfile(NamedTuple):
    """Mean losses in nats per token, None where nothing was counted.

    loss: of all targets. returning: of those that are words and were last seen in their document more than a window ago.
    by_position: of targets from each of `EDGES` to the next; the first is from the start.
    tokens: targets of each, in the same order.
    """

    loss: float | None
    returning: float | None
    by_position: tuple[float | None, ...]
    tokens: tuple[int, ...]


def profile(model: Backbone, documents: Documents, *, words: np.ndarray, mode: str = "on", streams: int = 8,
            windows: int = 64, length: int | None = None, slots: int | None = None) -> LossProfile:
    """Reads up to `windows` windows of every stream of documents. A collective; the model is left as it was.

    Args:
        words: bool over the vocabulary, the tokens that are words.
        mode, slots: see `Reading`. length: tokens of a window; the model's context when None.
    """
    length, group = length or model.config.context_length, model.group
    sampler = StreamSampler(documents, streams=streams * group.size, sequence_length=length, seed=0, epochs=1, shuffle=False)
    reading, device = Reading(model, mode=mode, slots=slots), next(model.parameters()).device
    sums = np.zeros((2, 2 + len(EDGES) + 1))
    for step in range(min(windows, sampler.num_steps or 0)):
        batch = sampler.batch(step, rank=group.rank, world_size=group.size).to(device)
        output = reading.read(batch, sampler.batch(step).namespace_B.tolist())
        reading.write(output)
        for row, number in enumerate(batch.namespace_B.tolist()):
            count = int(batch.valid_BT[row].sum()) if number >= 0 else 0
            if count:
                start = int(batch.window_B[row]) * length
                loss_t = token_losses(output)[row, :count].cpu().double().numpy()
                document = documents.document(number)[:start + count + 1]
                band_t = np.searchsorted(EDGES, np.arange(start, start + count) + 1, side="right")
                chosen = [np.ones(count, bool), returning(document, words, length)[start + 1:],
                          *(band_t == band for band in range(len(EDGES) + 1))]
                sums += [[loss_t[of].sum() for of in chosen], [of.sum() for of in chosen]]
    everyones = np.sum(group.all_gather_object(sums), axis=0)
    means = [float(total / count) if count else None for total, count in everyones.T]
    return LossProfile(means[0], means[1], tuple(means[2:]), tuple(int(count) for count in everyones[1]))


def returning(document: Sequence[int] | np.ndarray, words: np.ndarray, length: int) -> np.ndarray:
    """bool, the tokens of a document that are words and were last seen in it more than `length` tokens before."""
    tokens = np.asarray(document, np.int64)
    order = np.argsort(tokens, kind="stable")
    same = np.append(False, tokens[order][1:] == tokens[order][:-1])
    since = np.zeros(len(tokens), np.int64)
    since[order[1:]] = np.where(same[1:], np.diff(order), 0)
    chosen: np.ndarray = words[tokens] & (since > length)
    return chosen


def words_of(texts: Sequence[str]) -> np.ndarray:
    """Which tokens, by what they spell, are words: at least three letters or underscores, and nothing else."""
    return np.array([len(text.strip()) >= 3 and text.strip().replace("_", "a").isalpha() for text in texts])
