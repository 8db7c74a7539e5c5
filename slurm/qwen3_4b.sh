#!/usr/bin/env bash
# Qwen3-4B-Base learns from Qwen3-8B on three nodes: the student's, the teacher's, the rollout servers'.
#SBATCH --job-name=qwen3-4b
#SBATCH --nodes=3
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
# shellcheck source=slurm/lib/job.sh
source "${EAOPD_ROOT:-${SLURM_SUBMIT_DIR:-.}}/slurm/lib/job.sh" || exit

distil recipes/qwen3/4b_from_8b.yaml student=1 teacher=1 servers=1 -- "$@"
