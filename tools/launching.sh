# Shared by dist_*.sh and slurm_*.sh, which source it: usage, checks of arguments, and the commands of the launchers.
# shellcheck shell=bash
set -euo pipefail

# refuse [MESSAGE]: ends the script with its usage (the comment at its top) and an error.
refuse() {
    sed -n -e 1d -e '/^#/!q' -e 's/^# \{0,1\}//p' "$0"
    [[ $# == 0 ]] || echo "${0##*/}: error: $1"
    exit 2
} >&2

# need COUNT NAME...: checks that COUNT arguments are enough for the names.
need() {
    local count=$1
    shift
    ((count >= $#)) || refuse "${*:count+1:1} is missing"
}

# need_config FILE
need_config() {
    [[ -f $1 ]] || refuse "there is no config '$1' (working folder $PWD)"
}

# need_count NAME VALUE
need_count() {
    [[ $2 =~ ^[1-9][0-9]{0,8}$ ]] || refuse "$1 is a whole number of 1 or more, got '$2'"
}

# torchrun GPUS ARGUMENTS...: becomes torchrun with GPUS processes on this machine, one of NNODES.
torchrun() {
    local nodes=${NNODES:-1} rank=${NODE_RANK:-} meeting
    need_count GPUS "$1"
    need_count NNODES "$nodes"
    [[ $nodes == 1 || -n $rank ]] || refuse "NODE_RANK, the number of this node from 0, is missing"
    [[ ${rank:=0} =~ ^(0|[1-9][0-9]{0,8})$ ]] && ((rank < nodes)) ||
        refuse "NODE_RANK is a whole number from 0 to NNODES - 1, which is $((nodes - 1)), got '$rank'"
    if [[ $nodes == 1 && -z ${PORT:-} ]]; then
        meeting=(--standalone --local-addr=127.0.0.1)
    elif [[ $nodes == 1 ]]; then
        meeting=(--master-addr=127.0.0.1 --master-port="$PORT")
    else
        [[ -n ${MASTER_ADDR:-} ]] || refuse "MASTER_ADDR, the address of node 0, is missing"
        meeting=(--nnodes="$nodes" --node-rank="$rank" --master-addr="$MASTER_ADDR" --master-port="${PORT:-29500}")
    fi
    exec python -m torch.distributed.run "${meeting[@]}" --nproc-per-node="$1" "${@:2}"
}

# slurm PARTITION JOB_NAME COMMAND...: becomes srun with GPUS tasks.
slurm() {
    local gpus=${GPUS:-8} cpus=${CPUS_PER_TASK:-5} per_node
    need_count GPUS "$gpus"
    per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}
    need_count GPUS_PER_NODE "$per_node"
    need_count CPUS_PER_TASK "$cpus"
    command -v srun >/dev/null || refuse "srun is not on the PATH: this is for a machine of a Slurm cluster"
    # SRUN_ARGS is split into words.
    # shellcheck disable=SC2086
    exec srun --partition="$1" --job-name="$2" --gres=gpu:"$per_node" --ntasks="$gpus" --ntasks-per-node="$per_node" \
        --cpus-per-task="$cpus" --kill-on-bad-exit=1 ${SRUN_ARGS:-} "${@:3}"
}

case ${1:-} in -h | --help) refuse ;; esac
# torch's default for several processes, without its warning. On CPUs set it to the cores of each process.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} MKL_NUM_THREADS=${MKL_NUM_THREADS:-${OMP_NUM_THREADS:-1}}
