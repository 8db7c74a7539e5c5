#!/usr/bin/env bash
# Qwen3-8B-Base learns from Qwen3-235B-A22B on four nodes: one the student's, two the teacher's, one the rollout servers'.
#SBATCH --job-name=qwen3-8b-from-235b-a22b
#SBATCH --nodes=4
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=48:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
# shellcheck source=slurm/lib/job.sh
source "${EAOPD_ROOT:-${SLURM_SUBMIT_DIR:-.}}/slurm/lib/job.sh" || exit

distil recipes/qwen3/8b_from_235b_a22b.yaml student=1 teacher=2 servers=1 -- "$@"
