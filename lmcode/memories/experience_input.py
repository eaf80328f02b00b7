"""What users pass as experiences and questions, judged and turned into `Experience`s and token ids: pure functions.

The one thing to know: everything is checked before anything is stored, so a list is stored whole or not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Union

import numpy as np
import torch
from torch import Tensor

from lmcode.data.tokenizer import Tokenizer
from lmcode.memories.experiences import Experience, Namespace, check_importance, namespace_number

Content = Union[str, Sequence[int], Tensor]  # noqa: UP007  (evaluated at run time)
Given = tuple[str, Union[tuple[int, ...], None], list[int]]  # noqa: UP007  text, ids if those were given, ids to read


def comparable(arguments: Any) -> Any:
    """Arguments with tensors turned into lists, so that equal ones are spelled alike on every rank."""
    if isinstance(arguments, Tensor | np.ndarray | np.generic):
        return arguments.tolist()
    return [comparable(one) for one in arguments] if isinstance(arguments, list | tuple) else arguments


def contents_of(given: Content | Sequence[Content]) -> list[Content]:
    """The single contents of what may be one text, one row of ids, or several of them; a tensor [B, T] is B rows.

    Raises:
        ValueError: for a tensor of other dimensions, an empty list, or anything else.
    """
    if isinstance(given, Tensor):
        if given.dim() not in (1, 2) or given.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"ids must be an integer tensor [T] or [B, T]: got {given.dtype} {list(given.shape)}")
        return [given] if given.dim() == 1 else list(given)
    if isinstance(given, str):
        return [given]
    if not isinstance(given, Sequence) or isinstance(given, bytes):
        raise ValueError(f"expected text, token ids, or a list of either: got {type(given).__name__}")
    if not given:
        raise ValueError("text or ids must not be empty: got an empty list")
    row_or_rows: Any = given
    return [row_or_rows] if all(_is_id(one) for one in given) else list(row_or_rows)


def read_content(content: Content, tokenizer: Tokenizer | None, vocab_size: int) -> Given:
    """One content as text, as the ids that were given (None for text), and as the ids that the model reads.

    Without a tokenizer, ids stand for themselves in figures.

    Raises:
        ValueError: for empty or blank text, text that is not Unicode, text without a tokenizer; no ids, ids of another
            type or outside the vocabulary.
    """
    if isinstance(content, str):
        if not content.strip():
            raise ValueError(f"text must hold more than white space: got {content[:40]!r}")
        if tokenizer is None:
            raise ValueError("text needs a tokenizer: set model.tokenizer (bytes need a vocabulary of 257), or give ids")
        try:
            content.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"text must be Unicode without lone surrogates: position {error.start} of "
                             f"{content[:40]!r}") from None
        return content, None, tokenizer.encode(content)
    ids = content.tolist() if isinstance(content, Tensor) else content
    if not isinstance(ids, Sequence) or not all(_is_id(one) for one in ids):
        raise ValueError(f"expected text or a row of integer token ids: got {str(content)[:60]!r}")
    if not ids:
        raise ValueError("text or ids must not be empty: got no ids")
    if min(ids) < 0 or max(ids) >= vocab_size:
        raise ValueError(f"ids must lie in 0..{vocab_size - 1}: got {min(ids)}..{max(ids)}")
    row = [int(one) for one in ids]
    return " ".join(map(str, row)) if tokenizer is None else tokenizer.decode(row), tuple(row), row


def experiences_of(contents: Sequence[Content], *, namespace: Namespace | Sequence[Namespace],
                   importance: float | Sequence[float], stored_at: int | Sequence[int], tokenizer: Tokenizer | None,
                   vocab_size: int) -> tuple[list[Experience], list[list[int]]]:
    """Experiences to be stored, and the ids that the model reads of each.

    Args:
        namespace, importance, stored_at: one for all, or one for each.

    Raises:
        ValueError: as `read_content`, with the place in the list where there are several; a namespace, importance or time
            out of range, or of another number than the contents.
    """
    count = len(contents)
    columns = [_spread(name, value, count) for name, value in
               (("namespace", namespace), ("importance", importance), ("stored_at", stored_at))]
    batch, rows = [], []
    for place, (content, where, weight, moment) in enumerate(zip(contents, *columns, strict=True)):
        try:
            text, ids, row = read_content(content, tokenizer, vocab_size)
            namespace_number(where)
            if not _is_id(moment) or not 0 <= moment < 2**62:
                raise ValueError(f"stored_at must be a Unix second from 0 on: got {moment!r}")
            where = where if isinstance(where, str) else int(where)
            batch.append(Experience(text, ids, where, check_importance(weight), int(moment)))
        except ValueError as error:
            raise ValueError(f"experience {place}: {error}" if count > 1 else str(error)) from None
        rows.append(row)
    return batch, rows


def _spread(name: str, value: Any, count: int) -> list[Any]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} must be one value or one for each of the {count} experiences: got {len(value)}")
    return list(value)


def _is_id(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
