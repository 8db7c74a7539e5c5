# shellcheck shell=bash
# Checks before anything starts: all nodes report at the same time, and the job prints one table and the faults.

preflight() {
    local mark
    [[ ${EAOPD_PREFLIGHT:-yes} != no && -z $dry_run ]] || return 0
    say "checking ${#nodes[@]} nodes"
    mark="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
    echo "$mark" >"$folder/token"
    (step_options=(--kill-on-bad-exit=0)
        on_all_nodes "$python" -m eaopd_megatron.slurm_job preflight --token "$folder/token" --content "$mark" \
            --stage "${EAOPD_STAGE:-}" "${allocated_models[@]}") >"$folder/nodes" 2>"$folder/nodes.srun" &
    await $!
    stop_if_asked
    tool preflight-report --reports "$folder/nodes" --srun "$folder/nodes.srun" --gpus "$gpus" "${nodes[@]}" || finish 1
    probe_network
}

# An all-reduce over the student's ranks; without GPUs only if EAOPD_PROBE=yes.
probe_network() {
    command -v nvidia-smi >/dev/null || [[ ${EAOPD_PROBE:-} == yes ]] || return 0
    [[ ${EAOPD_PROBE:-} != no ]] || return 0
    allocated_steps[probe]="${allocated_steps[student]}"
    (step probe "$python" -m eaopd_megatron.slurm_job probe-network) &
    await $! || finish 1 "error: the ranks do not reach each other (above)"
    stop_if_asked
}

# Copies the models to every node's own disk if EAOPD_STAGE names a folder there.
stage_models() {
    [[ -n ${EAOPD_STAGE:-} ]] || return 0
    allocated_overrides+=("${allocated_staged[@]}")
    [[ -z $dry_run ]] || return 0
    say "copying models to $EAOPD_STAGE on every node"
    (on_all_nodes "$python" -m eaopd_megatron.slurm_job stage --stage "$EAOPD_STAGE" "${allocated_models[@]}") &
    await $! || finish 1 "error: the models could not be copied (above)"
    stop_if_asked
}
