# shellcheck shell=bash
# srun: which nodes, how many tasks, in which container; and the small programs of eaopd_megatron/slurm_job.

step_options=() # more of srun's
session=()      # what srun is started by
ranked=()       # what as_rank makes

# on NODES TASKS NODELIST COMMAND...: TASKS a node. Steps share a node's processors, memory and GPUs with each other:
# what needs GPUs of its own takes its part of the visible ones (`cluster step --gpus`).
on() {
    local count="$1" tasks="$2" list="$3" per_node=()
    shift 3
    ((gpus == 0)) || per_node=("--gpus-per-node=$gpus")
    exec "${session[@]}" srun --overlap --nodes="$count" --nodelist="$list" --ntasks=$((count * tasks)) \
        --ntasks-per-node="$tasks" --cpus-per-task=$((SLURM_CPUS_ON_NODE / tasks > 0 ? SLURM_CPUS_ON_NODE / tasks : 1)) "${per_node[@]}" \
        --kill-on-bad-exit=1 "${step_options[@]}" "${container[@]}" "${in_container[@]}" "$@"
}

# as_rank NAME GPUS COMMAND...: what `on` is given to make ranks or services of its tasks.
as_rank() {
    local name="$1" part="$2"
    shift 2
    ranked=("$python" -m eaopd_megatron.slurm_job step --name "$name" --folder "$folder" --gpus "$part" "$@")
}

# tool VERB ARGUMENTS...: on this node, in the container where there is one.
tool() {
    if ((${#container[@]})); then
        (on 1 1 "${nodes[0]}" "$python" -m eaopd_megatron.slurm_job "$@")
    else
        "${in_container[@]}" "$python" -m eaopd_megatron.slurm_job "$@"
    fi
}

joined_by_comma() {
    local IFS=,
    echo "$*"
}
