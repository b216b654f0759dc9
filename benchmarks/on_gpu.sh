#!/usr/bin/env bash
# All that one GPU can tell of this package in ten minutes, with nothing to download.
#
#     benchmarks/on_gpu.sh OUT            # a GPU
#     benchmarks/on_gpu.sh OUT --small    # a CPU, with sizes whose numbers mean nothing: whether it runs through
#
# Wheels in the folder WHEELS are installed first, if there is one. OUT gets a JSON file and the output of each part,
# and table.md. A part that fails does not stop the rest; the exit code is then 1.
set -u
out=${1:?"the folder of the results"}
small=${2:-}
python=${PYTHON:-python}
mkdir -p "$out"
out=$(cd "$out" && pwd)
if [ -n "${WHEELS:-}" ]; then
    "$python" -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl || exit 1
fi
cd "$(dirname "$0")/.." || exit 1
if [ "$small" = --small ]; then
    device=cpu
    step=(--model tiny --batch 2 --repeats 2) walk=(--size 12 16 --repeats 2) crf=(--size 40 50 --count 2 --repeats 2)
    stages=(--size 40 50 --count 2) inference=(--backbone scenes --size 48 64 --count 2 --rounds 1)
    chain=(--tiny --images 4 --val 2 --steps 2 --workers 0)
else
    device=cuda
    step=() walk=() crf=(--count 8) stages=(--count 8) inference=() chain=(--precision bf16 --workers 8)
fi
failed=0
longer=1  # times the seconds that a part may take
[ "$small" = --small ] && longer=20

part() { # name, seconds at most, command
    local name=$1 seconds=$2
    shift 2
    echo "== $name"
    timeout "$((longer * seconds))" "$@" > "$out/$name.txt" 2>&1
    local code=$?
    tail -n 3 "$out/$name.txt"
    if [ "$code" -ne 0 ]; then
        echo "$name: exit code $code, see $out/$name.txt"
        failed=1
    fi
}

"$python" -c 'import json; from cacl._support.hardware import described; print(json.dumps(described()))' \
    > "$out/machine.json" || exit 1
if [ "$device" = cuda ]; then
    part tests 150 "$python" -m pytest -q -m cuda tests
fi
part step 80 "$python" benchmarks/step.py --device "$device" --json "$out/step.json" "${step[@]}"
part inference 50 "$python" benchmarks/inference.py --device "$device" --json "$out/inference.json" "${inference[@]}"
part walk 50 "$python" benchmarks/random_walk.py --device "$device" --json "$out/walk.json" "${walk[@]}"
part crf 50 "$python" benchmarks/crf.py --device "$device" --json "$out/crf.json" "${crf[@]}"
part stages 50 "$python" benchmarks/stages.py --device "$device" --json "$out/stages.json" "${stages[@]}"
part chain 130 "$python" benchmarks/chain.py --device "$device" --json "$out/chain.json" "${chain[@]}"
"$python" benchmarks/tables.py "$out" || failed=1
exit "$failed"
