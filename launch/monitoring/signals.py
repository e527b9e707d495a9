"""Stop signals: the first asks the training run to save and stop, the next one ends the process at once."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from launch.monitoring.launcher import say_after_launcher, tell_launcher

# Signals that ask a process to end. SIGINT, SIGQUIT: a terminal's keys; SIGHUP: a terminal or connection that closes; SIGTERM:
# launchers, Kubernetes, PBS, systemd; SIGUSR1, SIGUSR2: Slurm (--signal), SGE (-notify), LSF (-wa); SIGXCPU: a limit of CPU time.
STOP_SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
)
STOPPED = 75  # exit status (EX_TEMPFAIL): saved after a signal; the same command resumes the run
INTERRUPTED = 130  # exit status: stopped at once
AT_ONCE = "stopped at once by a signal; the same command continues from the newest checkpoint"
# s; a signal that follows another within this time is a copy of it: `timeout` signals its child twice, and torchrun passes on a
# Ctrl-C that its ranks have also got from the terminal. Without torchrun, Ctrl-C comes once.
COPY = 1.0
GRACE = 2.0  # s from the second signal until a process ends whose main thread is blocked outside of Python


class StopSignals:
    """Handles STOP_SIGNALS while the context is open.

    The first signal sets `received`. The second one raises KeyboardInterrupt in the main thread. If the main thread is blocked in
    a collective or a system call and cannot run the handler, another thread ends the process after GRACE.

    Attributes:
        wait: whether the first signal lets the run save. Until it is set there is nothing to save, and the first signal acts like
            the second one.
        received: whether a signal came.
        held: whether the process is about to end anyway; a launcher's signal must not replace its exit status and message.
        patience: seconds that the process has left after a first SIGTERM while there is nothing to save. torchrun sends SIGTERM
            when another rank has died, and the run needs the time to name that rank.
        listener: called at every signal, in another thread than the main one.
    """

    def __init__(self) -> None:
        self.wait, self.received, self.held = False, False, False
        self.patience = 0.0
        self.listener: Callable[[], None] = lambda: None
        self._closed = threading.Event()

    def __enter__(self) -> StopSignals:
        self._woken, self._wake = socket.socketpair()
        self._wake.setblocking(False)
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()
        self._previous_fd = signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        count = Count()
        self._previous: dict[signal.Signals, Any] = {}
        for number in STOP_SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # started with nohup
            self._previous[number] = signal.signal(number, lambda number, _: self._handle(count, number))
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._wake.send(b"\0")
        self._thread.join()
        signal.set_wakeup_fd(self._previous_fd)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._woken.close()
        self._wake.close()

    def hold(self) -> None:
        """The process is about to end: from now on only SIGINT, from a person, ends it at once."""
        self.held = True

    def _at_once(self, count: Count, number: int) -> bool:
        """Whether a signal, counted here, ends the process at once."""
        return not (self.held and number != signal.SIGINT) and count.add(number) > int(self.wait)

    def _handle(self, count: Count, number: int) -> None:
        """The signal handler: runs in the main thread, as soon as that executes Python."""
        self.received = True
        if self._at_once(count, number):
            raise KeyboardInterrupt

    def _watch(self) -> None:
        """The loop of the other thread, whatever the main thread does: numbers of signals arrive as bytes of a socket."""
        count = Count()
        while not self._closed.is_set():
            for number in self._woken.recv(64):
                if number not in STOP_SIGNALS:
                    continue
                at_once = self._at_once(count, number)
                self.received = True
                self.listener()
                if at_once:
                    from_launcher = number == signal.SIGTERM and count.total == 1
                    if not self._closed.wait(max(GRACE, self.patience if from_launcher else 0)) and not self.held:
                        end_now()


class Count:
    """Counts signals; copies of the one before do not count."""

    def __init__(self) -> None:
        self.total, self.last = 0, -COPY
        self.once = {signal.SIGINT} if "TORCHELASTIC_RUN_ID" not in os.environ else set()  # signals that come without copies

    def add(self, number: int) -> int:
        """Count a signal; returns how many there were, with this one."""
        now = time.monotonic()
        if number in self.once or now - self.last >= COPY:
            self.total, self.last = self.total + 1, now
        return self.total


def end_now() -> None:
    """End this process, with one line from the first rank."""
    tell_launcher(AT_ONCE)
    if os.environ.get("RANK", "0") == "0":
        cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # a progress bar hides it
        os.write(2, f"{cursor}error: {AT_ONCE}\n".encode())
        say_after_launcher(AT_ONCE)
    os._exit(INTERRUPTED)
