"""`lmcode memory`: looking at and changing what a saved run remembers.

The one thing to know: these commands work on the newest checkpoint that verifies, in one process, whatever number of
ranks saved it. Those that change the memory commit a revision of that checkpoint (see `train.amend`), all of the
change or none of it. `lmcode.cli` hands in its way of making parsers and prints what the commands return.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmcode.config import ConfigError

if TYPE_CHECKING:
    from lmcode.lmcode import LMCODE

Command = Callable[..., argparse.ArgumentParser]
Number = Callable[..., Callable[[str], Any]]
Answer = tuple[str, int]  # what to print, and the exit code

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
SHOWN_CHARACTERS = 100  # of a text in a table


def add_memory(commands: Any, command: Command, number: Number, ignore_local_rank: Callable[[Any], None]) -> None:
    """Adds `memory` and its subcommands; each leaves a function from arguments to an `Answer` in `arguments.answer`."""
    parser = commands.add_parser("memory", help="look at and change what a run remembers",
                                 description="look at and change what a run remembers")
    ignore_local_rank(parser)
    kinds = parser.add_subparsers(title="commands", metavar="add|search|stats|inspect|export|import|delete|expire|"
                                                            "consolidate|verify", required=True)
    _add_readers(kinds, command, number)
    _add_writers(kinds, command, number)


def _kind(kinds: Any, command: Command, name: str, answer: Callable[[argparse.Namespace], Answer], *, words: str,
          help: str, examples: list[str]) -> argparse.ArgumentParser:
    parser = command(kinds, name, help=help, usage=f"lmcode memory {name} RUN {words}".rstrip(),
                     examples="\n".join(f"  lmcode memory {name} {example}" for example in examples))
    parser.set_defaults(answer=answer)
    parser.add_argument("path", metavar="RUN", type=Path, help="a run folder, or one checkpoint in it")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _add_readers(kinds: Any, command: Command, number: Number) -> None:
    one = _kind(kinds, command, "search", search, words="TEXT [--top-k N] [--namespace N] [--json]",
                help="find experiences by what they say", examples=["runs/books 'the white whale' --top-k 3"])
    one.add_argument("text", metavar="TEXT")
    one.add_argument("--top-k", metavar="N", type=number(int, lowest=1, highest=2048), default=5,
                     help="hits wanted (%(default)s)")
    _add_namespace(one, "look there only")
    _kind(kinds, command, "stats", stats, words="[--json]", help="how much is in the memory",
          examples=["runs/books", "runs/books --json"])
    one = _kind(kinds, command, "inspect", inspect, words="ID [--json]", help="everything about one experience",
                examples=["runs/books 17"])
    one.add_argument("id", metavar="ID", type=number(int, lowest=0))
    one = _kind(kinds, command, "export", export, words="[--namespace N] [--output FILE]",
                help="experiences as JSONL that import reads", examples=["runs/books --output books.jsonl"])
    one.add_argument("--output", metavar="FILE", type=Path, help="a new file; standard output when left out")
    _add_namespace(one, "those only")
    _kind(kinds, command, "verify", verify, words="[--json]",
          help="compare every checkpoint with its hashes, and read the newest memory; exit code 1 if something is damaged",
          examples=["runs/books"])


def _add_writers(kinds: Any, command: Command, number: Number) -> None:
    one = _kind(kinds, command, "add", add, words="[TEXT ...] [--file FILE] [--namespace N] [--importance X] [--json]",
                help="remember texts", examples=["runs/books 'The key is under the mat' --namespace house",
                                                 "runs/books --file notes.jsonl"])
    one.add_argument("texts", metavar="TEXT", nargs="*")
    one.add_argument("--file", metavar="FILE", help="JSONL, one object with text (or ids), and perhaps namespace and "
                                                    "importance, a line; - is standard input")
    _add_namespace(one, "where the line of a file does not say (0)")
    one.add_argument("--importance", metavar="X", type=number(float, lowest=1e-6, highest=10), default=1.0,
                     help="where the line of a file does not say (%(default)s)")
    one = _kind(kinds, command, "import", import_, words="FILE [--json]", help="store what export wrote",
                examples=["runs/books books.jsonl"])
    one.add_argument("file", metavar="FILE", help="JSONL; - is standard input")
    one = _kind(kinds, command, "delete", delete, words="[--id N ...] [--namespace N] [--json]",
                help="forget experiences, for good", examples=["runs/books --id 17 18", "runs/books --namespace house"])
    one.add_argument("--id", metavar="N", type=number(int, lowest=0), nargs="+", dest="ids")
    _add_namespace(one, "those only")
    one = _kind(kinds, command, "expire", expire, words="--older-than AGE [--namespace N] [--json]",
                help="forget old experiences, for good", examples=["runs/books --older-than 30d"])
    one.add_argument("--older-than", metavar="AGE", type=age, required=True, help="such as 90s, 45m, 12h, 30d, 8w")
    _add_namespace(one, "those only")
    one = _kind(kinds, command, "consolidate", consolidate, words="[--threshold X] [--json]",
                help="merge similar entries in the layers' banks (the texts of experiences stay as they are)",
                examples=["runs/books --threshold 0.05"])
    one.add_argument("--threshold", metavar="X", type=number(float, lowest=1e-6, highest=2),
                     help="cosine distance below which entries merge (memory.consolidation_threshold)")


def _add_namespace(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument("--namespace", metavar="N", type=_namespace, help=f"a number or a name: {help}")


def _namespace(text: str) -> int | str:
    """An argparse type: figures are a number, everything else is a name."""
    return int(text) if re.fullmatch(r"[0-9]+", text) else text


def age(text: str) -> int:
    """An argparse type: a number of seconds, minutes, hours, days or weeks, in seconds."""
    named = re.fullmatch(r"([0-9]+)([smhdw])", text)
    if named is None:
        raise argparse.ArgumentTypeError(f"expected a number and one of {', '.join(UNITS)}, such as 30d: got '{text}'")
    return int(named[1]) * UNITS[named[2]]


# Reading


def search(arguments: argparse.Namespace) -> Answer:
    """`lmcode memory search`."""
    _, model = _open(arguments.path)
    found, _ = _said(lambda: model.query_memory(arguments.text, top_k=arguments.top_k, namespace=arguments.namespace))
    if arguments.json:
        return _json([vars(one) for one in found])
    rows = [(f"{one.score:.3f}", str(one.id), str(one.namespace), f"{one.importance:g}", _ago(one.age), _short(one.text))
            for one in found]
    return _table(("score", "id", "namespace", "importance", "age", "text"), rows, none="nothing is stored"), 0


def stats(arguments: argparse.Namespace) -> Answer:
    """`lmcode memory stats`."""
    folder, model = _open(arguments.path)
    numbers = {f"layer {layer}": bank.stats() for layer, bank in model.banks.items()}
    namespaces = model.experiences.namespaces()
    experiences = model.experiences.bank.stats()
    if arguments.json:
        return _json({"checkpoint": folder.name, "experiences": {**experiences, "namespaces": {
            str(name): count for name, count in namespaces.items()}}, "banks": numbers})
    keys = ("live", "slots", "fill", "evicted", "merged", "rejected")
    rows = [(name, *(f"{one[key]:.1%}" if key == "fill" else f"{one[key]:,}" for key in keys))
            for name, one in {"experiences": experiences, **numbers}.items()]
    spaces = [(str(name), f"{count:,}") for name, count in namespaces.items()]
    return (f"{folder}\n\n" + _table(("bank", *keys), rows) + "\n"
            + _table(("namespace", "experiences"), spaces, none="no experiences are stored")), 0


def inspect(arguments: argparse.Namespace) -> Answer:
    """`lmcode memory inspect`."""
    _, model = _open(arguments.path)
    facts = _said(lambda: model.inspect_experience(arguments.id))
    if arguments.json:
        return _json(facts)
    facts["stored_at"] = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(facts["stored_at"]))
    facts["age"] = _ago(facts["age"])
    for layer, one in facts.pop("token_entries").items():
        first, end = one["ids"]
        facts[f"layer {layer}"] = f"{one['live']} of {end - first} token entries, ids from {first} on"
    return "".join(f"{name.replace('_', ' '):<18}{value}\n" for name, value in facts.items()), 0


def export(arguments: argparse.Namespace) -> Answer:
    """`lmcode memory export`."""
    from lmcode.experience_files import to_jsonl

    _, model = _open(arguments.path)
    chosen = _said(lambda: model.experiences.all(namespace=arguments.namespace))
    if arguments.output is None:
        return to_jsonl(chosen), 0
    try:
        with arguments.output.open("xb") as file:
            file.write(to_jsonl(chosen).encode("utf-8"))
    except OSError as error:
        raise ConfigError(f"'{arguments.output}' cannot be written: {error.strerror}") from None
    count = {"exported": len(chosen), "file": str(arguments.output)}
    return _json(count) if arguments.json else (f"exported {len(chosen):,} experiences to {arguments.output}\n", 0)


def verify(arguments: argparse.Namespace) -> Answer:
    """`lmcode memory verify`."""
    from lmcode.train import checkpoint, durable

    _alone()
    run, chosen = checkpoint.locate(arguments.path)
    problems: dict[str, str | None] = {}
    for path in [chosen] if chosen else durable.steps(run / "checkpoints"):
        try:
            durable.verify(path)
            problems[path.name] = None
        except durable.DamagedCheckpoint as error:
            problems[path.name] = str(error)
    if not problems:
        raise ConfigError(f"'{run}' holds no checkpoint")
    if None in problems.values():
        newest = [name for name, problem in problems.items() if problem is None][-1]
        try:
            _open(run / "checkpoints" / newest)
        except ConfigError as error:
            problems[newest] = str(error)
    code = int(any(problems.values()))
    if arguments.json:
        return _json(problems)[0], code
    return "".join(f"{name}: {problem or 'ok'}\n" for name, problem in problems.items()), code


# Changing


def add(arguments: argparse.Namespace) -> Answer:
    """`lmcode memory add`."""
    if bool(arguments.texts) == bool(arguments.file):
        raise ConfigError("add takes either texts or --file: got " + ("both" if arguments.texts else "neither"))
    rows = _read_rows(arguments.file, without="stored_at") if arguments.file else [{"text": t} for t in arguments.texts]
    defaults = {"namespace": 0 if arguments.namespace is None else arguments.namespace,
                "importance": arguments.importance, "stored_at": int(time.time())}
    return _amend(arguments, lambda model, step: _store(model, rows, defaults, step), "stored {count:,} experiences")


def import_(arguments: argparse.Namespace) -> Answer:
    """`lmcode memory import`."""
    rows, defaults = _read_rows(arguments.file), {"namespace": 0, "importance": 1.0, "stored_at": int(time.time())}
    return _amend(arguments, lambda model, step: _store(model, rows, defaults, step), "imported {count:,} experiences")


def delete(arguments: argparse.Namespace) -> Answer:
    """`lmcode memory delete`."""
    if arguments.ids is None and arguments.namespace is None:
        raise ConfigError("delete needs --id or --namespace: got neither")

    def change(model: LMCODE, step: int) -> dict[str, int]:
        return {"count": model.delete_experiences(ids=arguments.ids, namespace=arguments.namespace)}

    return _amend(arguments, change, "deleted {count:,} experiences")


def expire(arguments: argparse.Namespace) -> Answer:
    """`lmcode memory expire`."""
    def change(model: LMCODE, step: int) -> dict[str, int]:
        return {"count": model.delete_experiences(older_than=arguments.older_than, namespace=arguments.namespace)}

    return _amend(arguments, change, "deleted {count:,} experiences")


def consolidate(arguments: argparse.Namespace) -> Answer:
    """`lmcode memory consolidate`."""
    def change(model: LMCODE, step: int) -> dict[str, Any]:
        threshold = arguments.threshold or model.memory_config.consolidation_threshold
        reports = {str(layer): bank.consolidate(threshold) for layer, bank in model.banks.items()}
        return {"count": sum(one.merged for one in reports.values()), "before": sum(one.before for one in reports.values()),
                "threshold": threshold, "merged_by_layer": {layer: one.merged for layer, one in reports.items()}}

    return _amend(arguments, change, "merged {count:,} of {before:,} entries within {threshold:g} of another")


def _store(model: LMCODE, rows: list[dict[str, Any]], defaults: dict[str, Any], step: int) -> dict[str, Any]:
    columns = {name: [row.get(name, default) for row in rows] for name, default in defaults.items()}
    contents = [row["text"] if "text" in row else row["ids"] for row in rows]
    ids = model.store_experience(contents, columns["namespace"], columns["importance"], stored_at=columns["stored_at"],
                                 step=step)
    return {"count": len(ids), "ids": ids}


def _amend(arguments: argparse.Namespace, change: Callable[[LMCODE, int], dict[str, Any]], sentence: str) -> Answer:
    """Makes a change to the newest checkpoint of a run; says what it did, where it is, and where the old memory still is."""
    from lmcode.train import checkpoint, durable
    from lmcode.train.amend import amend, writing

    run, chosen = checkpoint.locate(arguments.path)
    with writing(run):
        folder, model = _open(run)
        if chosen is not None and chosen != folder.resolve():
            raise ConfigError(f"only the newest checkpoint can be changed, '{folder.name}': got '{chosen.name}'")
        done = _said(lambda: amend(folder, model, lambda model: change(model, durable.step_of(folder)[0])))
    older = [path.name for path in done.older]
    if arguments.json:
        return _json({**done.result, "checkpoint": done.folder.name, "older_checkpoints": older})
    note = f"older checkpoints keep the memory they have: {', '.join(older)}\n" if older else ""
    return f"{sentence.format(**done.result)}: {done.folder}\n{note}", 0


# Helpers


def _alone() -> None:
    from lmcode.dist import discover

    if (size := discover().world_size) > 1:
        raise ConfigError(f"lmcode memory runs in one process: got {size} ranks")


def _open(path: Path) -> tuple[Path, LMCODE]:
    """The newest checkpoint that verifies, and its model with everything that it remembers."""
    _alone()
    import torch

    from lmcode.dist import Group
    from lmcode.train import checkpoint

    try:
        folder = checkpoint.find(path)
        model, *_ = checkpoint.load_model(folder, [], group=Group(), device=torch.device("cpu"))
        if not model.banks:
            raise ConfigError(f"the model in '{path}' has no long-term memory: model.long_term_memory_slots = 0")
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return folder, model


def _said(action: Callable[[], Any]) -> Any:
    """What the action returns; what it refuses becomes one line on the command line."""
    try:
        return action()
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from None


def _read_rows(file: str, *, without: str | None = None) -> list[dict[str, Any]]:
    """The experiences in a JSONL file; ConfigError that names the file, the line and the rule."""
    from lmcode.experience import check_importance, namespace_number
    from lmcode.experience_files import from_jsonl

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


def _json(value: Any) -> Answer:
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n", 0


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]], *, none: str = "") -> str:
    """Columns as wide as they need to be; the last one is text, the others are set flush right."""
    if not rows:
        return f"{none}\n"
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return "".join("  ".join([*(cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=False)), row[-1]]) + "\n"
                   for row in (head, *rows))


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_CHARACTERS else line[:SHOWN_CHARACTERS - 3] + "..."


def _ago(seconds: int) -> str:
    """An age in its largest whole unit."""
    unit = next((unit for unit in ("w", "d", "h", "m") if seconds >= UNITS[unit]), "s")
    return f"{seconds // UNITS[unit]}{unit}"
