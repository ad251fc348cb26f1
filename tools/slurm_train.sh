#!/usr/bin/env bash
# Train as a Slurm job: one task per GPU, on as many machines as that takes.
#
#   tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [OPTION of tools/train.py]...
#
# GPUS (8), GPUS_PER_NODE (8 or GPUS, whichever is less) and CPUS_PER_TASK (5) say how many;
# SRUN_ARGS is more for srun, such as "--time 12:00:00 --account lab"; PYTHON is the interpreter.
# A job that was ended goes on by the same command with --resume.
set -euo pipefail

if [[ $# -lt 4 ]]; then
    echo "error: usage: tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR" \
        "[OPTION of tools/train.py]..." >&2
    exit 2
fi
partition=$1
job=$2
config=$3
work_dir=$4
shift 4

gpus=${GPUS:-8}
per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}
read -ra more <<<"${SRUN_ARGS:-}"
exec srun --partition "$partition" --job-name "$job" --ntasks "$gpus" \
    --ntasks-per-node "$per_node" --gres "gpu:$per_node" --cpus-per-task "${CPUS_PER_TASK:-5}" \
    --kill-on-bad-exit=1 ${more[@]+"${more[@]}"} \
    "${PYTHON:-python}" -u "$(dirname "$0")/train.py" "$config" --work-dir "$work_dir" \
    --launcher slurm "$@"
