"""Tell torchrun why a rank ends with another status than 0, so that torchrun's traceback does not bury the reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress

# A program that waits for the end of a process, and then prints a line.
REPEAT = """
import os, select, sys
try:
    select.select([os.pidfd_open(int(sys.argv[1]))], [], [], 600)
except ProcessLookupError:
    pass
os.write(2, os.fsencode(sys.argv[2]) + b"\\n")
"""


def tell_launcher(message: str) -> None:
    """Tell torchrun why this rank ends. torchrun shows `message` as the root cause in its table of failures."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        record = {"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump(record, file)


def say_after_launcher(message: str) -> None:
    """Print `message` on stderr once torchrun has ended. Called on the first rank, and only on Linux.

    A signal to torchrun makes it end with a traceback of its own, whatever the ranks tell it.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and hasattr(os, "pidfd_open"):
        command = [sys.executable, "-S", "-c", REPEAT, str(os.getppid()), message]
        with suppress(OSError):
            subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
