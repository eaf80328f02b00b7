"""What the doctor finds: rows, as a table or JSON, and the exit code that follows from them.

A row's state is `ok`, `warn` (works, with a limit that the detail names) or `fail` (a run would stop or be wrong here).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

State = Literal["ok", "warn", "fail"]
STATES: tuple[State, ...] = ("ok", "warn", "fail")
NAMED = 8  # hosts that a table names before it counts


class Row(NamedTuple):
    """One finding: what was looked at, how it is, what a person needs to know about it, and on which hosts.

    hosts: empty where only one host was looked at, or all of them together.
    """

    name: str
    state: State
    detail: str
    hosts: tuple[str, ...] = ()


def guarded(name: str, check: Callable[[], list[Row]]) -> list[Row]:
    """The rows of a check, or one failed row that says what it raised."""
    try:
        return check()
    except Exception as error:  # whatever it is, it is a finding
        return [Row(name, "fail", f"{type(error).__name__}: {' '.join(str(error).split())}")]


def exit_code(rows: Iterable[Row]) -> int:
    """1 if any row failed, else 0."""
    return int(any(row.state == "fail" for row in rows))


def listed(names: Sequence[str]) -> str:
    """'n0, n1', or the first few of many and how many more there are."""
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def to_table(rows: Sequence[Row]) -> str:
    """The rows as aligned text, with a closing line that counts them."""
    width = max((len(row.name) for row in rows), default=0)
    lines = [f"{row.state:<4}  {row.name:<{width}}  {listed(row.hosts) + ': ' if row.hosts else ''}{row.detail}"
             for row in rows]
    counts = {state: sum(row.state == state for row in rows) for state in STATES}
    return "\n".join([*lines, ", ".join(f"{count} {state}" for state, count in counts.items())])


def to_json(rows: Sequence[Row]) -> str:
    """{"ok": bool, "checks": [{"name": ..., "state": ..., "detail": ..., "hosts": [...] if any}]}."""
    return json.dumps({"ok": exit_code(rows) == 0, "checks": [to_dict(row) for row in rows]}, indent=2)


def to_dict(row: Row) -> dict[str, Any]:
    """The row as JSON values."""
    found = {"name": row.name, "state": row.state, "detail": row.detail}
    return {**found, "hosts": list(row.hosts)} if row.hosts else found


def from_dict(value: Any) -> Row:
    """A row from what `to_dict` made of it, perhaps on another host.

    Raises:
        ValueError: if it is anything else.
    """
    texts = [value.get(key) for key in ("name", "state", "detail")] if isinstance(value, dict) else []
    if not texts or not all(isinstance(text, str) for text in texts) or texts[1] not in STATES:
        raise ValueError(f"a row has the texts name, state and detail: got {str(value)[:80]!r}")
    return Row(value["name"], value["state"], value["detail"])
