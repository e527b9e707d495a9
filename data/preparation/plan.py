"""What a folder of prepared tokens holds: nothing, an unfinished preparation in OUT/.partial, or a finished one.

OUT/.partial/plan.json says what the unfinished one was asked for. Once a unit is finished, it is an error to go on with
other arguments; with the same ones finished units are kept, unless the source's files changed: then it starts over.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data.errors import DataError
from data.preparation.sources import Source, open_source
from data.shards import VERSION, check_sizes, check_tokenizer, fingerprint, read_index
from data.tokenizer import load_tokenizer, tokenizer_hash


def is_finished(out: Path, arguments: dict, log: Callable[[str], None]) -> bool:
    """Whether `out` holds the preparation that `arguments` ask for, whole; DataError if it holds another one."""
    if not (out / "index.json").exists():
        return False
    index = read_index(out)
    advice = "choose another folder, or remove this one"
    if difference := _difference(index["arguments"], arguments):
        raise DataError(f"{out} is already prepared with other arguments: {difference}; {advice}")
    inventory = _local_inventory(arguments["source"])
    if inventory and (difference := _difference(index["inventory"], inventory)):
        raise DataError(f"{out} is already prepared, but the files of {arguments['source']} changed: {difference}; {advice}")
    if _changed(arguments["tokenizer"], index["tokenizer_sha256"]):
        raise DataError(f"{out} is already prepared, but the tokenizer in {arguments['tokenizer']} changed; {advice}")
    check_tokenizer(out, index)
    for split in index["splits"]:
        check_sizes(out, index, split)
    shutil.rmtree(out / ".partial", ignore_errors=True)
    log(f"already prepared: {out}, {summary(index)}")
    return True


def begin(partial: Path, arguments: dict, source: Source, log: Callable[[str], None]) -> None:
    """Make `partial`, or take up the one that is there; DataError if that belongs to other arguments."""
    plan = {"version": VERSION, "arguments": arguments, "inventory": source.inventory, "state": source.state}
    path = partial / "plan.json"
    if path.exists():
        old = json.loads(path.read_text())
        difference = _difference(old["arguments"], arguments)
        if difference and any(partial.glob("*.tokens")):
            raise DataError(
                f"{partial.parent} holds an unfinished preparation with other arguments: {difference}; "
                f"finish that one, or remove {partial}"
            )
        if old == plan:
            for leftover in partial.glob("*.tmp"):
                leftover.unlink()
            return
        if not difference:
            log("the source changed since this preparation began: starting over")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    _write_json(path, plan)


def publish(partial: Path, shards: Path, out: Path, index: dict) -> None:
    """Move `shards` to their place and write index.json last: a folder with an index is whole."""
    for path in sorted(shards.iterdir()):
        os.replace(path, out / path.name)
    shutil.copyfile(partial / "tokenizer.json", out / "tokenizer.json")
    _write_json(out / "index.json", index)
    shutil.rmtree(partial, ignore_errors=True)  # whoever finds the index removes it, too


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """One preparation at a time in a folder. The lock ends with the process, even if that is killed."""
    handle = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{out}: another preparation is running there") from None
        except OSError:
            pass  # a network file system without locks
        yield
    finally:
        os.close(handle)


def summary(index: dict) -> str:
    """One line on what was prepared."""
    parts = [f"{split} {s['tokens']:,} tokens in {s['documents']:,} documents" for split, s in index["splits"].items()]
    return f"{', '.join(parts)}; vocabulary {index['vocab_size']}, fingerprint {fingerprint(index)[:12]}"


def _difference(old: dict, new: dict) -> str:
    return ", ".join(f"{key} was {old.get(key)!r} and is now {new[key]!r}" for key in new if old.get(key) != new[key])


def _local_inventory(source: str) -> dict | None:
    """None for the hub, and for files that are gone: a corpus may be deleted once it is prepared."""
    if source.startswith("hub:"):
        return None
    try:
        return open_source(source).inventory
    except (DataError, OSError):
        return None


def _changed(tokenizer: str, sha256: str) -> bool:
    """Whether a tokenizer that was given as a path is there and has another hash."""
    if tokenizer in ("bytes", "bpe") or not Path(tokenizer).exists():
        return False
    return tokenizer_hash(load_tokenizer(tokenizer)) != sha256


def _write_json(path: Path, value: dict) -> None:
    """Atomically, and on the disk when it returns."""
    aside = path.with_name(path.name + ".tmp")
    with open(aside, "w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
