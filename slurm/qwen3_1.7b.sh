#!/usr/bin/env bash
# Qwen3-1.7B-Base learns from Qwen3-8B on two nodes: student and teacher on one, eight servers on the other.
#SBATCH --job-name=qwen3-1.7b
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
# shellcheck source=slurm/lib/job.sh
source "${EAOPD_ROOT:-${SLURM_SUBMIT_DIR:-.}}/slurm/lib/job.sh" || exit

distil recipes/qwen3/1.7b_from_8b.yaml student=1 servers=1 -- "$@"
