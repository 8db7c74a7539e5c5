# shellcheck shell=bash
# srun: nodes, tasks, GPUs and container of a step; and the verbs of `python -m eaopd_megatron.slurm_job`.

step_options=() # more options for srun
session=()      # command that starts srun

# on TASKS NODELIST COMMAND...: TASKS on each node. Steps share a node's processors, memory and GPUs with each other; a
# step that needs GPUs of its own takes a part of the visible ones (`slurm_job exec-as-rank --gpus`).
on() {
    local tasks="$1" list="$2" names per_node=()
    shift 2
    IFS=, read -ra names <<<"$list"
    # every task is to see all of them: ranks choose theirs by LOCAL_RANK, and servers by number
    unset SLURM_GPU_BIND SLURM_GPUS_PER_TASK SLURM_TRES_PER_TASK
    ((gpus == 0)) || per_node+=("--gpus-per-node=$gpus")
    [[ -z ${SLURM_CPUS_ON_NODE:-} ]] ||
        per_node+=("--cpus-per-task=$((SLURM_CPUS_ON_NODE / tasks > 0 ? SLURM_CPUS_ON_NODE / tasks : 1))")
    set -- "${session[@]}" srun --overlap --nodes="${#names[@]}" --nodelist="$list" \
        --ntasks=$((${#names[@]} * tasks)) --ntasks-per-node="$tasks" "${per_node[@]}" \
        --kill-on-bad-exit=1 "${step_options[@]}" "${container[@]}" "${in_container[@]}" "$@"
    if [[ -n $dry_run ]]; then
        printf '%q ' "$@"
        printf '\n\n'
        exit 0
    fi
    exec "$@"
}

# on_all_nodes COMMAND...: one task on each of the job's nodes.
on_all_nodes() { on 1 "$(joined_by_comma "${nodes[@]}")" "$@"; }

# step NAME COMMAND...: the tasks of one of the allocated steps, as ranks or as a service.
step() {
    local name="$1" list tasks part
    shift
    read -r list tasks part <<<"${allocated_steps[$name]}"
    on "$tasks" "$list" \
        "$python" -m eaopd_megatron.slurm_job exec-as-rank --name "$name" --folder "$folder" --gpus "$part" "$@"
}

# tool VERB ARGUMENTS...: on this node, inside the container if there is one.
tool() {
    if ((${#container[@]})); then
        (dry_run="" on 1 "${nodes[0]}" "$python" -m eaopd_megatron.slurm_job "$@")
    else
        "${in_container[@]}" "$python" -m eaopd_megatron.slurm_job "$@"
    fi
}

joined_by_comma() {
    local IFS=,
    echo "$*"
}
