#!/usr/bin/env bash
# Evaluate a checkpoint on the GPUs of a machine: one process per GPU.
#
#   tools/dist_test.sh CONFIG CHECKPOINT GPUS [OPTION of tools/test.py]...
#
# PYTHON is the interpreter. Where there is no GPU, GPUS is the number of processes on the CPU.
set -euo pipefail

if [[ $# -lt 3 || ! $3 =~ ^[1-9][0-9]*$ ]]; then
    echo "error: usage: tools/dist_test.sh CONFIG CHECKPOINT GPUS [OPTION of tools/test.py]..." >&2
    exit 2
fi
config=$1
checkpoint=$2
processes=$3
shift 3

exec "${PYTHON:-python}" -m torch.distributed.run --standalone --nproc-per-node "$processes" \
    "$(dirname "$0")/test.py" "$config" "$checkpoint" --launcher pytorch "$@"
