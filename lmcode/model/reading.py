"""Reading texts for what they offer to the memory: the candidates of each text, as if it were a document of its own.

The one thing to know: a text is read from its own start, and from nothing but itself. What it offers depends neither on
what a bank holds nor on the other texts of the batch (but for rounding), so texts may be read in any number at once. No
autocast reaches in here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lmcode.model.inputs import IGNORED
from lmcode.model.mode import in_eval_mode
from lmcode.precision import without_autocast
from lmcode.protocol import Candidates

STREAMS = 32  # texts that are read side by side


@torch.no_grad()
@without_autocast()
def read_texts(model: Any, rows: Sequence[Sequence[int]]) -> list[dict[int, Candidates]]:
    """The valid candidates of each text, by memory layer, in the order of its tokens.

    Texts longer than the context are read window by window, with the short-term state carried on. The model runs in
    eval mode and is left in the mode it came in. With successor values n tokens offer n - 1 candidates. Namespaces are 0:
    they are the writer's to choose.

    Args:
        model: any `Backbone`.
        rows: token ids of each text, at least one each, all in the vocabulary.
    """
    offered: list[dict[int, Candidates]] = [{}] * len(rows)
    by_length = sorted(range(len(rows)), key=lambda index: len(rows[index]))  # side by side with least padding
    with in_eval_mode(model), model.reading_from({}):
        for start in range(0, len(rows), STREAMS):
            batch = by_length[start:start + STREAMS]
            for index, candidates in zip(batch, _read_side_by_side(model, [rows[i] for i in batch]), strict=True):
                offered[index] = candidates
    return offered


def _read_side_by_side(model: Any, rows: list[Sequence[int]]) -> list[dict[int, Candidates]]:
    device, window, count = next(model.parameters()).device, model.config.context_length, len(rows)
    parts: list[defaultdict[int, list[Candidates]]] = [defaultdict(list) for _ in rows]
    state: Any = None
    for start in range(0, max(map(len, rows)), window):
        ids_BT, valid_BT = _padded([row[start:start + window] for row in rows], 0, device)
        length = ids_BT.shape[1]
        targets_BT, _ = _padded([row[start + 1:start + length + 1] for row in rows], IGNORED, device, length=length)
        output = model(ids_BT, targets_BT=targets_BT, state=state, valid_BT=valid_BT,
                       namespace_B=torch.zeros(count, dtype=torch.int64, device=device))
        state = output.state
        for layer, memory in output.memory.items():
            for stream, candidates in enumerate(_by_stream(memory.candidates, count)):
                parts[stream][layer].append(candidates)
    return [{layer: Candidates(*(_join(column) for column in zip(*some, strict=True))) for layer, some in part.items()}
            for part in parts]


def _padded(parts: Sequence[Sequence[int]], filler: int, device: torch.device, *,
            length: int | None = None) -> tuple[Tensor, Tensor]:
    """Rows with trailing padding, int64 [B, T], and where they are valid, bool [B, T]."""
    length = max(map(len, parts)) if length is None else length
    ids_BT = torch.tensor([[*part, *[filler] * (length - len(part))] for part in parts], device=device)
    length_B = torch.tensor([len(part) for part in parts], device=device)
    return ids_BT, torch.arange(length, device=device) < length_B[:, None]


def _by_stream(candidates: Candidates, count: int) -> list[Candidates]:
    """The valid candidates of each stream of a window."""
    tokens = candidates.valid_N.view(count, -1).sum(dim=1).tolist()
    valid_N = candidates.valid_N
    if candidates.document_N is None:
        candidates = candidates._replace(document_N=torch.full_like(candidates.namespace_N, -1))
    key_HND, value_HND = (part[:, valid_N].split(tokens, dim=1) for part in candidates[:2])
    rest = (part[valid_N].split(tokens) for part in candidates[2:] if part is not None)
    return [Candidates(*columns) for columns in zip(key_HND, value_HND, *rest, strict=True)]


def _join(parts: Sequence[Tensor]) -> Tensor:
    """Concatenates the windows of one text along its tokens."""
    return torch.cat(list(parts), dim=1 if parts[0].dim() == 3 else 0)
