#!/usr/bin/env bash
# All set-up plus the tests: `bash tests/run.sh` for the whole suite, `bash tests/run.sh tests/cli/test_command.py -k train` for
# a part. Arguments are pytest's, and so is the exit code. Without arguments ruff and mypy come first, and what they find
# ends it; then the whole suite runs in two processes of one thread, a file at a time.
set -euo pipefail

checkout="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=launch/environment.sh
source "$checkout/launch/environment.sh"
cd "$checkout"
if [ $# -eq 0 ]; then
    "$LMCODE_PYTHON" -m ruff check .
    "$LMCODE_PYTHON" -m mypy
    export OMP_NUM_THREADS=1
    set -- --numprocesses=2 --dist=loadfile --no-loadscope-reorder --durations=20
fi
exec "$LMCODE_PYTHON" -m pytest "$@"
