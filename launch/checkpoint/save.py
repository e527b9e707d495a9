"""Writing checkpoints. Training waits only until every rank has copied its own shards to host memory; a thread writes the files.

Every rank writes the tensors that it owns, whole, into files of its own: the threads of all ranks bring them together one tensor
after another (`launch.distributed.gather`). The first rank makes the folder, and gives it its name when every rank's files are
flushed and the manifest lists them all. A rank that cannot write goes on taking part, so that nobody waits for it: the save
fails as one, on all ranks, and everything that was there before is still there.
"""

from __future__ import annotations

import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from configs.schema import Checkpoint as CheckpointConfig
from launch.checkpoint.publish import Announce, begin, publish, remove, temporary_folder
from launch.checkpoint.snapshot import Snapshot, take_snapshot
from launch.checkpoint.tensors import part_name
from launch.checkpoint.verify import AVERAGE, MODEL, OPTIMIZER, CheckpointError, checkpoint_name
from launch.checkpoint.writer import Progress, TensorHeader, TensorWriter, Written, no_progress
from launch.distributed.gather import AVERAGES, STATE, WEIGHTS, Share, gather_in_turn, in_order
from launch.distributed.host_group import HostGroup
from launch.distributed.strategy import Strategy

# The phases of writing a checkpoint, in order: RANK_PHASES on every rank, the others on the first.
PHASES = (
    "temporary folder", "weights", "optimizer state", "flush to disk", "ranks done", "manifest", "rename",
    "deletion of old checkpoints",
)  # fmt: skip
RANK_PHASES = PHASES[1:5]
FILE_OF = {WEIGHTS: MODEL, STATE: OPTIMIZER, AVERAGES: AVERAGE}
PAUSE = 5.0  # s between two attempts at the last checkpoint of a run


class Saver:
    """Decides when a training run is saved, and writes its checkpoints beside the training, one at a time.

    All ranks make the same decisions, and learn the same outcome of each save.
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
        """A saver of a run. Every rank must make it at the same place.

        Args:
            folders: the first, which exists, gets a folder for each checkpoint; the others are tried in turn where it takes none.
            config: the section `checkpoint`.
            report: gets a record for each checkpoint, on the first rank: step, stall_seconds, write_seconds, bytes, or error.
            host: all ranks.
            saved: the step of the newest checkpoint.
            announce: called in the thread that writes, before each of its PHASES.
            origin: the step of the checkpoint that the run branched from; it is never deleted. None: it began at step 0.
            progress: called in the thread that writes after each piece of its work.
        """
        self.folders, self.config, self.host, self.saved = folders, config, host, saved
        self.announce, self.origin, self.progress = announce, origin, progress
        self.first = host.rank == 0
        self.report = report if self.first else lambda record: None
        self.asked = False  # all ranks agreed that the first one's clock asks for a checkpoint
        self.clock = time.monotonic()
        self.thread: threading.Thread | None = None
        self.error: CheckpointError | None = None
        self.snapshot: Snapshot | None = None  # what is not written yet
        alone = unshared(folders, host) if config.shards == "auto" else None
        self.by_all = config.shards == "auto" and alone is None
        self.notes = (
            [f"not every rank sees {alone} and may write there: the first rank writes the checkpoints alone"] if alone else []
        )

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not KeyboardInterrupt:  # a second Ctrl-C stops at once, and a half-written checkpoint harms nothing
            self.wait()

    @property
    def overdue(self) -> bool:
        """Whether this rank's clock asks for a checkpoint. The first rank's counts."""
        return self.first and 0 < self.config.minutes * 60 <= time.monotonic() - self.clock

    def due(self, step: int, scheduled: bool, stop: bool) -> bool:
        """Whether to save after `step`: it is not saved yet, and the schedule, the clock or the end of the run asks for it."""
        return step > self.saved and (scheduled or self.asked or stop)

    def ask(self, step: int) -> None:
        """Ask for a checkpoint of `step`, even if there is one: its state has changed."""
        self.asked, self.saved = True, min(self.saved, step - 1)

    def save(self, strategy: Strategy, state: dict[str, Any]) -> None:
        """Wait for the checkpoint before this one, copy this rank's shards to host memory, and start writing.

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
        """Write the snapshot into the first folder that takes it. `quiet`: a failure is not reported."""
        assert self.snapshot is not None
        start, errors = time.perf_counter(), []
        for number, folder in enumerate(self.folders):
            others = [*self.folders[:number], *self.folders[number + 1 :]]
            try:
                path, size = write_checkpoint(
                    folder, self.snapshot, self.config, self.announce, self.origin, others, self.progress
                )
            except Exception as error:  # whatever it is, the run goes on, and its events say so
                errors.append(str(error) if isinstance(error, CheckpointError) else f"checkpoint: {error!r}")
                continue
            self.error, self.snapshot = None, None
            record |= {"bytes": size} | ({"folder": str(path.parent), "instead": errors[0]} if errors else {})
            break
        else:
            self.error = CheckpointError("; ".join(errors))
            record["error"] = str(self.error)
        if self.error is None or not quiet:
            self.report({"event": "checkpoint", **record, "write_seconds": time.perf_counter() - start})

    def wait(self) -> None:
        """Wait until the last checkpoint is written, or has failed."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def close(self) -> None:
        """Wait for the last checkpoint, and try again for `checkpoint.patience` seconds if it could not be written.

        Raises CheckpointError if it still is not.
        """
        self.wait()
        attempts = math.ceil(self.config.patience / PAUSE)  # a number, so that all ranks take as many
        if self.error is not None and self.snapshot is not None and attempts:
            step = self.snapshot.state["step"]
            second = "" if len(self.folders) > 1 else " (a second folder would be checkpoint.fallback_dir)"
            remedy = f"make room there, or let it be written{second}; trying again for {self.config.patience:g} s"
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
        """Wait for PAUSE or `checkpoint.patience`, the less of both. This rank is alive all the while."""
        end = time.monotonic() + min(PAUSE, self.config.patience)
        while (left := end - time.monotonic()) > 0:
            self.progress()
            time.sleep(min(1.0, left))


def unshared(folders: Sequence[Path], host: HostGroup) -> str | None:
    """A folder of `folders` in which some rank does not find what the first rank makes there, or may not write; None without one.

    Each rank gives its own paths. The answer is the same on all of them.
    """
    if host.world == 1:
        return None
    probes: dict[int, Path] = {}
    for number, folder in enumerate(folders if host.rank == 0 else ()):
        with suppress(OSError):  # a disk that takes nothing now: the first save will say so
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
) -> tuple[Path, int]:
    """Write `folder/step_<state["step"]>`, and then delete the checkpoints that `launch.checkpoint.retention` gives up.

    Every rank must call it, with its own part. `others`: further folders with checkpoints of this run.

    Returns:
        The checkpoint and its bytes, on all ranks.

    Raises:
        CheckpointError: on all ranks, for no space, no permission, ...; everything that was there before is still there.
    """
    host, step = snapshot.host, snapshot.state["step"]
    temporary, target = temporary_folder(folder, step), folder / checkpoint_name(step)
    shares, files, total = plan_files(snapshot.shares, host)
    outcome: Any = None  # of the first rank, told to all: the checkpoint and its bytes, or an error in words

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
                outcome = publish(folder, snapshot, written, config, announce, origin, others)
            except Exception as error:  # the other ranks wait for the outcome
                outcome = str(error) if isinstance(error, OSError) else repr(error)
        outcome = host.from_first(outcome)
    if isinstance(outcome, str):
        if host.rank == 0:
            remove(temporary)
        raise CheckpointError(f"cannot write checkpoint {target}: {outcome}")
    return outcome


def plan_files(shares: list[Share], host: HostGroup) -> tuple[list[Share], dict[int, str], int]:
    """This rank's shares, the names of its files by kind of share, and the bytes of all ranks' tensors.

    One rank keeps the state of a parameter that another owns only where the first rank writes everything: that learns of it here.
    """
    kept = [share for share in shares if share.alone]
    owned = [share for share in shares if share.owner == host.rank]
    sizes: dict[tuple[int, int], int] = {}  # bytes by owner and kind, as far as this rank alone knows them
    for share in [*owned, *kept]:
        where = share.owner, share.turn[0]
        sizes[where] = sizes.get(where, 0) + share.nbytes
    everyone = host.gather((sizes, [share._replace(value=None) for share in kept]))
    offered = [share for _, of_rank in everyone for share in of_rank if share.owner == host.rank]
    files = {}
    for kind, whole in FILE_OF.items():
        owners = sorted({owner for sizes, _ in everyone for owner, of_kind in sizes if of_kind == kind})
        owners = owners or [0] * (kind != AVERAGES)  # a file of weights and one of state is always there
        if host.rank in owners:
            number = owners.index(host.rank) + 1
            files[kind] = whole if len(owners) == 1 else part_name(whole, number, len(owners))
    return in_order([*shares, *offered]), files, sum(size for sizes, _ in everyone for size in sizes.values())


class OwnFiles:
    """What this rank writes of a checkpoint. After a failure it writes nothing more, and `problem` says why."""

    def __init__(self, where: str, announce: Announce, progress: Progress) -> None:
        self.where, self.announce, self.progress = where, announce, progress  # `where`: this rank, as a problem names it
        self.written: list[Written] = []
        self.problem: str | None = None
        self._writer: TensorWriter | None = None

    @contextmanager
    def _careful(self) -> Iterator[None]:
        """Whatever goes wrong becomes the problem: the other ranks need this one to go on."""
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
        The files, flushed to disk; and what went wrong, if anything.
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
            del whole  # before the next one is brought together
            progress()
        files.end()
    files.phase("ranks done")
    return files.written, files.problem
