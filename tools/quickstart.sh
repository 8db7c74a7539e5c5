#!/usr/bin/env bash
# Creates the environment if it is missing and distils the Countdown teacher into its student on two ranks of this machine.
#
#   bash tools/quickstart.sh [a.b.c=value ...]     override settings of the recipe, for example seed=1 run.folder=runs/second
set -euo pipefail
# shellcheck source=tools/lib/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"

recipe=recipes/countdown/eopd.yaml
cd "$root"
prepare_environment run
folder="$("$python" -m eaopd_megatron show "$recipe" "$@" --key run.folder)"
"$python" -m eaopd_megatron train "$recipe" "$@"

echo
echo "Results in $folder:"
[[ ! -f "$folder/report.html" ]] || echo "  report.html    the run with its plots: open it in a browser"
[[ ! -d "$folder/student" ]] || echo "  student/       the distilled student: transformers.AutoModelForCausalLM.from_pretrained(\"$folder/student\")"
[[ ! -f "$folder/metrics.jsonl" ]] || echo "  metrics.jsonl  every number of every iteration"
