"""A lock so that only one training run uses a folder; a run takes it before it writes anything into the folder.

The kernel releases its lock on the file `lock` when the process ends, in whatever way. This lock separates processes of one
machine, and processes of several machines if the file system shares locks. Some mounts of NFS and Lustre do not. So the holder
also updates the file's time every HEARTBEAT seconds. A process on another machine waits until SILENCE seconds pass without that.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
import tempfile
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from celo2.training.folder import check_folder, check_no_file

HEARTBEAT = 5.0  # seconds between two signs of life of the holder
SILENCE = 30.0  # seconds without a sign of life after which a holder on another machine counts as dead; its job may be requeued
SETTLE = 1.0  # seconds after which a new holder checks whether another process took the lock at the same moment
LOST = 2  # exit status of a holder that finds its lock taken by another process


class FolderInUse(OSError):
    """Another process holds the folder. The message names it and the remedy."""


class FolderLock:
    """A context manager that takes a lock on `folder` and releases it; creates the folder if it is missing.

    Raises:
        FolderInUse: a live process holds the lock.
        UnsafeFolder: the path is a file, or the folder holds something that would make the run write elsewhere.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "lock"
        boot = Path("/proc/sys/kernel/random/boot_id")  # containers of one machine share this id and the kernel's locks
        machine = boot.read_text(encoding="utf-8").strip() if boot.exists() else socket.gethostname()
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": since, "machine": machine, "id": uuid.uuid4().hex}
        self.own = json.dumps(owner).encode()
        self.machine = machine
        self.made = False  # whether this process created the folder
        self.descriptor = -1
        self.released = threading.Event()
        self.thread = threading.Thread(target=self._beat, name="lock", daemon=True)

    def __enter__(self) -> FolderLock:
        while True:
            check_no_file(self.folder)
            self.made |= not self.folder.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
            check_folder(self.folder)
            self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            try:
                self._take()
            except BaseException as error:
                self._give_up(error)
                if isinstance(error, OSError) and error.errno is not None:
                    error.filename = str(self.path)  # a full disk
                raise
            if not self._replaced():
                break
            os.close(self.descriptor)  # the last holder has just removed the file: try again
        self.thread.start()
        return self

    def _give_up(self, error: BaseException) -> None:
        """Close the file after `error`, and remove it unless another process holds it."""
        with suppress(OSError):
            if not isinstance(error, FolderInUse) and self._content() in (b"", self.own) and not self._replaced():
                self.path.unlink()
                if self.made:
                    self.folder.rmdir()
        os.close(self.descriptor)

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self.thread.join(HEARTBEAT)
        with suppress(OSError):
            if self._content() == self.own and not self._replaced():
                self.path.unlink()
                if self.made:
                    self.folder.rmdir()  # fails unless the folder is empty because the run wrote nothing
        os.close(self.descriptor)

    def _take(self) -> None:
        """Take the lock and write this process into the file, or raise FolderInUse."""
        certain = True  # whether the kernel's lock alone is sufficient
        try:
            # Not flock: forked processes would inherit the lock and hold it after this process has died.
            fcntl.lockf(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise self._in_use() from None
            certain = False  # a file system without locks
        owner = self._owner()
        if owner is not None and not (certain and owner.get("machine") == self.machine):
            self._wait_for_silence()
            certain = False
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, self.own, 0)
        os.fsync(self.descriptor)
        if not certain:
            time.sleep(SETTLE)
            if self._content() != self.own:
                raise self._in_use()

    def _wait_for_silence(self) -> None:
        """Return when the holder has given no sign of life for SILENCE seconds; raise FolderInUse if it gives one."""
        with tempfile.TemporaryFile(dir=self.folder) as probe:  # so that both times come from the clock of the file server
            silent = os.fstat(probe.fileno()).st_mtime - os.fstat(self.descriptor).st_mtime
        first, wait = self._sign(), SILENCE - max(0.0, silent)
        end = time.monotonic() + wait
        if wait > 1:
            print(
                f"note: {self._in_use()}; waiting {wait:.0f} s to see whether that process is alive", file=sys.stderr, flush=True
            )
        while time.monotonic() < end:
            time.sleep(min(1.0, SILENCE / 5))
            if self._sign() != first:
                raise self._in_use()

    def _sign(self) -> tuple[bytes, int]:
        """Content and time of the file; a change of them is a sign of life of the holder."""
        return self._content(), os.fstat(self.descriptor).st_mtime_ns

    def _content(self) -> bytes:
        return os.pread(self.descriptor, 4096, 0)  # opening and closing the file again would release the kernel's lock

    def _owner(self) -> dict[str, Any] | None:
        """What the holder wrote into the file; None if the file is empty, so that the lock is free."""
        content = self._content()
        try:
            owner = json.loads(content)
        except ValueError:
            owner = {}
        return (owner if isinstance(owner, dict) else {}) if content else None

    def _in_use(self) -> FolderInUse:
        owner = self._owner() or {}
        who = "process {pid} on {host} since {since}".format(**owner) if {"pid", "host", "since"} <= owner.keys() else ""
        return FolderInUse(f"{self.folder} is in use by {who or 'another process'}; stop it, or choose another run.dir")

    def _replaced(self) -> bool:
        """Whether the file at the path was replaced by another one or removed."""
        try:
            return os.stat(self.path).st_ino != os.fstat(self.descriptor).st_ino
        except FileNotFoundError:
            return True

    def _beat(self) -> None:
        """Update the file's time. End this process if another took the lock while this one was stopped: it must not write."""
        while not self.released.wait(HEARTBEAT):
            with suppress(OSError):
                os.utime(self.descriptor)
                taken = self._content() != self.own or (self._replaced() and self.path.exists())
                if taken and not self.released.is_set():
                    sys.stderr.write(
                        f"error: {self.folder}: another process took the lock while this one was stopped; this process ends\n"
                    )
                    sys.stderr.flush()
                    os._exit(LOST)
