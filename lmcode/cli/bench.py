"""`lmcode bench`: what a part of the program costs beside its peers, in the same run.

`lmcode.cli` hands in its ways of making parsers and prints what `bench` returns. A further bench is a function that adds its
parser, and leaves one from arguments to settings and rows in `arguments.measure`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lmcode.config import EVICTIONS, RunConfig

Command = Callable[..., argparse.ArgumentParser]
Number = Callable[..., Callable[[str], int | float]]
Measured = tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]  # what was asked for, and the rows of the table


class Presets(NamedTuple):
    """How a command asks for the settings of a run, and how it is told them."""

    add: Callable[[argparse.ArgumentParser], None]
    read: Callable[[argparse.Namespace], RunConfig]


def add_bench(commands: Any, command: Command, number: Number, ignore_local_rank: Callable[[Any], None],
              presets: Presets) -> None:
    """Adds `bench` and its subcommands."""
    text = "measure a part of the program beside its peers, taking turns; medians"
    parser = commands.add_parser("bench", help=text, description=text)
    ignore_local_rank(parser)
    kinds = parser.add_subparsers(title="commands", metavar="search|exchange|step|evict", required=True)
    _add_search(kinds, command, number)
    _add_exchange(kinds, command, number)
    _add_step(kinds, command, number, presets)
    _add_evict(kinds, command, number)


def bench(arguments: argparse.Namespace) -> str:
    """Measures, writes the file that was asked for, and returns the table."""
    from lmcode.bench.turns import check_result, to_table, write_json

    if arguments.out is not None:
        check_result(arguments.out)
    asked, rows = arguments.measure(arguments)
    if arguments.out is not None:
        write_json(arguments.out, asked, rows)
    return to_table(rows)


def _add_search(kinds: Any, command: Command, number: Number) -> None:
    parser = command(
        kinds, "search", overrides=False,
        help="search of a sliced bank, beside FAISS and torch in one process with as many threads",
        usage="lmcode bench search [--model RUN] [--rows N ...] [--queries N] [--top-k N] [--ranks N] [--tiers NAME ...] "
              "[--probes N] [--width N] [--rounds N] [--out FILE]",
        examples="  lmcode bench search --model runs/books --rows 100000 1000000\n"
                 "  lmcode bench search --rows 20000 --queries 256 --tiers exact hnsw --out search.json")
    parser.set_defaults(measure=search)
    parser.add_argument("--model", metavar="RUN", help="a run or checkpoint whose keys are taken; random ones always are")
    parser.add_argument("--rows", metavar="N", nargs="+", type=number(int, lowest=1000), default=[100_000],
                        help="entries of the bank (100000)")
    parser.add_argument("--queries", metavar="N", type=number(int, lowest=1), default=4096,
                        help="over all ranks (%(default)s)")
    parser.add_argument("--top-k", metavar="N", type=number(int, lowest=1, highest=999), default=32,
                        help="hits wanted (%(default)s)")
    parser.add_argument("--ranks", metavar="N", type=number(int, lowest=1, highest=64), default=2,
                        help="processes of one thread; the peers have as many threads (%(default)s)")
    parser.add_argument("--tiers", metavar="NAME", nargs="+", default=["exact", "faiss-flat", "ivf"],
                        help="search tiers, with FAISS's own index beside ivf and hnsw (exact faiss-flat ivf)")
    parser.add_argument("--probes", metavar="N", type=number(int, lowest=1), default=16,
                        help="lists that ivf looks into (%(default)s)")
    parser.add_argument("--width", metavar="N", type=number(int, lowest=1), default=64,
                        help="entries that hnsw keeps in view, of each graph (%(default)s)")
    _add_rounds(parser, number, 5)


def _add_rounds(parser: argparse.ArgumentParser, number: Number, default: int) -> None:
    parser.add_argument("--rounds", metavar="N", type=number(int, lowest=1), default=default,
                        help="in which every way has its turn; numbers are medians over them (%(default)s)")
    parser.add_argument("--out", metavar="FILE", type=Path, help="write JSON, too")


def _add_exchange(kinds: Any, command: Command, number: Number) -> None:
    parser = command(
        kinds, "exchange", overrides=False,
        help="what a read moves between ranks, by phase, with every memory.exchange and memory.fetch",
        usage="lmcode bench exchange [--ranks N] [--queries N] [--top-k N] [--heads N] [--width N] [--rows N] [--rounds N] "
              "[--out FILE]",
        examples="  lmcode bench exchange --ranks 4\n  lmcode bench exchange --ranks 2 --queries 256 --out exchange.json")
    parser.set_defaults(measure=exchange)
    for option, default, lowest, highest, help in (
            ("--ranks", 4, 2, 64, "processes of one thread"),
            ("--queries", 1024, 1, 1 << 20, "of each rank and head"), ("--top-k", 32, 1, 999, "hits wanted"),
            ("--heads", 2, 1, 64, "of the bank"), ("--width", 64, 1, 4096, "of a key, and of a value"),
            ("--rows", 8192, 1000, 1 << 24, "entries of the bank, few enough to be searched quickly")):
        parser.add_argument(option, metavar="N", type=number(int, lowest=lowest, highest=highest), default=default,
                            help=f"{help} (%(default)s)")
    _add_rounds(parser, number, 5)


def _add_step(kinds: Any, command: Command, number: Number, presets: Presets) -> None:
    parser = command(
        kinds, "step", overrides=True, help="training steps of a model with its bank, beside the same model without one",
        usage="lmcode bench step [--preset NAME | --config FILE.yaml] [--ranks N] [--steps N] [--rounds N] [--out FILE] "
              "[section.key=value ...]",
        examples="  lmcode bench step\n  lmcode bench step --ranks 1 memory.tier=exact model.retrieval_stride=2\n"
                 "  lmcode bench step --preset tiny --steps 10 --out step.json data.path=books/")
    parser.set_defaults(measure=partial(step, presets))
    presets.add(parser)
    parser.add_argument("--ranks", metavar="N", type=number(int, lowest=1, highest=64), default=2,
                        help="processes of one thread (%(default)s)")
    parser.add_argument("--steps", metavar="N", type=number(int, lowest=1), default=5,
                        help="of one model before the other has its turn (%(default)s)")
    _add_rounds(parser, number, 5)


def _add_evict(kinds: Any, command: Command, number: Number) -> None:
    parser = command(
        kinds, "evict", overrides=False,
        help="the bookkeeping of a commit, by policy of eviction and slots, beside the smallest bank",
        usage="lmcode bench evict [--slots N N ...] [--policies NAME ...] [--rounds N] [--out FILE]",
        examples="  lmcode bench evict\n  lmcode bench evict --slots 100000 10000000 --policies clock --out evict.json")
    parser.set_defaults(measure=evict)
    parser.add_argument("--slots", metavar="N", nargs="+", type=number(int, lowest=1000), default=[100_000, 1_000_000],
                        help="of the banks, each of which is filled (100000 1000000)")
    parser.add_argument("--policies", metavar="NAME", nargs="+", default=[*EVICTIONS],
                        help=f"of memory.eviction ({' '.join(EVICTIONS)})")
    _add_rounds(parser, number, 20)


def search(arguments: argparse.Namespace) -> Measured:
    """`lmcode bench search`."""
    from dataclasses import asdict

    from lmcode.bench.search import Settings, run

    settings = Settings(model=arguments.model, rows=tuple(arguments.rows), queries=arguments.queries, top_k=arguments.top_k,
                        ranks=arguments.ranks, rounds=arguments.rounds, tiers=tuple(arguments.tiers),
                        probes=arguments.probes, width=arguments.width, seed=0)
    return asdict(settings), run(settings)


def exchange(arguments: argparse.Namespace) -> Measured:
    """`lmcode bench exchange`."""
    from dataclasses import asdict

    from lmcode.bench.exchange import Settings, run

    settings = Settings(ranks=arguments.ranks, queries=arguments.queries, top_k=arguments.top_k, heads=arguments.heads,
                        width=arguments.width, rows=arguments.rows, rounds=arguments.rounds, seed=0)
    return asdict(settings), run(settings)


def step(presets: Presets, arguments: argparse.Namespace) -> Measured:
    """`lmcode bench step`."""
    from lmcode.bench.step import Settings, run

    settings = Settings(presets.read(arguments), ranks=arguments.ranks, steps=arguments.steps, rounds=arguments.rounds)
    asked = {"config": settings.config.model_dump(mode="json"), "ranks": settings.ranks, "steps": settings.steps,
             "rounds": settings.rounds}
    return asked, run(settings)


def evict(arguments: argparse.Namespace) -> Measured:
    """`lmcode bench evict`."""
    from dataclasses import asdict

    from lmcode.bench.evict import Settings, run

    settings = Settings(slots=tuple(arguments.slots), policies=tuple(arguments.policies), rounds=arguments.rounds, seed=0)
    return asdict(settings), run(settings)
