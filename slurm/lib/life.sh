# shellcheck shell=bash
# The life of a job: its signals, the trainer's starts, the requeue and the end.

asked=""   # the signal that asked the job to stop
trainer="" # process of the student's srun

say() { echo "[job] $(date +%T) $*"; }

begin() {
    [[ -n ${SLURM_JOB_ID:-} ]] || { echo "error: this is a Slurm script: submit it with sbatch" >&2; exit 1; }
    trap 'on_signal USR1' USR1
    trap 'on_signal TERM' TERM
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    ((${#nodes[@]})) || finish 1 "error: scontrol does not name the job's nodes (SLURM_JOB_NODELIST)"
    gpus="${SLURM_GPUS_ON_NODE:-0}"
    prepare_site
    say "job $SLURM_JOB_ID on ${nodes[*]}${SLURM_RESTART_COUNT:+, start $((SLURM_RESTART_COUNT + 1))}"
}

# USR1 comes before the time limit, as the script's --signal says; TERM from a user or a scheduler that preempts. The
# trainer finishes what it can, saves and stops at USR1.
on_signal() {
    asked="$1"
    if [[ -n $folder ]]; then say "SIG$1: the trainer saves its state and stops"; else say "SIG$1: stopping"; fi
    [[ -z $folder ]] || touch "$folder/ending"
    [[ -z $trainer ]] || kill -USR1 "$trainer" 2>/dev/null
}

# await PID: its exit code; signals are handled meanwhile.
await() {
    local code
    while kill -0 "$1" 2>/dev/null; do
        wait "$1"
    done
    wait "$1"
    code=$?
    return "$code"
}

# Where a signal came before the trainer was started.
ended_by_signal() { [[ -z $asked ]] || stopped; }

# As a word of a sentence, too.
newest_checkpoint() {
    local found=("$arranged_folder"/checkpoints/step_*)
    if [[ -e ${found[-1]} ]]; then echo "${found[-1]##*/}"; else echo "no checkpoint"; fi
}

# Starts the trainer until the run is finished, or it is asked to stop, or it fails: for the user to mend, or again and
# again without a new checkpoint.
train() {
    local code failed="" restarts="${EAOPD_RESTARTS:-3}"
    while :; do
        ended_by_signal
        count_start "$restarts"
        [[ -z $failed ]] || say "the trainer is started again; $(newest_checkpoint) is there"
        run_trainer
        code=$?
        ((code != 0)) || finish 0
        [[ -z $asked ]] || stopped
        say "the trainer ended with exit code $code"
        tool verdict --srun "$folder/trainer.srun" --errors "$folder/errors" --logs "$arranged_folder/logs" --code "$code"
        code=$?
        ((code != 0)) || stopped
        [[ ! -e $folder/errors/user ]] || finish "$code"
        ((restarts > 0)) || finish "$code"
        failed=yes
    done
}

# Refuses the start that would be one too many without a new checkpoint, over all starts of this job.
count_start() {
    local file="$folder/starts" checkpoint count=0 last=""
    checkpoint="$(newest_checkpoint)"
    [[ ! -e $file ]] || read -r count last <"$file"
    [[ $last == "$checkpoint" ]] || count=0
    ((count <= $1)) || finish "${code:-1}" "error: $count starts without a new checkpoint ($checkpoint is there): \
not started again; look at $arranged_folder/logs"
    echo "$((count + 1)) $checkpoint" >"$file"
}

# The student's step. Rank 0's words come into the job's output too.
run_trainer() {
    local log="$arranged_folder/logs/rank_0.log" size=0 tail
    rm -rf "$folder/errors"
    mkdir -p "$folder/errors"
    [[ ! -e $log ]] || size="$(stat -c %s "$log")"
    touch "$log"
    as_rank student "" "$python" -m eaopd_megatron train "$arranged_recipe" "${arranged_overrides[@]}" "${connections[@]}"
    # a session of its own: a signal to the job's processes would make srun kill the ranks at once
    (step_options=("--output=$arranged_folder/logs/rank_%t.log" --open-mode=append)
        export EAOPD_ERROR_FILE="$folder/errors/error"
        session=(setsid)
        on "${#student_nodes[@]}" "$arranged_student_tasks" "$(joined_by_comma "${student_nodes[@]}")" "${ranked[@]}") \
        2>"$folder/trainer.srun" &
    trainer=$!
    tail -c "+$((size + 1))" -F --pid="$trainer" "$log" 2>/dev/null &
    tail=$!
    await "$trainer"
    local code=$?
    trainer=""
    wait "$tail"
    return "$code"
}

job_state() { scontrol show job -o "$SLURM_JOB_ID" | grep -o 'JobState=[A-Z_]*' | cut -d= -f2; }

# The state is saved. The job goes back into the queue, unless it was cancelled (Slurm requeues a preempted one itself),
# or the site wants a chain of jobs instead.
stopped() {
    local there="what is done is kept"
    [[ -z $folder ]] || there="$(newest_checkpoint) is there"
    end_services
    if [[ "$(job_state)" != RUNNING ]]; then
        finish 143 "ended by Slurm; submitted again, the run goes on; $there"
    fi
    [[ ${EAOPD_REQUEUE:-yes} != no ]] || finish 0 "stopped; $there, the next job goes on"
    [[ -z $folder ]] || rm -f "$folder/key"
    say "stopped; $there, back into the queue"
    scontrol requeue "$SLURM_JOB_ID" || finish 1 "error: the job cannot be requeued: set EAOPD_REQUEUE=no and submit a chain"
    trap '' TERM USR1
    sleep 60 # Slurm ends this process
    exit 0
}

end_services() {
    local pid
    [[ -z $folder ]] || touch "$folder/ending"
    for pid in "${keepers[@]}"; do
        kill -TERM "$pid" 2>/dev/null
    done
    for pid in "${keepers[@]}"; do
        wait "$pid" 2>/dev/null
    done
}

# finish CODE [LINE]: ends all that runs, and the job.
finish() {
    [[ -z ${2:-} ]] || case "$2" in
    error:*) echo "$2" >&2 ;;
    *) say "$2" ;;
    esac
    trap '' TERM USR1
    end_services
    [[ -z $folder ]] || rm -f "$folder/key" "$folder/ending"
    exit "$1"
}
