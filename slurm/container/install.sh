#!/usr/bin/env bash
# Installs a locked environment for GPUs into a Python environment, with pip alone:
#
#   python3.12 -m venv .venv
#   bash slurm/container/install.sh .venv/bin/python [LOCK]        # default: this machine's, for Python 3.12
#
# Needs a C++ compiler, to build Transformer Engine's torch extension against the installed torch. It takes the headers of
# CUDA, cuDNN and NCCL from the packages that the lock has just installed: the same libraries as at run time.
set -euo pipefail
python="$1" lock="${2:-$(dirname "${BASH_SOURCE[0]}")/requirements-$(uname -m).lock}"
compiled='^transformer-engine-torch=='

fail() {
    echo "error: $*" >&2
    exit 1
}

[[ -f "$lock" ]] || fail "no lock for this machine: $lock"
wanted="$(sed -n 's/^# \(Python [0-9.]*, [a-z0-9_]*\), glibc.*/\1/p' "$lock")"
found="$("$python" -c 'import platform, sys; print("Python %d.%d," % sys.version_info[:2], platform.machine())')"
[[ "$found" == "$wanted" ]] || fail "$lock is for $wanted; $python is $found"
"$python" -c 'import platform, sys; sys.exit([*map(int, (platform.libc_ver()[1] or "0").split("."))] < [2, 34])' ||
    fail "the lock's packages need glibc 2.34 or later (Debian 12, Ubuntu 22.04, RHEL 9); use the container"

"$python" -m pip install --no-deps -r <(grep -vE "$compiled" "$lock")
"$python" -m pip install wheel pybind11
packages="$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"

# nccl.h and cudnn.h lie in packages of their own, which Transformer Engine finds with the first variable, and up to
# release 2.11 only on the compiler's path.
headers="$(printf '%s:' "$packages"/nvidia/*/include)"
headers="${headers%:}"
NVTE_BUILD_USE_NVIDIA_WHEELS=1 CPATH="$headers${CPATH:+:$CPATH}" NVTE_FRAMEWORK=pytorch \
    "$python" -m pip install --no-deps --no-build-isolation "$(grep -E "$compiled" "$lock")"

# torch loads its own cuDNN; Transformer Engine would load the system's beside it, and two releases in one process fail.
echo "import os; os.environ.setdefault('CUDNN_HOME', '$packages/nvidia/cudnn')" >"$packages/eaopd_cudnn.pth"
