"""`lmcode memory`: looking at and changing what a saved run remembers.

The one thing to know: these commands work on the newest checkpoint that verifies, in one process, whatever number of
ranks saved it. Those that change the memory commit a revision of that checkpoint (see `saved.amend`), all of the
change or none of it. A saved model, or a checkpoint outside of a run, is replaced as a whole. `cli.command` passes in
how parsers are made, and prints what the functions here return.
"""

from __future__ import annotations

import argparse
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmcode.cli.answers import (
    UNITS,
    Answer,
    ago,
    alone,
    as_json,
    look,
    read_rows,
    said,
    short,
    table,
)
from lmcode.config import ConfigError

if TYPE_CHECKING:
    from lmcode.backbone import Backbone
    from lmcode.saved.amend import Draft

Command = Callable[..., argparse.ArgumentParser]
Number = Callable[..., Callable[[str], Any]]


def add_memory(commands: Any, command: Command, number: Number, ignore_local_rank: Callable[[Any], None]) -> None:
    """Adds `memory` and its subcommands; each leaves a function from arguments to an `Answer` in `arguments.answer`."""
    parser = commands.add_parser("memory", help="look at and change what a run remembers",
                                 description="look at and change what a run remembers")
    ignore_local_rank(parser)
    kinds = parser.add_subparsers(title="commands", metavar="add|search|stats|inspect|export|import|delete|expire|"
                                                            "consolidate|reshard|verify", required=True)
    _add_readers(kinds, command, number)
    _add_writers(kinds, command, number)


def _kind(kinds: Any, command: Command, name: str, answer: Callable[[argparse.Namespace], Answer], *, words: str,
          help: str, examples: list[str]) -> argparse.ArgumentParser:
    parser = command(kinds, name, help=help, usage=f"lmcode memory {name} RUN {words}".rstrip(),
                     examples="\n".join(f"  lmcode memory {name} {example}" for example in examples))
    parser.set_defaults(answer=answer)
    parser.add_argument("path", metavar="RUN", type=Path,
                        help="a run folder, one checkpoint in it (of which only the newest can be changed), a saved model, "
                             "or a trainer's checkpoint")
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
                help="forget experiences, for good: their texts, their entries in every layer, and all spans that are kept\n"
                     "for replay in their namespaces. A namespace without ids goes as a whole, with what was generated in\n"
                     "it; visit:N is that of the N-th document, from 0 on, that was trained on",
                examples=["runs/books --id 17 18", "runs/books --namespace house"])
    one.add_argument("--id", metavar="N", type=number(int, lowest=0), nargs="+", dest="ids", help="of experiences")
    _add_namespace(one, "everything in it; with --id those only")
    one = _kind(kinds, command, "expire", expire, words="--older-than AGE [--namespace N] [--json]",
                help="forget old experiences, for good, with their entries in every layer. Spans that are kept for replay\n"
                     "have no time of day: all go that are in a namespace in which something has expired, no others",
                examples=["runs/books --older-than 30d"])
    one.add_argument("--older-than", metavar="AGE", type=age, required=True, help="such as 90s, 45m, 12h, 30d, 8w")
    _add_namespace(one, "those only")
    one = _kind(kinds, command, "consolidate", consolidate, words="[--threshold X] [--measure] [--json]",
                help="merge similar entries in the layers' banks (the texts of experiences stay as they are)",
                examples=["runs/books --threshold 0.05 --measure"])
    one.add_argument("--threshold", metavar="X", type=number(float, lowest=1e-6, highest=2),
                     help="cosine distance below which entries merge (memory.consolidation_threshold)")
    one.add_argument("--measure", action="store_true",
                     help="say what it does to the run's held-out loss (takes as long as two evaluations)")
    one = _kind(kinds, command, "reshard", reshard, words="--virtual-shards N [--slots N] [--experience-slots N] [--out "
                                                          "FOLDER] [--json]",
                help="move the memory to another number of virtual shards; nothing is lost, or it is refused",
                examples=["runs/books --virtual-shards 64", "my_model --virtual-shards 64 --out my_model_64"])
    at_least_one = number(int, lowest=1)
    one.add_argument("--virtual-shards", metavar="N", type=at_least_one, required=True,
                     help="units of placement and storage: no more than slots, no fewer than ranks that will train")
    one.add_argument("--slots", metavar="N", type=at_least_one,
                     help="of each layer's bank from now on, model.long_term_memory_slots (as many as before)")
    one.add_argument("--experience-slots", metavar="N", type=at_least_one,
                     help="from now on, memory.experience_slots (as many as before)")
    one.add_argument("--out", metavar="FOLDER", type=Path, help="a new folder, where RUN is a saved model")


def _add_namespace(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument("--namespace", metavar="N", type=namespace, help=f"a number or a name: {help}")


def namespace(text: str) -> int | str:
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
    _, model = look(arguments.path)
    found, _ = said(lambda: model.query_memory(arguments.text, top_k=arguments.top_k, namespace=arguments.namespace))
    if arguments.json:
        return as_json([vars(one) for one in found])
    rows = [(f"{one.score:.3f}", str(one.id), str(one.namespace), f"{one.importance:g}", ago(one.age), short(one.text))
            for one in found]
    return table(("score", "id", "namespace", "importance", "age", "text"), rows, none="nothing is stored"), 0


def stats(arguments: argparse.Namespace) -> Answer:
    """`lmcode memory stats`."""
    folder, model = look(arguments.path)
    numbers = {f"layer {layer}": bank.stats() for layer, bank in model.banks.items()}
    namespaces = model.experiences.namespaces()
    experiences = model.experiences.bank.stats()
    if arguments.json:
        return as_json({"checkpoint": folder.name, "virtual_shards": model.memory_config.virtual_shards,
                        "experiences": {**experiences, "namespaces": {str(name): n for name, n in namespaces.items()}},
                        "banks": numbers})
    keys = ("live", "slots", "fill", "evicted", "merged", "rejected")
    rows = [(name, *(f"{one[key]:.1%}" if key == "fill" else f"{one[key]:,}" for key in keys))
            for name, one in {"experiences": experiences, **numbers}.items()]
    spaces = [(str(name), f"{count:,}") for name, count in namespaces.items()]
    return (f"{folder}: {model.memory_config.virtual_shards} virtual shards\n\n" + table(("bank", *keys), rows) + "\n"
            + table(("namespace", "experiences"), spaces, none="no experiences are stored")), 0


def inspect(arguments: argparse.Namespace) -> Answer:
    """`lmcode memory inspect`."""
    _, model = look(arguments.path)
    facts = said(lambda: model.inspect_experience(arguments.id))
    if arguments.json:
        return as_json(facts)
    facts["stored_at"] = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(facts["stored_at"]))
    facts["age"] = ago(facts["age"])
    for layer, one in facts.pop("token_entries").items():
        first, end = one["ids"]
        facts[f"layer {layer}"] = f"{one['live']} of {end - first} token entries, ids from {first} on"
    return "".join(f"{name.replace('_', ' '):<18}{value}\n" for name, value in facts.items()), 0


def export(arguments: argparse.Namespace) -> Answer:
    """`lmcode memory export`."""
    from lmcode.memories.experience_files import to_jsonl

    _, model = look(arguments.path)
    chosen = said(lambda: model.experiences.all(namespace=arguments.namespace))
    if arguments.output is None:
        return to_jsonl(chosen), 0
    try:
        with arguments.output.open("xb") as file:
            file.write(to_jsonl(chosen).encode("utf-8"))
    except OSError as error:
        raise ConfigError(f"'{arguments.output}' cannot be written: {error.strerror}") from None
    count = {"exported": len(chosen), "file": str(arguments.output)}
    return as_json(count) if arguments.json else (f"exported {len(chosen):,} experiences to {arguments.output}\n", 0)


def verify(arguments: argparse.Namespace) -> Answer:
    """`lmcode memory verify`."""
    from lmcode.files import durable
    from lmcode.saved import checkpoint
    from lmcode.saved.places import place_of

    alone()
    problems: dict[str, str | None] = {}
    if place_of(arguments.path).run is None:
        try:
            look(arguments.path)
            problems[arguments.path.name] = None
        except ConfigError as error:
            problems[arguments.path.name] = str(error)
        return _verdict(arguments, problems)
    run, chosen = checkpoint.locate(arguments.path)
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
            look(run / "checkpoints" / newest)
        except ConfigError as error:
            problems[newest] = str(error)
    return _verdict(arguments, problems)


def _verdict(arguments: argparse.Namespace, problems: dict[str, str | None]) -> Answer:
    code = int(any(problems.values()))
    if arguments.json:
        return as_json(problems)[0], code
    return "".join(f"{name}: {problem or 'ok'}\n" for name, problem in problems.items()), code


# Changing


def add(arguments: argparse.Namespace) -> Answer:
    """`lmcode memory add`."""
    if bool(arguments.texts) == bool(arguments.file):
        raise ConfigError("add takes either texts or --file: got " + ("both" if arguments.texts else "neither"))
    rows = read_rows(arguments.file, without="stored_at") if arguments.file else [{"text": t} for t in arguments.texts]
    defaults = {"namespace": 0 if arguments.namespace is None else arguments.namespace,
                "importance": arguments.importance, "stored_at": int(time.time())}
    return _amend(arguments, lambda draft: _store(draft, rows, defaults), "stored {count:,} experiences")


def import_(arguments: argparse.Namespace) -> Answer:
    """`lmcode memory import`."""
    rows, defaults = read_rows(arguments.file), {"namespace": 0, "importance": 1.0, "stored_at": int(time.time())}
    return _amend(arguments, lambda draft: _store(draft, rows, defaults), "imported {count:,} experiences")


def delete(arguments: argparse.Namespace) -> Answer:
    """`lmcode memory delete`."""
    if arguments.ids is None and arguments.namespace is None:
        raise ConfigError("delete needs --id or --namespace: got neither")
    return _forget(arguments, ids=arguments.ids, namespace=arguments.namespace)


def expire(arguments: argparse.Namespace) -> Answer:
    """`lmcode memory expire`."""
    return _forget(arguments, older_than=arguments.older_than, namespace=arguments.namespace)


def _forget(arguments: argparse.Namespace, **conditions: Any) -> Answer:
    from lmcode.saved.amend import forget

    return _amend(arguments, lambda draft: forget(draft, **conditions), "deleted {count:,} experiences, {entries:,} entries "
                                                                        "of layers' banks and {replay_spans:,} replay spans")


def consolidate(arguments: argparse.Namespace) -> Answer:
    """`lmcode memory consolidate`."""
    from lmcode.protocol import ConsolidationReport

    def merged(draft: Draft, threshold: float) -> dict[str, Any]:
        reports: dict[str, ConsolidationReport] = {
            str(layer): bank.consolidate(threshold) for layer, bank in draft.model.banks.items()}
        return {"count": sum(one.merged for one in reports.values()), "before": sum(one.before for one in reports.values()),
                "threshold": threshold, "merged_by_layer": {layer: one.merged for layer, one in reports.items()}}

    def change(draft: Draft) -> dict[str, Any]:
        threshold = arguments.threshold or draft.model.memory_config.consolidation_threshold
        if not arguments.measure:
            return merged(draft, threshold)
        loss = _held_out_loss(draft)
        before = loss(None)
        return {**merged(draft, threshold), "held_out_loss_before": before, "held_out_loss": loss(threshold)}

    sentence = "merged {count:,} of {before:,} entries within {threshold:g} of another"
    if arguments.measure:
        sentence += "; held-out loss {held_out_loss_before:.4f}, consolidated every few windows {held_out_loss:.4f}"
    return _amend(arguments, change, sentence)


def _held_out_loss(draft: Draft) -> Callable[[float | None], float]:
    """What measures the held-out loss of a run's model with what it remembers at the time, consolidated by a threshold."""
    from lmcode.eval.consolidation import held_out_loss
    from lmcode.eval.documents import held_out_documents
    from lmcode.eval.held_out import held_out_sampler
    from lmcode.opening import Opened
    from lmcode.presets import load_run_config
    from lmcode.saved.places import place_of

    config = None if draft.facts is None else load_run_config(draft.folder / "config.yaml")
    if config is None or config.preset == "trainer":
        raise ConfigError("--measure reads the held-out documents of a run: "
                          f"'{draft.folder}' is a {'saved model' if config is None else 'checkpoint'} without any")
    model = draft.model
    opened = Opened(model, place_of(draft.folder), draft.folder, config, 0)
    sampler = held_out_sampler(held_out_documents(opened).documents, config)
    return lambda threshold: held_out_loss(model, sampler, config.eval, model.banks, threshold).result.loss


def reshard(arguments: argparse.Namespace) -> Answer:
    """`lmcode memory reshard`: a run gets a revision, a saved model is written to a new folder."""
    sentence = ("moved {count:,} entries from {former} to {virtual_shards} virtual shards, {slots:,} slots a layer and "
                "{experience_slots:,} for experiences")
    from lmcode.saved.places import Kind, place_of

    target, out, virtual_shards = arguments.path, arguments.out, arguments.virtual_shards
    numbers = {"slots": arguments.slots, "experience_slots": arguments.experience_slots}
    if place_of(target).kind is Kind.SAVED_MODEL:
        if out is None or os.path.lexists(out):
            came = "none" if out is None else f"'{out}', which exists"
            raise ConfigError(f"'{target}' is a saved model, which is resharded into another folder: --out must be a new "
                              f"folder, got {came}")
        result = said(lambda: _reshard_model(look(target)[1], virtual_shards, out, **numbers))
        return as_json(result) if arguments.json else (f"{sentence.format(**result)}: {out}\n", 0)
    if out is not None and target.is_dir():
        raise ConfigError(f"--out is for saved models: '{target}' is none, and gets a revision of its newest checkpoint")
    from lmcode.saved import amend

    return _amend(arguments, lambda draft: amend.reshard(draft, virtual_shards, **numbers), sentence)


def _reshard_model(model: Backbone, virtual_shards: int, out: Path, **numbers: int | None) -> dict[str, Any]:
    former = model.memory_config.virtual_shards
    count = model.reshard_memory(virtual_shards, **numbers)
    model.save_pretrained(out)
    return {"count": count, "former": former, "virtual_shards": virtual_shards, "folder": str(out),
            "slots": model.config.long_term_memory_slots, "experience_slots": model.memory_config.experience_slots}


def _store(draft: Draft, rows: list[dict[str, Any]], defaults: dict[str, Any]) -> dict[str, Any]:
    columns = {name: [row.get(name, default) for row in rows] for name, default in defaults.items()}
    contents = [row["text"] if "text" in row else row["ids"] for row in rows]
    ids = draft.model.store_experience(contents, columns["namespace"], columns["importance"],
                                       stored_at=columns["stored_at"], step=draft.facts.step if draft.facts else 0)
    return {"count": len(ids), "ids": ids}


def _amend(arguments: argparse.Namespace, change: Callable[[Draft], dict[str, Any]], sentence: str) -> Answer:
    """Makes a change to the newest checkpoint of a run; says what it did, where it is, and where the old memory still is."""
    from lmcode.saved import checkpoint
    from lmcode.saved.amend import amend, writing
    from lmcode.saved.places import place_of

    if place_of(arguments.path).run is None:
        return _replace(arguments, change, sentence)
    run, chosen = checkpoint.locate(arguments.path)
    with writing(run):
        folder, model = look(run)
        if chosen is not None and chosen != folder.resolve():
            raise ConfigError(f"only the newest checkpoint can be changed, '{folder.name}': got '{chosen.name}'")
        done = said(lambda: amend(folder, model, change))
    older = [path.name for path in done.older]
    if arguments.json:
        return as_json({**done.result, "checkpoint": done.folder.name, "older_checkpoints": older})
    note = f"older checkpoints keep the memory they have: {', '.join(older)}\n" if older else ""
    return f"{sentence.format(**done.result)}: {done.folder}\n{note}", 0


def _replace(arguments: argparse.Namespace, change: Callable[[Draft], dict[str, Any]], sentence: str) -> Answer:
    """The same with a saved model or a checkpoint that lies in no run, which keeps its path."""
    from lmcode.files.durable import held
    from lmcode.files.replace import make_way
    from lmcode.saved.amend import Draft, amend
    from lmcode.saved.files import replacing
    from lmcode.saved.places import Kind, place_of
    from lmcode.saved.pretrained import rewrite_memory

    place = place_of(arguments.path)
    path, saved_model = place.path, place.kind is Kind.SAVED_MODEL

    def whole() -> dict[str, Any]:
        if saved_model:
            with replacing(path):
                folder, model = look(path)
                done: dict[str, Any] = rewrite_memory(model, folder, lambda: change(Draft(folder, model)))
                return done
        if not path.exists():
            make_way(path)  # a kill has left it beside its place
        with held(path / "config.yaml"):
            make_way(path)
            amended: dict[str, Any] = amend(*look(path), change).result
            return amended

    result = said(whole)
    return as_json({**result, "folder": str(path)}) if arguments.json else (f"{sentence.format(**result)}: {path}\n", 0)
