"""What an output folder holds: nothing, an unfinished preparation in OUT/.partial, or a finished one with OUT/index.json.

OUT/.partial/plan.json keeps the arguments of an unfinished preparation and the state of its sources. Once a unit is
finished, other arguments are an error. With the same ones finished units are kept, unless the source's files changed:
then the preparation starts over.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data import DataError
from data.files import replacing
from data.preparation.sources import Source, open_source
from data.shards import check_files, fingerprint, read_index
from data.special_tokens import CONFIG, as_trained
from data.tokenizer import load_tokenizer, tokenizer_hash

UNITS_VERSION = 2  # of what is in OUT/.partial


def is_finished(out: Path, arguments: dict, log: Callable[[str], None]) -> bool:
    """Whether `out` holds the whole preparation that `arguments` ask for; DataError if it holds another one."""
    if not (out / "index.json").exists():
        return False
    index = read_index(out)
    advice = "choose another folder, or remove this one"
    tokenizer = arguments["tokenizer"]
    if difference := _difference(index["arguments"], arguments):
        raise DataError(f"{out} is already prepared with other arguments: {difference}; {advice}")
    for key, inventory in (("source", "inventory"), ("val_source", "val_inventory")):
        if arguments[key] and (difference := _difference(index[inventory], _local_inventory(arguments[key]))):
            raise DataError(f"{out} is already prepared, but the files of {arguments[key]} changed: {difference}; {advice}")
    if tokenizer not in ("bytes", "bpe") and Path(tokenizer).exists():
        tok = load_tokenizer(tokenizer)
        end = tok.id_to_token(index["end_of_text_id"])  # former versions kept the tokenizer as it was
        if end is None or index["tokenizer_sha256"] not in map(tokenizer_hash, (tok, as_trained(tok, end))):
            raise DataError(f"{out} is already prepared, but the tokenizer in {tokenizer} changed; {advice}")
    check_files(out, index, *index["splits"])
    shutil.rmtree(out / ".partial", ignore_errors=True)
    log(f"already prepared: {out}, {summary(index)}")
    return True


def begin(partial: Path, arguments: dict, sources: list[Source], log: Callable[[str], None]) -> None:
    """Make `partial`, or continue the one that is there; DataError if that belongs to other arguments."""
    states = [source.state for source in sources]
    plan = {"version": UNITS_VERSION, "arguments": arguments, "states": states}
    path = partial / "plan.json"
    if path.exists():
        old = json.loads(path.read_text(encoding="utf-8"))
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
            former = old["version"] != UNITS_VERSION
            why = "a former version began this preparation" if former else "the source changed since this preparation began"
            log(f"{why}: starting over")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    _write_json(path, plan)


def publish(partial: Path, shards: Path, out: Path, index: dict) -> None:
    """Move `shards` to their place and write index.json last: a folder with an index is whole."""
    for path in sorted(shards.iterdir()):
        os.replace(path, out / path.name)
    for name in (CONFIG, "tokenizer.json"):
        with replacing(out / name) as file:
            file.write((partial / name).read_bytes())
    _write_json(out / "index.json", index)
    shutil.rmtree(partial, ignore_errors=True)  # if this is interrupted, is_finished removes it


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
    left_out = "".join(f"; {note}" for note in index.get("notes", []) if note.startswith("left out"))
    return f"{', '.join(parts)}; vocabulary {index['vocab_size']}, fingerprint {fingerprint(index)[:12]}{left_out}"


def _difference(old: dict, new: dict) -> str:
    return ", ".join(f"{key} was {old.get(key)!r} and is now {new[key]!r}" for key in new if old.get(key) != new[key])


def _local_inventory(source: str) -> dict:
    """Empty for the hub, and for files that are gone: a corpus may be deleted once it is prepared."""
    if source.startswith("hub:"):
        return {}
    try:
        return open_source(source).inventory
    except (DataError, OSError):
        return {}


def _write_json(path: Path, value: dict) -> None:
    with replacing(path) as file:
        file.write(json.dumps(value, indent=1).encode())
