#!/bin/sh
# Profiles of costs (layers, stages; links where there are several GPUs) of SDXL, SD3, PixArt-Sigma, Flux-dev and
# Wan-1.3B with random weights, into a folder. Compiling wants cores: all five took under six minutes beside 32 of them;
# with 16, name one or two at a time. Run it from the repository's root; run again, it makes what is missing. Further
# arguments go to gpu_profiles.py, whose --helpers are for each architecture.
# usage: tools/gpu_profiles.sh FOLDER [NAME ...] [--limit SECONDS]
folder=$1
shift
USE_FLAX=0 HF_HUB_OFFLINE=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} exec "${PYTHON:-python3}" tools/gpu_profiles.py "$folder" "$@"
