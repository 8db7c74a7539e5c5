#!/usr/bin/env bash
# Scores a model on benchmarks:  sbatch slurm/evaluate.sh runs/x/student --benchmarks countdown --samples 8
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
# shellcheck source=slurm/lib/job.sh
source "${EAOPD_ROOT:-${SLURM_SUBMIT_DIR:-.}}/slurm/lib/job.sh" || exit

on_one_node -m eaopd_megatron evaluate "$@"
