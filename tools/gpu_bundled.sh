#!/bin/sh
# Full profiles (times, links between all GPUs, discrepancy, image errors) of both bundled models on this machine's GPUs,
# into FOLDER/unet.json and FOLDER/mmdit.json. Run it from the repository's root; further arguments go to the profiler.
# usage: tools/gpu_bundled.sh FOLDER [OPTION ...]
folder=$1
shift
mkdir -p "$folder"
for model in unet mmdit; do
    USE_FLAX=0 HF_HUB_OFFLINE=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} "${PYTHON:-python3}" -m hybridiff_compiler \
        profile "bundled:$model" --device cuda --dtype float32 -o "$folder/$model.json" "$@" || exit 1
done
