#!/usr/bin/env bash
# The same training run under Open MPI instead of the DeepSpeed launcher; mpirun comes with the environment.
#
#     bash launch/mpi.sh                                   preset tiny on 2 ranks
#     LMCODE_RANKS=4 bash launch/mpi.sh --preset small train.total_steps=100
#     LMCODE_MPI_ARGUMENTS="--hostfile hosts" LMCODE_RANKS=16 bash launch/mpi.sh
#
# LMCODE_MPI_ARGUMENTS goes to mpirun as it is. Arguments and exit codes are those of `lmcode train`. GLOO_*, NCCL_*, TORCH_*,
# HF_*, MASTER_*, DS_ACCELERATOR, OMP_NUM_THREADS and CUDA_VISIBLE_DEVICES are handed to the ranks on all hosts.
set -euo pipefail

launch="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/environment.sh
source "$launch/environment.sh"

ranks="${LMCODE_RANKS:-2}"
case "$ranks" in '' | *[!0-9]* | 0*) echo "lmcode: error: LMCODE_RANKS must be a positive number: got '$ranks'" >&2; exit 2 ;; esac
"$LMCODE_PYTHON" -m lmcode config check --data --world "$ranks" "$@"

read -r -a extra <<<"${LMCODE_MPI_ARGUMENTS:-}" || true
if [ "$(id -u)" -eq 0 ]; then extra+=(--allow-run-as-root); fi
if ! nvidia-smi -L >/dev/null 2>&1; then export DS_ACCELERATOR=cpu; fi
# Ranks on other hosts would start without these.
handed_on='^(GLOO_.*|NCCL_.*|TORCH_.*|HF_.*|MASTER_ADDR|MASTER_PORT|DS_ACCELERATOR|OMP_NUM_THREADS|CUDA_VISIBLE_DEVICES)$'
for name in $(compgen -e | grep -E "$handed_on" || true); do extra+=(-x "$name"); done
exec mpirun -n "$ranks" --oversubscribe --bind-to none "${extra[@]}" "$LMCODE_PYTHON" -m lmcode train "$@"
