"""Branching: with `checkpoint.resume=CHECKPOINT` a training run resumes from any checkpoint, its own or another run's.

A run's folder always holds one line of steps. After branching, this line leads up to the chosen checkpoint and continues from
there. Everything that the folder held beyond the checkpoint moves to `set_aside/1` (2, 3, ...). That folder is the folder of a
training run, too: it can be resumed, compared and exported. A checkpoint of another run is linked or copied into the run's own
`checkpoints/`, and the other run's metrics up to that step are copied. `origin.json` records where the line began, so that the
same command resumes the line instead of branching once more.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
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
from launch.checkpoint.folders import (
    CHECKPOINTS,
    FALLBACK,
    choose_checkpoint,
    folders_of,
    newest_of_original,
    other_owner,
    owner_of,
    second_folder,
)
from launch.checkpoint.journal import wrote
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

# Options that change the steps of a line, without those in INCIDENTAL. With another value of one of them, resuming from the same
# checkpoint begins a new line.
DECISIVE = ("run.seed", "model.", "optimizer.", "schedule.", "train.")
INCIDENTAL = (
    "model.gradient_checkpointing", "train.steps", "train.micro_batch_size", "train.compile", "train.on_batch_change",
    "train.tokens", "train.deterministic", "train.max_bad_steps", "train.spike", "train.on_spike",
)  # fmt: skip
FOLDERS = ("tensorboard", "profile")  # folders in a run's folder that belong to one line and move when it is set aside
WORDS = {  # words that people write in place of the two that checkpoint.resume knows, with a hint
    **dict.fromkeys(("auto", "latest", "newest", "last", "true", "yes", "on"), "auto continues from the newest checkpoint"),
    **dict.fromkeys(("never", "false", "no", "off", "none", "null"), "never begins at step 0, in a folder that holds no run"),
}


@dataclass(frozen=True)
class Origin:
    """The beginning of a line of steps, as stored in origin.json."""

    resume: str  # checkpoint.resume as an absolute path
    checkpoint: str  # the checkpoint that `resume` led to, resolved
    manifest: str  # sha256 of its manifest, which identifies the checkpoint even after it was copied or moved
    step: int
    own: bool  # the checkpoint was one of the run's own
    settings: dict[str, Any]  # the `decisive` settings of the run
    id: str  # the name of the line for trackers; empty if the run continued from its own checkpoint with nothing to set aside
    set_aside: str | None = None  # the folder, below the run's folder, for what lay beyond the checkpoint
    done: bool = False  # `put_in_place` has finished
    before: dict[str, Any] | None = None  # the origin.json of the line that was set aside


class Start(NamedTuple):
    """The point from which a training run starts or resumes."""

    checkpoint: Path | None  # None: start from the beginning
    notes: list[str]
    origin: Origin | None  # the origin of the line; None: the line began at step 0
    begins: bool  # the line begins with this start, so that `begin_line` must be called
    changes: list[str]  # options that differ from the checkpoint's, in words; `resume` fills the list

    def event(self) -> dict[str, Any] | None:
        """Return the event which records that the run branches; None if it does not."""
        if not (self.begins and self.origin and self.origin.id):
            return None
        origin = self.origin
        return {
            "event": "branch", "step": origin.step, "from": origin.checkpoint, "own": origin.own, "set_aside": origin.set_aside
        }  # fmt: skip


def checkpoint_folders(config: Config, run_dir: Path, origin: Origin | None) -> list[Path]:
    """Return the checkpoint folders of a line: in the run's folder and, if set, a folder below `checkpoint.fallback_dir`."""
    folders = [run_dir / CHECKPOINTS]
    if config.checkpoint.fallback_dir is not None:
        parent = Path(config.checkpoint.fallback_dir)
        folders.append(parent / fallback_name(run_dir, origin, parent))
    return folders


def fallback_name(run_dir: Path, origin: Origin | None, parent: Path) -> str:
    """Return the name of a line's folder below `parent`: the name stored in the run's folder, else one that no run has there.

    Because the name is stored, the line keeps that folder if the run's folder moves or has another path on other nodes. A copy of
    the run's folder gets another name. If the name is lost, the OWNER of a folder tells that it belongs to this run; a run that
    begins leaves it to the earlier run at this path.
    """
    kept = second_folder(run_dir)
    if kept is not None and other_owner(parent / kept.name, run_dir) is None:
        return kept.name
    line = f"{run_dir.resolve()}\n{origin.id}{origin.manifest}" if origin else str(run_dir.resolve())
    lines = itertools.chain([line], (f"{line}\n{number}" for number in itertools.count(1)))
    names = (f"{run_dir.resolve().name}-{hashlib.sha256(os.fsencode(text)).hexdigest()[:12]}" for text in lines)
    begun = has_begun(run_dir)
    owners = ((name, owner_of(parent / name)) for name in names)
    return next(name for name, owner in owners if owner is None or (begun and owner == run_dir.resolve()))


def has_begun(run_dir: Path) -> bool:
    """Return whether a run has trained in `run_dir`: it holds events or checkpoints."""
    return bool(read_events(run_dir) or list_checkpoints(run_dir / CHECKPOINTS))


def require_nothing_lost(run_dir: Path, parent: Path) -> None:
    """Raise CheckpointError if `run_dir` holds no run, but a folder below `parent` holds checkpoints of a run at this path."""
    if has_begun(run_dir):
        return
    folders = [folder for folder in parent.iterdir() if owner_of(folder) == run_dir.resolve()] if parent.is_dir() else []
    found = [path for folder in folders for path in list_checkpoints(folder)]
    if found:
        newest = max(found, key=step_of)
        raise CheckpointError(
            f"{run_dir} holds no run, but {newest.parent} holds checkpoints of an earlier run at this path: continue from them "
            f"with checkpoint.resume={newest}, or choose another run.dir; if that run was moved, resume it first"
        )


def choose_start(config: Config, run_dir: Path, progress: Progress = no_progress) -> Start:
    """Choose the start that `checkpoint.resume` asks for. Finishes what a killed process left, and changes nothing else.

    `progress` is called while checkpoints are hashed.

    Raises:
        ConfigError: `checkpoint.resume` is "never", but the folder holds a run.
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
    if config.checkpoint.fallback_dir is not None:
        require_nothing_lost(run_dir, Path(config.checkpoint.fallback_dir))
    require_newest(run_dir, folders)
    path, notes = find_checkpoint(*folders, progress=progress)
    if path is None and notes:  # starting from the beginning would lose the run
        raise CheckpointError(
            f"{run_dir}: no checkpoint is whole ({'; '.join(notes)}); choose another run.dir to start from the beginning"
        )
    saved = [e["step"] for e in read_events(run_dir) if e.get("event") == "checkpoint" and "step" in e and "error" not in e]
    if path is None and origin is None and saved:  # for example because a disk is not mounted
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
            f"{run_dir} has already trained beyond step {origin.step} and resumes from its newest checkpoint; to branch from "
            f"step {origin.step} again, choose another run.dir"
        )
    return Start(path, notes, origin, False, [])


def require_newest(run_dir: Path, folders: list[Path]) -> None:
    """Raise CheckpointError if the run's second folder is not one of `folders` but holds newer checkpoints than they do."""
    here = {folder.resolve() for folder in folders}
    newest = max((step_of(path) for folder in folders for path in list_checkpoints(folder)), default=-1)
    for folder in folders_of(run_dir)[1:]:
        step = max(map(step_of, list_checkpoints(folder)), default=-1)
        if folder.resolve() not in here and step > newest:
            raise CheckpointError(
                f"{run_dir} has its checkpoint of step {step} in {folder}: continue with checkpoint.fallback_dir={folder.parent}"
            )
    for path, owner in newest_of_original(run_dir):
        if step_of(path) > newest:
            without = f", or remove {run_dir / FALLBACK} to continue without it" if newest >= 0 else ""
            raise CheckpointError(
                f"{run_dir} is a copy of {owner}, whose newest checkpoint is {path}: copy it into "
                f"{run_dir / CHECKPOINTS}{without}"
            )


def is_line_of(origin: Origin | None, given: Path, config: Config) -> bool:
    """Return whether the line in the run's folder began at the checkpoint or run `given`, with the same decisive settings."""
    if origin is None:
        return False
    if not same_settings(origin.settings, decisive(with_cooldown(config, origin.step))):
        return False
    path = Path(origin.checkpoint) if origin.own else Path(origin.resume).resolve()
    return given.resolve() == path or ((given / MANIFEST).is_file() and sha256(given / MANIFEST) == origin.manifest)


def same_settings(there: dict[str, Any], now: dict[str, Any]) -> bool:
    """Return whether the settings `there`, from an origin.json, equal the `decisive` settings `now`.

    An option that `there` lacks had its default. If the value of an option is a mapping, each of its keys is a setting, and a
    missing key counts as null.
    """
    before = decisive(Config()) | {key: value for key, value in there.items() if is_decisive(key)}
    known = {name for name, _, _ in options()}
    keys = [key for key in before | now if ".".join(key.split(".")[:2]) in known]
    return all(before.get(key, "None") == now.get(key, "None") for key in keys)


def no_such_folder(given: Path, run_dir: Path) -> CheckpointError:
    """Return the error for a `checkpoint.resume` that is not a folder, with a hint at what was probably meant."""
    moved = sorted(path for path in run_dir.glob("set_aside/*/checkpoints/*") if path.name == given.name)
    there = [path.name for path in list_checkpoints(given.parent)] if given.parent.is_dir() else []
    hint = f"; there is {moved[-1]}" if moved else f"; beside it are {', '.join(there)}" if there else ""
    meant = WORDS.get(str(given).lower())
    hint = f"; {meant}" if meant else hint
    return CheckpointError(f"checkpoint.resume: {given} is not a whole checkpoint: there is no such folder{hint}")


def branch_from(given: Path, config: Config, run_dir: Path, progress: Progress = no_progress) -> Start:
    """Return the start of a new line at the checkpoint or run `given`. Changes nothing on disk."""
    if not given.is_dir():
        raise no_such_folder(given, run_dir)
    found, _, notes = choose_checkpoint(given.resolve(), progress)
    checkpoint = found.resolve()
    step, manifest = read_state(checkpoint)["step"], sha256(checkpoint / MANIFEST)
    inside, before = checkpoint.parent == (run_dir / CHECKPOINTS).resolve(), read_origin(run_dir)
    own = inside and (wrote(run_dir, checkpoint) or (before is not None and manifest == before.manifest))
    if inside and not own:
        notes = [
            *notes,
            f"{checkpoint} is not of this run, as events.jsonl shows: it begins a line as a checkpoint of another run",
        ]
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
    """Return `config`; with `schedule.cooldown`, its schedule is that of a cooldown which begins at `origin`.

    Raises:
        ConfigError: a cooldown is set, but the line did not begin at a checkpoint with this cooldown.
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
    """Do the same as `config_of_line` for the line that training would begin or resume, without touching the folder."""
    origin, given = read_origin(run_dir), Path(config.checkpoint.resume).expanduser()
    if not config.schedule.cooldown or config.checkpoint.resume in ("auto", "never") or is_line_of(origin, given, config):
        return config_of_line(config, origin)
    if not given.is_dir():
        raise no_such_folder(given, run_dir)
    return with_cooldown(config, read_state(choose_checkpoint(given.resolve()).path)["step"])


def decisive(config: Config) -> dict[str, Any]:
    """Return the settings on which the steps of a line depend."""
    return {key: value for key, value in flat(asdict(config)).items() if is_decisive(key)}


def is_decisive(key: str) -> bool:
    """Return whether the steps of a line depend on the setting `key`."""
    return key.startswith(DECISIVE) and key not in INCIDENTAL


def begin_line(run_dir: Path, origin: Origin, progress: Progress = no_progress) -> None:
    """Make the run's folder hold the line that begins at `origin`. If a kill interrupts this, the next start completes it.

    Raises:
        OSError, CheckpointError: the disk is full, or the other run's checkpoint is gone.
    """
    before = read_origin(run_dir)
    write_origin(run_dir, replace(origin, before=asdict(replace(before, before=None)) if before else None))
    put_in_place(run_dir, progress)


def put_in_place(run_dir: Path, progress: Progress = no_progress) -> None:
    """Carry out the part of origin.json that is not done yet. `progress` is called after each copied file."""
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
            (run_dir / name).unlink(missing_ok=True)  # for the trackers, the new line is a run of its own
    target = checkpoints / checkpoint_name(origin.step)
    if not is_copy(target, origin):
        link_checkpoint(source, target, progress)
    (run_dir / FALLBACK).unlink(missing_ok=True)
    if not origin.own:
        runs = [source.parent.parent, Path(origin.resume), *run_dir.glob("set_aside/*")]
        runs = [run for run in runs if run.resolve() != run_dir.resolve()]  # a copy that was put there is not of this line
        of = [run / "metrics.jsonl" for run in runs if source.parent in (folder.resolve() for folder in folders_of(run))]
        known = next(filter(Path.exists, of), None)
        replace_file(run_dir / "metrics.jsonl", known.read_bytes() if known else b"")
        if known and not (run_dir / "events.jsonl").exists():  # earlier changes of options belong to the new line, too
            changes = [e for e in read_events(known.parent) if e.get("event") == "changed" and e.get("step", 0) < origin.step]
            replace_file(run_dir / "events.jsonl", "".join(json.dumps(event) + "\n" for event in changes).encode())
    write_origin(run_dir, replace(origin, done=True))


def beyond(run_dir: Path, origin: Origin) -> list[Path]:
    """Return the checkpoints in a run's folder that do not belong to the line of `origin`."""
    found = list_checkpoints(run_dir / CHECKPOINTS)
    return [path for path in found if not (origin.own and step_of(path) < origin.step) and not is_copy(path, origin)]


def is_copy(path: Path, origin: Origin) -> bool:
    """Return whether `path` is the checkpoint of `origin`, under its usual name."""
    manifest = path / MANIFEST
    return step_of(path) == origin.step and manifest.is_file() and sha256(manifest) == origin.manifest


def copy_files(run_dir: Path, aside: Path, before: dict[str, Any] | None) -> None:
    """Copy the files of `run_dir`, but no checkpoints, to the new run folder `aside`, which appears only when it is complete."""
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
    """Raise CheckpointError if `checkpoints` are on another disk than `run_dir`, whose disk has no space for them."""
    elsewhere = [path for path in checkpoints if path.stat().st_dev != run_dir.stat().st_dev]
    needed = sum(file.stat().st_size for path in elsewhere for file in path.rglob("*"))
    free = shutil.disk_usage(run_dir).free
    if needed > free:
        raise CheckpointError(
            f"{run_dir}: setting aside the later checkpoints, which are on another disk, needs {needed / 1e9:.3g} GB here, but "
            f"only {free / 1e9:.3g} GB are free; free space, or choose another run.dir"
        )


def copy_folder(source: Path, target: Path, progress: Progress = no_progress) -> None:
    """Copy a folder and flush its files to disk. Raises OSError with the first reason if a file cannot be copied."""

    def copy(file: str, to: str) -> None:
        shutil.copy2(file, to)
        flush(Path(to))
        progress()

    try:
        shutil.copytree(source, target, symlinks=True, copy_function=copy)
    except shutil.Error as error:
        raise OSError(f"{source} cannot be copied to {target}: {error.args[0][0][2]}") from None


def move_checkpoint(path: Path, target: Path, progress: Progress = no_progress) -> None:
    """Move the checkpoint `path` to `target`. A kill leaves at least one of them whole; calling this again completes the move.

    Raises:
        OSError: for example, the disk is full.
    """
    try:
        path.rename(target)
        return
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
    if not target.exists():  # `checkpoints` links to another disk or is a mount point
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
    """Make `target` the same checkpoint as `source`: by hard links, which take no space, else by copying."""
    partial = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for name in (*checkpoint_files(source), MANIFEST):
        try:
            os.link((source / name).resolve(), partial / name)
        except OSError:  # another disk, or a file system without hard links
            shutil.copy2(source / name, partial / name)
            progress()
    partial.rename(target)
    flush(target.parent)


def read_origin(run_dir: Path) -> Origin | None:
    """Return the origin of the line in a run's folder; None if the line began at step 0.

    Raises:
        ConfigError: origin.json is damaged.
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
    """Write a file. After a kill or a power failure, either the old or the new file is there, whole."""
    with replacing(path) as file:
        file.write(content)
    flush(path.parent)
