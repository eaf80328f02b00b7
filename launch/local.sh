#!/usr/bin/env bash
# Everything from a bare checkout to a training run on this machine, through the DeepSpeed launcher.
#
#     bash launch/local.sh                                          preset tiny: 2 ranks on a CPU, else one per GPU
#     bash launch/local.sh train.total_steps=100 model.memory_top_k=16
#     bash launch/local.sh --preset small train.deepspeed=zero3
#     bash launch/local.sh --config my-run.yaml
#     bash launch/local.sh --resume runs/mine train.total_steps=2000
#
# LMCODE_RANKS sets the number of ranks, CUDA_VISIBLE_DEVICES the GPUs, and launch/environment.sh reads a few more.
# Settings are checked before any rank starts: exit code 2 and one line. Otherwise the exit code is the job's own.
# SIGTERM and SIGUSR2 ask the job to save and end (exit code 75); Ctrl-C gives it half a minute.
set -euo pipefail

launch="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/environment.sh
source "$launch/environment.sh"

fail() { printf 'lmcode: error: %s\n' "$*" >&2; exit 2; }

case "${1:-}" in
    --preset | --config) [ $# -ge 2 ] || fail "$1 needs a value"; source_arguments=("$1" "$2"); shift 2 ;;
    --preset=* | --config=*) source_arguments=("$1"); shift ;;
    --resume | --resume=*) source_arguments=() ;;  # a run folder has its own settings; 'auto' takes the tiny preset
    *) source_arguments=(--preset tiny) ;;
esac
job=("${source_arguments[@]}" "$@")

gpus=0
if nvidia-smi -L >/dev/null 2>&1; then
    gpus="$("$LMCODE_PYTHON" -c 'import torch; print(torch.cuda.device_count())')"
fi
ranks="${LMCODE_RANKS:-$((gpus > 0 ? gpus : 2))}"
case "$ranks" in '' | *[!0-9]* | 0*) fail "LMCODE_RANKS must be a positive number: got '$ranks'" ;; esac
if [ "$gpus" -gt 0 ] && [ "$ranks" -gt "$gpus" ]; then fail "there are $gpus GPUs for $ranks ranks; set LMCODE_RANKS"; fi

"$LMCODE_PYTHON" -m lmcode config check --data --world "$ranks" "${job[@]}"

# The GPUs of CUDA_VISIBLE_DEVICES, not the first ones of the machine: DeepSpeed's --num_gpus would ignore the variable.
devices=(--num_gpus "$ranks")
if [ "$gpus" -gt 0 ] && [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
    devices=(--include "localhost:$(cut -d, -f"1-$ranks" <<<"$CUDA_VISIBLE_DEVICES")")
fi
if [ "$gpus" -eq 0 ]; then export DS_ACCELERATOR=cpu; fi
cores="$("$LMCODE_PYTHON" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}"
# A port of its own, so that two jobs can run on one machine.
port="$("$LMCODE_PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"

stop() {
    trap '' INT TERM HUP
    local launcher="${!:-}"  # known as soon as it is started
    [ -n "$launcher" ] || exit "$1"
    kill -TERM -- "-$launcher" 2>/dev/null || true
    for _ in $(seq 150); do
        kill -0 -- "-$launcher" 2>/dev/null || exit "$1"
        sleep 0.2
    done
    kill -KILL -- "-$launcher" 2>/dev/null || true
    exit "$1"
}
# A request to save and end goes to the ranks alone, which then end with 75: DeepSpeed's launchers would not pass it on, or
# kill what has not ended after 30 s. Where there are no ranks yet, there is nothing to save.
ask() {
    asked=1
    "$LMCODE_PYTHON" -c 'if True:
        import psutil, signal, sys
        nodes = psutil.Process(int(sys.argv[1])).children()
        ranks = [rank for node in nodes for rank in node.children()]
        for rank in ranks:
            rank.send_signal(signal.SIGUSR2)
        sys.exit(not ranks)' "${!:-0}" 2>/dev/null || stop 143
}

asked=0
trap 'stop 130' INT
trap 'stop 143' HUP
trap ask TERM USR2

# A process group of its own, so that one signal ends launcher and ranks alike: DeepSpeed's launcher does not pass on a
# SIGTERM, and its ranks would run on without it.
set -m
"$LMCODE_PYTHON" -m deepspeed.launcher.runner --hostfile /dev/null --log_level error --master_port "$port" \
    "${devices[@]}" --module lmcode train "${job[@]}" </dev/null &
launcher=$!
set +m

while :; do  # `wait` returns early when a signal comes
    asked=0 status=0
    wait "$launcher" || status=$?
    if [ "$asked" = 0 ]; then break; fi
done
exit "$status"
