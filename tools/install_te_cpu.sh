#!/usr/bin/env bash
# Creates the environment of tests/te on a machine without a GPU: Transformer Engine's Python, unmodified, of the version
# that slurm/container pins. Its compiled module is a stand-in (tools/te_cpu), whose kernels are torch's.
#
#   bash tools/install_te_cpu.sh && .venv-te/bin/python -m pytest -q tests/te
#
# It is separate from the project's own, whose packages it shares: without its compiled module Transformer Engine breaks
# the import of Megatron-Core.
#
# $EAOPD_TE_VENV  the environment's folder (default: .venv-te at the root)
# $EAOPD_TE_LOCK  the lock that names the version (default: slurm/container/requirements-py311.lock)
# $EAOPD_VENV, $EAOPD_PYTHON  as in tools/lib/environment.sh
set -euo pipefail
# shellcheck source=tools/lib/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"
cd "$root"
prepare_environment test

engine="${EAOPD_TE_VENV:-$root/.venv-te}"
lock="${EAOPD_TE_LOCK:-$root/slurm/container/requirements-py311.lock}"
read -r -a requirements <<<"$(grep -oE '^(transformer-engine|einops)==[^ ;]*' "$lock" | tr '\n' ' ')"
packages='import sysconfig; print(sysconfig.get_path("purelib"))'
shared="$("$python" -c "$packages")"
stamp="${requirements[*]} $root $shared $("$python" --version)"
if [[ "$(cat "$engine/eaopd.stamp" 2>/dev/null)" != "$stamp" ]]; then
    log="$(mktemp)"
    [[ ! -e "$engine" || -f "$engine/pyvenv.cfg" ]] || fail "$engine exists and is not a Python environment; move it away or set EAOPD_TE_VENV"
    step "creating $engine" "$python" -m venv --clear --without-pip "$engine"
    folder="$("$engine/bin/python" -c "$packages")"
    step "installing ${requirements[*]} without compiled modules" \
        "$python" -m pip install --no-deps --target "$folder" "${requirements[@]}"
    printf 'import site; site.addsitedir("%s")\n%s\nimport te_start\n' "$shared" "$root/tools/te_cpu" >"$folder/eaopd.pth"
    step "importing it" "$engine/bin/python" -c "import megatron.core.extensions.transformer_engine as te; assert te.HAVE_TE"
    echo "$stamp" >"$engine/eaopd.stamp"
fi
echo "[environment] tests/te run with $engine/bin/python"
