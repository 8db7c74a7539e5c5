#!/usr/bin/env bash
# Unpacks the megatron-core of the GPUs' lock beside the environment, which has an older one, so that tests run on both:
#
#   bash tools/install_newer_megatron.sh
#   PYTHONPATH=.megatron-0.19.2 .venv/bin/python -m pytest tests/distributed/test_families.py
#
# Its wheel declares Python 3.12, but what is used here runs on 3.11. Does nothing where the folder is there.
set -euo pipefail
# shellcheck source=tools/lib/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"

folder="$root/.megatron-$(newer_megatron)"
[[ ! -d "$folder" ]] || exit 0
prepare_environment test
work="$(mktemp -d "$folder.XXXXXX")"
trap 'rm -rf "$work"' EXIT
log="$work/log"
step "downloading megatron-core $(newer_megatron)" "$python" -m pip download --no-deps --only-binary :all: --dest "$work" \
    --python-version 3.12 --implementation cp --platform "manylinux_2_28_$(uname -m)" "megatron-core==$(newer_megatron)"
"$python" -m zipfile -e "$work"/megatron_core-*.whl "$work/unpacked"
mv "$work/unpacked" "$folder"
