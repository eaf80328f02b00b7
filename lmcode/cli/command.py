"""The `lmcode` command. Exit codes: 0 done, 1 failed, 2 bad usage or config, 75 saved and asks to be requeued
(130 after Ctrl-C).

Every rank of a job runs this same program, so an error in the command line is reported once, by rank 0. Subcommands
import what they need when they run: `lmcode --help` and `lmcode config` do not wait for torch.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from lmcode.cli import bench as bench_commands
from lmcode.cli import cluster as cluster_commands
from lmcode.cli import doctor as doctor_commands
from lmcode.cli import memory as memory_commands
from lmcode.cli.answers import Answer
from lmcode.cli.console import forgive
from lmcode.config import ConfigError, RunConfig, build, expanded, near_match, to_yaml, with_overrides
from lmcode.effects import without_effect
from lmcode.presets import load_run_config
from lmcode.version import __version__

DONE, FAILED, BAD_USAGE, REQUEUE, INTERRUPTED = 0, 1, 2, 75, 130


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are ConfigErrors, so that `main` reports all of them alike."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise ConfigError(f"'{self.prog}' has no command '{value}': expected one of {', '.join(action.choices)}."
                              f"{near_match(str(value), action.choices)}")

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; errors other than ConfigError are left to Python's traceback.

    Args:
        argv: the words after `lmcode`; those of the process when None.
    """
    spelling = forgive()
    try:
        arguments = parse(list(sys.argv[1:] if argv is None else argv))
        code: int = arguments.run(arguments)
        return code
    except ConfigError as error:
        complain(" ".join(str(error).split()))
        return BAD_USAGE
    except BrokenPipeError:  # the reader of our output (head, less) has had enough; Python would complain at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        if spelling.escaped:
            warn(f"the output's encoding ({sys.stdout.encoding}) lacks some characters, which are shown as \\uXXXX; "
                 "PYTHONIOENCODING=utf-8 prints them")


def complain(message: str) -> None:
    """Says what is wrong on stderr, once per job."""
    _say(f"lmcode: error: {message}")


def warn(message: str) -> None:
    """Says on stderr, once per job, what a user may not have meant."""
    _say(f"lmcode: warning: {message}")


def _say(line: str) -> None:
    from lmcode.dist import discover

    try:
        rank = discover().rank
    except ValueError:
        rank = 0
    if rank == 0:
        print(line, file=sys.stderr)


def parse(argv: list[str]) -> argparse.Namespace:
    """Arguments of one command; words of the form section.key=value end up in `overrides`, wherever they stand.

    Raises:
        ConfigError: for anything that is not understood, with the nearest known word.
    """
    for word in argv:
        if not _is_utf8(word):
            raise ConfigError(f"the words of a command must be UTF-8: got {ascii(word)}")
    arguments, rest = build_parser().parse_known_args(argv)
    parser = arguments.parser
    for word in rest:
        if word.startswith("-"):
            known = [option for action in parser._actions for option in action.option_strings]
            raise ConfigError(f"'{parser.prog}' has no option '{word}'.{near_match(word.split('=')[0], known)}")
        if not arguments.takes_overrides or "=" not in word:
            raise ConfigError(f"'{parser.prog}' does not understand '{word}'"
                              + ("; an override looks like section.key=value" if arguments.takes_overrides else ""))
    arguments.overrides = rest
    return arguments


def _is_utf8(word: str) -> bool:
    """Python keeps bytes that are no UTF-8 as lone surrogates."""
    try:
        word.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def build_parser() -> Parser:
    """The parser of the whole command line."""
    parser = Parser(prog="lmcode", description="A transformer with one long-term memory, sliced over all ranks.")
    parser.add_argument("--version", action="version", version=f"lmcode {__version__}")
    _ignore_local_rank(parser)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_train(commands)
    _add_eval(commands)
    _add_generate(commands)
    cluster_commands.add_submit(partial(_command, commands, "submit", submit), _number)
    cluster_commands.add_estimate(partial(_command, commands, "estimate", estimate), _number, _add_source)
    _add_report(commands)
    _add_export(commands)
    memory_commands.add_memory(commands, partial(_command, run=memory, overrides=False), _number, _ignore_local_rank)
    bench_commands.add_bench(commands, partial(_command, run=bench), _number, _ignore_local_rank,
                             bench_commands.Presets(_add_source, _run_config))
    doctor_commands.add_doctor(partial(_command, commands, "doctor", doctor), _number, _add_source)
    _add_config(commands)
    return parser


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], int], *, help: str, usage: str,
             examples: str, overrides: bool) -> Parser:
    parser: Parser = commands.add_parser(name, help=help, description=help, usage=usage, epilog=f"examples:\n{examples}")
    parser.set_defaults(run=run, parser=parser, takes_overrides=overrides)
    _ignore_local_rank(parser)
    return parser


def _ignore_local_rank(parser: argparse.ArgumentParser) -> None:
    """The DeepSpeed launcher puts --local_rank=N before everything; ranks are found in the environment instead."""
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)


def _add_source(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--preset", metavar="NAME", help="start from a preset (tiny if neither is given)")
    source.add_argument("--config", metavar="FILE", help="start from a YAML file, such as a run folder's config.yaml")


def _add_init_from(parser: Parser) -> None:
    parser.add_argument("--init-from", metavar="PATH",
                        help="start from the weights of a run, a checkpoint or a saved model, with its shape and tokenizer "
                             "and a fresh optimizer")
    parser.add_argument("--init-memory", action="store_true", help="with what that model remembers")


def _add_train(commands: Any) -> None:
    parser = _command(
        commands, "train", train, overrides=True, help="train a model and leave a run folder",
        usage="lmcode train [--preset NAME | --config FILE.yaml] [--init-from PATH [--init-memory]] "
              "[--resume auto|PATH|none] [section.key=value ...]",
        examples="  lmcode train train.total_steps=100\n"
                 "  lmcode train --preset small data.path=books/ train.run_dir=runs/books\n"
                 "  deepspeed --num_gpus 2 --module lmcode train --preset tiny train.deepspeed=zero3\n"
                 "  mpirun -n 4 python -m lmcode train --config runs/books/config.yaml train.seed=1\n"
                 "  lmcode train --resume auto --preset small train.run_dir=runs/books\n"
                 "  lmcode train --resume runs/books train.total_steps=20000\n"
                 "  lmcode train --init-from my_model data.path=notes/ train.learning_rate=1e-4")
    _add_source(parser)
    _add_init_from(parser)
    parser.add_argument("--resume", metavar="auto|PATH|none", default="none",
                        help="resume from the newest checkpoint in train.run_dir that verifies, or from step 0 if there is "
                             "none (auto); from a run folder or a checkpoint, with its settings unless others are given "
                             "(PATH); or never (%(default)s)")


def _add_eval(commands: Any) -> None:
    parser = _command(
        commands, "eval", evaluate, overrides=True, help="held-out loss of a run, with the memory on and its controls",
        usage="lmcode eval RUN [--recipe NAME] [--windows N] [--task NAME] [--json] [section.key=value ...]\n"
              "       lmcode eval --suite NAME [--trial NAME] [--seed N] [--books PATH] [--domains PATH PATH ...] "
              "[--out FOLDER] [--json]",
        examples="  lmcode eval runs/books\n  lmcode eval runs/books --windows 16 eval.slots=4096\n"
                 "  lmcode eval models/smollm2 --recipe camelot data.path=books/\n"
                 "  lmcode eval --suite smoke --out runs/smoke")
    parser.add_argument("path", metavar="RUN", type=Path, nargs="?", help="a run folder, or one checkpoint in it")
    _add_recipe(parser)
    parser.add_argument("--windows", metavar="N", type=_number(int, lowest=1),
                        help="windows that each held-out stream reads; short for eval.final_windows=N")
    parser.add_argument("--task", metavar="NAME", help="ask it the cases of a task instead ('recall': a value by its key)")
    parser.add_argument("--suite", metavar="NAME", help="train small models for tasks and ask them, beside their controls: "
                                                        "'smoke' or 'small'")
    parser.add_argument("--trial", metavar="NAME", action="append", default=[], help="only this trial of the suite")
    parser.add_argument("--seed", metavar="N", type=_number(int, lowest=0), action="append", help="only this seed")
    parser.add_argument("--books", metavar="PATH", type=Path, help="prose for the suite 'small', which has none of its own")
    parser.add_argument("--domains", metavar="PATH", nargs="+", default=[],
                        help="two or more texts for the suite 'small' to learn one after the other; NAME=PATH names one")
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="where results.json, results.md and index.html go")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _add_recipe(parser: Parser) -> None:
    parser.add_argument("--recipe", metavar="NAME",
                        help="how a model of transformers is to remember; short for model.recipe=NAME")


def _recipe(arguments: argparse.Namespace) -> list[str]:
    return [] if arguments.recipe is None else [f"model.recipe={arguments.recipe}"]


def _add_generate(commands: Any) -> None:
    parser = _command(
        commands, "generate", generate, overrides=True, help="continue a text with a trained model",
        usage="lmcode generate RUN --prompt TEXT [--recipe NAME] [options] [section.key=value ...]",
        examples="  lmcode generate runs/books --prompt 'Call me'\n"
                 "  lmcode generate runs/books --prompt 'def main(' --temperature 0 --no-memory\n"
                 "  lmcode generate my_model --prompt 'The key is' --namespace house\n"
                 "  lmcode generate runs/books --prompt 'Call me' memory.tier=hnsw memory.scope=global")
    parser.add_argument("path", metavar="RUN", type=Path, help="a run folder, one checkpoint in it, or a saved model")
    _add_recipe(parser)
    parser.add_argument("--prompt", metavar="TEXT", required=True, help="what comes before; at least one token")
    parser.add_argument("--max-new-tokens", metavar="N", type=_number(int, lowest=1), default=128,
                        help="tokens to add (%(default)s)")
    parser.add_argument("--temperature", metavar="X", type=_number(float, lowest=0), default=0.8,
                        help="0 takes the most likely token (%(default)s)")
    parser.add_argument("--top-k", metavar="N", type=_number(int, lowest=0), default=50,
                        help="draw from the N most likely tokens; 0 from all (%(default)s)")
    parser.add_argument("--top-p", metavar="P", type=_number(float, lowest=1e-9, highest=1), default=0.9,
                        help="draw from the fewest tokens that reach probability P (%(default)s)")
    parser.add_argument("--seed", metavar="N", type=_number(int, lowest=0), default=0,
                        help="of the draws (%(default)s)")
    parser.add_argument("--namespace", metavar="N", type=memory_commands.namespace, default=0,
                        help="a number or a name: what is read of the memory (%(default)s)")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="switch the long-term memory off")


def _add_report(commands: Any) -> None:
    parser = _command(
        commands, "report", report, overrides=True, help="write an HTML page about a run's memory and training",
        usage="lmcode report RUN [--out FILE] [section.key=value ...]",
        examples="  lmcode report runs/books\n  lmcode report runs/books --out books.html data.path=books/")
    parser.add_argument("path", metavar="RUN", type=Path, help="a run folder, or one checkpoint in it")
    parser.add_argument("--out", metavar="FILE", type=Path,
                        help="the page to write (RUN/report/index.html; beside a checkpoint that is in no run)")


def _add_export(commands: Any) -> None:
    parser = _command(
        commands, "export", export, overrides=False, help="write a model as a folder that Hugging Face's programs load",
        usage="lmcode export RUN OUT [--no-memory]",
        examples="  lmcode export runs/books my_model\n  lmcode export best_model.pt my_model --no-memory")
    parser.add_argument("path", metavar="RUN", type=Path, help="a run folder, a checkpoint, or a saved model")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder; other files in it stay as they are")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave out what the model remembers")


def _add_config(commands: Any) -> None:
    parser = commands.add_parser("config", help="show, check or describe settings",
                                 description="show, check or describe settings")
    _ignore_local_rank(parser)
    kinds = parser.add_subparsers(title="commands", metavar="show|check|schema", required=True)
    source = "[--preset NAME | --config FILE.yaml]"
    show = _command(kinds, "show", config_show, overrides=True, help="print the resolved settings as YAML",
                    usage=f"lmcode config show {source} [section.key=value ...]",
                    examples="  lmcode config show --preset small train.seed=1 > my-run.yaml")
    check = _command(kinds, "check", config_check, overrides=True,
                     help="say whether a run could start with these settings",
                     usage=f"lmcode config check {source} [--world N] [--data] [section.key=value ...]",
                     examples="  lmcode config check --config my-run.yaml --world 8")
    _command(kinds, "schema", config_schema, overrides=False, help="print the JSON schema of a config file",
             usage="lmcode config schema", examples="  lmcode config schema > lmcode.schema.json")
    for kind in (show, check):
        _add_source(kind)
    check.add_argument("--world", metavar="N", type=_number(int, lowest=1),
                       help="also check that N ranks can share the run")
    # So that a script can check the very words that it is about to start `lmcode train` with.
    _add_init_from(check)
    check.add_argument("--resume", default="none", help=argparse.SUPPRESS)
    check.add_argument("--data", action="store_true", help="also prepare the corpus, so that the run finds it ready")


def _number(kind: type[int] | type[float], *, lowest: float, highest: float = float("inf")) -> Callable[[str], Any]:
    """An argparse type: a number between two bounds, both allowed."""
    def convert(text: str) -> Any:
        value = kind(text)
        if not lowest <= value <= highest:
            raise argparse.ArgumentTypeError(f"expected {lowest} or more{f', {highest} or less' * (highest < 1e9)}: "
                                             f"got {text}")
        return value

    convert.__name__ = kind.__name__  # argparse names it when the text is not a number at all
    return convert


def _run_config(arguments: argparse.Namespace) -> RunConfig:
    resume = getattr(arguments, "resume", "none")
    if resume not in ("auto", "none") and arguments.config is None and arguments.preset is None:
        return load_run_config(expanded("--resume", resume) / "config.yaml", arguments.overrides)
    if arguments.config is not None and not arguments.config.endswith((".yaml", ".yml")):
        raise ConfigError(f"--config takes a file ending in .yaml or .yml: got '{arguments.config}'")
    source = arguments.config or arguments.preset
    if getattr(arguments, "init_from", None) is None:
        return load_run_config(source, arguments.overrides)
    if resume not in ("auto", "none"):
        raise ConfigError("give either --init-from, for a new run, or --resume with a path, for one that is continued")
    from lmcode.opening import shape_of

    values = load_run_config(source).model_dump()
    for section, settings in shape_of(expanded("--init-from", arguments.init_from), memory=arguments.init_memory).items():
        values[section].update(settings)
    config: RunConfig = build(RunConfig, with_overrides(values, arguments.overrides))
    return config


def train(arguments: argparse.Namespace) -> int:
    """`lmcode train`."""
    config = _run_config(arguments)
    from lmcode.jobs.preempt import noticing

    with noticing():  # a signal that comes while torch is imported is remembered
        from lmcode.train import loop

        return loop.run(config) if arguments.resume == "none" else loop.run(config, resume=arguments.resume)


def evaluate(arguments: argparse.Namespace) -> int:
    """`lmcode eval`."""
    from lmcode import dist
    from lmcode.eval.run import ask_path, evaluate_path

    if arguments.suite is not None:
        return run_suite(arguments)
    if arguments.path is None:
        raise ConfigError("give a RUN to evaluate, or --suite NAME")
    windows = [] if arguments.windows is None else [f"eval.final_windows={arguments.windows}"]
    settings = [*_recipe(arguments), *arguments.overrides]
    with dist.running() as me:
        if arguments.task is None:
            report = evaluate_path(arguments.path, [*windows, *settings], as_json=arguments.json)
        else:
            report = ask_path(arguments.path, arguments.task, settings, as_json=arguments.json)
    if me.rank == 0:
        print(report)
    return DONE


def run_suite(arguments: argparse.Namespace) -> int:
    """`lmcode eval --suite`."""
    from lmcode.dist import discover
    from lmcode.eval import suite
    from lmcode.report.suite import check_folder, write_suite

    if [arguments.path, arguments.task, arguments.windows, arguments.recipe] != [None] * 4 or arguments.overrides:
        raise ConfigError("a suite trains its own models: --suite takes no run, task, windows, recipe or settings")
    if discover().world_size > 1:
        raise ConfigError("a suite trains its models on one process: start it without a launcher")
    if arguments.out is not None:
        check_folder(arguments.out)  # before what takes an hour
    result = suite.run_suite(arguments.suite, only=arguments.trial, seeds=arguments.seed, books=arguments.books,
                             domains=arguments.domains, say=lambda line: print(line, file=sys.stderr, flush=True))
    if arguments.out is not None:
        write_suite(result, arguments.out)
    print(json.dumps(result) if arguments.json else suite.to_markdown(result))
    return DONE


def generate(arguments: argparse.Namespace) -> int:
    """`lmcode generate`."""
    from lmcode import dist
    from lmcode.cli.generating import generate_text

    with dist.running() as me:
        text = generate_text(arguments.path, arguments.prompt, max_new_tokens=arguments.max_new_tokens,
                             temperature=arguments.temperature, top_k=arguments.top_k, top_p=arguments.top_p,
                             seed=arguments.seed, namespace=arguments.namespace, memory=arguments.memory,
                             overrides=[*_recipe(arguments), *arguments.overrides])
    if me.rank == 0:
        print(text)
    return DONE


def report(arguments: argparse.Namespace) -> int:
    """`lmcode report`."""
    from lmcode import dist
    from lmcode.report.run import report_path

    with dist.running() as me:
        page = report_path(arguments.path, arguments.overrides, out=arguments.out)
    if me.rank == 0:
        print(page)
    return DONE


def export(arguments: argparse.Namespace) -> int:
    """`lmcode export`."""
    from lmcode import dist
    from lmcode.dist import Group
    from lmcode.opening import open_model

    with dist.running() as me:
        opened = open_model(arguments.path, group=Group.world(), device=dist.device(), memory=arguments.memory)
        opened.model.save_pretrained(arguments.out, include_memory=arguments.memory)
    if me.rank == 0:
        print(arguments.out)
    return DONE


def doctor(arguments: argparse.Namespace) -> int:
    """`lmcode doctor`."""
    text, code = doctor_commands.doctor(arguments)
    if text:
        print(text)
    return code


def submit(arguments: argparse.Namespace) -> int:
    """`lmcode submit`."""
    print(cluster_commands.submit(arguments))
    return DONE


def estimate(arguments: argparse.Namespace) -> int:
    """`lmcode estimate`."""
    print(cluster_commands.estimate(arguments, _run_config(arguments)))
    return DONE


def memory(arguments: argparse.Namespace) -> int:
    """`lmcode memory ...`."""
    answer: Answer = arguments.answer(arguments)
    text, code = answer
    print(text, end="")
    return code


def bench(arguments: argparse.Namespace) -> int:
    """`lmcode bench ...`."""
    print(bench_commands.bench(arguments))
    return DONE


def config_show(arguments: argparse.Namespace) -> int:
    """`lmcode config show`."""
    print(to_yaml(_run_config(arguments)), end="")
    return DONE


def config_check(arguments: argparse.Namespace) -> int:
    """`lmcode config check`: the settings, the sharding file they name, and the number of ranks if one is given."""
    from lmcode.train.ds_config import load_sharding

    config = _run_config(arguments)
    config.check_trains()
    stage = load_sharding(config.train.deepspeed)["zero_optimization"]["stage"]
    if arguments.world is not None:
        config.check_world_size(arguments.world)
    if arguments.data:
        from lmcode.data.corpus import load_corpus
        from lmcode.jobs.preempt import Preempted, noticing

        try:
            with noticing() as request:
                load_corpus(config, progress=request.raise_if_asked)
        except Preempted:
            return REQUEUE
    for line in without_effect(config, arguments.world):
        warn(line)
    slots = config.model.long_term_memory_slots
    banks = len(config.model.memory_layer_indices) if slots else 0
    ranks = "" if arguments.world is None else f", {arguments.world} ranks"
    print(f"ok: preset {config.preset}, {config.train.total_steps} steps, "
          f"{banks} bank{'s' * (banks != 1)} of {slots} slots, {config.train.deepspeed} (ZeRO stage {stage}){ranks}")
    return DONE


def config_schema(arguments: argparse.Namespace) -> int:
    """`lmcode config schema`."""
    print(json.dumps(RunConfig.model_json_schema(), indent=2))
    return DONE
