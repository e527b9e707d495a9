"""The Python standard library as a corpus: about 10 MB of code and documentation that every machine has."""

import os
import sysconfig
from pathlib import Path

from data import DataError

# Tests, bundled tools that some machines lack, and generated tables.
SKIPPED_FOLDERS = {
    *("test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages"),
    *("ensurepip", "encodings", "pydoc_data", "__pycache__"),
}
SKIPPED_FILES = {"html/entities.py", "stringprep.py"}
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")


def stdlib_files() -> tuple[Path, list[str]]:
    """Return the library's folder and the sorted names of its sources. Raises DataError on a machine without sources."""
    base = Path(sysconfig.get_path("stdlib"))
    names = []
    for parent, folders, files in os.walk(base):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS and not name.startswith(SKIPPED_PREFIXES)]
        sources = [name for name in files if name.endswith(".py") and not name.startswith(SKIPPED_PREFIXES)]
        names += [Path(parent, name).relative_to(base).as_posix() for name in sources]
    if not names:
        raise DataError(f"source stdlib: this Python has no library sources in {base}")
    return base, sorted(set(names) - SKIPPED_FILES)


def stdlib_topics() -> list[str]:
    """Return the documentation topics of `help()`, sorted by name."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]
