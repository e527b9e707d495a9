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

# What asks a process to end. SIGINT and SIGQUIT: a terminal's keys; SIGHUP: a terminal or connection that closes; SIGTERM:
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
STOPPED = 75  # exit status (EX_TEMPFAIL): saved after a signal; the same command continues
INTERRUPTED = 130  # exit status: stopped at once
AT_ONCE = "stopped at once by a signal; the same command continues from the newest checkpoint"
# s; a signal that follows another so soon is a copy of it: `timeout` signals its child twice, and torchrun passes on the Ctrl-C
# that its ranks got from the terminal, too. Without torchrun, Ctrl-C comes once.
COPY = 1.0
GRACE = 2.0  # s from the second signal to the end of a process whose main thread does not get to run Python


class StopSignals:
    """Handles STOP_SIGNALS while the context is open.

    The first sets `received`. The next raises KeyboardInterrupt in the main thread; where that waits in a collective or a system
    call and cannot see it, a thread ends the process after GRACE.

    Attributes:
        wait: whether the first signal is waited for; until it is set there is nothing to save, and the first acts as the next.
        received: whether a signal came.
        held: whether the process is about to end anyway, with a status and a line that a launcher's signal must not take from it.
        patience: seconds that a first SIGTERM leaves where there is nothing to save: torchrun sends it when another rank has
            died, which is to be named.
        listener: called with the first signal, in another thread than the main one.
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
        """In the main thread, once that runs Python."""
        self.received = True
        if self._at_once(count, number):
            raise KeyboardInterrupt

    def _watch(self) -> None:
        """In a thread of its own, whatever the main thread does: numbers of signals arrive here as bytes."""
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
        """How many signals there were, with this one."""
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
