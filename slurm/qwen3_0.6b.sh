#!/usr/bin/env bash
# Qwen3-0.6B-Base learns from Qwen3-8B on one node: four ranks carry both, four GPUs a server each.
#SBATCH --job-name=qwen3-0.6b
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=08:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
# shellcheck source=slurm/lib/job.sh
source "${EAOPD_ROOT:-${SLURM_SUBMIT_DIR:-.}}/slurm/lib/job.sh" || exit

distil recipes/qwen3/0.6b_from_8b.yaml student=1 -- "$@"
