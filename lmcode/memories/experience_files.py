"""Experiences as files: the experience bank with its texts in a checkpoint, and JSONL for people and programs.

    shard-00003.safetensors   the entries of one virtual shard, as `memory.store` describes
    texts-00003.jsonl         a first line {"lmcode": "experiences", "format": 1, "shard": 3}, then for each entry, by id,
                              {"id", "text", "ids", "namespace", "entries": {layer: [first id, end id]}}

Any number of ranks loads what any other saved. Refused, with a ValueError that names the file: what is missing, cut short
or no JSON; keys or types other than these; texts without an entry, entries without a text, a namespace that is not its
entry's. No file here is a pickle. Importance and time are the entry's own columns.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from lmcode.config import near_match
from lmcode.memories.experiences import Experience, Experiences, check_importance, namespace_number
from lmcode.memory.store import load_bank, save_shard, shard_file

FORMAT = 1
KINDS: dict[str, tuple[type, ...]] = {"text": (str,), "ids": (list,), "namespace": (int, str), "importance": (int, float),
                                      "stored_at": (int,)}


def texts_file(folder: Path | str, shard: int) -> Path:
    """The file with the texts of a virtual shard."""
    return Path(folder) / f"texts-{shard:05d}.jsonl"


def experience_parts(experiences: Experiences) -> dict[str, Callable[[Path], None]]:
    """The files that this rank writes (`bank.to_save`) by name; each holds a copy of what goes into it."""
    parts: dict[str, Callable[[Path], None]] = {}
    for shard in experiences.bank.to_save:
        state = experiences.bank.state(shard)
        ids = sorted(id for id in state["id"].tolist() if id >= 0)
        rows = [{"lmcode": "experiences", "format": FORMAT, "shard": shard},
                *(_stored_row(experiences.held[id]) for id in ids)]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        parts[shard_file("", shard).name] = partial(save_shard, state=state)
        parts[texts_file("", shard).name] = partial(_write_text, data=text.encode("utf-8"))
    return parts


def _write_text(path: Path, *, data: bytes) -> None:
    path.write_bytes(data)


def _stored_row(one: Experience) -> dict[str, Any]:
    return {"id": one.id, "text": one.text, "ids": None if one.ids is None else list(one.ids),
            "namespace": one.namespace, "entries": {str(layer): list(ids) for layer, ids in (one.entries or {}).items()}}


def load_experiences(folder: Path | str, experiences: Experiences) -> None:
    """Loads the virtual shards of this rank into `experiences`, which must be fresh. Collective.

    Raises:
        ValueError: on every rank, if any rank finds a file that it refuses; what `experiences` holds then is of no use.
    """
    load_bank(folder, experiences.bank)
    problem, held = None, {}
    try:
        for shard in experiences.bank.owned:
            held.update(_read_texts(texts_file(folder, shard), shard, experiences))
    except ValueError as error:
        problem = str(error)
    problems = [one for one in experiences.group.all_gather_object(problem) if one]
    if problems:
        raise ValueError("; ".join(problems))
    experiences.hold(held)


def _read_texts(path: Path, shard: int, experiences: Experiences) -> dict[int, Experience]:
    state = experiences.bank.state(shard)
    columns = zip(*(state[name].tolist() for name in ("id", "namespace", "step")), state["importance"].numpy(), strict=True)
    facts = {id: rest for id, *rest in columns if id >= 0}
    try:
        first, *rows = read_jsonl(path.read_bytes())
        if first != {"lmcode": "experiences", "format": FORMAT, "shard": shard}:
            raise ValueError(f"line 1: must say that this is format {FORMAT} of virtual shard {shard}: got {first}")
        held = {}
        for number, row in enumerate(rows, start=2):
            one = _stored(row, number)
            if one.id not in facts or one.id in held or namespace_number(one.namespace) != facts[one.id][0]:
                raise ValueError(f"line {number}: no entry of this id and namespace, or a second text for it: {one.id}")
            _, moment, importance = facts[one.id]
            held[one.id] = Experience(one.text, one.ids, one.namespace, check_importance(importance), moment, one.id,
                                      one.entries)
        if missing := sorted(facts.keys() - held.keys()):
            raise ValueError(f"the entries {missing[:8]} have no text")
        return held
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: {error}") from None


def _stored(row: Any, number: int) -> Experience:
    def is_row_of_ids(value: Any, length: int | None = None) -> bool:
        return (isinstance(value, list) and all(type(one) is int and one >= 0 for one in value)
                and length in (None, len(value)))

    fine = (isinstance(row, dict) and {*row} == {"id", "text", "ids", "namespace", "entries"} and type(row["id"]) is int
            and isinstance(row["text"], str) and (row["ids"] is None or is_row_of_ids(row["ids"]))
            and type(row["namespace"]) in (int, str) and isinstance(row["entries"], dict)
            and all(layer.isdigit() and is_row_of_ids(ids, 2) for layer, ids in row["entries"].items()))
    if not fine:
        raise ValueError(f"line {number}: must be an object of id, text, ids, namespace and entries: got {str(row)[:80]}")
    return Experience(row["text"], None if row["ids"] is None else tuple(row["ids"]), row["namespace"], id=row["id"],
                      entries={int(layer): (ids[0], ids[1]) for layer, ids in row["entries"].items()})


def to_jsonl(experiences: Iterable[Experience]) -> str:
    """The experiences as JSONL, in the order given: importing it stores the same, and exporting that gives these bytes."""
    return "".join(json.dumps(one.row(), ensure_ascii=False) + "\n" for one in experiences)


def read_jsonl(content: bytes) -> list[Any]:
    """The value of each line; ValueError for what is not UTF-8 or not JSON, with the line's number."""
    try:
        lines = content.decode("utf-8-sig").split("\n")  # not splitlines: JSON leaves U+2028 as it is
    except UnicodeDecodeError as error:
        number = content[:error.start].count(b"\n") + 1
        raise ValueError(f"line {number}: not UTF-8") from None
    values = []
    for number, line in enumerate(lines if lines[-1] else lines[:-1], start=1):
        try:
            values.append(json.loads(line, parse_constant=_refuse_constant))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number}: not JSON: {error}") from None
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def from_jsonl(content: bytes, judge: Callable[[dict[str, Any]], None]) -> list[dict[str, Any]]:
    """Rows of JSONL that describe experiences; each has 'text' or 'ids', and may have the other keys of `KINDS`.

    Args:
        judge: raises ValueError for a row that cannot be stored for other reasons.

    Raises:
        ValueError: with the number of the first bad line and the rule it breaks; no line at all.
    """
    rows = read_jsonl(content)
    if not rows:
        raise ValueError("expected at least one line with an experience: got none")
    for number, row in enumerate(rows, start=1):
        try:
            _check_row(row)
            judge(row)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
    return rows


def _check_row(row: Any) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"expected an object: got {str(row)[:60]}")
    for key in row:
        if key not in KINDS:
            raise ValueError(f"unknown key '{key}': expected {', '.join(KINDS)}.{near_match(key, KINDS)}")
        if type(row[key]) not in KINDS[key]:
            kinds = " or ".join(kind.__name__ for kind in KINDS[key])
            raise ValueError(f"'{key}' must be {kinds}: got {row[key]!r:.60}")
    if ("text" in row) == ("ids" in row):
        raise ValueError("an experience has either 'text' or 'ids'")
