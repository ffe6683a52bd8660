#!/usr/bin/env bash
# Usage: bash tools/dist_train.sh CONFIG GPUS [options of tools/train.py]
# Trains in GPUS processes on this machine, one for each GPU; without a GPU, on CPUs.
# Several machines: run it on each, with NNODES, NODE_RANK (0, 1, ...) and MASTER_ADDR (that of node 0), and PORT
# (29500). One machine takes a free port unless PORT is set.
source "$(dirname "$0")/launching.sh"
need $# CONFIG GPUS
need_config "$1"
torchrun "$2" "$(dirname "$0")/train.py" "$1" --launcher pytorch "${@:3}"
