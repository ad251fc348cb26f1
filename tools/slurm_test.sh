#!/usr/bin/env bash
# Evaluate a checkpoint as a Slurm job: one task per GPU.
#
#   tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [OPTION of tools/test.py]...
#
# GPUS, GPUS_PER_NODE, CPUS_PER_TASK, SRUN_ARGS and PYTHON as in slurm_train.sh.
set -euo pipefail

if [[ $# -lt 4 ]]; then
    echo "error: usage: tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT" \
        "[OPTION of tools/test.py]..." >&2
    exit 2
fi
partition=$1
job=$2
config=$3
checkpoint=$4
shift 4

gpus=${GPUS:-8}
per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}
read -ra more <<<"${SRUN_ARGS:-}"
exec srun --partition "$partition" --job-name "$job" --ntasks "$gpus" \
    --ntasks-per-node "$per_node" --gres "gpu:$per_node" --cpus-per-task "${CPUS_PER_TASK:-5}" \
    --kill-on-bad-exit=1 ${more[@]+"${more[@]}"} \
    "${PYTHON:-python}" -u "$(dirname "$0")/test.py" "$config" "$checkpoint" \
    --launcher slurm "$@"
