#!/usr/bin/env bash
# Usage: [GPUS=8] [GPUS_PER_NODE=8] [CPUS_PER_TASK=5] [SRUN_ARGS="..."]
#        bash tools/slurm_train.sh PARTITION JOB_NAME CONFIG [options of tools/train.py]
# Trains in GPUS tasks of Slurm, GPUS_PER_NODE of them on each node. A task without a GPU (SRUN_ARGS=--gres=none) runs
# on a CPU. What SRUN_ARGS says again counts.
set -euo pipefail
PARTITION=${1:?partition}
JOB_NAME=${2:?job name}
CONFIG=${3:?config file}
GPUS=${GPUS:-8}
GPUS_PER_NODE=${GPUS_PER_NODE:-$((GPUS < 8 ? GPUS : 8))}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} MKL_NUM_THREADS=${MKL_NUM_THREADS:-${OMP_NUM_THREADS:-1}}
# SRUN_ARGS is meant to fall into words.
# shellcheck disable=SC2086
exec srun --partition="$PARTITION" --job-name="$JOB_NAME" --gres=gpu:"$GPUS_PER_NODE" \
    --ntasks="$GPUS" --ntasks-per-node="$GPUS_PER_NODE" --cpus-per-task="${CPUS_PER_TASK:-5}" \
    --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
    python -u "$(dirname "$0")/train.py" "$CONFIG" --launcher slurm "${@:4}"
