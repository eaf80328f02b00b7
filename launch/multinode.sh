#!/usr/bin/env bash
# One training job on several hosts, through the DeepSpeed launcher: pdsh and ssh from this host to all of them.
#
#     bash launch/multinode.sh HOSTFILE                                       preset tiny
#     bash launch/multinode.sh HOSTFILE --preset small train.run_dir=runs/s1  arguments are those of `lmcode train`
#     bash launch/multinode.sh HOSTFILE --resume auto --preset small train.run_dir=runs/s1
#
# HOSTFILE has one line per host, `#` starts a comment:
#     node1 slots=8
#     node2 slots=8
# slots is the number of ranks on that host (its GPUs, if it has any). The first host is where rank 0 runs.
#
# What must be true, and is checked on every host before a rank starts (exit code 2 and one line for each that fails):
# pdsh is here; ssh needs no password; the checkout lies at the same path, with the same environment (LMCODE_VENV), the same
# versions and the same lmcode. The run folder, data.path and data.cache must be on a file system that all hosts share.
#
# Settings (environment variables):
#     LMCODE_MASTER_ADDR   what other hosts call the first one (default: its name in HOSTFILE)
#     LMCODE_MASTER_PORT   a free port there (default: drawn from 15000-29999)
#     GLOO_*, NCCL_*, TORCH_*, HF_*, DS_ACCELERATOR, OMP_NUM_THREADS, CUDA_VISIBLE_DEVICES
#                          are handed to all hosts as they are, and shown; nothing of the kind is set here but DS_ACCELERATOR
#                          on hosts without a GPU. GLOO_SOCKET_IFNAME is needed where a host's own name resolves to a
#                          loopback address (such hosts are named); it must then have the same name on all hosts.
set -euo pipefail

launch="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/environment.sh
source "$launch/environment.sh"
checkout="$(dirname "$launch")"
cd "$checkout"

fail() { printf 'lmcode: error: %s\n' "$*" >&2; exit 2; }

# --- the hosts ------------------------------------------------------------------------------------------------------

hostfile="${1:-}"
case "$hostfile" in '' | -* | *=*) fail "the first argument is the hostfile: bash launch/multinode.sh HOSTFILE [arguments]" ;; esac
shift
[ -f "$hostfile" ] || fail "there is no hostfile '$hostfile'"
hosts=() ranks=0 number=0
while IFS= read -r line || [ -n "$line" ]; do
    number=$((number + 1))
    line="${line%%#*}"
    [[ "$line" =~ ^[[:space:]]*$ ]] && continue
    [[ "$line" =~ ^[[:space:]]*([A-Za-z0-9][A-Za-z0-9._-]*)[[:space:]]+slots=([1-9][0-9]{0,3})[[:space:]]*$ ]] ||
        fail "$hostfile, line $number: expected 'HOST slots=N': got '$line'"
    case " ${hosts[*]-} " in *" ${BASH_REMATCH[1]} "*) fail "$hostfile, line $number: ${BASH_REMATCH[1]} is there twice" ;; esac
    hosts+=("${BASH_REMATCH[1]}")
    ranks=$((ranks + BASH_REMATCH[2]))
done <"$hostfile"
[ "$ranks" -gt 0 ] || fail "the hostfile '$hostfile' names no host"

for tool in pdsh ssh; do
    command -v "$tool" >/dev/null 2>&1 || fail "there is no $tool on $(hostname): install it, or start the job with Slurm or MPI"
done

# --- the settings ---------------------------------------------------------------------------------------------------

words=("$@") run='' resumed=0 named=0
for word in "${words[@]}"; do
    case "$word" in
        train.run_dir=*) run="${word#*=}" ;;
        --resume | --resume=*) resumed=1 ;;
        --preset | --preset=* | --config | --config=*) named=1 ;;
    esac
done
if [ "$named" = 0 ] && [ "$resumed" = 0 ]; then words=(--preset tiny "${words[@]}"); fi
if [ -z "$run" ] && [ "$resumed" = 0 ]; then
    run="runs/hosts-$(date +%Y%m%d-%H%M%S)"
    words+=("train.run_dir=$run")
fi
"$LMCODE_PYTHON" -m lmcode config check --data --world "$ranks" "${words[@]}"

# --- every host -----------------------------------------------------------------------------------------------------

scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
# What has to be equal everywhere, one line.
cat >"$scratch/facts.py" <<'PYTHON'
import hashlib, pathlib, platform, sys
from importlib import metadata
files = [*sorted(pathlib.Path("lmcode").rglob("*.py")), *sorted(pathlib.Path("ds_configs").glob("*.json"))]
source = hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:12]
versions = [f"{name} {metadata.version(name)}" for name in ("torch", "deepspeed")]
print(f"python {platform.python_version()},", ", ".join(versions) + f", lmcode {source}")
PYTHON
here="$("$LMCODE_PYTHON" "$scratch/facts.py")"
quoted() { printf '%q' "$1"; }
for host in "${hosts[@]}"; do
    (
        status=0
        ssh -o BatchMode=yes -o ConnectTimeout=10 "$host" \
            "echo answers; getent hosts \"\$(hostname)\"; cd $(quoted "$checkout") && $(quoted "$LMCODE_PYTHON") - && echo done" \
            <"$scratch/facts.py" >"$scratch/$host" 2>"$scratch/$host.error" || status=$?
        echo "$status" >"$scratch/$host.status"
    ) &
done
wait
wrong=0
for host in "${hosts[@]}"; do
    said="$(grep '^python ' "$scratch/$host" || true)"
    if ! grep -q '^answers$' "$scratch/$host"; then
        problem="does not answer to ssh without a password: $(tail -n 1 "$scratch/$host.error")"
    elif [ "$(tail -n 1 "$scratch/$host")" != "done" ]; then
        problem="has no working '$checkout' with '$LMCODE_PYTHON': $(tail -n 1 "$scratch/$host.error")"
    elif [ "$said" != "$here" ]; then
        problem="differs from $(hostname): '$said' instead of '$here'"
    elif [ "${#hosts[@]}" -gt 1 ] && [ -z "${GLOO_SOCKET_IFNAME:-}" ] && grep -Eq '^(127\.|::1)' "$scratch/$host"; then
        problem="resolves its own name to a loopback address, so gloo would listen there: set GLOO_SOCKET_IFNAME"
    else
        continue
    fi
    printf 'lmcode: error: %s %s\n' "$host" "$problem" >&2
    wrong=1
done
if [ "$wrong" = 1 ]; then exit 2; fi

# --- the job --------------------------------------------------------------------------------------------------------

if ! nvidia-smi -L >/dev/null 2>&1; then export DS_ACCELERATOR=cpu; fi
env | grep -E '^(GLOO_|NCCL_|TORCH_|HF_|DS_ACCELERATOR=|OMP_NUM_THREADS=|CUDA_VISIBLE_DEVICES=)' >"$scratch/environment" || true
lmcode_say "$ranks ranks on ${hosts[*]}; handed on: $(tr '\n' ' ' <"$scratch/environment")"
# DeepSpeed takes a hostfile that it cannot find for a wish to run here alone; this one has just been read.
cp "$hostfile" "$scratch/hostfile"
DS_ENV_FILE="$scratch/environment" "$LMCODE_PYTHON" -m deepspeed.launcher.runner --hostfile "$scratch/hostfile" --force_multi \
    --log_level error --master_addr "${LMCODE_MASTER_ADDR:-${hosts[0]}}" \
    --master_port "${LMCODE_MASTER_PORT:-$((15000 + RANDOM % 15000))}" --module lmcode train "${words[@]}" </dev/null &
launcher=$!
# The launcher ends the ranks on all hosts when it is told to stop itself.
trap 'kill -TERM "$launcher" 2>/dev/null || true' INT TERM HUP
status=0
wait "$launcher" || status=$?
while kill -0 "$launcher" 2>/dev/null; do
    status=0
    wait "$launcher" || status=$?
done
# The launcher says 0 when pdsh itself was killed; a run that ended well has left its summary.
if [ "$status" -eq 0 ] && [ -n "$run" ] && [ ! -f "$run/summary.txt" ]; then
    printf 'lmcode: error: the launcher reports success, but %s has no summary.txt\n' "$run" >&2
    exit 1
fi
exit "$status"
