# shellcheck shell=bash
# Teachers and SGLang servers, each in a step of its own, which is restarted when it ends.

service_pids=() # processes that run `keep`
connections=() # overrides that tell the trainer the services' addresses

start_services() {
    local name
    ((${#allocated_services[@]})) || return 0
    for name in "${allocated_services[@]}"; do
        case "$name" in
        teacher_*)
            keep "$name" "$python" -m eaopd_megatron teach "$allocated_recipe" "${allocated_overrides[@]}" \
                "teacher.listen={listen}" "teacher.api_key_file=$folder/key" &
            ;;
        server_*)
            keep "$name" "$python" -m eaopd_megatron.slurm_job serve --listen "{listen}" --key-file "$folder/key" \
                --log "$allocated_folder/servers/$name.log" "$allocated_recipe" "${allocated_overrides[@]}" &
            ;;
        esac
        service_pids+=($!)
        [[ -z $dry_run ]] || wait $!
    done
    [[ -n $dry_run ]] || say "waiting for ${allocated_services[*]}"
    connect teacher teacher_
    connect servers server_
}

# connect SECTION PREFIX: waits for the services whose names begin with PREFIX, and gives the recipe's section their
# addresses.
connect() {
    local name names=()
    for name in "${allocated_services[@]}"; do
        [[ $name != "$2"* ]] || names+=("$name")
    done
    ((${#names[@]})) || return 0
    if [[ -n $dry_run ]]; then
        connections+=("$1.urls=[${names[*]}]")
    else
        tool wait --folder "$folder" --logs "$allocated_folder/logs" --key-file "$folder/key" \
            --minutes "${EAOPD_START_MINUTES:-30}" "${names[@]}" >"$folder/urls" &
        await $! || { stop_if_asked; finish 1; }
        stop_if_asked
        connections+=("$1.urls=$(cat "$folder/urls")")
    fi
    connections+=("$1.api_key_file=$folder/key")
}

# keep NAME COMMAND...: runs the step; when it ends, `slurm_job restart` says whether it runs again.
keep() {
    local name="$1" log="$allocated_folder/logs/$1.log" started pid=""
    if [[ -n $dry_run ]]; then step "$@"; fi
    trap '[[ -z $pid ]] || { kill -TERM "$pid" 2>/dev/null; wait "$pid"; }; exit 0' TERM
    trap '' USR1
    while :; do
        started=$SECONDS
        (step_options=("--output=$log" --open-mode=append)
            step "$@") 2>"$folder/$name.srun" &
        pid=$!
        wait "$pid"
        [[ ! -e $folder/ending ]] || exit 0
        pid=""
        tool restart --name "$name" --folder "$folder" --log "$log" --lived $((SECONDS - started)) \
            --max-deaths "${EAOPD_DEATHS:-3}" || {
            # also where the decision itself failed: nobody is to wait for a service that never comes back
            [[ -e $folder/$name.lost ]] || echo "$name: whether to restart it could not be decided" >"$folder/$name.lost"
            exit 0
        }
        sleep 1
    done
}
