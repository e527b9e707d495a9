"""Resuming from a checkpoint at the start of a training run, and rolling back after a loss spike or steps that are not finite."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from configs.evaluation import sets_of
from configs.load import ConfigError, options
from configs.schema import Config
from launch.checkpoint.folders import CHECKPOINTS
from launch.checkpoint.load import load_checkpoint
from launch.checkpoint.save import Saver
from launch.checkpoint.state import read_state, require_state
from launch.checkpoint.verify import find_checkpoint, step_of
from launch.checkpoint.writer import Progress, no_progress
from launch.distributed.first_rank import on_first_rank
from launch.distributed.heartbeat import Heartbeat
from launch.distributed.strategy import Strategy
from launch.monitoring.guard import Diverged
from launch.monitoring.trackers import flat
from launch.optimizers.third_party import DECAY_BESIDE
from launch.run.agreement import DECOUPLED, require_agreement
from launch.run.branch import Start, checkpoint_folders, choose_start
from launch.run.ranks import checkpoint_fact, require_same
from launch.run.schedule import rate_after
from launch.run.setup import run_folder
from launch.run.state import RunState, from_saved

MAX_ROLLBACKS = 10  # rollbacks in a row that did not help


def find_start(config: Config, run_dir: Path, accelerator: Accelerator, heartbeat: Heartbeat) -> Start:
    """Return the point from which the run starts, chosen by the first rank as `checkpoint.resume` asks. Every rank must call it.

    Each rank gets the checkpoint as its own path, since paths may differ. Only the first rank reads and hashes checkpoints, and
    calls `heartbeat.progress` after each piece.

    Raises:
        ConfigError, CheckpointError: as `choose_start`.
    """

    def choose() -> tuple[Start, int | None, str]:
        """Return the start, the number of the run's folder that holds the checkpoint, and the name of the last folder."""
        start = choose_start(config, run_dir, heartbeat.progress)
        folders = checkpoint_folders(config, run_dir, start.origin)
        own = [n for n, f in enumerate(folders) if start.checkpoint and start.checkpoint.parent.resolve() == f.resolve()]
        return start, own[0] if own else None, folders[-1].name

    heartbeat.mark("looking for a checkpoint", disk=True)
    start, own, second = on_first_rank(accelerator, choose, heartbeat.mark)
    if start.checkpoint is None or own is None or accelerator.is_main_process:
        return start
    folder = run_dir / CHECKPOINTS if own == 0 else Path(str(config.checkpoint.fallback_dir)) / second
    return start._replace(checkpoint=folder / start.checkpoint.name)


def folders_of_line(config: Config, run_dir: Path, start: Start, accelerator: Accelerator, heartbeat: Heartbeat) -> list[Path]:
    """Return the checkpoint folders of the run's line, with the name that the first rank chooses. Every rank must call it."""
    second = on_first_rank(accelerator, lambda: checkpoint_folders(config, run_dir, start.origin)[-1].name, heartbeat.mark)
    parent = config.checkpoint.fallback_dir
    return [run_dir / CHECKPOINTS, *([Path(parent) / second] if parent is not None else [])]


def resume(
    config: Config, start: Start, strategy: Strategy, identity: dict[str, Any], progress: Progress = no_progress
) -> RunState:
    """Load the checkpoint of `start`, if there is one, and add notes and changes to `start`. Returns the state of the run.

    Raises:
        CheckpointError: the checkpoint does not fit this run; the message names the difference.
        ConfigError: the schedule does not fit the step.
    """
    path = start.checkpoint
    if path is None:
        if config.schedule.start:
            raise ConfigError(f"schedule.start is {config.schedule.start}, but the run begins at step 0")
        return RunState()
    saved = read_state(path)
    require_state(path, saved)
    require_agreement(path, saved, config, strategy.model.config, identity)
    rate = rate_after(saved, config)
    load_checkpoint(path, strategy, progress)
    start.changes.extend(changed_options(saved["config"], config))
    if DECOUPLED not in saved["identity"] and any(DECAY_BESIDE in group for group in strategy.optimizer.param_groups):
        start.changes.append("optimizer.weight_decay in the gradient, of an earlier version -> decoupled")
    start.notes.append(f"resumed from {path}" + (f" with {', '.join(start.changes)}" if start.changes else ""))
    start.notes.extend([rate] if rate else [])
    if saved["step"] == saved.get("evaluated") == config.train.steps:
        start.notes.extend(not_evaluated(saved["config"], config, start.changes))
    if saved.get("average") and strategy.average is not None and not strategy.average.begun:
        start.notes.append(
            "the average of the weights is restarted, because the checkpoint's average began earlier or is of another kind"
        )
    window = config.log.profile
    if window is not None and window[1] <= saved["step"] and saved["config"].get("log", {}).get("profile") != window:
        start.notes.append(f"log.profile is {window}, but the run resumes after step {saved['step']}: nothing is traced")
    return from_saved(saved)


def changed_options(saved: dict[str, Any], config: Config) -> list[str]:
    """Return the options that differ from a checkpoint's configuration, in words. An option that it lacks had its default."""
    as_saved = json.loads(json.dumps(asdict(config)))  # in JSON, the keys of a mapping are texts
    before, now = flat(asdict(Config())) | flat(saved), flat(as_saved)
    known = {name for name, _, _ in options()}
    keys = [key for key in now | before if ".".join(key.split(".")[:2]) in known]
    return [f"{key} {before.get(key)} -> {now.get(key)}" for key in keys if before.get(key, "None") != now.get(key, "None")]


def not_evaluated(saved: dict[str, Any], config: Config, changes: list[str]) -> list[str]:
    """Return a note on `changes` of `eval` that come after the run is finished, with commands that evaluate new sets."""
    changed = dict.fromkeys(".".join(change.split(" ")[0].split(".")[:2]) for change in changes)
    asked = [option for option in changed if option.startswith("eval.") and not option.endswith("every")]
    if not asked:
        return []
    known = saved.get("eval", {}).get("sets") or {}
    folder, sequences = shlex.quote(str(run_folder(config))), config.eval.sequences
    commands = [
        f"python -m launch.evaluate {folder} {shlex.quote(new.dir)} --split {new.split} --sequences {sequences}"
        for new in sets_of(config)
        if known.get(new.name) != {"dir": new.dir, "split": new.split}
    ]
    hint = f"; a set is evaluated by {' and '.join(commands)}" if commands else ""
    return [f"the run is finished, and what is new in {' and '.join(asked)} is not evaluated{hint}"]


def roll_back(run_dir: Path, state: RunState, strategy: Strategy, saver: Saver, heartbeat: Heartbeat) -> tuple[RunState, int]:
    """Load the newest checkpoint, and skip the sequences that were taken since then.

    Returns the state from which to resume, and the number of skipped sequences.

    Raises:
        Diverged: there is no checkpoint to roll back to, or too many rollbacks did not help.
        ConfigError: the ranks do not find the same checkpoint.
    """
    accelerator = strategy.accelerator
    heartbeat.mark(f"step {state.step}: rolling back", disk=True)
    saver.wait()

    def find() -> tuple[int, str] | None:
        """Return the number of the folder and the name in it, since the paths of other ranks may differ."""
        found, _ = find_checkpoint(*saver.folders, progress=heartbeat.progress)
        return None if found is None else (saver.folders.index(found.parent), found.name)

    newest = on_first_rank(accelerator, find, heartbeat.mark)
    if newest is None:
        raise Diverged(
            f"step {state.step}: no checkpoint to roll back to: none could be written, or all are damaged; make "
            "room, or continue without rollbacks, with train.on_spike=log"
        )
    path = saver.folders[newest[0]] / newest[1]
    there = step_of(path)
    saver.resumed(there)
    helped = state.healthy_since and state.rolled_back_to != there
    in_a_row = 1 if helped else state.rollbacks_in_a_row + 1
    if in_a_row > MAX_ROLLBACKS:
        raise Diverged(
            f"step {state.step}: {MAX_ROLLBACKS} rollbacks in a row did not help, the last to step {there}: lower optimizer.lr, "
            "or continue without rollbacks, with train.on_spike=log"
        )
    require_same(accelerator, lambda: [checkpoint_fact(path, run_dir)])
    load_checkpoint(path, strategy, heartbeat.progress)
    heartbeat.mark("loaded")
    back = from_saved(read_state(path))
    accelerator.wait_for_everyone()  # all ranks must have read the checkpoint before it is written again
    on = replace(back, sequences=state.sequences, sources=state.sources, bad_steps=state.bad_steps, recent_losses=[])
    on = replace(on, rollbacks=state.rollbacks + 1, rolled_back_to=there, rollbacks_in_a_row=in_a_row, healthy_since=False)
    return on, state.sequences - back.sequences
