"""Going on from a checkpoint: at the start of a training run, and after a spike of the loss or steps that are not finite."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from configs.schema import Config
from data.batches import Batches
from data.shards import TokenShards
from launch.checkpoint.load import load_checkpoint, read_state
from launch.checkpoint.save import Saver
from launch.checkpoint.verify import CheckpointError, find_checkpoint, verify
from launch.distributed.strategy import Strategy
from launch.monitoring.guard import Diverged
from launch.monitoring.metrics import flat
from launch.run.state import RunState, from_saved, identity

MAX_ROLLBACKS = 10


def resume(config: Config, run_dir: Path, strategy: Strategy, shards: TokenShards) -> tuple[RunState, list[str]]:
    """Begin or continue as `checkpoint.resume` says. Returns the state, and notes for a person to read.

    Raises:
        CheckpointError: a checkpoint of another model, optimizer, data set or batch order, naming the difference; or
            checkpoints of which none is whole.
    """
    notes: list[str] = []
    path: Path | None = None
    if config.checkpoint.resume == "auto":
        path, notes = find_checkpoint(run_dir / "checkpoints")
        if path is None and notes:  # starting from the beginning would throw the run away
            raise CheckpointError(
                f"{run_dir}: no checkpoint is whole ({'; '.join(notes)}); choose another run.dir to start from the beginning"
            )
    elif config.checkpoint.resume != "never":
        path = Path(config.checkpoint.resume)
        verify(path)
    if path is None:
        return RunState(), notes
    saved = read_state(path)
    for key, value in identity(config, shards).items():
        if saved["identity"].get(key) != value:
            raise CheckpointError(f"{path}: its {key} is {saved['identity'].get(key)}, this run's is {value}")
    if saved["step"] > config.train.steps:
        raise CheckpointError(f"{path} is at step {saved['step']}, beyond train.steps={config.train.steps}")
    load_checkpoint(path, strategy)
    before, now = flat(saved["config"]), flat(asdict(config))
    changes = [f"{key} {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]]
    notes.append(f"resumed from {path}" + (f" with {', '.join(changes)}" if changes else ""))
    return from_saved(saved), notes


def roll_back(run_dir: Path, state: RunState, batches: Batches, strategy: Strategy, saver: Saver) -> RunState:
    """Load the newest checkpoint, and leave out the batches that were taken since then. Returns the state to go on from.

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
    start, stop = batches.data_step(back.step), batches.data_step(state.step - 1) + 1
    # The new range contains the earlier ones that begin in it.
    skipped = [earlier for earlier in state.skipped if not start <= earlier[0] < stop] + [(start, stop)]
    strategy.accelerator.wait_for_everyone()  # the checkpoint is about to be written again, with the batches that are left out
    return replace(back, bad_steps=state.bad_steps, rollbacks=state.rollbacks + 1, skipped=skipped)
