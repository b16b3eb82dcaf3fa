#!/usr/bin/env bash
# The first run on a GPU, in less than ten minutes: bash experiments/gpu.sh results/gpu
#
# Each step is a command with a time limit. If a step fails, the report says so and the next step runs. The folder gets
# the tables (.md), errors (.log), numbers (.json) and picture (.png) of each step, and report.md with all tables.
# Llama-3.1-8B's shape has random weights. The exit status is 1 if a step failed.
set -u

refuse() {
    echo "gpu: $1" >&2
    exit 2
}

step() { # step NAME SECONDS ARGUMENTS...: run python with these arguments
    local name=$1 limit=$2 result=ok
    shift 2
    echo "gpu: $name, at most $limit s: python $*" >&2
    SECONDS=0
    timeout "$limit" python "$@" >"$out/$name.md" 2>"$out/$name.log" </dev/null ||
        result="failed, status $?: $(cat "$out/$name.md" "$out/$name.log" | tail -n 1)"
    [ "$result" = ok ] || failed=1
    echo "| $name | $SECONDS | $result |" >>"$out/report.md"
    tables+=$'\n## '"$name"$'\n\n'"$(cat "$out/$name.md")"$'\n'
}

[ $# -eq 1 ] || refuse "give a folder for the results, such as results/gpu"
[ ! -e "$1" ] || [ -z "$(ls -A "$1" 2>&1)" ] || refuse "$1 is not an empty folder: give a new one"
gpu=$(python -c "import torch; print(torch.cuda.get_device_name(), 'torch', torch.__version__)" 2>/dev/null) ||
    refuse "no GPU was found"
mkdir -p "$1" 2>/dev/null || refuse "$1 cannot be made"
out=$(cd "$1" && pwd) failed=0 tables=
cd "$(dirname "$0")/.." || exit

printf '# attnpred on %s\n\n| step | seconds | result |\n|---|---|---|\n' "$gpu" >"$out/report.md"
step tests 230 -m pytest -q -p no:cacheprovider test_kernels.py tests/test_offload.py tests/test_streams.py
step kernels 100 -m experiments.bench kernels --contexts 8192 32768 131072 --out "$out/kernels.json"
step speed-8K 40 -m experiments.bench speed --contexts 8192 --rounds 3 --out "$out/speed-8K.json"
step speed-32K 50 -m experiments.bench speed --contexts 32768 --rounds 3 --out "$out/speed-32K.json"
step speed-128K 100 -m experiments.bench speed --contexts 131072 --rounds 3 --out "$out/speed-128K.json"
step trace 40 -m experiments.bench speed --contexts 32768 --rounds 3 --contenders "sparse, offloaded" \
    --trace "$out/trace.perfetto.json"
step kernels-picture 15 -m experiments.plots kernels "$out/kernels.json" --out "$out/kernels.png"
step speed-picture 15 -m experiments.plots speed "$out"/speed-*.json --out "$out/speed.png"
printf '%s\n![kernels](kernels.png)\n\n![speed](speed.png)\n' "$tables" >>"$out/report.md"
exit $failed
