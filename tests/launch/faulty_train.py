"""train.py with one fault on one rank, in any phase of a training run. The tests of faults start it.

FAULT={"rank": 1, "at": PHASE, "do": WHAT, "n": 2} strikes when the rank gets to the phase for the n-th time, in the first start
of the processes alone ("every": true: in all). FOLDER gets pid<rank>, and `fault` at the moment of the fault.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import train
from launch.checkpoint.save import Saver
from launch.distributed.strategy import Strategy
from launch.private import leave
from launch.run.hooks import Hooks
from launch.run.summary import Summary

RANK, FOLDER = int(os.environ.get("RANK", "0")), Path(os.environ["FOLDER"])
FAULT = json.loads(os.environ.get("FAULT", "null"))
# What is called in each phase, on every rank ("summary", "write" and "finish": on the first)
PHASES = {
    "lock": (train, "lock_run"),
    "data": (train, "open_data"),
    "find": (train, "find_start"),
    "model": (train, "make_model"),
    "shard": (train, "make_strategy"),
    "resume": (train, "resume"),
    "step": (Hooks, "before_step"),
    "forward": (Strategy, "loss"),
    "update": (Hooks, "after_backward"),
    "evaluate": (Hooks, "before_evaluation"),
    "summary": (Summary, "update"),
    "save": (Saver, "save"),
    "write": (Hooks, "before_save_phase"),
    "end": (Saver, "close"),
    "finish": (Summary, "finish"),
}


def strike() -> None:
    """Carry out the fault."""
    (FOLDER / "fault").write_text(str(time.time()))
    do = FAULT["do"]
    if do == "raise":
        raise RuntimeError("an assertion of the user's own")
    if do == "hang":
        while True:
            time.sleep(1)
    if do.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, do))
        time.sleep(0.1)
    if do.startswith("slow"):
        time.sleep(float(do.removeprefix("slow")))


def inject() -> None:
    """Put the fault where its phase begins."""
    owner, name = PHASES[FAULT["at"]]
    real, calls = getattr(owner, name), 0

    def faulty(*args, **options):
        nonlocal calls
        calls += 1
        if calls == FAULT.get("n", 1):
            strike()
        return real(*args, **options)

    setattr(owner, name, faulty)


def main(arguments: list[str]) -> int:
    """Run train.py with the fault; returns its exit status."""
    (FOLDER / f"pid{RANK}").write_text(str(os.getpid()))
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and not (FAULT or {}).get("every")
    if FAULT and FAULT["rank"] == RANK and not again:
        inject()
    return train.main(arguments)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
