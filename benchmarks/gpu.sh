#!/usr/bin/env bash
# What a GPU changes, in at most eight minutes: the tests that need one, the graph of params.yaml, the speed table.
#
#     benchmarks/gpu.sh [gpu.json]
#
# Everything runs in a scratch copy of this working tree, so nothing computed before is used and nothing here changes.
# A step that fails or runs out of time does not stop the others, but the first stage that does ends the graph. The file
# says of every step how long it took, its exit code and, where it failed, the end of its log; the exit code of this
# script is 0 where every step's is. Stages run as `python -m stages.X`, in the order of dvc.yaml, so that a bare machine
# needs neither DVC nor a network:
#
#     PYTHON                 the interpreter (default: .venv/bin/python where it is there, else python3)
#     SPECTRIM_GPU_MODEL     a local .gguf file or model folder in place of model.source
#     SPECTRIM_GPU_TEXTS     a folder with the texts' files, by their own names, in place of every data.*.source
#     SPECTRIM_GPU_PARAMS    another params.yaml
set -u

here=$(cd "$(dirname "$0")/.." && pwd)
out=$(realpath "${1:-gpu.json}")
python=${PYTHON:-python3}
[ -n "${PYTHON:-}" ] || [ ! -x "$here/.venv/bin/python" ] || python=$here/.venv/bin/python
case $python in */*) python=$(realpath --no-symlinks "$python") ;; esac

# seconds after the start by which each part has ended; what one leaves over the next may use
TESTS_UNTIL=120 GRAPH_UNTIL=370 INFERENCE_UNTIL=465
SECONDS=0
export DO_NOT_TRACK=1 HF_HUB_DISABLE_TELEMETRY=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
log=$scratch/log copy=$scratch/copy
mkdir "$log" "$copy"
parameters=$(realpath "${SPECTRIM_GPU_PARAMS:-$here/params.yaml}")
model=${SPECTRIM_GPU_MODEL:+$(realpath "$SPECTRIM_GPU_MODEL")}
texts=${SPECTRIM_GPU_TEXTS:+$(realpath "$SPECTRIM_GPU_TEXTS")}
cd "$here" || exit 2
cp -r spectrim pipeline stages benchmarks tests presets dvc.yaml pyproject.toml requirements.lock "$copy" || exit 2
cp "$parameters" "$copy/params.yaml" || exit 2
cd "$copy" || exit 2

failed=0
step() { # NAME UNTIL COMMAND…: run it and note how it went; returns its exit code, 124 where time was up
    local name=$1 left=$(($2 - SECONDS)) started=$EPOCHREALTIME code=124
    shift 2
    if [ "$left" -gt 0 ]; then
        timeout --kill-after=5 "$left" "$@" >"$log/$name.out" 2>"$log/$name.err"
        code=$?
    fi
    local seconds
    seconds=$(awk -v from="$started" -v to="$EPOCHREALTIME" 'BEGIN { printf "%.1f", to - from }')
    printf '{"step": "%s", "seconds": %s, "exit_code": %d}\n' "$name" "$seconds" "$code" >>"$log/steps.jsonl"
    printf '%-24s %7s s   exit code %d\n' "$name" "$seconds" "$code"
    [ "$code" -eq 0 ] || failed=1
    return "$code"
}
report() { "$python" -m benchmarks.gpu_report "$@"; }

# every file of tests that asks for a GPU anywhere
mapfile -t files < <(grep -rl --include='test_*.py' 'cuda\.is_available' tests | sort)
step tests "$TESTS_UNTIL" "$python" -m pytest -q -p no:cacheprovider --junitxml="$log/tests.xml" "${files[@]}"

if step params 60 "$python" -m benchmarks.gpu_report params "$model" "$texts"; then
    for stage in $(report stages); do
        step "stage.$stage" "$GRAPH_UNTIL" "$python" -m benchmarks.gpu_report stage "$stage" "$log" || break
    done
    step inference "$INFERENCE_UNTIL" "$python" -m benchmarks.inference \
        --ratios 0.5 --batches 1 16 --contexts 512 --repeats 1
fi

report write "$log" "$out" || failed=1
exit "$failed"
