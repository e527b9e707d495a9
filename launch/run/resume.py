"""Going on from a checkpoint: at the start of a training run, and after a spike of the loss or steps that are not finite."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from configs.schema import Config
from launch.checkpoint.load import load_checkpoint, read_state, require_state
from launch.checkpoint.save import Saver
from launch.checkpoint.verify import find_checkpoint
from launch.distributed.first_rank import on_first_rank
from launch.distributed.strategy import Strategy
from launch.monitoring.guard import Diverged
from launch.monitoring.metrics import flat
from launch.run.agreement import require_agreement
from launch.run.branch import Start, choose_start
from launch.run.state import RunState, from_saved

MAX_ROLLBACKS = 10


def resume(config: Config, run_dir: Path, strategy: Strategy, identity: dict[str, Any]) -> tuple[RunState, Start]:
    """Begin or continue as `checkpoint.resume` says. Returns the state, and the start with notes for a person to read.

    Raises:
        ConfigError, CheckpointError: as `choose_start`; a checkpoint that does not agree with this run, naming the difference.
    """
    start = on_first_rank(strategy.accelerator, partial(choose_start, config, run_dir))
    path = start.checkpoint
    if path is None:
        return RunState(), start
    saved = read_state(path)
    require_state(path, saved)
    require_agreement(path, saved, config, strategy.model.config, identity)
    load_checkpoint(path, strategy)
    before, now = flat(saved["config"]), flat(asdict(config))
    changes = [f"{key} {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]]
    start.notes.append(f"resumed from {path}" + (f" with {', '.join(changes)}" if changes else ""))
    return from_saved(saved), start


def roll_back(run_dir: Path, state: RunState, strategy: Strategy, saver: Saver) -> tuple[RunState, int]:
    """Load the newest checkpoint, and leave out the sequences that were taken since then.

    Returns the state to go on from, and how many sequences are left out.

    Raises:
        Diverged: no checkpoint to go back to, or too many rollbacks.
    """
    saver.wait()
    strategy.accelerator.wait_for_everyone()
    path, _ = find_checkpoint(run_dir / "checkpoints")
    if path is None:
        raise Diverged(f"step {state.step}: no checkpoint to roll back to")
    if state.rollbacks >= MAX_ROLLBACKS:
        raise Diverged(f"step {state.step}: {MAX_ROLLBACKS} rollbacks did not help")
    load_checkpoint(path, strategy)
    back = from_saved(read_state(path))
    strategy.accelerator.wait_for_everyone()  # the checkpoint is about to be written again, with what is left out
    on = replace(back, sequences=state.sequences, bad_steps=state.bad_steps, rollbacks=state.rollbacks + 1)
    return on, state.sequences - back.sequences
