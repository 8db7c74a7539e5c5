#!/usr/bin/env bash
# Creates the environment if it is missing and checks the project: lint, format, types, tests.
#
#   bash tools/test.sh [--all] [pytest arguments]
#
# Without --all: every test that needs only this checkout. With --all, also those marked server (an SGLang server), slurm
# (root, and a one-machine Slurm cluster) and shared_data (data sets beside the checkout), tests/te on Transformer Engine's
# Python, and a part of the tests on the newer megatron-core of the GPUs' lock; what of this is missing is installed, Slurm
# if apt-get can do it. Example:  bash tools/test.sh tests/unit -k grading
set -euo pipefail
# shellcheck source=tools/lib/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"

# Installs Debian's or Ubuntu's packages as root; elsewhere the tests are skipped with the reason. The packages' daemons
# stay off: each cluster of the tests starts its own.
install_slurm() {
    local log policy=/usr/sbin/policy-rc.d
    command -v slurmctld >/dev/null && command -v munged >/dev/null && command -v shellcheck >/dev/null && return
    [[ "$(id -u)" == 0 ]] && command -v apt-get >/dev/null || return 0
    log="$(mktemp)"
    if [[ ! -e $policy ]]; then
        printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod +x "$policy"
        trap 'rm -f /usr/sbin/policy-rc.d' EXIT
    fi
    step "looking for packages of Slurm" apt-get update
    step "installing Slurm, munge and shellcheck" env DEBIAN_FRONTEND=noninteractive apt-get install --yes \
        --no-install-recommends slurm-wlm slurm-wlm-basic-plugins slurm-client munge shellcheck
    [[ -z "$(trap -p EXIT)" ]] || { rm -f "$policy" && trap - EXIT; }
}

engine="" newer=""
selection="not server and not slurm and not shared_data and not gpu and not te"
if [[ "${1:-}" == --all ]]; then
    selection="not gpu and not te"
    shift
    # on a machine with CUDA the sglang extra of this environment is used instead
    servers=""
    if ! command -v nvidia-smi >/dev/null; then
        bash "$root/tools/install_sglang_cpu.sh" &
        servers=$!
    fi
    bash "$root/tools/install_te_cpu.sh"
    engine="${EAOPD_TE_VENV:-$root/.venv-te}/bin/python"
    install_slurm
    [[ -z "$servers" ]] || wait "$servers"
    newer="$(newer_megatron)"
fi
cd "$root"
prepare_environment test

# phase NAME COMMAND...
phase() {
    local name="$1" started=$SECONDS
    shift
    "$@" || fail "$name failed: $*"
    echo "[test] $name: passed in $((SECONDS - started)) s"
}

phase lint "$python" -m ruff check --quiet --output-format concise .
phase format "$python" -m ruff format --check --quiet .
if (($#)); then
    phase types "$python" -m mypy eaopd_megatron tools tests
fi
echo "[test] tests: $selection"
pytest() { "$python" -m pytest -m "$selection" --durations=10 "$@"; }

if (($#)); then
    pytest "$@"
    exit
fi

types="$(mktemp)"
(phase types "$python" -m mypy eaopd_megatron tools tests) >"$types" 2>&1 &
checked=$!
# Two sessions at a time: ranks, servers and jobs spend half of their time waiting.
beside=(tests/unit tests/teacher tests/sglang tests/end_to_end)
output="$(mktemp)"
pytest -p no:cacheprovider "${beside[@]}" >"$output" 2>&1 &
second=$!
trap 'kill "$second" "$checked" 2>/dev/null || true; rm -f "$output" "$types"' EXIT
code=0
pytest "${beside[@]/#/--ignore=}" || code=$?
[[ -z "$engine" ]] || "$engine" -m pytest -p no:cacheprovider -m te --durations=3 tests/te || code=$?
if [[ -n "$newer" ]]; then
    bash "$root/tools/install_newer_megatron.sh"
    echo "[test] on megatron-core $newer:"
    PYTHONPATH="$root/.megatron-$newer" EAOPD_TEST_MEGATRON="$newer" pytest -p no:cacheprovider \
        tests/unit/test_private_names.py tests/distributed/test_families.py || code=$?
fi
wait "$second" || code=$?
wait "$checked" || code=$?
cat "$output" "$types"
exit "$code"
