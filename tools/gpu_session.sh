#!/bin/sh
# Everything worth knowing of a host with two GPUs, in one go: tests, then benchmarks. Results land in the given folder.
# usage: tools/gpu_session.sh FOLDER SECONDS MODEL[:ROW,...] ...
folder=$1 limit=$2
shift 2
mkdir -p "$folder"
timeout -k 5 "$limit" python3 tools/bench_together.py "$folder/bench" "$@" --build-limit $((limit - 110)) \
    > "$folder/bench.log" 2>&1 &
bench=$!
timeout -k 5 120 python3 -m pytest tests/gpu -q -s -p no:cacheprovider -k every_pattern > "$folder/patterns.log" 2>&1
tail -c 3000 "$folder/patterns.log"
if ! grep -q "[0-9] passed" "$folder/patterns.log"; then
    tail -c 6000 "$folder/bench.log"
    echo "nothing works yet; giving up early"
    exit 1
fi
timeout -k 5 170 python3 -m pytest tests/gpu -q -s -p no:cacheprovider -k "not every_pattern" > "$folder/others.log" 2>&1
tail -c 3000 "$folder/others.log"
wait "$bench"
tail -c 5500 "$folder/bench.log"
