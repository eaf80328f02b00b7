"""python tools/recurrence.py RUN [--reach 5 32 0] [--windows 96] [section.key=value ...]

What far text is worth to a model that knows nothing of it: its held-out loss with the memory off, beside that of its
mixture with a longest-match cache of the same document (caches: Grave et al. 2017; here what is compared are tokens). Where
the last 4 tokens or fewer have occurred before the current window, no further back than `reach` windows (0: the whole
document), the cache predicts what followed them there. The weight of the cache depends on how long the match was, how often
it occurred and how much it agreed, and is fitted (by expectation maximisation) to the first half of each document's windows;
losses are those of the second half. So it is no bound, but what a reader that only copies could have.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lmcode.backbone import token_losses
from lmcode.eval.documents import held_out_documents
from lmcode.eval.held_out import held_out_sampler
from lmcode.eval.reading import Reading
from lmcode.opening import Opened, open_model

LONGEST = 4  # tokens of a match
RECENT = 64  # occurrences of a context that count, the last ones
ROUNDS = 60  # of expectation maximisation


class Text(NamedTuple):
    """What a stream has read of one document: inputs, the token after each and the model's loss of it, [W, T]."""

    input_WT: np.ndarray
    target_WT: np.ndarray
    loss_WT: np.ndarray


def read(opened: Opened, windows: int) -> list[Text]:
    """The first document of each held-out stream, as far as `windows` whole windows, read with the memory off."""
    sampler = held_out_sampler(held_out_documents(opened).documents, opened.config)
    reading, rows = Reading(opened.model, mode="off"), defaultdict(list)
    first = sampler.batch(0).namespace_B.tolist()
    for step in range(min(windows, sampler.num_steps or 0)):
        batch = sampler.batch(step)
        losses_BT = token_losses(reading.read(batch, batch.namespace_B.tolist()))
        for stream, namespace in enumerate(batch.namespace_B.tolist()):
            if namespace == first[stream] >= 0 and bool(batch.valid_BT[stream].all()):
                rows[stream].append([part[stream].numpy() for part in (batch.input_ids_BT, batch.targets_BT, losses_BT)])
    return [Text(*map(np.stack, zip(*some, strict=True))) for some in rows.values() if len(some) > 1]


def cache_of(text: Text, reach: int) -> tuple[np.ndarray, np.ndarray]:
    """For each token the cache's probability of what follows, and the kind of match that says so, [W, T]; 0 without one."""
    W, T = text.input_WT.shape
    tokens: list[int] = text.input_WT.flatten().tolist()
    seen: list[defaultdict[tuple[int, ...], list[int]]] = [defaultdict(list) for _ in range(LONGEST + 1)]
    probability_N, kind_N = np.zeros(W * T), np.zeros(W * T, dtype=np.int64)
    for window in range(W):
        oldest = (window - reach) * T if reach else 0
        for at in range(window * T, (window + 1) * T):
            for length in range(min(LONGEST, at + 1), 0, -1):
                places = [one for one in seen[length][tuple(tokens[at - length + 1:at + 1])][-RECENT:] if one >= oldest]
                if places:
                    followed = Counter(tokens[one + 1] for one in places)
                    probability_N[at] = followed[int(text.target_WT.flat[at])] / len(places)
                    agreement = 4 * followed.most_common(1)[0][1] // (len(places) + 1)
                    kind_N[at] = 100 * length + 10 * min(len(places), 8) + agreement
                    break
        for at in range(max(0, window * T - 1), (window + 1) * T - 1):  # the last one's successor is not known yet
            for length in range(1, min(LONGEST, at + 1) + 1):
                seen[length][tuple(tokens[at - length + 1:at + 1])].append(at)
    return probability_N.reshape(W, T), kind_N.reshape(W, T)


def gain(texts: Sequence[Text], reach: int) -> tuple[float, float, int]:
    """Loss of the model and of the mixture on the second halves, nats per token, and the number of tokens."""
    parts = [cache_of(text, reach) for text in texts]
    first = np.concatenate([np.repeat(np.arange(len(text.loss_WT)) < len(text.loss_WT) // 2, text.loss_WT.shape[1])
                            for text in texts])
    model_N = np.exp(-np.concatenate([text.loss_WT.flatten() for text in texts]).astype(np.float64))
    cache_N, kind_N = (np.concatenate([part[column].flatten() for part in parts]) for column in (0, 1))
    mixed_N = model_N.copy()
    for kind in np.unique(kind_N[kind_N > 0]):
        fitted_N, chosen_N = first & (kind_N == kind), ~first & (kind_N == kind)
        weight = fit(model_N[fitted_N], cache_N[fitted_N])
        mixed_N[chosen_N] = (1 - weight) * model_N[chosen_N] + weight * cache_N[chosen_N]
    return float(-np.log(model_N[~first]).mean()), float(-np.log(mixed_N[~first]).mean()), int((~first).sum())


def fit(model_N: np.ndarray, cache_N: np.ndarray) -> float:
    """The weight of the cache that makes these tokens likeliest; 0 where there are too few to say."""
    weight = 0.2 if len(model_N) >= 30 else 0.0
    for _ in range(ROUNDS if weight else 0):
        weight = float((weight * cache_N / ((1 - weight) * model_N + weight * cache_N)).mean())
    return weight


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--reach", type=int, nargs="+", default=[5, 32, 0], help="windows; 0: the whole document")
    parser.add_argument("--windows", type=int, default=96, help="that each stream reads")
    arguments, overrides = parser.parse_known_args()
    texts = read(open_model(arguments.run, overrides, memory=False), arguments.windows)
    for reach in arguments.reach:
        model, mixed, tokens = gain(texts, reach)
        print(f"{f'{reach} windows' if reach else 'whole document':>14}: model {model:.4f}, with the cache {mixed:.4f}, "
              f"gain {model - mixed:.4f} nats over {tokens:,} tokens", flush=True)


if __name__ == "__main__":
    main()
