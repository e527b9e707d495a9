"""Going back: `checkpoint.resume=CHECKPOINT` makes a training run go on from any checkpoint, its own or another run's.

The run's folder then holds one line of steps, up to the checkpoint and on from there. What the folder held beyond the checkpoint
is moved to `set_aside/1` (2, 3, ...), which is the folder of a training run, too: it can be continued, compared and exported.
The checkpoint itself is in the run's `checkpoints/`, linked or copied there from another run, whose metrics up to that step come
along. `origin.json` records where the line began, so that the same command continues it instead of going back once more.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from configs.load import ConfigError, options
from configs.schema import Config
from data.files import read_json, replacing
from launch.checkpoint.folders import CHECKPOINTS, FALLBACK, choose_checkpoint, folders_of, second_folder
from launch.checkpoint.publish import flush, remove, remove_leftovers, temporary_folder
from launch.checkpoint.state import read_state
from launch.checkpoint.verify import (
    MANIFEST,
    CheckpointError,
    checkpoint_files,
    checkpoint_name,
    find_checkpoint,
    list_checkpoints,
    sha256,
    step_of,
)
from launch.checkpoint.writer import Progress, no_progress
from launch.monitoring.trackers import ID_FILES, flat
from launch.run.restart import read_events
from launch.run.schedule import with_cooldown

# What changes the steps of a line: with another value there, the same checkpoint is another line's beginning.
DECISIVE = ("run.seed", "model.", "optimizer.", "schedule.", "train.")
INCIDENTAL = (
    "model.gradient_checkpointing", "train.steps", "train.micro_batch_size", "train.compile", "train.on_batch_change",
    "train.tokens", "train.deterministic", "train.max_bad_steps", "train.spike", "train.on_spike",
)  # fmt: skip
FOLDERS = ("tensorboard", "profile")  # in a run's folder, of one line alone: they move with the line that is set aside
WORDS = {  # what people write for the two words that checkpoint.resume knows
    **dict.fromkeys(("auto", "latest", "newest", "last", "true", "yes", "on"), "auto continues from the newest checkpoint"),
    **dict.fromkeys(("never", "false", "no", "off", "none", "null"), "never begins at step 0, in a folder that holds no run"),
}


@dataclass(frozen=True)
class Origin:
    """Where a line of steps began, as in origin.json."""

    resume: str  # checkpoint.resume as an absolute path
    checkpoint: str  # the checkpoint that it led to, resolved
    manifest: str  # sha256 of its manifest: the checkpoint is known again, wherever it is copied or moved to
    step: int
    own: bool  # it was among the run's own checkpoints
    settings: dict[str, Any]  # of the run, as far as they are DECISIVE
    id: str  # names the line to the trackers; empty where the run just went on from its newest checkpoint
    set_aside: str | None = None  # where the steps beyond the checkpoint went, below the run's folder
    done: bool = False  # everything is in its place
    before: dict[str, Any] | None = None  # the origin.json of the line that was set aside


class Start(NamedTuple):
    """Where a start of a training run takes up."""

    checkpoint: Path | None  # None: from the beginning
    notes: list[str]
    origin: Origin | None  # of the line; None: it began at step 0
    begins: bool  # the line begins with this start: `begin_line` is due
    changes: list[str]  # options that are others than in the checkpoint, in words; `resume` fills it

    def event(self) -> dict[str, Any] | None:
        """The event that says that the run branches; None if it does not."""
        if not (self.begins and self.origin and self.origin.id):
            return None
        return {"event": "branch", "step": self.origin.step, "from": self.origin.checkpoint, "set_aside": self.origin.set_aside}


def checkpoint_folders(config: Config, run_dir: Path, origin: Origin | None) -> list[Path]:
    """Where the checkpoints of a line are: in the run's folder, and in a folder of its own below `checkpoint.fallback_dir`."""
    folders = [run_dir / CHECKPOINTS]
    if config.checkpoint.fallback_dir is not None:
        folders.append(Path(config.checkpoint.fallback_dir) / fallback_name(run_dir, origin))
    return folders


def fallback_name(run_dir: Path, origin: Origin | None) -> str:
    """The name of a line's folder below `checkpoint.fallback_dir`: what the run's folder says, or else one that nobody has.

    So the line keeps its folder where the run's own is moved, or other nodes know it by another path.
    """
    if (kept := second_folder(run_dir)) is not None:
        return kept.name
    line = f"{run_dir.resolve()}\n{origin.id}{origin.manifest}" if origin else str(run_dir.resolve())
    return f"{run_dir.resolve().name}-{hashlib.sha256(line.encode()).hexdigest()[:12]}"


def choose_start(config: Config, run_dir: Path, progress: Progress = no_progress) -> Start:
    """The checkpoint that `checkpoint.resume` means. Finishes what a killed process left, and changes nothing else.

    `progress` is called while it hashes checkpoints.

    Raises:
        ConfigError: "never", and the folder holds a run.
        CheckpointError: no whole checkpoint where there must be one.
    """
    remove_leftovers(run_dir / CHECKPOINTS)
    put_in_place(run_dir, progress)
    checkpoints, origin = run_dir / CHECKPOINTS, read_origin(run_dir)
    folders = checkpoint_folders(config, run_dir, origin)
    for folder in folders[1:]:
        remove_leftovers(folder)
    if config.checkpoint.resume == "never":
        if (run_dir / "metrics.jsonl").exists() or any(map(list_checkpoints, folders)):
            raise ConfigError(f"{run_dir} holds a run already: choose another run.dir, or checkpoint.resume=auto to continue it")
        return Start(None, [], None, False, [])
    if config.checkpoint.resume != "auto":
        given = Path(config.checkpoint.resume).expanduser()
        if not (given.is_dir() and given.resolve() == run_dir.resolve()) and not is_line_of(origin, given, config):
            return branch_from(given, config, run_dir, progress)
    require_newest(run_dir, folders)
    path, notes = find_checkpoint(*folders, progress=progress)
    if path is None and notes:  # starting from the beginning would throw the run away
        raise CheckpointError(
            f"{run_dir}: no checkpoint is whole ({'; '.join(notes)}); choose another run.dir to start from the beginning"
        )
    saved = [e["step"] for e in read_events(run_dir) if e.get("event") == "checkpoint" and "step" in e and "error" not in e]
    if path is None and origin is None and saved:  # as where a disk is not mounted
        raise CheckpointError(
            f"{run_dir} saved a checkpoint of step {saved[-1]} (events.jsonl), but {checkpoints} holds none now: mount it or "
            "bring it back, or choose another run.dir to start from the beginning"
        )
    if path is None and origin is not None:
        again = f", and checkpoint.resume={origin.checkpoint} to begin there again" if Path(origin.checkpoint).is_dir() else ""
        raise CheckpointError(
            f"{run_dir} began at {origin.checkpoint}, but holds no checkpoint any more; choose another run.dir{again}"
        )
    copies = [] if path else sorted(copy.parent.name for copy in checkpoints.glob(f"step_*/{MANIFEST}"))
    if copies:
        raise CheckpointError(
            f"{checkpoints} holds no step_<digits>, but {', '.join(copies)}: name one with checkpoint.resume, or another run.dir"
        )
    if origin is not None and path is not None and config.checkpoint.resume != "auto" and step_of(path) > origin.step:
        notes.append(
            f"{run_dir} already went on from step {origin.step} and continues; to begin there again, name another run.dir"
        )
    return Start(path, notes, origin, False, [])


def require_newest(run_dir: Path, folders: list[Path]) -> None:
    """Raise CheckpointError if the run's second folder, which is none of `folders`, holds newer checkpoints than they do."""
    here = {folder.resolve() for folder in folders}
    newest = max((step_of(path) for folder in folders for path in list_checkpoints(folder)), default=-1)
    for folder in folders_of(run_dir)[1:]:
        step = max(map(step_of, list_checkpoints(folder)), default=-1)
        if folder.resolve() not in here and step > newest:
            raise CheckpointError(
                f"{run_dir} has its checkpoint of step {step} in {folder}: continue with checkpoint.fallback_dir={folder.parent}"
            )


def is_line_of(origin: Origin | None, given: Path, config: Config) -> bool:
    """Whether the line in the run's folder began at the checkpoint or run `given`, with the same settings."""
    if origin is None:
        return False
    if not same_settings(origin.settings, decisive(with_cooldown(config, origin.step))):
        return False
    path = Path(origin.checkpoint) if origin.own else Path(origin.resume).resolve()
    return given.resolve() == path or ((given / MANIFEST).is_file() and sha256(given / MANIFEST) == origin.manifest)


def same_settings(there: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether `there`, as in origin.json, are the `decisive` settings `now`. An option that it does not know had its default.

    Of an option that is a mapping, each key is a setting; a key that is missing is null.
    """
    before = decisive(Config()) | {key: value for key, value in there.items() if is_decisive(key)}
    known = {name for name, _, _ in options()}
    keys = [key for key in before | now if ".".join(key.split(".")[:2]) in known]
    return all(before.get(key, "None") == now.get(key, "None") for key in keys)


def no_such_folder(given: Path, run_dir: Path) -> CheckpointError:
    """The error for a `checkpoint.resume` that is no folder, with what may be meant."""
    moved = sorted(path for path in run_dir.glob("set_aside/*/checkpoints/*") if path.name == given.name)
    there = [path.name for path in list_checkpoints(given.parent)] if given.parent.is_dir() else []
    hint = f"; there is {moved[-1]}" if moved else f"; beside it are {', '.join(there)}" if there else ""
    meant = WORDS.get(str(given).lower())
    hint = f"; {meant}" if meant else hint
    return CheckpointError(f"checkpoint.resume: {given} is no whole checkpoint: there is no such folder{hint}")


def branch_from(given: Path, config: Config, run_dir: Path, progress: Progress = no_progress) -> Start:
    """The start of a new line at the checkpoint or run `given`."""
    if not given.is_dir():
        raise no_such_folder(given, run_dir)
    found, _, notes = choose_checkpoint(given.resolve(), progress)
    checkpoint = found.resolve()
    own = checkpoint.parent == (run_dir / CHECKPOINTS).resolve()
    step, manifest = read_state(checkpoint)["step"], sha256(checkpoint / MANIFEST)
    origin = Origin(
        os.path.abspath(given), str(checkpoint), manifest, step, own, decisive(with_cooldown(config, step)), uuid.uuid4().hex
    )
    second = [path for folder in folders_of(run_dir)[1:] for path in list_checkpoints(folder) if step_of(path) > step]
    if second or beyond(run_dir, origin) or (not own and (run_dir / "metrics.jsonl").exists()):
        used = [int(path.name) for path in run_dir.glob("set_aside/*") if path.name.isdigit()]
        origin = replace(origin, set_aside=f"set_aside/{max(used, default=0) + 1}")
        aside = run_dir / str(origin.set_aside)
        require_room(run_dir, beyond(run_dir, origin))
        notes = [*notes, f"what {run_dir} held beyond step {step} is kept in {aside}, a run's folder of its own"]
    elif own:
        origin = replace(origin, id="")
    return Start(checkpoint, notes, origin, True, [])


def config_of_line(config: Config, origin: Origin | None) -> Config:
    """`config`, with the schedule that `schedule.cooldown` makes of it for the line that began at `origin`.

    Raises:
        ConfigError: a cooldown, and no checkpoint from which on it holds.
    """
    wanted = config.schedule.cooldown
    if not wanted:
        return config
    if origin is None or origin.settings.get("schedule.cooldown") != wanted:
        raise ConfigError(
            f"schedule.cooldown={wanted} begins at a checkpoint: name one, checkpoint.resume=RUN/checkpoints/step_..., and "
            "another run.dir"
        )
    return with_cooldown(config, origin.step)


def config_to_plan(config: Config, run_dir: Path) -> Config:
    """As `config_of_line` for the line that training would begin or continue, without touching the folder."""
    origin, given = read_origin(run_dir), Path(config.checkpoint.resume).expanduser()
    if not config.schedule.cooldown or config.checkpoint.resume in ("auto", "never") or is_line_of(origin, given, config):
        return config_of_line(config, origin)
    if not given.is_dir():
        raise no_such_folder(given, run_dir)
    return with_cooldown(config, read_state(choose_checkpoint(given.resolve()).path)["step"])


def decisive(config: Config) -> dict[str, Any]:
    """The settings that a line of steps depends on."""
    return {key: value for key, value in flat(asdict(config)).items() if is_decisive(key)}


def is_decisive(key: str) -> bool:
    """Whether a line of steps depends on a setting."""
    return key.startswith(DECISIVE) and key not in INCIDENTAL


def begin_line(run_dir: Path, origin: Origin, progress: Progress = no_progress) -> None:
    """Make the run's folder hold the line that begins at `origin`. A kill at any moment is made good by the next start.

    Raises:
        OSError, CheckpointError: the disk is full, or the other run's checkpoint is gone.
    """
    before = read_origin(run_dir)
    write_origin(run_dir, replace(origin, before=asdict(replace(before, before=None)) if before else None))
    put_in_place(run_dir, progress)


def put_in_place(run_dir: Path, progress: Progress = no_progress) -> None:
    """Carry out what origin.json says, as far as it is not done yet. `progress` is called after each file that it copies."""
    origin = read_origin(run_dir)
    if origin is None or origin.done:
        return
    checkpoints, source = run_dir / CHECKPOINTS, Path(origin.checkpoint)
    checkpoints.mkdir(parents=True, exist_ok=True)
    if origin.set_aside is not None:
        aside = run_dir / origin.set_aside
        if not aside.exists():
            copy_files(run_dir, aside, origin.before)
        for path in beyond(run_dir, origin):
            move_checkpoint(path, aside / CHECKPOINTS / path.name, progress)
        for name in FOLDERS:
            if (run_dir / name).exists() and not (aside / name).exists():
                (run_dir / name).rename(aside / name)
        for name in ID_FILES:
            (run_dir / name).unlink(missing_ok=True)  # the new line is a run of its own there
    target = checkpoints / checkpoint_name(origin.step)
    if not is_copy(target, origin):
        link_checkpoint(source, target, progress)
    (run_dir / FALLBACK).unlink(missing_ok=True)
    if not origin.own:
        runs = [source.parent.parent, Path(origin.resume), *run_dir.glob("set_aside/*")]
        of = [run / "metrics.jsonl" for run in runs if source.parent in (folder.resolve() for folder in folders_of(run))]
        known = next(filter(Path.exists, of), None)
        replace_file(run_dir / "metrics.jsonl", known.read_bytes() if known else b"")
        if known and not (run_dir / "events.jsonl").exists():  # what was changed before it is of the new line, too
            changes = [e for e in read_events(known.parent) if e.get("event") == "changed" and e.get("step", 0) < origin.step]
            replace_file(run_dir / "events.jsonl", "".join(json.dumps(event) + "\n" for event in changes).encode())
    write_origin(run_dir, replace(origin, done=True))


def beyond(run_dir: Path, origin: Origin) -> list[Path]:
    """The checkpoints of a run's folder that do not belong to the line of `origin`."""
    found = list_checkpoints(run_dir / CHECKPOINTS)
    return [path for path in found if not (origin.own and step_of(path) < origin.step) and not is_copy(path, origin)]


def is_copy(path: Path, origin: Origin) -> bool:
    """Whether `path` is the checkpoint of `origin`, under its usual name."""
    manifest = path / MANIFEST
    return step_of(path) == origin.step and manifest.is_file() and sha256(manifest) == origin.manifest


def copy_files(run_dir: Path, aside: Path, before: dict[str, Any] | None) -> None:
    """Make `aside` a run's folder with the files of `run_dir`, but without checkpoints yet. It appears complete."""
    partial = aside.with_name(f".{aside.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / CHECKPOINTS).mkdir(parents=True)
    for file in run_dir.iterdir():
        if file.is_file() and file.name not in ("lock", "origin.json"):
            shutil.copy2(file, partial / file.name)
    if before is not None:
        (partial / "origin.json").write_text(json.dumps(before, indent=1), encoding="utf-8")
    partial.rename(aside)
    flush(aside.parent)


def require_room(run_dir: Path, checkpoints: list[Path]) -> None:
    """Raise CheckpointError if `checkpoints`, of a run, are on another disk than its folder, which has no room for them."""
    elsewhere = [path for path in checkpoints if path.stat().st_dev != run_dir.stat().st_dev]
    needed = sum(file.stat().st_size for path in elsewhere for file in path.rglob("*"))
    free = shutil.disk_usage(run_dir).free
    if needed > free:
        raise CheckpointError(
            f"{run_dir}: the checkpoints that going back sets aside are on another disk and take {needed / 1e9:.3g} GB, but here "
            f"are {free / 1e9:.3g} GB free; make room, or choose another run.dir"
        )


def copy_folder(source: Path, target: Path, progress: Progress = no_progress) -> None:
    """Copy a folder, whose files are on the disk when this returns. Raises OSError, with its first reason."""

    def copy(file: str, to: str) -> None:
        shutil.copy2(file, to)
        flush(Path(to))
        progress()

    try:
        shutil.copytree(source, target, symlinks=True, copy_function=copy)
    except shutil.Error as error:
        raise OSError(f"{source} cannot be copied to {target}: {error.args[0][0][2]}") from None


def move_checkpoint(path: Path, target: Path, progress: Progress = no_progress) -> None:
    """Make `target` what the checkpoint `path` is, which goes. A kill leaves one of them whole, or both, and this goes on then.

    Raises:
        OSError: the disk is full, for one.
    """
    try:
        path.rename(target)
        return
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
    if not target.exists():  # `checkpoints` is a link to another disk, or mounted
        partial = temporary_folder(target.parent, step_of(target))
        shutil.rmtree(partial, ignore_errors=True)
        copy_folder(path, partial, progress)
        partial.rename(target)
        flush(target.parent)
    leftover = temporary_folder(path.parent, step_of(path))
    remove(leftover)
    path.rename(leftover)
    remove(leftover)


def link_checkpoint(source: Path, target: Path, progress: Progress = no_progress) -> None:
    """Make `target` the same checkpoint as `source`: with hard links, which take no space, or else a copy."""
    partial = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for name in (*checkpoint_files(source), MANIFEST):
        try:
            os.link((source / name).resolve(), partial / name)
        except OSError:  # another disk, or one without links
            shutil.copy2(source / name, partial / name)
            progress()
    partial.rename(target)
    flush(target.parent)


def read_origin(run_dir: Path) -> Origin | None:
    """Where the line in a run's folder began; None: at step 0.

    Raises:
        ConfigError: a file that is damaged.
    """
    path = run_dir / "origin.json"
    if not path.exists():
        return None
    try:
        origin = Origin(**read_json(path))
        if origin.set_aside is not None and not re.fullmatch(r"set_aside/[0-9]+", origin.set_aside):
            raise ValueError(f"set_aside is {origin.set_aside!r}")
        if not isinstance(origin.step, int):
            raise ValueError(f"step is {origin.step!r}")
        return origin
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({error})") from None


def write_origin(run_dir: Path, origin: Origin) -> None:
    """Write origin.json."""
    run_dir.mkdir(parents=True, exist_ok=True)
    replace_file(run_dir / "origin.json", json.dumps(asdict(origin), indent=1).encode())


def replace_file(path: Path, content: bytes) -> None:
    """Write a file. A kill leaves the old one or the new one, whole, and so does the loss of power."""
    with replacing(path) as file:
        file.write(content)
    flush(path.parent)
