# shellcheck shell=bash
# The life of a job: signals, starts of the trainer, requeue and end.

stop_signal="" # the signal that asked the job to stop
trainer=""     # process id of the student's srun

say() { echo "[job] $(date +%T) $*"; }

begin() {
    trap 'on_signal USR1' USR1
    trap 'on_signal TERM' TERM
    if [[ -n ${SLURM_JOB_ID:-} ]]; then
        mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
        ((${#nodes[@]})) || finish 1 "error: scontrol does not name the job's nodes (SLURM_JOB_NODELIST)"
        gpus="${SLURM_GPUS_ON_NODE:-0}"
    elif [[ -n $dry_run ]]; then
        mapfile -t nodes < <(seq -f 'node%g' "$(requested nodes)")
        gpus="$(requested gpus-per-node)"
    else
        echo "error: this is a Slurm script: submit it with sbatch, or add --dry-run to see what it starts" >&2
        exit 1
    fi
    prepare_site
    if [[ -n $dry_run ]]; then
        say "dry run on ${nodes[*]}: nothing is started"
    else
        say "job $SLURM_JOB_ID on ${nodes[*]}${SLURM_RESTART_COUNT:+, start $((SLURM_RESTART_COUNT + 1))}"
    fi
}

# requested OPTION: its number on the script's #SBATCH line.
requested() { sed -n "s/^#SBATCH --$1=\([0-9]*\)$/\1/p" "$0"; }

# USR1 comes before the time limit, as the script's --signal says; TERM from a user or from a scheduler that preempts. On
# USR1 the trainer finishes what it can, saves and stops.
on_signal() {
    stop_signal="$1"
    if [[ -n $folder ]]; then say "SIG$1: the trainer saves its state and stops"; else say "SIG$1: stopping"; fi
    [[ -z $folder ]] || touch "$folder/ending"
    [[ -z $trainer ]] || kill -USR1 "$trainer" 2>/dev/null
}

# await PID: returns its exit code; signals are handled meanwhile.
await() {
    local code
    while kill -0 "$1" 2>/dev/null; do
        wait "$1"
    done
    wait "$1"
    code=$?
    return "$code"
}

# Ends the job if a signal came before the trainer started.
stop_if_asked() { [[ -z $stop_signal ]] || stopped; }

newest_checkpoint() {
    local found=("$allocated_folder"/checkpoints/step_*)
    if [[ -e ${found[-1]} ]]; then echo "${found[-1]##*/}"; else echo none; fi
}

# Runs the trainer until the run is finished, a signal asks it to stop, or it fails: with an error of the user, or
# repeatedly without a new checkpoint.
train() {
    local code failed="" restarts="${EAOPD_RESTARTS:-3}"
    if [[ -n $dry_run ]]; then (start_trainer); finish 0; fi
    while :; do
        stop_if_asked
        tool count-start --folder "$folder" --checkpoint "$(newest_checkpoint)" --max-restarts "$restarts" ||
            finish "${code:-1}"
        [[ -z $failed ]] || say "the trainer is started again; newest checkpoint: $(newest_checkpoint)"
        run_trainer
        code=$?
        ((code != 0)) || finish 0
        [[ -z $stop_signal ]] || stopped
        say "the trainer ended with exit code $code"
        tool failure-report --srun "$folder/trainer.srun" --errors "$folder/errors" --logs "$allocated_folder/logs" \
            --code "$code"
        code=$?
        ((code != 0)) || stopped
        [[ ! -e $folder/errors/user ]] || finish "$code"
        ((restarts > 0)) || finish "$code"
        failed=yes
    done
}

# Runs the student's step, and prints rank 0's log meanwhile.
run_trainer() {
    local log="$allocated_folder/logs/rank_0.log" size=0 tail code
    rm -rf "$folder/errors"
    mkdir -p "$folder/errors"
    [[ ! -e $log ]] || size="$(stat -c %s "$log")"
    touch "$log"
    (start_trainer) 2>"$folder/trainer.srun" &
    trainer=$!
    tail -c "+$((size + 1))" -F --pid="$trainer" "$log" 2>/dev/null &
    tail=$!
    await "$trainer"
    code=$?
    trainer=""
    wait "$tail"
    return "$code"
}

# Does not return. The step has a session of its own: a signal to the job's processes would make srun kill its ranks.
start_trainer() {
    step_options=("--output=$allocated_folder/logs/rank_%t.log" --open-mode=append)
    export EAOPD_ERROR_FILE="$folder/errors/error"
    session=(setsid)
    step student "$python" -m eaopd_megatron train "$allocated_recipe" "${allocated_overrides[@]}" "${connections[@]}"
}

job_state() { scontrol show job -o "$SLURM_JOB_ID" | grep -o 'JobState=[A-Z_]*' | cut -d= -f2; }

# The state is saved. Requeues the job unless it was cancelled (Slurm itself requeues a preempted job), or the site
# prefers a chain of jobs.
stopped() {
    local state="what is done is kept"
    [[ -z $folder ]] || state="newest checkpoint: $(newest_checkpoint)"
    end_services
    if [[ "$(job_state)" != RUNNING ]]; then
        finish 143 "ended by Slurm; submit it again to continue; $state"
    fi
    [[ ${EAOPD_REQUEUE:-yes} != no ]] || finish 0 "stopped; $state, the next job goes on"
    [[ -z $folder ]] || rm -f "$folder/key"
    say "stopped; $state, back into the queue"
    scontrol requeue "$SLURM_JOB_ID" || finish 1 "error: the job cannot be requeued: set EAOPD_REQUEUE=no and submit a chain"
    trap '' TERM USR1
    sleep 60 # Slurm ends this process
    exit 0
}

end_services() {
    local pid
    [[ -z $folder || -n $dry_run ]] || touch "$folder/ending"
    for pid in "${service_pids[@]}"; do
        kill -TERM "$pid" 2>/dev/null
    done
    for pid in "${service_pids[@]}"; do
        wait "$pid" 2>/dev/null
    done
}

# finish CODE [LINE]: ends everything that runs, and the job.
finish() {
    [[ -z ${2:-} ]] || case "$2" in
    error:*) echo "$2" >&2 ;;
    *) say "$2" ;;
    esac
    trap '' TERM USR1
    end_services
    [[ -z $folder || -n $dry_run ]] || rm -f "$folder/key" "$folder/ending"
    exit "$1"
}
