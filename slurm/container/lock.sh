#!/usr/bin/env bash
# Resolves the locks for GPUs anew, from pyproject.toml and versions.txt. Needs uv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
for machine in x86_64 aarch64; do
    {
        echo "# Python 3.12, $machine, glibc 2.34 or later, CUDA 13. Made by slurm/container/lock.sh."
        uv pip compile pyproject.toml --extra gpu --extra sglang --constraint slurm/container/versions.txt \
            --override slurm/container/overrides.txt --python-version 3.12 --python-platform "$machine-manylinux_2_34" \
            --only-binary :all: --no-binary transformer-engine-torch --no-annotate --no-header --quiet
    } >"slurm/container/$machine.new"
    mv "slurm/container/$machine.new" "slurm/container/requirements-$machine.lock"
done
