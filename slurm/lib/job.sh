# shellcheck shell=bash
# Sourced by the scripts beside this folder. Each calls one of these, with what the user gave to sbatch after `--`:
#
#   distil RECIPE student=N [teacher=N] [servers=N] -- [a.b.c=value ...]
#       Trains on N nodes for each role. A role without nodes is where the recipe puts it: the teacher on the student's
#       ranks, responses by the student itself or by servers that the trainer starts on its own node.
#   on_one_node ARGUMENTS...
#       What the environment's Python is given, on the job's only node. A signal ends it; what it has done must be kept.
#
# site.sh: what differs between clusters; steps.sh: srun; preflight.sh: before anything starts; services.sh: teachers and
# servers; life.sh: signals, requeue, restarts and the end.
set -uo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
cd "$root" || exit 1

nodes=()                  # the job's, and those of each role
student_nodes=() teacher_nodes=() servers_nodes=()
gpus=0                    # a node's
folder=""                 # the job's, in the run's, which all nodes see
python="" container=() in_container=() # the environment: site.sh
# what `cluster arrange` says; see its class Arrangement
arranged_recipe="" arranged_folder="" arranged_finished="" arranged_overrides=() arranged_models=() arranged_staged=()
arranged_student_tasks=0 arranged_teacher_replicas=0 arranged_teacher_tasks=0 arranged_teacher_nodes=0
arranged_servers=0 arranged_server_gpus=0

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
    local recipe="${EAOPD_RECIPE:-$1}" roles=() overrides
    shift
    while (($#)) && [[ $1 != -- ]]; do
        roles+=("--${1%%=*}=${1#*=}")
        shift
    done
    read -ra overrides <<<"${EAOPD_OVERRIDES:-}"
    overrides+=("${@:2}")

    arrange "$recipe" "${overrides[@]}"
    [[ -z $arranged_finished ]] || finish 0 "$arranged_finished"
    open_folder
    preflight
    stage_models
    start_services
    train
}

# What the nodes carry: the variables arranged_*, and the nodes of each role.
arrange() {
    local recipe="$1" said
    shift
    said="$(tool arrange "${roles[@]}" --nodes "${#nodes[@]}" --gpus "$gpus" \
        --student-per-node "${EAOPD_RANKS_PER_NODE:-0}" --teacher-per-node "${EAOPD_TEACHERS_PER_NODE:-0}" \
        --servers-per-node "${EAOPD_SERVERS_PER_NODE:-0}" "$recipe" "$@")" || finish $?
    eval "$said"
    arranged_recipe="$recipe"
    local role count first=0
    for role in student teacher servers; do
        count="$(role_nodes "$role")"
        count="${count:-0}"
        declare -ga "${role}_nodes=(${nodes[*]:first:count})"
        first=$((first + count))
    done
}

# The number of nodes that the script gives to a role.
role_nodes() {
    local said
    for said in "${roles[@]}"; do
        [[ $said != --$1=* ]] || echo "${said#*=}"
    done
}

# The job's part of the run's folder, which all nodes see: $folder.
open_folder() {
    folder="$arranged_folder/cluster/job_$SLURM_JOB_ID"
    mkdir -p "$folder" "$arranged_folder/logs" || finish 1 "error: $folder cannot be made"
    alone_in_the_folder
    rm -rf "$folder"/{*.url,*.ranks,*.lost,ending,errors}
    (umask 077 && head -c 24 /dev/urandom | base64 | tr -d '/+=' >"$folder/key")
}

# Two jobs must not train in one folder.
alone_in_the_folder() {
    local holder="$arranged_folder/cluster/holder" other
    other="$(cat "$holder" 2>/dev/null)"
    if [[ -n $other && $other != "$SLURM_JOB_ID" && -n "$(squeue -h -j "$other" -t running 2>/dev/null)" ]]; then
        finish 1 "error: job $other trains in $arranged_folder: wait for it, or give this one another run.folder"
    fi
    echo "$SLURM_JOB_ID" >"$holder"
}

on_one_node() {
    begin
    ((${#nodes[@]} == 1)) || finish 1 "error: this script is for one node, the job has ${#nodes[@]}"
    (session=(setsid)
        on 1 1 "${nodes[0]}" "$python" "$@") &
    trainer=$!
    await "$trainer"
    local code=$?
    trainer=""
    [[ -z $asked ]] || stopped
    finish "$code"
}
