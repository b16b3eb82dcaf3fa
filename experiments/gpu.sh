#!/usr/bin/env bash
# The first run on a GPU, in two calls, of at most 240 and 400 seconds:
#
#     bash experiments/gpu.sh check results/check && bash experiments/gpu.sh measure results/measure
#
# Each step is a command with a time limit. If a step fails, the report says so and the next step runs. The folder gets
# the output (.md), the errors (.log) and the numbers (.json) of each step, and report.md with all of it. After each
# step all files are packed into FOLDER.tar.gz, so a cut loses one step at most. Models have random weights; the steps
# need torch, triton, numpy, pytest, hypothesis and pytest-xdist, and the packages that attnpred.py itself imports. The
# exit status is 1 if a step failed. A third argument, toy, tries the script without a GPU, in Triton's interpreter.
set -u

refuse() {
    echo "gpu: $1" >&2
    exit 2
}

step() { # step NAME SECONDS ARGUMENTS...: run python with these arguments
    local name=$1 limit=$(($2 * patience)) result=ok
    shift 2
    echo "gpu: $name, at most $limit s: python $*" >&2
    SECONDS=0
    timeout -k 5 "$limit" python "$@" >"$out/$name.md" 2>"$out/$name.log" </dev/null ||
        result="failed, status $?: $(cat "$out/$name.md" "$out/$name.log" | tail -n 1)"
    [ "$result" = ok ] || failed=1
    steps+="| $name | $SECONDS | $result |"$'\n'
    tables+=$'\n## '"$name"$'\n\n'"$(cat "$out/$name.md")"$'\n'
    printf '# attnpred on %s\n\n| step | seconds | result |\n|---|---|---|\n%s%s' "$gpu" "$steps" "$tables" >"$out/report.md"
    tar -czf "$out.tar.gz" -C "$(dirname "$out")" "$(basename "$out")"
}

[ $# -ge 2 ] || refuse "give check or measure, and a folder for the results, such as results/check"
[ ! -e "$2" ] || [ -z "$(ls -A "$2" 2>&1)" ] || refuse "$2 is not an empty folder: give a new one"
if [ "${3-}" = toy ]; then
    export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES=
    gpu="no GPU: a rehearsal" tests=(-k test_assign_slots test_kernels.py) n=64 rounds=1 long=(128) patience=9
    shape=(--model-shape toy) method=(--block-size 8 --sink-tokens 8 --local-tokens 8 --budget 32 --echo-blocks 1
        --history-len 5 --calibration-interval 2)
else
    gpu=$(python -c "import torch; print(torch.cuda.get_device_name(), 'torch', torch.__version__)" 2>/dev/null) ||
        refuse "no GPU was found; a third argument, toy, tries the script without one"
    tests=(-n 12 test_kernels.py tests/test_offload.py) n=4096 rounds=2 long=(8192 32768 131072) patience=1
    shape=(--model-shape llama-3.1-8b) method=()
fi
mkdir -p "$2" 2>/dev/null || refuse "$2 cannot be made"
out=$(cd "$2" && pwd) failed=0 steps= tables=
cd "$(dirname "$0")/.." || exit

speed() { # speed NAME SECONDS CONTEXT OPTIONS...: time decoding
    step "$1" "$2" -m experiments.bench speed --dtypes bfloat16 --backend triton --contexts "$3" --rounds "$rounds" \
        --out "$out/$1.json" "${shape[@]}" ${method[@]+"${method[@]}"} "${@:4}"
}

case $1 in
check)
    step checks 100 -m experiments.check "${shape[@]}" --n-tokens "$n"
    step tests 135 -m pytest -q -p no:cacheprovider "${tests[@]}"
    ;;
measure)
    step kernels 110 -m experiments.bench kernels --backend triton --contexts "${long[@]}" --out "$out/kernels.json" \
        "${shape[@]}" ${method[@]+"${method[@]}"}
    for context in "${long[@]}"; do
        speed "speed-$context" 60 "$context" --contenders dense sparse
    done
    speed trace 35 "${long[0]}" --contenders sparse --trace "$out/trace.perfetto.json"
    speed offloaded 60 "${long[@]: -1}" --contenders "sparse, offloaded"
    ;;
*) refuse "the first argument must be check or measure, not $1" ;;
esac
exit $failed
