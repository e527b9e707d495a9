"""The end of a process that was one of many."""

from __future__ import annotations

import atexit
import os
import sys
from contextlib import suppress
from typing import NoReturn


def leave(status: int) -> NoReturn:
    """End the process with `status`: exit handlers run and what was printed is written, the interpreter is not taken apart.

    Gloo's worker threads let go of a collective's tensors a moment after the collective is done. One that does so while the
    interpreter is being taken apart aborts the process (SIGABRT), and a run that has succeeded counts as failed. Taking down
    the process group ends the threads only where nothing refers to it any more, but DeepSpeed and a DeviceMesh always do.
    https://github.com/pytorch/pytorch/pull/179291
    """
    atexit._run_exitfuncs()
    with suppress(BrokenPipeError):  # nobody reads it
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)
