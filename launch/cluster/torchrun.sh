#!/usr/bin/env bash
# One machine, one process for each GPU:
#
#     launch/cluster/torchrun.sh configs/demo.yaml distributed.strategy=fsdp2
#
# Paths are relative to the project folder, from wherever this is called.
# torchrun sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. The signals below reach every rank; the run ends its
# step, saves and stops, and the same command resumes it. torchrun's own status is then 1, whatever that of the ranks (75).
# If a rank dies or hangs, torchrun restarts all ranks from the newest checkpoint, up to RESTARTS times.
set -euo pipefail

# Edit, or set in the environment.
GPUS="${GPUS:-gpu}"                     # processes: a number, gpu (one for each GPU) or cpu (one for each core, over gloo)
SAVING="${SAVING:-600}"                 # seconds that a checkpoint may take after a signal; torchrun's default is 30, then SIGKILL
RESTARTS="${RESTARTS:-3}"
PYTHON="${PYTHON:-.venv/bin/python}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}" # CPU threads of one process; torchrun's default is 1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="$SAVING" # as --shutdown-timeout, but the ranks see it, too
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1    # every start gets a store of its own (pytorch issue 135712)

cd "$(dirname "$(readlink -f "$0")")/../.."
if ! command -v "$PYTHON" >/dev/null; then
    echo "error: there is no $PYTHON in $PWD: make venv, or set PYTHON" >&2
    exit 2
fi
# Unless told to handle them, torchrun dies of the last three signals and leaves the ranks running.
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$GPUS" --max-restarts "$RESTARTS" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2,SIGXCPU train.py "$@"
