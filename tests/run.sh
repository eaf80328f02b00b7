#!/usr/bin/env bash
# All set-up plus the tests: `bash tests/run.sh` for the whole suite, `bash tests/run.sh tests/test_cli.py -k train` for
# a part. Arguments are pytest's, and so is the exit code.
set -euo pipefail

checkout="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=launch/environment.sh
source "$checkout/launch/environment.sh"
cd "$checkout"
exec "$LMCODE_PYTHON" -m pytest "$@"
