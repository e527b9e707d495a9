"""The heartbeat: every rank publishes that it is alive and how far it is, so that a rank that dies or hangs is named.

    with Heartbeat(rank, world, timeout=60) as heartbeat:
        for step in ...:
            heartbeat.mark(f"step {step}: batch loaded")

A rank that dies leaves the others blocked in a collective. So each rank has a daemon thread with its own connection to the store
of the process group. Every `interval`, this thread publishes a beat (a counter, the newest mark, host and process) and reads the
beats of the others. The first rank that misses a beat writes the diagnosis into the store. Every rank stops with this diagnosis,
so that all of them name the same rank. Collectives have practically no timeout (COLLECTIVE_TIMEOUT): only the heartbeat decides.
The time from the fault to the last exit, with interval = min(1 s, timeout / 10):

    a rank raised an exception                 GRACE + 4 intervals                     3 + 4 s at most
    a rank is dead or stopped                  timeout + 5 intervals; if a collective failed or a signal came (torchrun sends
                                               SIGTERM when a rank dies), min(timeout, ALERT) + 5 intervals    15 + 5 s at most
    a rank hangs in Python, or all hang        timeout + 5 intervals; PATIENCE timeouts if it waits for a disk
    a rank dies while the others hang          timeout + ALERT + 5 intervals
    the store does not answer                  timeout + 1 interval; at once if its process is gone

`timeout` must exceed the longest time between two signs of work. A sign of work is a mark or a call of `progress`. Every rank
sets the same marks, and marks are counted: the ranks with the fewest marks hold up the others. If all ranks are at the same mark,
as within a step, the culprits are the ranks whose main thread is not in code that waits for others. A rank that works long
between two marks, for example on a checkpoint, calls `progress`. Progress of a rank that is ahead does not count: it may write in
the background while another rank hangs. A single call that flushes a large file gives no sign of work, so a rank that waits for a
disk gets PATIENCE times as long.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

from data import printable
from launch.monitoring.launcher import tell_launcher
from launch.private import connect_to_default_store

STATUS = 70  # exit status (EX_SOFTWARE) of a rank that stops because of another rank
ALERT = 15.0  # s; half of torchrun's time between SIGTERM and SIGKILL, and longer than writing a checkpoint holds the GIL
GRACE = 3.0  # s; time for each rank to print an exception that all ranks raise
COLLECTIVE_TIMEOUT = 7 * 24 * 3600.0  # s; the first rank may work for long while the others wait for it
PATIENCE = 5  # a rank that waits for a disk counts as hung after this many timeouts without a sign of work
# Modules whose code waits for other ranks, or for a device that waits for them.
WAITING = ("torch.distributed.", "deepspeed.", "celo2.distributed.", "launch.distributed.", "launch.monitoring.guard.")
OBSERVERS = 2  # ranks that read all beats; the others read only these ranks' beats, so that the store can serve 1,024 ranks
NAMED = 8  # the most ranks that a message names
CONTINUES = "the run stops, and the same command continues from its newest checkpoint"

_starts = itertools.count()  # numbers the heartbeats of a process group, so that each has keys of its own


class RankError(RuntimeError):
    """Another rank is gone, hangs or failed; the message names it. The process exits with `STATUS`."""


@dataclass(frozen=True)
class Beat:
    """The last message that a rank published about itself."""

    count: int  # number of beats so far; it stops rising when the process is dead or stopped
    marks: int  # number of marks that the main thread has set so far
    text: str  # of the newest mark
    host: str
    pid: int
    alarm: str = ""  # "signal": the rank got a signal; "error": a collective failed, and the rank waits for the diagnosis
    left: bool = False  # the rank is done and does not need the others any more
    progress: int = 0  # changes while the rank works between two marks
    disk: bool = False  # the newest mark says that the rank waits for a disk
    waits: bool = False  # a thread of the rank, such as the one that writes a checkpoint, waits for other ranks
    place: str = ""  # where in the code the main thread is; empty while it waits for other ranks


class Diagnosis(NamedTuple):
    """The reason why the run stops; the same on all ranks."""

    message: str
    failed: bool  # the rank itself reported an exception


def where(rank: int, beat: Beat) -> str:
    """Return a rank with its host and process id, so that a person can find it."""
    return f"rank {rank} ({beat.host}, pid {beat.pid})"


def place_of_main_thread() -> str:
    """Return where the main thread is, as `function (file:line)`; empty if it waits for other ranks, or may.

    The main thread waits for collectives in torch.distributed, in DeepSpeed, or in the backward pass, whose collectives run
    outside of Python.
    """
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None or frame.f_code.co_name == "_engine_run_backward":
        return ""
    if f"{frame.f_globals.get('__name__')}.".startswith(WAITING):
        return ""
    return f"{frame.f_code.co_name} ({os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno})"


def in_one_line(sentences: list[str]) -> str:
    """Return the first NAMED sentences and the number of further ones: one line, even if a whole node is gone."""
    more = f"; and {len(sentences) - NAMED} more" if len(sentences) > NAMED else ""
    return "; ".join(sentences[:NAMED]) + more + f"; {CONTINUES}"


def got_further(before: dict[int, Beat], now: dict[int, Beat]) -> bool:
    """Return whether any rank has set a mark, or a rank that holds up the others has made progress."""
    least = min((beat.marks for beat in now.values() if not beat.left), default=0)
    return any(
        beat.marks != before[rank].marks or (beat.progress != before[rank].progress and beat.marks == least)
        for rank, beat in now.items()
    )


def blame(beats: dict[int, Beat], silent: dict[int, float], still: float, timeout: float) -> str | None:
    """Return a message that names the ranks that hold up the run; None if no rank does.

    Args:
        beats: the newest beats of the ranks that this rank reads, its own included.
        silent: for how many seconds each of them has published nothing new.
        still: for how many seconds no rank has `got_further`; 0 if not all ranks are read.
        timeout: seconds. A process that is silent for so long is gone; if there was a signal or an error, or the run hangs,
            ALERT is enough. A run without a sign of work for so long hangs; a disk gets PATIENCE times as long.
    """
    working = {rank: beat for rank, beat in beats.items() if not beat.left}
    least = min((beat.marks for beat in working.values()), default=0)
    behind = {rank: beat for rank, beat in working.items() if beat.marks == least}
    patience = timeout * (PATIENCE if any(beat.disk for beat in behind.values()) else 1)
    hung = still >= patience
    alarms = {beat.alarm for beat in beats.values()}
    limit = min(timeout, ALERT) if hung or alarms > {""} else timeout
    gone = {rank: beat for rank, beat in working.items() if silent[rank] >= limit}
    if gone:
        since = f"has not answered for {limit:g} s, last seen at"
        return in_one_line([f'{where(rank, beat)} {since} "{beat.text}"' for rank, beat in gone.items()])
    perhaps_dead = any(silent[rank] >= limit / 4 for rank in working)  # wait: if they are dead, their silence will show it
    if not hung or not working or perhaps_dead or "error" in alarms:
        return None
    if len(behind) == len(working):
        behind = {rank: beat for rank, beat in working.items() if not beat.waits}
    if len(behind) == len(working):  # within a step, as in the forward pass of fsdp2, whose collectives set no marks
        behind = {rank: beat for rank, beat in working.items() if beat.place}
    if len(behind) in (0, len(working)):
        text = next(iter(working.values())).text
        return (
            f'no rank has made progress for {patience:g} s and all are at "{text}", so that no single rank can be blamed; '
            f"{CONTINUES}"
        )
    since = f"has hung for {patience:g} s, while others wait, at"
    places = {rank: f", in {beat.place}" if beat.place else "" for rank, beat in behind.items()}
    return in_one_line([f'{where(rank, beat)} {since} "{beat.text}"{places[rank]}' for rank, beat in behind.items()])


def is_communication_error(error: BaseException) -> bool:
    """Return whether `error` came from a collective. NCCL's errors have their own class; gloo's are recognized by their text."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def print_error(message: str) -> None:
    """Print one line on stderr, and tell torchrun. A single write is used because several processes share stderr.

    Control characters are escaped, because the message may quote a file from somebody else.
    """
    message = printable(message)
    tell_launcher(message)
    with suppress(OSError):  # nobody reads stderr, or its disk is full
        print(f"error: {message}\n", end="", file=sys.stderr, flush=True)


class Heartbeat:
    """Publishes this rank's beat while the context is open. Open it around all communication. It does nothing for one process.

    Args:
        rank, world: of the default process group; every rank opens its own heartbeat.
        timeout: seconds; see the module's docstring.
        report: prints the diagnosis before the process exits with `STATUS`.

    Raises:
        RankError: on entering the context, if a rank did not start; on leaving it, if another rank is gone, hangs or failed.
    """

    def __init__(self, rank: int, world: int, timeout: float, report: Callable[[str], None] = print_error) -> None:
        self.rank, self.world, self.timeout, self.report = rank, world, timeout, report
        self.record: Callable[[str], None] = lambda message: None  # stores the diagnosis before the process ends
        self.interval = min(1.0, timeout / 10)
        self.observed = range(world) if rank < OBSERVERS else range(OBSERVERS)  # the ranks whose beats this one reads
        self._diagnosis: Diagnosis | None = None
        self._found = threading.Event()  # there is a diagnosis
        self._leaving = threading.Event()  # the main thread leaves the context, and will raise the diagnosis itself
        self._closing = False  # the main thread waits only for the end of the beating thread
        self._alarm = ""
        self._ended = threading.Event()  # the beating thread has ended
        self._exchanges = 0  # odd: an exchange is in progress
        self._end_at = math.inf  # time (time.monotonic) at which the guard ends the process, even if the beating thread is stuck
        self._failure: str | None = None
        self._mark = (0, "start", True)
        self._progress = 0
        self._waiters: set[int] = set()  # threads that wait for other ranks
        self._count = 0
        self._silent = dict.fromkeys(self.observed, 0.0)
        self._still = 0.0
        self._thread: threading.Thread | None = None

    def mark(self, text: str, disk: bool = False) -> None:
        """Set a mark: the main thread is now at `text`. `disk`: it may wait for a disk until the next mark. Sends nothing."""
        self._mark = (self._mark[0] + 1, text, disk)

    def progress(self) -> None:
        """Give a sign of work between two marks: this rank is still working. Any thread may call it, as often as it likes."""
        self._progress += 1

    @contextmanager
    def waits(self) -> Iterator[None]:
        """In this context, the calling thread waits for other ranks. So this rank is not the one that hangs."""
        thread = threading.get_ident()
        self._waiters.add(thread)
        try:
            yield
        finally:
            self._waiters.discard(thread)

    def signalled(self) -> None:
        """Report that this rank got a signal, which torchrun sends when a rank has died: then a dead rank is named sooner.

        Any thread may call it.
        """
        if self._thread is not None and not self._alarm:
            self._alarm = "signal"
            self._wake.send(b"\0")

    def fail(self, message: str) -> None:
        """Tell the other ranks that this rank fails. Returns once they can read it."""
        if self._thread is not None:
            self._failure = f"{where(self.rank, self._own)} failed: {' '.join(message.split())}"
            self._wake.send(b"\0")
            self._found.wait(self.timeout)

    def __enter__(self) -> Heartbeat:
        if self.world == 1:
            return self
        self._store = connect_to_default_store(f"heartbeat/{next(_starts)}")
        self._host, self._pid = socket.gethostname(), os.getpid()
        if self.rank == 0:
            self._store.set("diagnosis", "none")
        self._publish()
        for rank in self.observed:
            try:
                self._store.wait([f"beat/{rank}"], timedelta(seconds=self.timeout))
            except dist.DistError as error:
                message = f"rank {rank} did not start within {self.timeout:g} s; {CONTINUES}"
                with suppress(RuntimeError):
                    self._store.compare_set("diagnosis", "none", json.dumps(Diagnosis(message, failed=True)))
                raise RankError(message) from error
        self._beats = self._read_beats()
        self._woken, self._wake = socket.socketpair()
        self._woken.setblocking(False)
        self._wake.setblocking(False)
        self._thread = threading.Thread(target=self._work, name="heartbeat", daemon=True)
        # Start both threads now. Later the machine may be unable to start more, which must not end this rank.
        threading.Thread(target=self._guard, name="heartbeat guard", daemon=True).start()
        self._thread.start()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if self._thread is None:
            return
        self._leaving.set()
        if error is not None and is_communication_error(error):
            self._alarm = "error"
            self._wake.send(b"\0")
            self._found.wait(min(self.timeout, ALERT) + GRACE)
        if isinstance(error, KeyboardInterrupt):
            self.signalled()
            self._hear_others()
        if error is not None and self._diagnosis is None:
            self.fail(f"{type(error).__name__}: {error}")
        self._closing = True
        self._wake.send(b"\0")
        self._ended.wait()
        self._thread = None
        diagnosis = self._diagnosis
        if diagnosis is None or diagnosis.message == self._failure:
            return
        stopped_with_them = isinstance(error, KeyboardInterrupt) and not diagnosis.failed
        if error is None or is_communication_error(error) or stopped_with_them:
            self.record(diagnosis.message)
            raise RankError(diagnosis.message) from error

    def _hear_others(self) -> None:
        """After a signal, wait until it is known whether torchrun sent it because a rank died.

        It is known when a dead rank is named, or when every other rank has published beats since. A rank that does not read all
        beats waits until rank 1 leaves.
        """
        counts, end = {rank: beat.count for rank, beat in self._beats.items()}, time.monotonic() + self.until_named
        while time.monotonic() < end and not self._found.wait(self.interval / 4):
            others = {rank: beat for rank, beat in self._beats.items() if rank != self.rank}
            if len(self.observed) < self.world:
                others = {1: others[1]}
            if all(b.left or (len(self.observed) == self.world and b.count > counts[r] + 1) for r, b in others.items()):
                return

    @property
    def until_named(self) -> float:
        """Most seconds from a signal until a dead rank is named; 0 for one process."""
        return min(self.timeout, ALERT) + GRACE if self.world > 1 else 0.0

    def _publish(self, left: bool = False) -> None:
        self._count += 1
        marks, text, disk = self._mark
        now = self._alarm, left, self._progress, disk, bool(self._waiters), place_of_main_thread()
        self._own = Beat(self._count, marks, text, self._host, self._pid, *now)
        self._store.set(f"beat/{self.rank}", json.dumps(asdict(self._own)))

    def _read_beats(self) -> dict[int, Beat]:
        values = self._store.multi_get([f"beat/{rank}" for rank in self.observed])
        return {rank: Beat(**json.loads(value)) for rank, value in zip(self.observed, values, strict=True)}

    def _work(self) -> None:
        """Run the beating thread: an exchange every interval, until the main thread closes or a diagnosis ends the process."""
        before = time.monotonic()
        while not self._ended.is_set():
            now = time.monotonic()
            elapsed, before = min(now - before, 2 * self.interval), now  # do not count time in which this process was stopped
            self._exchanges += 1
            try:
                self._exchange(elapsed)
                if self._closing and (self.rank != 0 or not self._others()):  # the first may host the store: it leaves last
                    self._publish(left=True)
                    self._ended.set()
            except RuntimeError:
                self._store_gone()
            self._exchanges += 1
            if self._diagnosis is not None and not self._closing and not self._ended.is_set():
                self._leave(self._diagnosis)
            self._sleep(0.05 if self._closing else self.interval)

    def _guard(self) -> None:
        """Run the guard thread: end the process at `_end_at`, or if the store leaves the beating thread waiting for `timeout`."""
        seen, waited = 0, 0.0
        while not self._ended.wait(self.interval):  # time in which this process was stopped counts as one interval
            waited = waited + self.interval if self._exchanges == seen and seen % 2 else 0.0
            seen = self._exchanges
            if time.monotonic() >= self._end_at:
                self._exit()
            if waited >= self.timeout:
                self._store_gone()

    def _exchange(self, elapsed: float) -> None:
        """Publish this rank's beat, read the others', and write a diagnosis or adopt the one in the store."""
        self._publish()
        beats = self._read_beats()
        for rank, beat in beats.items():
            self._silent[rank] = self._silent[rank] + elapsed if beat.count == self._beats[rank].count else 0.0
        self._still = 0.0 if len(beats) < self.world or got_further(self._beats, beats) else self._still + elapsed
        self._beats = beats

        found = self._store.get("diagnosis")
        if found == b"none":
            message = self._failure or blame(beats, self._silent, self._still, self.timeout)
            if message is None:
                return
            mine = Diagnosis(message, failed=self._failure is not None)
            found = self._store.compare_set("diagnosis", "none", json.dumps(mine))
        self._diagnosis = Diagnosis(*json.loads(found))
        self._found.set()

    def _others(self) -> list[int]:
        """Return the other ranks that answer and have not left."""
        return [
            r
            for r, beat in self._beats.items()
            if r != self.rank and not beat.left and self._silent[r] < min(GRACE, self.timeout)
        ]

    def _leave(self, diagnosis: Diagnosis) -> None:
        """End the process with the diagnosis, unless the main thread is leaving the context."""
        if diagnosis.failed:
            self._leaving.wait(GRACE)
        if self._leaving.is_set():
            return
        self.report(diagnosis.message)
        end = time.monotonic() + GRACE
        self._end_at = end + GRACE  # the store or the disk may not answer any more
        self.record(diagnosis.message)
        time.sleep(
            2 * self.interval
        )  # torchrun signals the other ranks as soon as one has ended: by then they must know the diagnosis
        with suppress(RuntimeError):
            while self.rank == 0 and self._others() and time.monotonic() < end:
                self._beats = self._read_beats()
                time.sleep(0.05)
            self._publish(left=True)
        self._exit()

    def _store_gone(self) -> None:
        """Report that the store is gone, and end the process. Nothing is known about the other ranks any more."""
        self._ended.set()
        if self._closing:
            return
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            host = f"torchrun on the host of {where(0, self._beats[0])}"
        else:
            host = f'{where(0, self._beats[0])}, last seen at "{self._beats[0].text}"'
        message = f"the store of the process group is gone, no answer from {host}; {CONTINUES}"
        self._diagnosis = Diagnosis(message, failed=False)
        self._found.set()
        if not self._leaving.is_set():
            self.report(message)
            self.record(message)
            self._exit()

    def _exit(self) -> None:
        """End this process now, because its main thread may be blocked forever."""
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # nobody reads the stream, or its disk is full
                stream.flush()
        os._exit(STATUS)

    def _sleep(self, seconds: float) -> None:
        """Sleep; another thread of this process may wake this one earlier."""
        ready, _, _ = select.select([self._woken], [], [], seconds)
        if ready:
            self._woken.recv(1024)
