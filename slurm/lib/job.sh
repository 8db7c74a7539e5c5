# shellcheck shell=bash
# Sourced by the scripts in slurm/. Each calls one of these with the arguments that the user gives to sbatch:
#
#   distil RECIPE student=N [teacher=N] [servers=N] -- [a.b.c=value ...]
#       Train on N nodes per role. A role without nodes runs where the recipe places it: the teacher on the student's
#       ranks; rollouts on the student, or on servers that the trainer starts on its own node.
#   on_one_node ARGUMENTS...
#       Run the environment's Python with ARGUMENTS on the job's only node. A signal ends it and requeues the job.
#
# With --dry-run as a script's first argument nothing starts: the job's allocation and its srun lines are printed, outside
# a job for the nodes that the script's #SBATCH lines request.
#
# site.sh: what differs between clusters; steps.sh: srun; preflight.sh: checks before the start; services.sh: teachers
# and rollout servers; life.sh: signals, requeue, restarts and the end of the job.
set -uo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
cd "$root" || exit 1

dry_run=""                # yes: print instead of starting
[[ ${1:-} != --dry-run ]] || { dry_run=yes; shift; } # the script's own first argument
nodes=()                  # names of the job's nodes
gpus=0                    # per node
folder=""                 # the job's folder inside the run's folder, visible to all nodes
python="" container=() in_container=() # the environment: site.sh
# set by the file that `slurm_job allocate` renders; see Allocation in eaopd_megatron/slurm_job/allocate.py
allocated_recipe="" allocated_folder="" allocated_finished="" allocated_overrides=() allocated_models=()
allocated_staged=() allocated_services=()
declare -A allocated_steps=()

# shellcheck source=slurm/lib/life.sh
source "$root/slurm/lib/life.sh"
# shellcheck source=slurm/lib/site.sh
source "$root/slurm/lib/site.sh"
# shellcheck source=slurm/lib/steps.sh
source "$root/slurm/lib/steps.sh"
# shellcheck source=slurm/lib/preflight.sh
source "$root/slurm/lib/preflight.sh"
# shellcheck source=slurm/lib/services.sh
source "$root/slurm/lib/services.sh"

distil() {
    begin
    local recipe="${EAOPD_RECIPE:-$1}" roles=() overrides allocation
    shift
    while (($#)) && [[ $1 != -- ]]; do
        roles+=("$1")
        shift
    done
    read -ra overrides <<<"${EAOPD_OVERRIDES:-}"
    allocation="$(tool allocate --roles "${roles[*]}" --nodes "$(joined_by_comma "${nodes[@]}")" --gpus "$gpus" \
        "$recipe" "${overrides[@]}" "${@:2}")" || finish $?
    # shellcheck disable=SC1090  # rendered
    source /dev/stdin <<<"$allocation"
    [[ -z $allocated_finished ]] || finish 0 "$allocated_finished"
    open_folder
    preflight
    stage_models
    start_services
    train
}

# Makes $folder, the job's part of the run's folder, and writes what the job runs to its file allocation.sh.
open_folder() {
    folder="$allocated_folder/cluster/job_${SLURM_JOB_ID:-ID}"
    if [[ -n $dry_run ]]; then
        echo "$allocation"
        return 0
    fi
    mkdir -p "$folder" "$allocated_folder/logs" || finish 1 "error: $folder cannot be made"
    lock_run_folder
    rm -rf "$folder"/{*.url,*.ranks,*.lost,*.deaths,ending,errors}
    echo "$allocation" >"$folder/allocation.sh"
    (umask 077 && head -c 24 /dev/urandom | base64 | tr -d '/+=' >"$folder/key")
}

# Two jobs must not train in one folder.
lock_run_folder() {
    local holder="$allocated_folder/cluster/holder" other
    other="$(cat "$holder" 2>/dev/null)"
    if [[ -n $other && $other != "$SLURM_JOB_ID" && -n "$(squeue -h -j "$other" -t running 2>/dev/null)" ]]; then
        finish 1 "error: job $other trains in $allocated_folder: wait for it, or give this one another run.folder"
    fi
    echo "$SLURM_JOB_ID" >"$holder"
}

on_one_node() {
    local code
    begin
    ((${#nodes[@]} == 1)) || finish 1 "error: this script is for one node, the job has ${#nodes[@]}"
    (session=(setsid)
        on 1 "${nodes[0]}" "$python" "$@") &
    trainer=$!
    await "$trainer"
    code=$?
    trainer=""
    [[ -z $stop_signal ]] || stopped
    finish "$code"
}
