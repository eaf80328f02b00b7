"""`lmcode doctor`: this host, or the hosts of a hostfile or of a Slurm job, checked and compared.

`cli.command` passes in how parsers are made, and prints what `doctor` returns.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lmcode.config import ConfigError

Number = Callable[..., Callable[[str], int | float]]
QUEUE_S = 60  # for Slurm to find free nodes
WAIT_S = 120.0


def add_doctor(command: Callable[..., argparse.ArgumentParser], number: Number,
               add_source: Callable[[argparse.ArgumentParser], Any]) -> None:
    """Adds the options of `lmcode doctor` to the parser that `command` makes."""
    parser = command(
        overrides=False, help="check that this machine, or several together, can run the project",
        usage="lmcode doctor [--hostfile FILE | --srun [--nodes N]] [--run-dir FOLDER] [--preset NAME | --config FILE] "
              "[--json]",
        examples="  lmcode doctor\n  lmcode doctor --hostfile hosts --run-dir /shared/runs --preset small\n"
                 "  lmcode doctor --srun --nodes 2 --config run.yaml\n"
                 "  mpirun -n 2 python -m lmcode doctor --run-dir runs/books")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--hostfile", metavar="FILE", type=Path,
                       help="check all hosts of this file, over ssh without a password, and compare them")
    where.add_argument("--srun", action="store_true",
                       help="the same for the hosts of the Slurm job around this command, or of a new one")
    parser.add_argument("--nodes", metavar="N", type=number(int, lowest=1), help="hosts of a new Slurm job")
    parser.add_argument("--run-dir", metavar="FOLDER", type=Path, default=Path("runs"),
                        help="check the file system of this folder (%(default)s)")
    add_source(parser)
    parser.add_argument("--timeout", metavar="SECONDS", type=number(float, lowest=1), default=WAIT_S,
                        help="a host that has not reported by then has failed (%(default)g)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def doctor(arguments: argparse.Namespace) -> tuple[str, int]:
    """What `lmcode doctor` prints, on rank 0 alone, and its exit code: 1 if a check failed. Under a launcher each rank's
    exit code is about its own host.

    Raises:
        ConfigError: options that do not go together; no hostfile, ssh or Slurm where one is needed.
    """
    from lmcode import dist
    from lmcode.doctor.folder import space_of
    from lmcode.doctor.host import run_checks
    from lmcode.doctor.row import exit_code, to_json, to_table
    from lmcode.presets import load_run_config

    if arguments.nodes is not None and not arguments.srun:
        raise ConfigError("--nodes goes with --srun: how many hosts the new Slurm job has")
    me = dist.discover()
    source = arguments.config or arguments.preset
    space = None if source is None else space_of(load_run_config(source, []))
    if not arguments.srun and arguments.hostfile is None:
        rows = run_checks(arguments.run_dir, space)
    elif me.world_size > 1:
        raise ConfigError("--hostfile and --srun reach all hosts from one process: start the doctor without a launcher")
    elif arguments.srun and "SLURM_JOB_ID" not in os.environ:
        return "", in_new_job(arguments)
    else:
        from lmcode.doctor.hosts import examine
        from lmcode.doctor.link import Link

        with Link(srun_commands(os.environ) if arguments.srun else ssh_commands(arguments.hostfile, os.environ),
                  ready_s=arguments.timeout) as link:
            rows = examine(link, run_dir=arguments.run_dir, space=space, **rendezvous(os.environ))
    return (to_json(rows) if arguments.json else to_table(rows)) if me.rank == 0 else "", exit_code(rows)


def ssh_commands(hostfile: Path, env: Mapping[str, str]) -> dict[str, list[str]]:
    """The command that starts an agent, by host."""
    from lmcode.doctor.link import over_ssh
    from lmcode.jobs.hostfile import read_hostfile

    hosts = read_hostfile(hostfile)
    need("ssh", "--hostfile")
    return {host: over_ssh(host, env) for host in hosts}


def srun_commands(env: Mapping[str, str]) -> dict[str, list[str]]:
    """The same for the hosts of the Slurm job that this process is in."""
    from lmcode.doctor.link import over_srun

    need("srun", "--srun")
    need("scontrol", "--srun")
    done = subprocess.run(["scontrol", "show", "hostnames", env.get("SLURM_JOB_NODELIST", "")], capture_output=True,
                          text=True, timeout=QUEUE_S)
    hosts = done.stdout.split()
    if done.returncode != 0 or not hosts:
        raise ConfigError(f"scontrol does not name the hosts of this job: {done.stderr.strip() or 'it said nothing'}")
    return {host: over_srun(host) for host in hosts}


def in_new_job(arguments: argparse.Namespace) -> int:
    """Runs this very command inside a Slurm job that lasts as long; its exit code. It prints its own output.

    Raises:
        ConfigError: without a number of nodes; or if Slurm has none to give now.
    """
    from lmcode.doctor.link import ROOT

    if arguments.nodes is None:
        raise ConfigError("outside of a Slurm job --srun needs --nodes N: how many hosts to look at")
    need("salloc", "--srun")
    words = ["--srun", "--run-dir", str(arguments.run_dir), "--timeout", str(arguments.timeout)]
    words += ["--preset", arguments.preset] if arguments.preset else []
    words += ["--config", arguments.config] if arguments.config else []
    words += ["--json"] if arguments.json else []
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    return subprocess.call(["salloc", f"--nodes={arguments.nodes}", "--ntasks-per-node=1", f"--immediate={QUEUE_S}",
                            "--job-name=lmcode-doctor", "--quiet", sys.executable, "-m", "lmcode", "doctor", *words],
                           env=env)


def rendezvous(env: Mapping[str, str]) -> dict[str, Any]:
    """Where the ranks of a job will meet, as far as the environment says.

    Raises:
        ConfigError: for a port that is none.
    """
    address, port = (env.get(f"LMCODE_{name}") or env.get(name) for name in ("MASTER_ADDR", "MASTER_PORT"))
    if port and not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
        raise ConfigError(f"MASTER_PORT must be a number from 1 to 65535: got '{port}'")
    return {"master_address": address or None, "master_port": int(port or 0)}


def need(program: str, option: str) -> None:
    """ConfigError if a program is not on this machine."""
    if shutil.which(program) is None:
        raise ConfigError(f"there is no {program} on this machine, which {option} needs")
