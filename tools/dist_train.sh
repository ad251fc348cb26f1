#!/usr/bin/env bash
# Train on the GPUs of a machine, or of several: one process per GPU.
#
#   tools/dist_train.sh CONFIG GPUS [OPTION of tools/train.py]...
#
# On several machines, run it on each of them, with the address of the first:
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 tools/dist_train.sh CONFIG 8
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=10.0.0.1 tools/dist_train.sh CONFIG 8
# MASTER_PORT is 29500 unless it is set; PYTHON is the interpreter. Where there is no GPU, GPUS is
# the number of processes on the CPU.
set -euo pipefail

if [[ $# -lt 2 || ! $2 =~ ^[1-9][0-9]*$ ]]; then
    echo "error: usage: tools/dist_train.sh CONFIG GPUS [OPTION of tools/train.py]..." >&2
    exit 2
fi
config=$1
processes=$2
shift 2

if [[ ${NNODES:-1} == 1 ]]; then
    meet=(--standalone) # on a free port: two trainings do not meet by mistake
else
    meet=(
        --nnodes "$NNODES"
        --node-rank "${NODE_RANK:?is the number of this machine, 0 to NNODES - 1}"
        --master-addr "${MASTER_ADDR:?is the address of the machine with NODE_RANK 0}"
        --master-port "${MASTER_PORT:-29500}"
    )
fi
exec "${PYTHON:-python}" -m torch.distributed.run "${meet[@]}" --nproc-per-node "$processes" \
    "$(dirname "$0")/train.py" "$config" --launcher pytorch "$@"
