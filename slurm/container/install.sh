#!/usr/bin/env bash
# Installs the locked environment for GPUs into a Python environment, with pip alone:
#
#   python3.11 -m venv .venv
#   bash slurm/container/install.sh .venv/bin/python slurm/container/requirements.lock
#
# Needs nvcc of CUDA 13 and cuDNN's headers, to compile Transformer Engine's torch extension against the installed torch.
set -euo pipefail
python="$1" lock="$2"
compiled='^transformer-engine-torch=='

"$python" -m pip install --no-deps -r <(grep -vE "$compiled" "$lock")
"$python" -m pip install wheel "setuptools<82" pybind11 ninja
NVTE_FRAMEWORK=pytorch "$python" -m pip install --no-deps --no-build-isolation "$(grep -E "$compiled" "$lock")"
