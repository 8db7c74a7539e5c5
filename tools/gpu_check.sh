#!/usr/bin/env bash
# Checks on one NVIDIA GPU what no CPU can: kernels, NCCL, memory, speed. Takes at most 8 minutes.
#
#   bash tools/gpu_check.sh [--wheels DIR] [--out DIR] [--steps "NAME ..."] [--rehearse]
#
# Needs a Python with PyTorch for CUDA ($EAOPD_PYTHON, default python3). Packages that it lacks are installed from the
# wheels of DIR (tools/gpu_check/wheels.txt) into a temporary folder, without a network. Needs 20 GB in /dev/shm, else in $TMPDIR. Writes check.md,
# check.json and logs.tar.gz to --out (default: tests/gpu/results/<name of the GPU>) after every step, so that nothing is
# lost when it is interrupted. A step that fails or exceeds its limit does not stop the others; the exit code is 1 if one
# has failed. --rehearse runs the same steps small, on a CPU with gloo, in the tests' environment.
set -uo pipefail
# shellcheck source=tools/lib/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"
wheels="" out="" only="" rehearse="" small=() slowness=1
while (($#)); do
    case "$1" in
    --wheels) wheels="$(realpath "${2:?--wheels needs a folder}")" && shift 2 ;;
    --out) out="$(realpath "${2:?--out needs a folder}")" && shift 2 ;;
    --steps) only=" ${2:?--steps needs names} " && shift 2 ;;
    --rehearse) rehearse=1 small=(--small) slowness=5 && shift ;;
    *) fail "unknown option $1 (see the first lines of tools/gpu_check.sh)" ;;
    esac
done
cd "${root:?}" || exit 1
memory=/dev/shm # checkpoints are read and written at its speed
(($(df --output=avail -k $memory 2>/dev/null | tail -n 1) > 20000000)) || memory="${TMPDIR:-/tmp}"
work="$(mktemp -d -p "$memory")"
trap 'rm -rf "$work"' EXIT
if [[ -n "$rehearse" ]]; then
    prepare_environment test
else
    python="${EAOPD_PYTHON:-python3}"
    "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
        fail "$python has no PyTorch that sees an NVIDIA GPU; set EAOPD_PYTHON, or use --rehearse"
fi
if [[ -n "$wheels" ]]; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$work/site" \
        "$wheels"/*.whl || fail "the wheels of $wheels cannot be installed"
fi
export PYTHONPATH="$work/site:$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TRITON_CACHE_DIR="$work/triton"
export PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1
"$python" -c 'import eaopd_megatron.cli, eaopd_megatron.training.trainer, pytest' 2>"$work/import" ||
    fail "$python lacks a package ($(tail -n 1 "$work/import")); give the wheels of tools/gpu_check/wheels.txt by --wheels"
name="$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")')" || exit 1
out="${out:-$root/tests/gpu/results/$(tr ' ' '_' <<<"$name")}"
mkdir -p "$out" "$work/logs"
started=$SECONDS total=$((450 * slowness))

# step NAME LIMIT COMMAND...: runs a command for at most LIMIT seconds of the check's total, with its output in a log
step() {
    local name="$1" limit="$(($2 * slowness))" code=0 begin=$SECONDS left="$((started + total - SECONDS))"
    shift 2
    [[ -z "$only" || "$only" == *" $name "* ]] || return 0
    ((limit <= left)) || limit=$((left > 1 ? left : 1))
    timeout --kill-after=5 "$limit" "$@" >"$work/logs/$name.log" 2>&1 || code=$?
    printf '%s\t%s\t%s\t%s\n' "$name" "$code" "$((SECONDS - begin))" "$limit" >>"$work/steps.tsv"
    echo "[$((SECONDS - started)) s] $name: exit code $code after $((SECONDS - begin)) s (limit $limit s)"
    ((code == 0)) || tail -n 3 "$work/logs/$name.log" | cut -c 1-300
    report >/dev/null
}

# report: writes the results of the steps that have ended, one call at a time, and prints them
report() {
    (
        flock 9
        tar -czf "$out/logs.tar.gz" -C "$work" logs
        "$python" tools/gpu_check/report.py write "$work" "$out" "$((SECONDS - started))"
    ) 9>"$work/lock"
}

eaopd() { "$python" -m eaopd_megatron "$@"; }

# two_ranks NAME PORT OVERRIDE...: Countdown on two ranks. NCCL_HOSTID makes NCCL take two ranks of one GPU for two hosts.
two_ranks() {
    local name="$1" port="$2" rank codes=0 pids=()
    shift 2
    export NCCL_SOCKET_IFNAME=lo GLOO_SOCKET_IFNAME=lo NCCL_IB_DISABLE=1 NCCL_NVLS_ENABLE=0 NCCL_CUMEM_ENABLE=0
    for rank in 0 1; do
        NCCL_HOSTID="host$rank" RANK=$rank WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT="$port" \
            eaopd train recipes/countdown/eopd.yaml "run.folder=$work/runs/$name" train.iterations=2 \
            train.prompts_per_iteration=16 train.mini_batch=8 'evaluation.benchmarks=[]' run.save_interval=1 \
            reporting.tensorboard=false student.precision=bf16 teacher.precision=bf16 "$@" >"$work/logs/$name.rank$rank" 2>&1 &
        pids+=($!)
    done
    for rank in 0 1; do wait "${pids[$rank]}" || codes=1; done
    tail -n 4 "$work/logs/$name".rank?
    return $codes
}

# One run as it is, and one that is stopped after its first iteration and goes on: their students must be equal.
stop_and_resume() {
    local pid code=0 settings=("$work/shallow.yaml" train.iterations=2)
    eaopd train "${settings[@]}" run.folder="$work/runs/undisturbed" || return 1
    eaopd train "${settings[@]}" run.folder="$work/runs/stopped" &
    pid=$!
    while kill -0 $pid 2>/dev/null && [[ ! -s "$work/runs/stopped/metrics.jsonl" ]]; do sleep 0.1; done
    kill -TERM $pid
    wait $pid || code=$?
    eaopd train "${settings[@]}" run.folder="$work/runs/stopped" || return 1
    "$python" tools/gpu_check/report.py compare "$work/runs/undisturbed" "$work/runs/stopped" "$code"
    rm -rf "$work/runs/undisturbed" "$work/runs/stopped"
}

exact() {
    eaopd train "$work/shallow.yaml" run.folder="$work/runs/exact" objective.preset=eopd_exact teacher.offload=weights \
        optimizer.offload=moments optimizer.distributed=true student.recompute=full train.iterations=2
    rm -rf "$work/runs/exact"
}

real_width() {
    eaopd plan "$work/recipe.yaml" --gpus 1 --json "$work/plan.json" >/dev/null || echo "the plan says: does not fit"
    eaopd train "$work/recipe.yaml" || return 1
    "$python" tools/gpu_check/report.py speed "$work/runs/real_width/metrics.jsonl" "$work/plan.json"
}

test_with() { "$python" -m pytest -q -p no:cacheprovider -m gpu -o junit_family=xunit1 "$@"; }

export work python
export -f eaopd two_ranks stop_and_resume exact real_width test_with
run=(bash -c '"$@"' run) # `timeout` starts programs, not functions

"$python" tools/gpu_check/report.py environment >"$work/environment.json" || exit 1
"$python" tools/gpu_check/make_models.py "$work" "${small[@]}" || fail "the random models cannot be written"
if [[ -n "$rehearse" ]]; then
    parallel=() sizes=(--tokens 64 --vocab 1024 --hidden 64 --dtype fp32 --repeats 1)
else
    parallel=(-n 4) sizes=(--tokens 2048 8192 --hidden 2560 --dtype bf16 --repeats 3)
fi
alone="bandwidth or no_memory or 32_bits or by_time"
echo "[$((SECONDS - started)) s] right or wrong: steps side by side"
step kernels 170 "${run[@]}" test_with "${parallel[@]}" --junitxml "$work/kernels.xml" tests/gpu -k "not ($alone)" &
(
    step update_group 60 "$python" tools/gpu_check/update_group.py
    step tp2_sp 80 "${run[@]}" two_ranks tp2_sp 29701 student.sequence_parallel=true
    step pp2 60 "${run[@]}" two_ranks pp2 29703 student.tensor_parallel=1 student.pipeline_parallel=2
) &
(
    step cp2 60 "${run[@]}" two_ranks cp2 29704 student.tensor_parallel=1 student.context_parallel=2
    step dp2_overlap 60 "${run[@]}" two_ranks dp2_overlap 29702 student.tensor_parallel=1 student.data_parallel=2 \
        optimizer.distributed=true optimizer.overlap=true
) &
(
    step stop_and_resume 150 "${run[@]}" stop_and_resume
    step exact 80 "${run[@]}" exact
) &
wait
echo "[$((SECONDS - started)) s] memory and speed: one step at a time"
step memory 110 "$python" tools/gpu_check/memory.py "$work"
"$python" -c 'import transformer_engine.pytorch' 2>/dev/null &&
    step transformer_engine 60 "$python" tools/gpu_check/engine_layers.py "$work"
step real_width 90 "${run[@]}" real_width
step speed 70 "${run[@]}" test_with --junitxml "$work/speed.xml" tests/gpu/test_objective_gpu.py -k "$alone"
step objective 60 "$python" tools/benchmark_objective.py "${sizes[@]}" --json "$work/objective.json"
report
