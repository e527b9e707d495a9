#!/usr/bin/env bash
# Restarts a training run until it is done, whatever ended it: a rank that died or hung (70), a signal (75), a lost machine.
#
#     launch/cluster/loop.sh launch/cluster/torchrun.sh configs/demo.yaml distributed.strategy=fsdp2
#
# Each start resumes from the newest checkpoint, with the GPUs that are there. The loop ends with the run in these cases:
# - at status 0; at 2 (bad input) and 130 (stopped at once by a person), which another start does not mend;
# - after a signal to the loop itself, which it passes on to the run, INT and QUIT as TERM;
# - after QUICK failures in a row that took less than SHORT seconds each (torchrun ends with 1 for every reason).
set -uo pipefail

QUICK="${QUICK:-3}"
SHORT="${SHORT:-60}"
PAUSE="${PAUSE:-5}" # seconds before the next start

stopped=no
child=
pass_on() {
    stopped=yes
    interrupted=yes
    local name="$1" # bash starts background children with INT and QUIT ignored, until the child handles them
    [[ "$name" != INT && "$name" != QUIT ]] || name=TERM
    [[ -z "$child" ]] || kill -s "$name" "$child" 2>/dev/null
}
for name in TERM INT HUP QUIT USR1 USR2 XCPU; do
    # shellcheck disable=SC2064
    trap "pass_on $name" "$name"
done

quick=0
while true; do
    began=$SECONDS
    "$@" &
    child=$!
    interrupted=yes
    while [[ "$interrupted" == yes ]]; do # a signal ended the wait before, not the run
        interrupted=no
        wait "$child"
        status=$?
    done
    child=
    if [[ "$stopped" == yes || "$status" == 0 || "$status" == 2 || "$status" == 130 ]]; then
        exit "$status"
    fi
    quick=$((SECONDS - began < SHORT ? quick + 1 : 0))
    if ((quick >= QUICK)); then
        echo "loop: $quick starts in a row ended within $SHORT s, the last with status $status; giving up" >&2
        exit "$status"
    fi
    echo "loop: the run ended with status $status; starting it again" >&2
    sleep "$PAUSE"
    [[ "$stopped" == no ]] || exit "$status"
done
