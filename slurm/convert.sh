#!/usr/bin/env bash
# Hugging Face folder -> Megatron-Core checkpoint, or back where --checkpoint is among the arguments, which are those of
# tools/hf_to_mcore.py and tools/mcore_to_hf.py:  sbatch slurm/convert.sh --hf DIR --out DIR --tensor-parallel 8 --verify
#SBATCH --job-name=convert
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=02:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
# shellcheck source=slurm/lib/job.sh
source "${EAOPD_ROOT:-${SLURM_SUBMIT_DIR:-.}}/slurm/lib/job.sh" || exit

case " $* " in
*" --checkpoint"*) on_one_node tools/mcore_to_hf.py "$@" ;;
*) on_one_node tools/hf_to_mcore.py "$@" ;;
esac
