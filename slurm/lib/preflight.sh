# shellcheck shell=bash
# Before anything starts: every node is looked at, at the same time, and the findings are one table.

preflight() {
    local mark list
    [[ ${EAOPD_PREFLIGHT:-yes} != no ]] || return 0
    say "looking at ${#nodes[@]} nodes"
    mark="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
    echo "$mark" >"$folder/token"
    list="$(joined_by_comma "${nodes[@]}")"
    (step_options=(--kill-on-bad-exit=0)
        on "${#nodes[@]}" 1 "$list" "$python" -m eaopd_megatron.slurm_job look --token "$folder/token" --holds "$mark" \
            --stage "${EAOPD_STAGE:-}" "${arranged_models[@]}") >"$folder/nodes" 2>"$folder/nodes.srun" &
    await $!
    ended_by_signal
    tool compare --reports "$folder/nodes" --said "$folder/nodes.srun" --gpus "$gpus" "${nodes[@]}" || finish 1
    probe_network
}

# An all-reduce over the student's ranks; without GPUs only where EAOPD_PROBE=yes asks for it.
probe_network() {
    command -v nvidia-smi >/dev/null || [[ ${EAOPD_PROBE:-} == yes ]] || return 0
    [[ ${EAOPD_PROBE:-} != no ]] || return 0
    as_rank probe "" "$python" -m eaopd_megatron.slurm_job probe
    (on "${#student_nodes[@]}" "$arranged_student_tasks" "$(joined_by_comma "${student_nodes[@]}")" "${ranked[@]}") &
    await $! || finish 1 "error: the network does not carry the ranks (above)"
    ended_by_signal
}

# Model folders to every node's own disk, where EAOPD_STAGE names one.
stage_models() {
    local list
    [[ -n ${EAOPD_STAGE:-} ]] || return 0
    say "copying models to $EAOPD_STAGE of every node"
    list="$(joined_by_comma "${nodes[@]}")"
    (on "${#nodes[@]}" 1 "$list" "$python" -m eaopd_megatron.slurm_job stage --stage "$EAOPD_STAGE" \
        "${arranged_models[@]}") &
    await $! || finish 1 "error: the models could not be copied (above)"
    ended_by_signal
    arranged_overrides+=("${arranged_staged[@]}")
}
