"""Manages an output folder. It is empty, or holds an unfinished preparation (OUT/.partial) or a finished one (OUT/index.json).

OUT/.partial/plan.json stores the arguments of an unfinished preparation and the state of its sources. Once a unit is
finished, other arguments are an error. With the same arguments, finished units are kept. But if the source's files have
changed, the preparation starts over.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data import DataError
from data.files import replacing
from data.preparation.sources import Source, open_source
from data.preparation.split import hashes_of_source, texts_hash
from data.shards import check_files, fingerprint, read_index
from data.special_tokens import CONFIG, as_trained, end_of_text
from data.tokenizer import load_declared, load_tokenizer, tokenizer_hash

UNITS_VERSION = 3  # version of the files in OUT/.partial


def is_finished(out: Path, arguments: dict, log: Callable[[str], None]) -> bool:
    """Return whether `out` holds the finished preparation that `arguments` ask for. Raises DataError if it holds another one."""
    if not (out / "index.json").exists():
        return False
    index = read_index(out)
    advice = "choose another folder, or remove this one"
    tokenizer = arguments["tokenizer"]
    if difference := _changed_arguments(index["arguments"], arguments):
        raise DataError(f"{out} is already prepared with other arguments: {difference}; {advice}")
    for i, (key, inventory) in enumerate((("source", "inventory"), ("val_source", "val_inventory"))):
        name, source = arguments[key], _local_source(arguments[key])
        if source is None:
            continue
        if difference := _difference(index[inventory], source.inventory):
            raise DataError(f"{out} is already prepared, but the files of {name} changed: {difference}; {advice}")
        kept = index.get("sources", [])[i : i + 1]  # empty in folders of earlier versions
        if kept and kept[0]["written_sha256"] != source.written:
            log(f"{name} was written to since, or copied: comparing its text")
            if texts_hash(hashes_of_source(source.units, arguments["text_key"])) != kept[0]["texts_sha256"]:
                raise DataError(f"{out} is already prepared, but the text of {name} changed; {advice}")
            kept[0]["written_sha256"] = source.written
            with suppress(OSError):  # if the folder is read-only, the next start compares the text again
                _write_json(out / "index.json", index)
    if tokenizer not in ("bytes", "bpe") and Path(tokenizer).exists():
        tok = load_tokenizer(tokenizer)
        end = tok.id_to_token(index["end_of_text_id"])  # earlier versions stored the tokenizer unchanged
        if end is None or index["tokenizer_sha256"] not in map(tokenizer_hash, (tok, as_trained(tok, end))):
            raise DataError(f"{out} is already prepared, but the tokenizer in {tokenizer} changed; {advice}")
        if (now := end_of_text(tok, load_declared(tokenizer), arguments["end_token"])) != end:
            raise DataError(f"{out} is already prepared with the end of text {end!r}, but {tokenizer} now says {now!r}; {advice}")
    check_files(out, index, *index["splits"])
    shutil.rmtree(out / ".partial", ignore_errors=True)
    log(f"already prepared: {out}, {summary(index)}")
    return True


def begin(partial: Path, arguments: dict, sources: list[Source], log: Callable[[str], None]) -> None:
    """Create the folder `partial`, or keep an existing one to continue it. Raises DataError if that has other arguments."""
    states = [source.state for source in sources]
    plan = {"version": UNITS_VERSION, "arguments": arguments, "states": states}
    path = partial / "plan.json"
    if path.exists():
        old = json.loads(path.read_text(encoding="utf-8"))
        difference = _changed_arguments(old["arguments"], arguments)
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
            why = "an earlier version began this preparation" if former else "the source changed since this preparation began"
            log(f"{why}: starting over")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    _write_json(path, plan)


def publish(partial: Path, shards: Path, out: Path, index: dict) -> None:
    """Move the files in `shards` to `out`, and write index.json last: a folder with an index is whole."""
    for path in sorted(shards.iterdir()):
        os.replace(path, out / path.name)
    for name in (CONFIG, "tokenizer.json"):
        with replacing(out / name) as file:
            file.write((partial / name).read_bytes())
    _write_json(out / "index.json", index)
    shutil.rmtree(partial, ignore_errors=True)  # if this is interrupted, is_finished removes it


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Lock a folder in this context: only one preparation may run in it. The lock ends with the process, even after a kill."""
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
    """Return a line on the prepared data."""
    parts = [f"{split} {s['tokens']:,} tokens in {s['documents']:,} documents" for split, s in index["splits"].items()]
    left_out = "".join(f"; {note}" for note in index.get("notes", []) if note.startswith("left out"))
    return f"{', '.join(parts)}; vocabulary {index['vocab_size']}, fingerprint {fingerprint(index)[:12]}{left_out}"


def repetition(splits: dict[str, dict]) -> list[str]:
    """Return a note if a validation shard has the same tokens as a training shard. `splits`: as in index.json."""
    train = {shard["sha256"]: shard["name"] for shard in splits["train"]["shards"]}
    same = [f"{shard['name']} is {train[shard['sha256']]}" for shard in splits["val"]["shards"] if shard["sha256"] in train]
    return [f"validation holds the tokens of training: {', '.join(same)}; its loss says nothing about new text"] if same else []


def _option(argument: str) -> str:
    """Return the name of an argument of data.prepare on the command line."""
    return "SOURCE" if argument == "source" else f"--{argument.replace('_', '-')}"


def _changed_arguments(old: dict, new: dict) -> str:
    return _difference(*({_option(key): value for key, value in arguments.items()} for arguments in (old, new)))


def _difference(old: dict, new: dict) -> str:
    return ", ".join(f"{key} was {old.get(key)!r} and is now {new[key]!r}" for key in new if old.get(key) != new[key])


def _local_source(name: str | None) -> Source | None:
    """Open a local source. Returns None for the hub, and for missing files: a corpus may be deleted once it is prepared."""
    if name is None or name.startswith("hub:"):
        return None
    try:
        return open_source(name)
    except (DataError, OSError):
        return None


def _write_json(path: Path, value: dict) -> None:
    with replacing(path) as file:
        file.write(json.dumps(value, indent=1).encode())
