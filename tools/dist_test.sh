#!/usr/bin/env bash
# Usage: bash tools/dist_test.sh CONFIG CHECKPOINT GPUS [options of tools/test.py]
# Evaluates in GPUS processes on this machine, one for each GPU; without a GPU, on CPUs.
# Several machines: run it on each, with NNODES, NODE_RANK (0, 1, ...) and MASTER_ADDR (that of node 0), and PORT
# (29500). One machine takes a free port unless PORT is set.
set -euo pipefail
CONFIG=${1:?config file}
CHECKPOINT=${2:?checkpoint file}
GPUS=${3:?number of GPUs}
if [[ ${NNODES:-1} == 1 && -z ${PORT:-} ]]; then
    MEETING=(--standalone --local-addr=127.0.0.1)
elif [[ ${NNODES:-1} == 1 ]]; then
    MEETING=(--master-addr=127.0.0.1 --master-port="$PORT")
else
    MEETING=(--nnodes="$NNODES" --node-rank="${NODE_RANK:?number of this node, from 0}")
    MEETING+=(--master-addr="${MASTER_ADDR:?address of node 0}" --master-port="${PORT:-29500}")
fi
# torch's default for several processes, said without its warnings. On CPUs set it to the cores of each process.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} MKL_NUM_THREADS=${MKL_NUM_THREADS:-${OMP_NUM_THREADS:-1}}
exec python -m torch.distributed.run "${MEETING[@]}" --nproc-per-node="$GPUS" \
    "$(dirname "$0")/test.py" "$CONFIG" "$CHECKPOINT" --launcher pytorch "${@:4}"
