# shellcheck shell=bash
# Sourced by the tools: finds or makes the Python environment of the project, and installs into it once.
#
#   prepare_environment run|test     sets $python to the environment's interpreter; exits with one line when it cannot
#
# Any other word KIND, for a tool with an environment of its own: `install_KIND` says what is in it, and the array
# $installed_from names the files that it was made from, beside pyproject.toml.
#
# $EAOPD_VENV    the environment's folder (default: .venv at the root)
# $EAOPD_PYTHON  the Python that makes it (default: a Python 3.11 on the PATH)

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
venv="${EAOPD_VENV:-$root/.venv}"
[[ "$venv" == /* ]] || venv="$PWD/$venv"

# Ranks share the processors: one thread each, and none that spins while it waits.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" TOKENIZERS_PARALLELISM=false

fail() {
    echo "error: $*" >&2
    exit 1
}

# Prints the command of a Python that may make the environment.
find_python() {
    local candidate
    if [[ -n "${EAOPD_PYTHON:-}" ]]; then
        "$EAOPD_PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
            fail "EAOPD_PYTHON is '$EAOPD_PYTHON', which is no Python of version 3.11 or later"
        echo "$EAOPD_PYTHON"
        return
    fi
    for candidate in python3.11 python3 python /usr/bin/python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.11 on the PATH; install it (Debian, Ubuntu: apt-get install python3.11 python3.11-venv) or set EAOPD_PYTHON"
}

# What an installed environment was made from: pyproject.toml and other files, the place of the checkout, and the Python.
installed_from=()
environment_stamp() {
    "$python" - "$root" "$root/pyproject.toml" "${installed_from[@]}" <<'PYTHON'
import hashlib, pathlib, sys
files = b"".join(pathlib.Path(file).read_bytes() for file in sys.argv[2:])
print(hashlib.sha256(files + str((pathlib.Path(sys.argv[1]), sys.version)).encode()).hexdigest())
PYTHON
}

# The requirement of pyproject.toml that begins so, such as torch==2.13.0.
pinned() {
    sed -n "s/.*\"\($1==[^\"]*\)\".*/\1/p" "$root/pyproject.toml"
}

# step TEXT COMMAND...: one line for the reader, the command's output for the log.
step() {
    local text="$1" started=$SECONDS
    shift
    echo "[environment] $text ..."
    if ! "$@" >>"$log" 2>&1; then
        tail -n 15 "$log" >&2
        fail "$text: failed (all of it: $log)"
    fi
    echo "[environment] $text: done in $((SECONDS - started)) s"
}

prepare_environment() {
    local kind="$1" maker stamp log target
    python="$venv/bin/python"
    if ! "$python" -c 'import pip' 2>/dev/null; then
        maker="$(find_python)" || exit 1
        [[ ! -e "$venv" || -f "$venv/pyvenv.cfg" || -z "$(ls -A "$venv")" ]] ||
            fail "$venv exists and is no Python environment; move it away or set EAOPD_VENV"
        echo "[environment] making $venv with $("$maker" --version)"
        if ! log="$("$maker" -m venv --clear "$venv" 2>&1)"; then
            echo "$log" >&2
            fail "no environment could be made in $venv (Debian, Ubuntu: apt-get install python3.11-venv)"
        fi
    fi
    stamp="$(environment_stamp)"
    # The tests' environment serves a run too. The stamp is written last, so that an interrupted install is done again.
    for target in test "$kind"; do
        [[ "$(cat "$venv/eaopd-$target.stamp" 2>/dev/null)" != "$stamp" ]] || return 0
    done
    log="$venv/eaopd-install.log"
    : >"$log"
    rm -f "$venv"/eaopd-*.stamp
    step "installing $(pinned torch) (the largest part)" "$python" -m pip install "$(pinned torch)"
    "install_$kind"
    echo "$stamp" >"$venv/eaopd-$kind.stamp"
}

install_run() {
    step "installing the project and what it needs" "$python" -m pip install --editable "$root"
}

install_test() {
    step "installing the project and what it needs" "$python" -m pip install --editable "${root}[test]"
}
