#!/usr/bin/env bash
# Usage: bash tools/dist_test.sh CONFIG CHECKPOINT GPUS [options of tools/test.py]
# Evaluates in GPUS processes on this machine, one for each GPU; without a GPU, on CPUs.
# Several machines: run it on each, with NNODES, NODE_RANK (0, 1, ...) and MASTER_ADDR (that of node 0), and PORT
# (29500). One machine takes a free port unless PORT is set.
source "$(dirname "$0")/launching.sh"
need $# CONFIG CHECKPOINT GPUS
need_config "$1"
torchrun "$3" "$(dirname "$0")/test.py" "$1" "$2" --launcher pytorch "${@:4}"
