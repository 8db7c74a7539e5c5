# shellcheck shell=bash
# Sourced by the tools: finds or creates the project's Python environment, and installs into it once.
#
#   prepare_environment run|test     sets $python to the environment's interpreter, or exits with one line
#
# A tool with its own environment passes another word KIND: it defines `install_KIND`, and lists in the array
# $installed_from the files, besides pyproject.toml, that determine what is installed.
#
# $EAOPD_VENV    the environment's folder (default: .venv at the root)
# $EAOPD_PYTHON  the Python that creates it (default: a Python 3.11 on the PATH)

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
versions="$root/tools/lib/versions.txt"
venv="${EAOPD_VENV:-$root/.venv}"
[[ "$venv" == /* ]] || venv="$PWD/$venv"

# Ranks share the processors: one thread each, without busy waiting.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" TOKENIZERS_PARALLELISM=false

fail() {
    echo "error: $*" >&2
    exit 1
}

# Prints the command of a Python that can create the environment.
find_python() {
    local candidate
    if [[ -n "${EAOPD_PYTHON:-}" ]]; then
        "$EAOPD_PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
            fail "EAOPD_PYTHON is '$EAOPD_PYTHON', which is not a Python of version 3.11 or later"
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

# Hash of all that determines an environment: pyproject.toml, the versions and other files, the checkout's path, the Python version.
installed_from=()
environment_stamp() {
    "$python" - "$root" "$root/pyproject.toml" "$versions" "${installed_from[@]}" <<'PYTHON'
import hashlib, pathlib, sys
files = b"".join(pathlib.Path(file).read_bytes() for file in sys.argv[2:])
print(hashlib.sha256(files + str((pathlib.Path(sys.argv[1]), sys.version)).encode()).hexdigest())
PYTHON
}

# pinned NAME: the requirement in versions.txt, such as torch==2.13.0.
pinned() {
    grep "^$1==" "$versions"
}

# Prints the version of megatron-core in the locks for GPUs.
newer_megatron() {
    sed -n 's/^megatron-core==//p' "$root/slurm/container/versions.txt"
}

# step TEXT COMMAND...: prints TEXT, and writes the command's output to $log.
step() {
    local text="$1" started=$SECONDS
    shift
    echo "[environment] $text ..."
    if ! "$@" >>"$log" 2>&1; then
        tail -n 15 "$log" >&2
        fail "$text: failed (complete output: $log)"
    fi
    echo "[environment] $text: done in $((SECONDS - started)) s"
}

prepare_environment() {
    local kind="$1" maker stamp log target
    python="$venv/bin/python"
    if ! "$python" -c 'import pip' 2>/dev/null; then
        maker="$(find_python)" || exit 1
        [[ ! -e "$venv" || -f "$venv/pyvenv.cfg" || -z "$(ls -A "$venv")" ]] ||
            fail "$venv exists and is not a Python environment; move it away or set EAOPD_VENV"
        echo "[environment] creating $venv with $("$maker" --version)"
        if ! log="$("$maker" -m venv --clear "$venv" 2>&1)"; then
            echo "$log" >&2
            fail "cannot create an environment in $venv (Debian, Ubuntu: apt-get install python3.11-venv)"
        fi
    fi
    stamp="$(environment_stamp)"
    # A run can use the tests' environment. The stamp is written last, so an interrupted installation is repeated.
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
    step "installing the project and its dependencies" "$python" -m pip install --constraint "$versions" --editable "$root"
}

install_test() {
    step "installing the project and its dependencies" "$python" -m pip install --constraint "$versions" --editable "${root}[test]"
}
