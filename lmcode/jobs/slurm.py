"""Slurm: a pure function from a job to the text of its batch script, and the thin call that submits it.

The batch script, not Python, does the work on the cluster, so that it can be read, edited and submitted by hand:
launch/slurm.sbatch is what `render` says about the default job. It starts one `srun` task per rank and needs no ssh; the
ranks find themselves in Slurm's own variables (`lmcode.dist.discover`).
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass

from lmcode.config import ConfigError

TIME = re.compile(r"\d+(-\d+(:\d+){0,2})?|\d+(:\d+){1,2}")  # minutes, m:s, h:m:s, days-hours[:m[:s]]
NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
WARNING_S = 120  # between the signal that asks to save and the end of the time limit


@dataclass(frozen=True)
class Job:
    """One training job on a Slurm cluster.

    nodes, tasks_per_node: their product is the number of ranks.
    gpus_per_node: 0 asks for none; else one rank per GPU is the sensible number of tasks.
    cpus_per_task: cores of each rank.
    time: Slurm's notation, such as '90' (minutes), '12:00:00' or '2-00:00:00'.
    arguments: words for `lmcode train`: --preset or --config first, then dotted overrides.
    python, checkout: found when the job starts if None (the checkout's .venv, the folder that sbatch was called in).

    Raises:
        ConfigError: counts below their lowest value, or a time, name or argument that Slurm could not take.
    """

    nodes: int = 2
    tasks_per_node: int = 2
    gpus_per_node: int = 0
    cpus_per_task: int = 1
    time: str = "01:00:00"
    name: str = "lmcode"
    partition: str | None = None
    account: str | None = None
    arguments: tuple[str, ...] = ("--preset", "tiny")
    python: str | None = None
    checkout: str | None = None

    def __post_init__(self) -> None:
        for field, lowest in (("nodes", 1), ("tasks_per_node", 1), ("gpus_per_node", 0), ("cpus_per_task", 1)):
            if getattr(self, field) < lowest:
                raise ConfigError(f"a job's {field} must be {lowest} or more: got {getattr(self, field)}")
        if not TIME.fullmatch(self.time):
            raise ConfigError(f"a job's time looks like 90, 12:00:00 or 2-00:00:00: got '{self.time}'")
        for field in ("name", "partition", "account"):
            word = getattr(self, field)
            if word is not None and not NAME.fullmatch(word):
                raise ConfigError(f"a job's {field} has letters, digits, '.', '_' and '-' only: got '{word}'")
        for word in (*self.arguments, self.python or "", self.checkout or ""):
            if "\n" in word or "\0" in word:
                raise ConfigError(f"a job's arguments and paths must be single lines: got {word!r}")

    @property
    def ranks(self) -> int:
        return self.nodes * self.tasks_per_node


def render(job: Job) -> str:
    """The batch script of `job`: bash, with its #SBATCH lines on top. Equal jobs give equal text."""
    checkout = '"${LMCODE_CHECKOUT:-$SLURM_SUBMIT_DIR}"' if job.checkout is None else shlex.quote(job.checkout)
    python = '"${LMCODE_VENV:-$checkout/.venv}/bin/python"' if job.python is None else shlex.quote(job.python)
    blanks = {"directives": "\n".join(f"#SBATCH --{line}" for line in _directives(job)), "checkout": checkout,
              "python": python, "words": shlex.join(job.arguments), "warning": str(WARNING_S)}
    return re.sub("@([a-z]+)@", lambda blank: blanks[blank[1]], SCRIPT)


def _directives(job: Job) -> list[str]:
    lines = [f"job-name={job.name}", f"nodes={job.nodes}", f"ntasks-per-node={job.tasks_per_node}",
             f"cpus-per-task={job.cpus_per_task}", f"time={job.time}"]
    if job.gpus_per_node:
        lines.append(f"gpus-per-node={job.gpus_per_node}")
    if job.partition is not None:
        lines.append(f"partition={job.partition}")
    if job.account is not None:
        lines.append(f"account={job.account}")
    return [*lines, "output=%x-%j.out", "open-mode=append", "requeue", f"signal=B:USR2@{WARNING_S}"]


def hand_in(script: str) -> str:
    """Hands a batch script to sbatch; returns what that said, such as 'Submitted batch job 17'.

    Raises:
        ConfigError: if there is no sbatch here, or it refuses the job.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError("there is no sbatch on this machine: submit from a login node of a Slurm cluster, or print the "
                          "script with --dry-run")
    done = subprocess.run(["sbatch"], input=script, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"sbatch refused the job: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip()


SCRIPT = """\
#!/usr/bin/env bash
@directives@
#
# One training job on a Slurm cluster, one task per rank; no ssh. Edit the lines above, then
#
#     sbatch launch/slurm.sbatch                                        from the checkout
#     sbatch --nodes=4 launch/slurm.sbatch train.total_steps=2000       sbatch's own options go before the script,
#                                                                       settings of the run after it
# `lmcode submit` writes such a script from its options. The checkout, its environment and the run folder must lie on a
# file system that all nodes share. What may be set in the environment of sbatch:
#     LMCODE_CHECKOUT      the checkout (default: the folder that sbatch was called in)
#     LMCODE_VENV          its environment (default: .venv in the checkout)
#     GLOO_SOCKET_IFNAME   the interface for gloo, if it has the same name on all nodes (default: found on each node)
# NCCL_* and other variables are passed on as they are and never set here.
# A job that runs into its time limit, or is preempted, is asked to save (SIGUSR2) @warning@ s before its end; it exits
# with 75, is put into the queue again and resumes from there, in the same run folder.
set -euo pipefail

fail() { echo "lmcode: error: $*" >&2; exit 2; }
if [ -z "${SLURM_JOB_ID:-}" ]; then fail "this is a Slurm batch script; start it with: sbatch $0"; fi

# Slurm asks this script to save and end; what it runs is to hear it. It is asked every second, as a process that is just
# being started does not listen yet (and must not die of it: hence the ignored signal).
asked=0 child='' asker='' interrupted=0 status=0
ask() {
    asked=1 interrupted=1
    if [ -n "$child" ] && [ -z "$asker" ]; then
        while sleep 0.5 && kill -USR2 "$child" 2>/dev/null; do :; done &
        asker=$!
    fi
}
trap ask USR2 TERM
perform() {  # runs a command; `status` is its exit code
    (trap '' USR2; exec "$@") &
    child=$! asker=''
    if [ "$asked" = 1 ]; then ask; fi
    interrupted=1
    while [ "$interrupted" = 1 ]; do  # `wait` returns early when a signal comes
        interrupted=0 status=0
        wait "$child" || status=$?
    done
    child=''
}
back_into_the_queue() {  # but not after scancel, nor if Slurm itself is putting the job back
    state="$(scontrol show job "$SLURM_JOB_ID")" || true
    if [[ "$state" =~ JobState=(COMPLETING|CANCELLED|PENDING) && ! "$state" =~ Reason=TimeLimit ]]; then
        echo "lmcode: $1; Slurm ends this job"
    else
        echo "lmcode: $1; the job goes back into the queue"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit 75
}

checkout=@checkout@
python=@python@
words=(@words@ "$@")
cd "$checkout"
if [ ! -x "$python" ]; then fail "there is no '$python' on $(hostname); make it with: bash launch/environment.sh"; fi

# The run folder carries the job's id, which outlives a requeue; a train.run_dir among the settings wins.
run="runs/$SLURM_JOB_NAME-$SLURM_JOB_ID"
for word in "${words[@]}"; do
    case "$word" in train.run_dir=*) run="${word#*=}" ;; esac
done
case "$run" in "~/"*) run="$HOME/${run#"~/"}" ;; esac
words+=("train.run_dir=$run" --resume auto)

# What is wrong with the settings is said here, once; the corpus is prepared here, once.
perform "$python" -m lmcode config check --data --world "$SLURM_NTASKS" "${words[@]}"
if [ "$status" -ne 0 ] && [ "$status" -ne 75 ]; then exit "$status"; fi
if [ "$status" -eq 75 ] || [ "$asked" = 1 ]; then back_into_the_queue "asked to end before the ranks were started"; fi

mkdir -p "$run"
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
written="# Written by lmcode: the hosts of the job."
if [ -e "$run/hostfile" ] && ! grep -qsxF "$written" "$run/hostfile"; then
    fail "'$run/hostfile' is not that of a job of lmcode, and is not replaced: give another train.run_dir"
fi
{ echo "$written"; printf "%s slots=$((SLURM_NTASKS / SLURM_NNODES))\\n" "${hosts[@]}"; } >"$run/hostfile"
export MASTER_ADDR="${hosts[0]}"
# From the job's id, so that two jobs on one node do not meet; below the ports that the kernel hands out itself.
export MASTER_PORT=$((15000 + SLURM_JOB_ID % 15000))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
export LMCODE_PEER="${hosts[1]:-}"
echo "lmcode: job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $SLURM_NTASKS ranks on ${hosts[*]}," \\
    "rendezvous at $MASTER_ADDR:$MASTER_PORT, run folder $run"

# What every task does. Gloo listens on the address that the node's own name resolves to, and on many distributions that
# is a loopback address; so, unless told, it gets the interface with the route to another node. NCCL looks for itself.
# shellcheck disable=SC2016
task='
trap "" USR2  # until Python listens
peer="$MASTER_ADDR"
if [ "$SLURM_NODEID" = 0 ]; then peer="$LMCODE_PEER"; fi
if [ -z "${GLOO_SOCKET_IFNAME:-}" ] && [ -n "$peer" ]; then
    read -r address rest < <(getent ahostsv4 "$peer") || true
    interface="$(ip -4 -o route get "$address" 2>/dev/null | sed -n "s/.* dev \\([^ ]*\\).*/\\1/p")" || true
    if [ -n "$interface" ]; then export GLOO_SOCKET_IFNAME="$interface"; fi
fi
if [ "$SLURM_LOCALID" = 0 ]; then
    echo "lmcode: $(hostname): GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-unset}" \\
        "NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-unset} OMP_NUM_THREADS=$OMP_NUM_THREADS" >&2
fi
exec "$@"'

# A rank that ends takes the others with it only after a minute: those that were asked to save may end one by one.
perform srun --kill-on-bad-exit=0 --wait=60 bash -c "$task" task "$python" -m lmcode train "${words[@]}"
if [ "$status" -eq 75 ]; then back_into_the_queue "saved in $run"; fi
exit "$status"
"""
