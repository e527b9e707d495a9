"""Writes checkpoints. Training waits only until every rank has copied its own shards to host memory; a thread writes the files.

Every rank writes the whole tensors that it owns into files of its own. The threads of all ranks gather them from the shards, one
tensor after another (`launch.distributed.gather`). The first rank makes the temporary folder, and renames it when every rank's
files are flushed and the manifest lists them all. A rank that cannot write still takes part in the gathering, so that no other
rank waits for it. Then the save fails on all ranks, and all earlier checkpoints are still there.
"""

from __future__ import annotations

import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from configs.schema import Checkpoint as CheckpointConfig
from launch.checkpoint.publish import Announce, begin, publish, remove, temporary_folder
from launch.checkpoint.snapshot import Snapshot, take_snapshot
from launch.checkpoint.tensors import part_name
from launch.checkpoint.verify import (
    AVERAGE,
    MANIFEST,
    MODEL,
    OPTIMIZER,
    CheckpointError,
    checkpoint_name,
    list_checkpoints,
    sha256,
    step_of,
)
from launch.checkpoint.writer import Progress, TensorHeader, TensorWriter, Written, no_progress
from launch.distributed.gather import AVERAGES, STATE, WEIGHTS, Share, gather_in_turn, in_order
from launch.distributed.host_group import HostGroup
from launch.distributed.strategy import Strategy

# The phases of writing a checkpoint, in order. RANK_PHASES run on every rank, the others on the first rank.
PHASES = (
    "temporary folder", "weights", "optimizer state", "flush to disk", "ranks done", "manifest", "rename",
    "deletion of old checkpoints",
)  # fmt: skip
RANK_PHASES = PHASES[1:5]
FILE_OF = {WEIGHTS: MODEL, STATE: OPTIMIZER, AVERAGES: AVERAGE}
PAUSE = 5.0  # s between two attempts to write the last checkpoint of a run


class Saver:
    """Decides when a training run is saved, and writes its checkpoints in the background, one at a time.

    All ranks make the same decisions, and get the same outcome of each save.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        config: CheckpointConfig,
        report: Callable[[dict[str, Any]], None],
        host: HostGroup,
        saved: int,
        announce: Announce = lambda phase: None,
        origin: int | None = None,
        progress: Progress = no_progress,
    ) -> None:
        """Construct the saver of a run. Every rank must do so at the same point.

        Args:
            folders: checkpoints go into the first, which exists. If that fails, the others are tried in turn.
            config: the section `checkpoint`.
            report: called on the first rank with each checkpoint's record: step, stall_seconds, write_seconds, bytes or error.
            host: the group of all ranks.
            saved: the step of the newest whole checkpoint.
            announce: called in the thread that writes, before each of its PHASES.
            origin: the step of the checkpoint from which the run branched, which is never deleted. None: the run began at step 0.
            progress: called in the thread that writes, after each piece of work.
        """
        self.folders, self.config, self.host, self.saved = folders, config, host, saved
        self.announce, self.origin, self.progress = announce, origin, progress
        self.first = host.rank == 0
        self.damaged: set[Path] = set()
        self.resumed(saved)
        self.report = report if self.first else lambda record: None
        self.asked = False  # a checkpoint was asked for, by the first rank's clock or by `ask`; the same on all ranks
        self.clock = time.monotonic()
        self.thread: threading.Thread | None = None
        self.error: CheckpointError | None = None
        self.snapshot: Snapshot | None = None  # the snapshot that is not written yet
        alone = unshared(folders, host) if config.shards == "auto" else None
        self.by_all = config.shards == "auto" and alone is None
        self.notes = (
            [f"not every rank sees {alone} and may write there: only the first rank writes the checkpoints"] if alone else []
        )

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not KeyboardInterrupt:  # a second Ctrl-C stops at once, and a half-written checkpoint harms nothing
            self.wait()

    def resumed(self, step: int) -> None:
        """Record that the newest whole checkpoint is that of `step`, so that the checkpoints of later steps are damaged."""
        found = (path for folder in self.folders if self.first for path in list_checkpoints(folder))
        self.damaged.update(path for path in found if step_of(path) > step)

    @property
    def overdue(self) -> bool:
        """Whether `checkpoint.minutes` have passed since the last save, by the first rank's clock; False on other ranks."""
        return self.first and 0 < self.config.minutes * 60 <= time.monotonic() - self.clock

    def due(self, step: int, scheduled: bool, stop: bool) -> bool:
        """Return whether to save after `step`: it is not saved yet, and the schedule, the clock or a stop asks for it."""
        return step > self.saved and (scheduled or self.asked or stop)

    def ask(self, step: int) -> None:
        """Ask for a checkpoint of `step`, even if there is one already, because the state has changed."""
        self.asked, self.saved = True, min(self.saved, step - 1)

    def save(self, strategy: Strategy, state: dict[str, Any]) -> None:
        """Wait for the previous checkpoint, copy this rank's shards to host memory, and start writing in the background.

        Every rank must call it. `state` becomes state.json.
        """
        self.saved, self.asked, self.clock = state["step"], False, time.monotonic()
        start = time.perf_counter()
        self.wait()
        self.snapshot = None
        self.snapshot = take_snapshot(strategy, state, self.by_all)
        self._start({"step": state["step"], "stall_seconds": time.perf_counter() - start})

    def _start(self, record: dict[str, Any], quiet: bool = False) -> None:
        self.thread = threading.Thread(target=self._write, args=(record, quiet), name="checkpoint", daemon=True)
        self.thread.start()

    def _write(self, record: dict[str, Any], quiet: bool) -> None:
        """Write the snapshot into the first folder that can be written. `quiet`: do not report a failure."""
        assert self.snapshot is not None
        start, errors = time.perf_counter(), []
        for number, folder in enumerate(self.folders):
            others = [*self.folders[:number], *self.folders[number + 1 :]]
            try:
                path, size = write_checkpoint(
                    folder, self.snapshot, self.config, self.announce, self.origin, others, self.progress, self.damaged
                )
            except Exception as error:  # after any error the run continues; its events record the error
                errors.append(str(error) if isinstance(error, CheckpointError) else f"checkpoint: {error!r}")
                continue
            self.error, self.snapshot = None, None
            if self.first:
                self.damaged.discard(path)
                with suppress(OSError):
                    record["manifest"] = sha256(path / MANIFEST)
            record |= {"bytes": size} | ({"folder": str(path.parent), "instead": errors[0]} if errors else {})
            break
        else:
            self.error = CheckpointError("; ".join(errors))
            record["error"] = str(self.error)
        if self.error is None or not quiet:
            self.report({"event": "checkpoint", **record, "write_seconds": time.perf_counter() - start})

    def wait(self) -> None:
        """Wait until the last checkpoint is written or has failed."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def close(self) -> None:
        """Wait for the last checkpoint. If it could not be written, try again for `checkpoint.patience` seconds.

        Raises CheckpointError if it still cannot be written.
        """
        self.wait()
        attempts = math.ceil(self.config.patience / PAUSE)  # a number, not a time, so that all ranks make equally many
        if self.error is not None and self.snapshot is not None and attempts:
            step = self.snapshot.state["step"]
            second = "" if len(self.folders) > 1 else " (a second folder would be checkpoint.fallback_dir)"
            remedy = f"free space there, or make it writable{second}; trying again for {self.config.patience:g} s"
            self.report({"event": "waiting", "step": step, "error": f"{self.error}; {remedy}"})
            for _ in range(attempts):
                self._pause()
                self._start({"step": step, "stall_seconds": 0.0}, quiet=True)
                self.wait()
                if self.error is None:
                    break
        if self.error is not None:
            raise self.error

    def _pause(self) -> None:
        """Wait for PAUSE or `checkpoint.patience`, whichever is less, and report progress meanwhile."""
        end = time.monotonic() + min(PAUSE, self.config.patience)
        while (left := end - time.monotonic()) > 0:
            self.progress()
            time.sleep(min(1.0, left))


def unshared(folders: Sequence[Path], host: HostGroup) -> str | None:
    """Return a folder in which some rank cannot write, or does not see a file that the first rank makes; None if there is none.

    `folders`: as paths of this rank. The answer is the same on all ranks.
    """
    if host.world == 1:
        return None
    probes: dict[int, Path] = {}
    for number, folder in enumerate(folders if host.rank == 0 else ()):
        with suppress(OSError):  # a disk that cannot be written now: the first save reports it
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".shared-{uuid.uuid4().hex}"
            probe.touch()
            probes[number] = probe
    asked = host.from_first({number: probe.name for number, probe in probes.items()})
    fits = {number: (folders[number] / name).exists() and os.access(folders[number], os.W_OK) for number, name in asked.items()}
    missing = host.gather([str(folders[number]) for number, fit in fits.items() if not fit])
    for probe in probes.values():
        probe.unlink(missing_ok=True)
    return next((folder for of_rank in missing for folder in of_rank), None)


def write_checkpoint(
    folder: Path,
    snapshot: Snapshot,
    config: CheckpointConfig,
    announce: Announce = lambda phase: None,
    origin: int | None = None,
    others: Sequence[Path] = (),
    progress: Progress = no_progress,
    damaged: Collection[Path] = (),
) -> tuple[Path, int]:
    """Write `folder/step_<state["step"]>`, and then delete the checkpoints that `launch.checkpoint.retention` selects.

    Every rank must call it with its own snapshot. `others`: further folders with checkpoints of this run. `damaged`: checkpoints
    that are known to be damaged.

    Returns:
        The checkpoint and its bytes, on all ranks.

    Raises:
        CheckpointError: on all ranks, for no space, no permission, ...; earlier checkpoints are still there.
    """
    host, step = snapshot.host, snapshot.state["step"]
    temporary, target = temporary_folder(folder, step), folder / checkpoint_name(step)
    shares, files, total = plan_files(snapshot.shares, host)
    outcome: Any = None  # the first rank sends it to all: the checkpoint and its bytes, or an error as a text

    if host.rank == 0:
        try:
            announce("temporary folder")
            begin(folder, step, total)
        except OSError as error:
            outcome = str(error)
    outcome = host.from_first(outcome)
    if outcome is None:
        paths = {kind: temporary / name for kind, name in files.items()}
        everyone = host.gather(write_files(shares, host, paths, announce, progress))
        problems = [problem for _, problem in everyone if problem]
        written = [file for of_rank, _ in everyone for file in of_rank]
        if host.rank == 0:
            try:
                if problems:
                    raise OSError("; ".join(problems))
                outcome = publish(folder, snapshot, written, config, announce, origin, others, damaged)
            except Exception as error:  # the other ranks wait for the outcome
                outcome = str(error) if isinstance(error, OSError) else repr(error)
        outcome = host.from_first(outcome)
    if isinstance(outcome, str):
        if host.rank == 0:
            remove(temporary)
        raise CheckpointError(f"cannot write checkpoint {target}: {outcome}")
    return outcome


def plan_files(shares: list[Share], host: HostGroup) -> tuple[list[Share], dict[int, str], int]:
    """Return this rank's shares, the names of its files by kind of share, and the bytes of all ranks' tensors.

    If the first rank writes everything, it owns state that only another rank has (`distributed.shard_state`). It does not know
    these shares before, and receives their description here.
    """
    kept = [share for share in shares if share.alone]
    owned = [share for share in shares if share.owner == host.rank]
    sizes: dict[tuple[int, int], int] = {}  # bytes by owner and kind, of the shares that this rank counts
    for share in [*owned, *kept]:
        where = share.owner, share.turn[0]
        sizes[where] = sizes.get(where, 0) + share.nbytes
    everyone = host.gather((sizes, [share._replace(value=None) for share in kept]))
    offered = [share for _, of_rank in everyone for share in of_rank if share.owner == host.rank]
    files = {}
    for kind, whole in FILE_OF.items():
        owners = sorted({owner for sizes, _ in everyone for owner, of_kind in sizes if of_kind == kind})
        owners = owners or [0] * (kind != AVERAGES)  # the files of weights and of state always exist
        if host.rank in owners:
            number = owners.index(host.rank) + 1
            files[kind] = whole if len(owners) == 1 else part_name(whole, number, len(owners))
    return in_order([*shares, *offered]), files, sum(size for sizes, _ in everyone for size in sizes.values())


class OwnFiles:
    """Writes this rank's files of a checkpoint. After a failure it writes nothing more; `problem` gives the reason."""

    def __init__(self, where: str, announce: Announce, progress: Progress) -> None:
        self.where, self.announce, self.progress = where, announce, progress  # `where`: names this rank in `problem`
        self.written: list[Written] = []
        self.problem: str | None = None
        self._writer: TensorWriter | None = None

    @contextmanager
    def _careful(self) -> Iterator[None]:
        """Turn any exception into `problem`, because the other ranks need this rank to take part until the end."""
        try:
            yield
        except Exception as error:
            self.problem = self.problem or self.where + (str(error) if isinstance(error, OSError) else repr(error))
            if self._writer is not None:
                self._writer.abandon()
                self._writer = None

    def phase(self, phase: str) -> None:
        """Announce a phase."""
        if self.problem is None:
            with self._careful():
                self.announce(phase)

    def begin(self, path: Path, shares: Sequence[Share]) -> None:
        """Begin a file of the tensors `shares`."""
        if self.problem is None:
            with self._careful():
                self._writer = TensorWriter(path, [TensorHeader(s.name, s.dtype, s.shape) for s in shares], self.progress)

    def write(self, tensor: Tensor) -> None:
        """Add the next tensor to the file."""
        if self._writer is not None:
            with self._careful():
                self._writer.write(tensor)

    def end(self) -> None:
        """Flush the file to disk."""
        self.phase("flush to disk")
        if self._writer is not None:
            with self._careful():
                self.written.append(self._writer.close())
                self._writer = None


def write_files(
    shares: list[Share], host: HostGroup, paths: dict[int, Path], announce: Announce, progress: Progress
) -> tuple[list[Written], str | None]:
    """Take part in gathering all tensors, and write those that this rank owns. Every rank must call it.

    Returns:
        The files, flushed to disk, and the problem, if there was one.
    """
    where = "" if host.world == 1 else f"rank {host.rank} ({socket.gethostname()}): "
    files = OwnFiles(where, announce, progress)
    for kind, phase in ((WEIGHTS, "weights"), (STATE, "optimizer state"), (AVERAGES, "")):
        of_kind = [share for share in shares if share.turn[0] == kind]
        if kind == AVERAGES and not of_kind:
            continue
        if phase:
            files.phase(phase)
        if kind in paths:
            files.begin(paths[kind], [share for share in of_kind if share.owner == host.rank])
        for whole in gather_in_turn(of_kind, host):
            files.write(whole)
            del whole  # free it before the next tensor is gathered
            progress()
        files.end()
    files.phase("ranks done")
    return files.written, files.problem
