#!/usr/bin/env bash
# Usage: [GPUS=8] [GPUS_PER_NODE=8] [CPUS_PER_TASK=5] [SRUN_ARGS="..."]
#        bash tools/slurm_train.sh PARTITION JOB_NAME CONFIG [options of tools/train.py]
# Trains in GPUS tasks of Slurm, GPUS_PER_NODE of them on each node. A task without a GPU (SRUN_ARGS=--gres=none) runs
# on a CPU. Options in SRUN_ARGS override the others.
source "$(dirname "$0")/launching.sh"
need $# PARTITION JOB_NAME CONFIG
need_config "$3"
slurm "$1" "$2" python -u "$(dirname "$0")/train.py" "$3" --launcher slurm "${@:4}"
