"""The subcommands for clusters: `submit` puts a run into Slurm's queue, `estimate` computes beforehand what it will need.

`cli.command` passes in how parsers are made, and prints what the functions here return.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from lmcode.config import ConfigError, RunConfig
from lmcode.jobs.slurm import Job, hand_in, render

Command = Callable[..., argparse.ArgumentParser]
Number = Callable[..., Callable[[str], int | float]]


def add_submit(command: Command, number: Number) -> None:
    """Adds the options of `lmcode submit` to the parser that `command` makes."""
    parser = command(
        overrides=True, help="put a training run into Slurm's queue",
        usage="lmcode submit CONFIG --nodes N [--tasks-per-node M] [--dry-run] [options] [section.key=value ...]",
        examples="  lmcode submit tiny --nodes 2 --dry-run > job.sbatch\n"
                 "  lmcode submit books.yaml --nodes 4 --tasks-per-node 8 --gpus-per-node 8 --time 2-00:00:00\n"
                 "  lmcode submit small --nodes 2 --partition debug train.total_steps=100")
    parser.add_argument("config", metavar="CONFIG", help="a preset's name or a YAML file")
    parser.add_argument("--nodes", metavar="N", type=number(int, lowest=1), required=True)
    for option, default, lowest, help in (
            ("--tasks-per-node", Job.tasks_per_node, 1, "ranks on each node"),
            ("--gpus-per-node", Job.gpus_per_node, 0, "GPUs to ask for on each node, one for each rank"),
            ("--cpus-per-task", Job.cpus_per_task, 1, "cores for each rank")):
        parser.add_argument(option, metavar="M", type=number(int, lowest=lowest), default=default,
                            help=f"{help} (%(default)s)")
    parser.add_argument("--time", metavar="LIMIT", default=Job.time, help="such as 90, 12:00:00 or 2-00:00:00 (%(default)s)")
    parser.add_argument("--name", metavar="NAME", default=Job.name, help="of the job (%(default)s)")
    parser.add_argument("--partition", metavar="NAME")
    parser.add_argument("--account", metavar="NAME")
    parser.add_argument("--python", metavar="FILE", help="of the environment on the nodes (the checkout's .venv/bin/python)")
    parser.add_argument("--checkout", metavar="FOLDER", help="on the nodes (the folder that this is called in)")
    parser.add_argument("--dry-run", action="store_true", help="print the batch script and submit nothing")


def add_estimate(command: Command, number: Number, add_source: Callable[[argparse.ArgumentParser], None]) -> None:
    """Adds the options of `lmcode estimate` to the parser that `command` makes."""
    parser = command(
        overrides=True, help="memory, traffic and checkpoint size of a run, before it runs",
        usage="lmcode estimate [--preset NAME | --config FILE.yaml] --world N [options] [section.key=value ...]",
        examples="  lmcode estimate --preset base --world 16 --device gpu --memory 80\n"
                 "  lmcode estimate --config books.yaml --world 4 --json train.deepspeed=zero3")
    add_source(parser)
    parser.add_argument("--world", metavar="N", type=number(int, lowest=1), required=True, help="ranks")
    parser.add_argument("--ranks-per-host", metavar="M", type=number(int, lowest=1),
                        help="ranks that share the memory of one host (all of them)")
    parser.add_argument("--device", choices=("cpu", "gpu"), help="where ranks compute (what this machine has)")
    parser.add_argument("--memory", metavar="GIB", type=number(float, lowest=0),
                        help="memory of the host, or of one GPU, to fit into (this machine's)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def submit(arguments: argparse.Namespace) -> str:
    """What `lmcode submit` prints: sbatch's answer, or the script.

    Raises:
        ConfigError: settings that cannot work on this number of ranks; no sbatch, or one that refuses.
    """
    from lmcode.presets import load_run_config
    from lmcode.train.ds_config import resolve

    is_file = arguments.config.endswith((".yaml", ".yml"))
    source = str(Path(arguments.config).absolute()) if is_file else arguments.config
    job = Job(nodes=arguments.nodes, tasks_per_node=arguments.tasks_per_node, gpus_per_node=arguments.gpus_per_node,
              cpus_per_task=arguments.cpus_per_task, time=arguments.time, name=arguments.name,
              partition=arguments.partition, account=arguments.account, python=arguments.python,
              checkout=arguments.checkout,
              arguments=("--config" if is_file else "--preset", source, *arguments.overrides))
    if 0 < job.gpus_per_node < job.tasks_per_node:
        raise ConfigError(f"--gpus-per-node must be at least --tasks-per-node, one GPU for each rank: "
                          f"{job.gpus_per_node} < {job.tasks_per_node}")
    resolve(load_run_config(source, arguments.overrides), job.ranks)
    return render(job).rstrip("\n") if arguments.dry_run else hand_in(render(job))


def estimate(arguments: argparse.Namespace, config: RunConfig) -> str:
    """What `lmcode estimate` prints; that a run will not fit is a warning in there."""
    from lmcode import estimate as estimates
    from lmcode.processor import has_bf16

    device, memory_bytes = estimates.this_machine(arguments.device)
    if arguments.memory is not None:
        memory_bytes = int(arguments.memory * estimates.GIB)
    made = estimates.estimate(config, arguments.world, device=device, memory_bytes=memory_bytes, has_bf16=has_bf16(),
                              ranks_per_host=arguments.ranks_per_host)
    return json.dumps(made.to_dict(), indent=2) if arguments.json else estimates.to_table(made)
