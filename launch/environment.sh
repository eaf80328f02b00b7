#!/usr/bin/env bash
# Makes the Python environment of this checkout, or finds it ready and returns at once.
#
#     bash launch/environment.sh          makes it and says where it is
#     source launch/environment.sh        the same, then puts it first on PATH and sets LMCODE_PYTHON
#
# Needs bash and Python >= 3.10. Everything is installed into one virtual environment with the versions of
# launch/constraints.txt: torch first and alone (a looser requirement could pull a much larger build), then the project.
# Settings (environment variables):
#     LMCODE_VENV             where the environment lives (default: .venv in the checkout); a new or empty folder, or one
#                             that this script has made
#     PYTHON                  the Python to make it with (default: python3)
#     LMCODE_SKIP_INSTALL=1   install nothing: use LMCODE_VENV as it is, or else PYTHON itself (containers, clusters)
# Package sources, proxies and the like are pip's own settings (PIP_* variables, pip.conf).

lmcode_checkout="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
lmcode_venv="${LMCODE_VENV:-$lmcode_checkout/.venv}"
case "$lmcode_venv" in /*) ;; *) lmcode_venv="$PWD/$lmcode_venv" ;; esac

lmcode_say() { printf 'lmcode: %s\n' "$*" >&2; }

# Prints the Python to build with; fails with one line if there is none that is new enough.
lmcode_base_python() {
    local python="${PYTHON:-python3}"
    if ! command -v "$python" >/dev/null 2>&1; then
        lmcode_say "error: there is no '$python'; install Python 3.10 or newer, or name one with PYTHON=/path/to/python"
        return 1
    fi
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        lmcode_say "error: Python 3.10 or newer is needed: '$python' is $("$python" --version 2>&1)"
        return 1
    fi
    command -v "$python"
}

# Prints cpu or gpu: which build of FAISS fits this machine.
lmcode_faiss_kind() {
    if nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then echo gpu; else echo cpu; fi
}

# Prints what the environment has to look like; the stamp of a finished environment holds the same text.
lmcode_wanted() {
    "$1" - "$2" "$lmcode_checkout" <<'PYTHON'
import hashlib, pathlib, sys
kind, checkout = sys.argv[1], pathlib.Path(sys.argv[2])
files = ("launch/constraints.txt", "launch/environment.sh", "setup.cfg", "pyproject.toml")
text = b"\0".join((checkout / name).read_bytes() for name in files)
print("python", sys.version.split()[0], "faiss", kind, checkout, hashlib.sha256(text).hexdigest())
PYTHON
}

lmcode_is_ready() {
    [ -f "$lmcode_venv/lmcode.stamp" ] && [ "$(cat "$lmcode_venv/lmcode.stamp")" = "$1" ] &&
        "$lmcode_venv/bin/python" -c '' 2>/dev/null
}

# One stage: says what it does, keeps pip's words in a log, shows the log's end if it fails.
lmcode_stage() {
    local what="$1" log="$lmcode_venv/lmcode-install.log"
    shift
    lmcode_say "$what"
    if ! "$@" >>"$log" 2>&1; then
        tail -n 20 "$log" >&2
        lmcode_say "error: '$what' failed; the whole log is $log"
        return 1
    fi
}

# Every step ends in `|| return 1`: `set -e` is off inside a function whose caller looks at its exit status.
lmcode_install() {
    local base="$1" kind="$2" wanted="$3" other=gpu python="$lmcode_venv/bin/python" pins pip torch
    [ "$kind" = gpu ] && other=cpu
    pins="$lmcode_checkout/launch/constraints.txt"
    pip=("$python" -m pip --disable-pip-version-check --no-input)
    torch="$(grep '^torch==' "$pins")" || return 1
    # An installation that was cut short may have left half a package that pip takes for a whole one: start over.
    if [ -e "$lmcode_venv/lmcode.unfinished" ]; then
        lmcode_say "environment: the last installation did not finish; starting over"
        (cd "$lmcode_venv" && rm -rf bin include lib lib64 share etc pyvenv.cfg .gitignore) || return 1
    fi
    : >"$lmcode_venv/lmcode.unfinished" || return 1
    rm -f "$lmcode_venv/lmcode.stamp" || return 1
    : >"$lmcode_venv/lmcode-install.log" || return 1
    if ! "$python" -m pip --version >/dev/null 2>&1; then
        lmcode_stage "environment: making $lmcode_venv" "$base" -m venv "$lmcode_venv" || return 1
    fi
    lmcode_stage "environment: installing $torch" "${pip[@]}" install --constraint "$pins" "$torch" || return 1
    lmcode_stage "environment: making sure that faiss-$other is not there" \
        "${pip[@]}" uninstall --yes "faiss-$other" || return 1
    lmcode_stage "environment: installing the project with faiss-$kind" "${pip[@]}" install --constraint "$pins" \
        --editable "${lmcode_checkout}[$kind,mpi,report,hf,test,dev]" || return 1
    printf '%s\n' "$wanted" >"$lmcode_venv/lmcode.stamp.new" || return 1
    mv "$lmcode_venv/lmcode.stamp.new" "$lmcode_venv/lmcode.stamp" || return 1
    rm -f "$lmcode_venv/lmcode.unfinished"
}

# Whether the folder is ours to fill: new, empty but for a lock, or with the stamp of an environment, whole or not.
lmcode_is_ours() {
    [ -e "$lmcode_venv/lmcode.stamp" ] || [ -e "$lmcode_venv/lmcode.unfinished" ] || [ ! -e "$lmcode_venv" ] ||
        { [ -d "$lmcode_venv" ] && [ -z "$(find "$lmcode_venv/" -mindepth 1 ! -name lmcode.lock -print -quit)" ]; }
}

# A subshell, so that its variables and its lock do not reach a shell that sources this file.
lmcode_environment() (
    base="$(lmcode_base_python)" || return 1
    kind="$(lmcode_faiss_kind)"
    wanted="$(lmcode_wanted "$base" "$kind")" || return 1
    if lmcode_is_ready "$wanted"; then return 0; fi
    if ! lmcode_is_ours; then
        lmcode_say "error: '$lmcode_venv' holds something else than an environment of this script, and is not changed;" \
            "give a new or empty folder as LMCODE_VENV"
        return 1
    fi
    started=$SECONDS
    mkdir -p "$lmcode_venv" || return 1
    if command -v flock >/dev/null 2>&1; then
        exec 9>"$lmcode_venv/lmcode.lock" || return 1
        if ! flock --nonblock 9; then
            lmcode_say "environment: another start is installing; waiting for it"
            flock 9 || return 1
        fi
    fi
    if lmcode_is_ready "$wanted"; then return 0; fi
    lmcode_install "$base" "$kind" "$wanted" || return 1
    lmcode_say "environment: ready after $((SECONDS - started)) s"
)

if [ "${LMCODE_SKIP_INSTALL:-0}" = 1 ]; then
    LMCODE_PYTHON="$lmcode_venv/bin/python"
    [ -x "$LMCODE_PYTHON" ] || LMCODE_PYTHON="$(lmcode_base_python)" || { return 1 2>/dev/null || exit 1; }
    export PYTHONPATH="$lmcode_checkout${PYTHONPATH:+:$PYTHONPATH}"
else
    lmcode_environment || { return 1 2>/dev/null || exit 1; }
    LMCODE_PYTHON="$lmcode_venv/bin/python"
fi
export LMCODE_PYTHON
PATH="$(dirname "$LMCODE_PYTHON"):$PATH"
export PATH
if [ "${BASH_SOURCE[0]}" = "$0" ]; then lmcode_say "environment: $(dirname "$(dirname "$LMCODE_PYTHON")")"; fi
