"""The lock on a run's folder: one process at a time, free at once when its process is dead, on this machine or another."""

import errno
import json
import os
import signal
import sys
import threading
import time

import pytest

from celo2.training import lock as lock_module
from celo2.training.lock import FolderInUse, FolderLock


def fork(action):
    """A process that carries out `action(say)`, where `say` writes a line for this process; its pid and a file with the lines."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            action(lambda line: os.write(write, f"{line}\n".encode()))
        finally:
            os._exit(99)
    os.close(write)
    return pid, os.fdopen(read)


@pytest.fixture
def quick(monkeypatch):
    for name, seconds in (("HEARTBEAT", 0.1), ("SILENCE", 0.6), ("SETTLE", 0.05)):
        monkeypatch.setattr(lock_module, name, seconds)


def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path):
    def hold(say):
        with FolderLock(tmp_path / "run"):
            child, _ = fork(lambda say: time.sleep(60))  # must not hold the lock when its parent is dead
            say(child)
            time.sleep(60)

    holder, lines = fork(hold)
    child = int(lines.readline())
    try:
        refused = rf"run is in use by process {holder} on .* since .*another run.dir"
        with pytest.raises(FolderInUse, match=refused), FolderLock(tmp_path / "run"):
            pass
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
    start = time.monotonic()
    with FolderLock(tmp_path / "run"):
        assert time.monotonic() - start < 1
    os.kill(child, signal.SIGKILL)
    lines.close()
    assert not list((tmp_path / "run").iterdir())


def write_lock(folder, **changes):
    """A lock as a process on another machine leaves it."""
    (folder / "lock").write_text(
        json.dumps({"host": "far", "pid": 7, "since": "today", "machine": "another", "id": "x"} | changes)
    )


def test_a_holder_on_another_machine(tmp_path, quick):
    write_lock(tmp_path)
    start = time.monotonic()
    with FolderLock(tmp_path):  # it gives no sign
        assert time.monotonic() - start >= 0.5
    write_lock(tmp_path)
    os.utime(tmp_path / "lock", (0, 0))  # it has been dead for long: no wait
    start = time.monotonic()
    with FolderLock(tmp_path):
        assert time.monotonic() - start < 0.5
    write_lock(tmp_path)
    stop = threading.Event()

    def beat():
        while not stop.wait(0.1):
            with (tmp_path / "lock").open("r+b") as file:  # a change of the time alone, as the holder makes it
                os.utime(file.fileno())

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(FolderInUse, match="in use by process 7 on far"), FolderLock(tmp_path):
            pass
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"host": "far"}'])
def test_a_damaged_lock_is_a_holder_that_is_not_known(tmp_path, quick, content):
    (tmp_path / "lock").write_text(content)
    with FolderLock(tmp_path):
        pass


def test_a_holder_that_finds_its_lock_taken_ends(tmp_path, quick):
    def hold(say):
        sys.stderr = os.fdopen(os.dup(2), "w")
        with FolderLock(tmp_path):
            say("held")
            time.sleep(60)

    holder, lines = fork(hold)
    with lines:
        lines.readline()
    write_lock(tmp_path)  # as one does that waited while this process was stopped
    assert os.waitstatus_to_exitcode(os.waitpid(holder, 0)[1]) == lock_module.LOST
    assert "far" in (tmp_path / "lock").read_text()


def test_without_locks_in_the_file_system_the_file_decides(tmp_path, quick, monkeypatch):
    def unsupported(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(lock_module.fcntl, "lockf", unsupported)
    with FolderLock(tmp_path), pytest.raises(FolderInUse, match=f"process {os.getpid()}"), FolderLock(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_and_one_that_was_empty(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError), FolderLock(tmp_path / "file"):
        pass
    (tmp_path / "empty").mkdir()
    for name, stays in (("empty", True), ("new", False)):
        with FolderLock(tmp_path / name):
            pass
        assert (tmp_path / name).exists() == stays


@pytest.mark.parametrize("folder", ["new", "held before"])
def test_a_lock_that_a_full_disk_refuses_leaves_nothing(tmp_path, quick, monkeypatch, folder):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if folder == "held before":
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(lock_module.os, "pwrite", full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / folder / 'lock'}'"), FolderLock(tmp_path / folder):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ([folder] if folder == "held before" else [])
