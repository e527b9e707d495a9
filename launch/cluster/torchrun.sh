#!/usr/bin/env bash
# One machine, one process for each GPU:
#
#     launch/cluster/torchrun.sh configs/demo.yaml distributed.strategy=fsdp2
#
# torchrun sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and hosts the store itself. SIGTERM, SIGINT and
# SIGUSR1 to it reach every rank; the run ends its step, saves and stops, and the same command continues it. torchrun's own
# status is then 1, whatever the ranks say (75).
set -euo pipefail

# Edit, or set in the environment.
GPUS="${GPUS:-gpu}"                     # processes: a number, gpu (one for each GPU) or cpu (one for each core, over gloo)
SAVING="${SAVING:-600}"                 # seconds that a checkpoint may take after a signal; torchrun's own is 30, then SIGKILL
PYTHON="${PYTHON:-.venv/bin/python}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}" # CPU threads of one process; torchrun's own is 1

cd "$(dirname "$0")/../.."
# SIGUSR1 is not among the signals that torchrun handles by itself: it would die of it and leave the ranks behind.
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$GPUS" --shutdown-timeout "$SAVING" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 train.py "$@"
