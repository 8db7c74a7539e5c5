#!/usr/bin/env bash
# Creates the environment of the SGLang servers on a machine without a GPU: unmodified SGLang, without CUDA packages.
#
#   bash tools/install_sglang_cpu.sh
#
# It is separate from the project's own, because SGLang runs with import stand-ins (tools/sglang_cpu) that must not reach
# the trainer. On a GPU machine install the project's `sglang` extra instead.
#
# $EAOPD_SGLANG_VENV  the environment's folder (default: .venv-sglang at the root)
# $EAOPD_PYTHON       the Python that creates it (default: a Python 3.11 on the PATH)
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
EAOPD_VENV="${EAOPD_SGLANG_VENV:-$here/../.venv-sglang}"
# shellcheck source=tools/lib/environment.sh
source "$here/lib/environment.sh"

installed_from=("$root/tools/install_sglang_cpu.sh" "$root/tools/sglang_cpu/requirements.txt")

install_servers() {
    local packages
    packages="$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    printf '%s\nimport stand_ins\n' "$root/tools/sglang_cpu" >"$packages/eaopd_stand_ins.pth"
    step "installing the servers' dependencies" "$python" -m pip install -r "$root/tools/sglang_cpu/requirements.txt"
    step "installing $(pinned sglang)" "$python" -m pip install --no-deps "$(pinned sglang)" torchvision==0.28.0 xgrammar==0.2.7
    step "importing the server" env SGLANG_USE_CPU_ENGINE=1 TORCHDYNAMO_DISABLE=1 "$python" -c "import sglang.srt.entrypoints.http_server"
}

cd "$root"
prepare_environment servers
echo "[environment] SGLang servers start with $python"
