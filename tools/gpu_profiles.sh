#!/bin/sh
# Profiles of costs (layers, stages; links where there are several GPUs) of SDXL, SD3, PixArt-Sigma, Flux-dev and
# Wan-1.3B with random weights, into a folder; at most eight minutes on one GPU and 16 cores. Run it from the
# repository's root; run again, it makes what is missing. Further arguments go to gpu_profiles.py.
# usage: tools/gpu_profiles.sh FOLDER [NAME ...] [--limit SECONDS]
folder=$1
shift
USE_FLAX=0 HF_HUB_OFFLINE=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} exec "${PYTHON:-python3}" tools/gpu_profiles.py "$folder" "$@"
