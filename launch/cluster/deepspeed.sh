#!/usr/bin/env bash
# DeepSpeed's launcher, for clusters that are reached by ssh (pdsh). The other launchers run the ZeRO strategies as well.
#
#     launch/cluster/deepspeed.sh configs/demo.yaml distributed.strategy=zero3
#
# Paths are relative to the project folder, from wherever this is called.
# The launcher sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; rank 0 hosts the store. A signal to the launcher
# does not save the run: on one machine SIGTERM ends the launcher and leaves the ranks running. Send it to any one rank
# (kill -TERM PID of a train.py), and all save and stop; or use torchrun.sh, or slurm.sbatch, which pass signals on.
set -euo pipefail

# Edit, or set in the environment. A hostfile has a line for each machine with its number of GPUs, such as
#     worker-0 slots=8
#     worker-1 slots=8
# Without a hostfile, all processes run on this machine.
HOSTFILE="${HOSTFILE:-}"
GPUS="${GPUS:-8}"                       # processes on this machine, without a hostfile
PORT="${PORT:-29500}"
DEEPSPEED="${DEEPSPEED:-.venv/bin/deepspeed}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
# export DS_ACCELERATOR=cpu             # on a machine without GPUs: processes over gloo
# Other machines get variables that begin with PYTHON, NCCL, UCX or MV2, and what the file .deepspeed_env lists (A=1).

cd "$(dirname "$(readlink -f "$0")")/../.."
if ! command -v "$DEEPSPEED" >/dev/null; then
    echo "error: there is no $DEEPSPEED in $PWD: make venv, or set DEEPSPEED" >&2
    exit 2
fi
if [[ -n "$HOSTFILE" ]]; then
    where=(--hostfile "$HOSTFILE")
else
    where=(--num_gpus "$GPUS")
fi
# --no_local_rank: without it every rank gets a further argument, --local_rank=N, which train.py refuses.
exec "$DEEPSPEED" "${where[@]}" --master_port "$PORT" --no_local_rank train.py "$@"
