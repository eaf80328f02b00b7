"""What the commands of `lmcode memory` share: opening what holds a memory, reading JSONL, and printing results."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lmcode.config import ConfigError

if TYPE_CHECKING:
    from lmcode.backbone import Backbone

Answer = tuple[str, int]  # what to print, and the exit code

Result = TypeVar("Result")

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
SHOWN_CHARACTERS = 100  # of a text in a table


def alone() -> None:
    """Refuses a job of several ranks."""
    from lmcode.dist import discover

    if (size := discover().world_size) > 1:
        raise ConfigError(f"lmcode memory runs in one process: got {size} ranks")


def look(path: Path) -> tuple[Path, Backbone]:
    """What a run, a checkpoint or a saved model remembers, to be looked at: its folder and the model.

    Raises:
        ConfigError: in a job of several ranks; for what cannot be opened, and what has no memory.
    """
    alone()
    from lmcode.opening import open_model
    from lmcode.saved.places import Kind
    from lmcode.saved.pretrained import settings

    opened = said(lambda: open_model(path))
    if not opened.model.banks:
        raise ConfigError(f"the model in '{path}' has no long-term memory: model.long_term_memory_slots = 0")
    if opened.place.kind is Kind.SAVED_MODEL and not settings(opened.folder)[2]:
        raise ConfigError(f"the model in '{path}' was saved without its memory")
    return opened.folder, opened.model


def said(action: Callable[[], Result]) -> Result:
    """What the action returns; what it refuses becomes one line on the command line."""
    try:
        return action()
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from None


def read_rows(file: str, *, without: str | None = None) -> list[dict[str, Any]]:
    """The experiences in a JSONL file; ConfigError that names the file, the line and the rule."""
    from lmcode.memories.experience_files import from_jsonl
    from lmcode.memories.experiences import check_importance, namespace_number

    def judge(row: dict[str, Any]) -> None:
        namespace_number(row.get("namespace", 0))
        check_importance(row.get("importance", 1.0))
        if without in row:
            raise ValueError(f"'{without}' belongs to import: add stores now")
        if "text" in row and not row["text"].strip():
            raise ValueError(f"text must hold more than white space: got {row['text'][:40]!r}")
        if "ids" in row and not row["ids"]:
            raise ValueError("ids must not be empty")

    name = "standard input" if file == "-" else f"'{file}'"
    try:
        return from_jsonl(sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes(), judge)
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from None


def as_json(value: Any) -> Answer:
    """The value as JSON, with exit code 0."""
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n", 0


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]], *, none: str = "") -> str:
    """Columns as wide as they need to be; the last one is text, the others are set flush right."""
    if not rows:
        return f"{none}\n"
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return "".join("  ".join([*(cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=False)), row[-1]]) + "\n"
                   for row in (head, *rows))


def short(text: str) -> str:
    """A text on one line, cut if it is long."""
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_CHARACTERS else line[:SHOWN_CHARACTERS - 3] + "..."


def ago(seconds: int) -> str:
    """An age in its largest whole unit."""
    unit = next((unit for unit in ("w", "d", "h", "m") if seconds >= UNITS[unit]), "s")
    return f"{seconds // UNITS[unit]}{unit}"
