#!/bin/sh
# Everything worth knowing of a host with two GPUs, in one go: tests while the graphs are built, then benchmarks, which
# need the GPUs alone. Results land in the given folder.
# usage: tools/gpu_session.sh FOLDER SECONDS MODEL[:ROW,...] ...
folder=$1 limit=$2
shift 2
mkdir -p "$folder"
run_tests() {  # NAME SECONDS EXPRESSION
    timeout -k 5 "$2" python3 -m pytest tests/gpu -q -s -p no:cacheprovider -o faulthandler_timeout=40 -k "$3" > "$folder/$1.log" 2>&1
    tail -c 2500 "$folder/$1.log"
}
timeout -k 5 "$limit" python3 tools/bench_together.py "$folder/bench" "$@" --build-limit $((limit - 140)) \
    --wait-for "$folder/tested" > "$folder/bench.log" 2>&1 &
bench=$!
run_tests patterns 120 "every_pattern"
if ! grep -q "[0-9] passed" "$folder/patterns.log"; then
    tail -c 6000 "$folder/bench.log"
    echo "nothing works yet; giving up early"
    exit 1
fi
run_tests failures 150 "test_failures"
run_tests others 170 "not every_pattern and not test_failures"
touch "$folder/tested"
wait "$bench"
tail -c 5500 "$folder/bench.log"
