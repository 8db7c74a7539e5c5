# shellcheck shell=bash
# Teachers and SGLang servers, each in a step of its own, which is started again when it dies.

keepers=()    # processes of `keep`
connections=() # overrides by which the trainer finds them

start_services() {
    local i names=()
    for ((i = 0; i < arranged_teacher_replicas; i++)); do
        names+=("teacher_$i")
        start_teacher "$i"
    done
    for ((i = 0; i < arranged_servers * ${#servers_nodes[@]}; i++)); do
        names+=("server_$i")
        start_server "$i"
    done
    ((${#names[@]} == 0)) || await_services "${names[@]}"
}

start_teacher() {
    local number="$1" list per_node part=""
    if ((arranged_teacher_nodes > 1)); then
        list="$(joined_by_comma "${teacher_nodes[@]:number * arranged_teacher_nodes:arranged_teacher_nodes}")"
    else
        per_node=$((arranged_teacher_replicas / ${#teacher_nodes[@]}))
        list="${teacher_nodes[number / per_node]}"
        ((gpus == 0)) || part="$((number % per_node * arranged_teacher_tasks)):$arranged_teacher_tasks"
    fi
    as_rank "teacher_$number" "$part" "$python" -m eaopd_megatron teach "$arranged_recipe" "${arranged_overrides[@]}" \
        teacher.listen={listen} "teacher.api_key_file=$folder/key"
    keep "teacher_$number" "$arranged_teacher_nodes" "$arranged_teacher_tasks" "$list" "${ranked[@]}" &
    keepers+=($!)
}

start_server() {
    local number="$1" part=""
    ((gpus == 0)) || part="$((number % arranged_servers * arranged_server_gpus)):$arranged_server_gpus"
    as_rank "server_$number" "$part" "$python" -m eaopd_megatron.slurm_job serve --listen {listen} \
        --key-file "$folder/key" --log "$arranged_folder/servers/server_$number.log" \
        "$arranged_recipe" "${arranged_overrides[@]}"
    keep "server_$number" 1 1 "${servers_nodes[number / arranged_servers]}" "${ranked[@]}" &
    keepers+=($!)
}

# keep NAME NODES TASKS NODELIST COMMAND...: the step, again and again until it dies $EAOPD_DEATHS times in a row, none of
# them after it had lived for five minutes.
keep() {
    local name="$1" log="$arranged_folder/logs/$1.log" deaths=0 limit="${EAOPD_DEATHS:-3}" started step="" why
    shift
    trap '[[ -z $step ]] || { kill -TERM "$step" 2>/dev/null; wait "$step"; }; exit 0' TERM
    trap '' USR1
    while :; do
        started=$SECONDS
        (step_options=("--output=$log" --open-mode=append)
            on "$@") 2>"$folder/$name.srun" &
        step=$!
        wait "$step"
        [[ ! -e $folder/ending ]] || exit 0
        ((SECONDS - started < 300)) || deaths=0
        deaths=$((deaths + 1))
        why="$(last_line_of "$log" "$folder/$name.srun")"
        if ((deaths >= limit)); then
            echo "$name died $deaths times in a row and is not started again: $why (log: $log)" >"$folder/$name.lost"
            say "$(cat "$folder/$name.lost")"
            exit 0
        fi
        say "$name died and is started again: $why (log: $log)"
        sleep 1
    done
}

# The last line of the first of these files that has one.
last_line_of() {
    local file line
    for file in "$@"; do
        line="$(grep -v '^[[:space:]]*$' "$file" 2>/dev/null | tail -n 1)"
        [[ -z $line ]] || { echo "${line:0:200}"; return; }
    done
    echo "it wrote nothing"
}

# Until all of them serve; what the trainer needs to find them is in $connections then.
await_services() {
    local names=("$@") teachers=() servers=() name
    say "waiting for ${names[*]}"
    for name in "${names[@]}"; do
        if [[ $name == teacher_* ]]; then teachers+=("$name"); else servers+=("$name"); fi
    done
    if ((${#teachers[@]})); then
        await_role "${teachers[@]}"
        connections+=("teacher.urls=$(cat "$folder/urls")" "teacher.api_key_file=$folder/key")
    fi
    if ((${#servers[@]})); then
        await_role "${servers[@]}"
        connections+=("servers.urls=$(cat "$folder/urls")" "servers.api_key_file=$folder/key")
    fi
}

await_role() {
    tool wait --folder "$folder" --logs "$arranged_folder/logs" --key-file "$folder/key" \
        --minutes "${EAOPD_START_MINUTES:-30}" "$@" >"$folder/urls" &
    await $! || { ended_by_signal; finish 1; }
    ended_by_signal
}
