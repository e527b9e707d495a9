"""python -m data.adopt SOURCE FOLDER --tokenizer NAME: Use data that is tokenized already, where it is.

SOURCE is a folder, a glob or a file: token files of llm.c and modded-nanogpt (.bin with a header), train.bin and val.bin of
nanoGPT, or a data set that `datasets` saved to disk. Token files are read once but not copied: FOLDER gets a tokenizer, and an
index with the paths and hashes of these files. FOLDER can then be used like a folder that data.prepare wrote. A saved data set is
copied into shards (data/saved_dataset.py).
"""

import argparse
import glob
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from data import DataError, printable
from data.files import replace_text
from data.preparation.output import locked, repetition, summary
from data.preparation.workers import cores
from data.saved_dataset import Chosen, copy_saved
from data.shards import FILES_FORMAT, VERSION, fingerprint, read_index
from data.special_tokens import as_trained, end_of_text
from data.token_files import Scan, TokenFile, is_saved, open_token_file, scan
from data.tokenizer import (
    LARGEST_VOCABULARY,
    load_declared,
    load_tokenizer,
    save_tokenizer,
    token_id,
    tokenizer_hash,
    vocabulary_size,
)
from data.vocabularies import character_tokenizer, character_vocabulary, number_tokenizer

# The word in a file's name that gives its split; test files are skipped.
TRAINING, VALIDATION, TEST = (
    re.compile(rf"(?<![a-z])({words})(?![a-z])", re.IGNORECASE)
    for words in ("train|training", "val|valid|validation|dev", "test")
)
PICKLE = "is a pickle, which is never opened: write its 'stoi' into a JSON file (docs/data.md has the command)"


def adopt(
    source: str,
    out: str | Path,
    *,
    tokenizer: str | None = None,
    vocab_size: int | None = None,
    end_token: str | None = None,
    val: str | None = None,
    log: Callable[[str], None] = print,
) -> Path:
    """Make the data in `source` usable as the prepared folder `out`. Returns `out`.

    tokenizer: an argument of load_tokenizer, or a JSON file with the ids of characters (data/vocabularies.py). vocab_size:
    replaces the tokenizer if all that is known about the tokens is that they are below this number. end_token: as in
    data.prepare; with vocab_size, the number of a token. val: files (a glob) of the validation split, if their names do not show
    it. Raises DataError for anything that the user can correct.
    """
    for name, value in {"SOURCE": source, "FOLDER": out, "--tokenizer": tokenizer, "--val": val}.items():
        if value is not None and not str(value).strip():  # an unset shell variable; Path("") would be the current folder
            raise DataError(f"{name} is empty")
    out = Path(out)

    def say(line: str) -> None:
        log(printable(line))

    begun = time.monotonic()
    if is_saved(Path(source)):
        arguments = {"adopted": str(source), "val": val}
        return copy_saved(Path(source), out, val, choose_tokenizer(tokenizer, vocab_size, end_token, None), arguments, say)
    splits = find_files(source, out, val, say)
    tok, end, declared, ids = choose_tokenizer(tokenizer, vocab_size, end_token, splits["train"][0].parent)
    raw = "uint16" if (vocab_size or vocabulary_size(tok)) <= 2**16 else "uint32"  # not counting an end of text that was added
    files = {split: [open_token_file(path, raw) for path in paths] for split, paths in splits.items()}
    check_alike([file for split in files.values() for file in split])
    say(f"end of text: {end!r}, id {token_id(tok, end)}")
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        index = describe(files, out, tok, token_id(tok, end), ids, say) | {"arguments": {"adopted": str(source), "val": val}}
        if not sum(split["documents"] for split in index["splits"].values()):
            note = (
                f"the end of text {end!r} (id {index['end_of_text_id']}) is not in the files: nothing tells their documents "
                "apart; if another token does, name it with --end-token"
            )
            say(note)
            index["notes"].append(note)
        for note in repetition(index["splits"]):
            say(note)
            index["notes"].append(note)
        publish(out, index, tok, end, declared)
    say(f"adopted {out} in {time.monotonic() - begun:.1f} s: {summary(index)}")
    return out


def find_files(source: str, out: Path, val: str | None, say: Callable[[str], None]) -> dict[str, list[Path]]:
    """Return the token files of each split, sorted by name. Raises DataError if there are none, or a name shows no split."""
    found, validation = _listed(source, out), _listed(val, out) if val else []
    splits: dict[str, list[Path]] = {"train": [], "val": validation}
    chosen = {path.resolve() for path in validation}
    for path in found:
        if path.resolve() in chosen:
            continue
        if val or TRAINING.search(path.stem):
            splits["train"].append(path)
        elif VALIDATION.search(path.stem):
            splits["val"].append(path)
        elif TEST.search(path.stem):
            say(f"left out: {path.name}, a test file")
        else:
            raise DataError(f"{path}: its name has neither train nor val; say with --val which files are for validation")
    for split, option in (("train", "; --val names all of them" if val else ""), ("val", "; name a file of it with --val")):
        if not splits[split]:
            raise DataError(f"{source}: no file of the split {split!r} among {len(found)}: {found[0].name}, ...{option}")
    return splits


def _listed(source: str, out: Path) -> list[Path]:
    """Return the .bin files that a folder, a glob or a path names. The folder may be `out`, adopted in place before."""
    path = Path(source)
    if path.is_dir():
        if (path / "index.json").exists() and (path.resolve() != out.resolve() or read_index(path)["format"] != FILES_FORMAT):
            raise DataError(f"{path} is a prepared folder: use it as data.dir")
        found = sorted(path.glob("*.bin"))
        if not found:
            raise DataError(f"{path}: no token files (*.bin) in it, and no data set that `datasets` saved")
    else:
        found = [Path(name) for name in sorted(glob.glob(source, recursive=True))] or ([path] if path.exists() else [])
        if not found:
            raise DataError(f"{source}: no such file")
    for file in found:
        if not file.is_file():
            raise DataError(f"{file}: {'not a file' if file.exists() else 'a broken link'}")
    return found


def choose_tokenizer(name: str | None, vocab_size: int | None, asked: str | None, source: Path | None) -> Chosen:
    """Return the tokenizer of the data. Raises DataError if it is not given, or not valid.

    name: --tokenizer. vocab_size: --vocab-size. asked: --end-token. source: a folder in which to look for meta.pkl, for a hint.
    """
    declared: dict[str, str] = {}
    if (name is None) == (vocab_size is None):
        if name is not None:
            raise DataError("--tokenizer and --vocab-size exclude each other: a tokenizer says how many tokens it has")
        hint = ""
        if source is not None and (source / "meta.pkl").exists():
            hint = f" ({source / 'meta.pkl'} {PICKLE})"
        raise DataError(
            "which tokenizer wrote the data? Give --tokenizer: a name such as gpt2, the path of a tokenizer.json, or a JSON file "
            f"of {{character: id}}{hint}; or --vocab-size, if only the number of tokens is known"
        )
    if vocab_size is not None:
        if vocab_size < 2:
            raise DataError(f"--vocab-size {vocab_size}: at least 2")
        if vocab_size > LARGEST_VOCABULARY:
            raise DataError(f"--vocab-size {vocab_size}: at most {LARGEST_VOCABULARY}")
        if asked is not None and not (asked.isascii() and asked.isdecimal() and int(asked) < vocab_size):
            raise DataError(f"--end-token {asked!r}: with --vocab-size it is the number of a token, below {vocab_size}")
        tok = number_tokenizer(vocab_size, str(int(asked))) if asked else number_tokenizer(vocab_size)
        asked, ids = str(int(asked)) if asked else None, vocab_size
    else:
        assert name is not None
        path = Path(name)
        if path.suffix in (".pkl", ".pickle"):
            raise DataError(f"--tokenizer {name} {PICKLE}")
        characters = character_vocabulary(path) if path.suffix == ".json" and path.is_file() else None
        if characters is not None and max(characters.values()) >= LARGEST_VOCABULARY:
            raise DataError(f"--tokenizer {name}: the id {max(characters.values())}; ids must be below {LARGEST_VOCABULARY}")
        if characters is not None:
            tok, ids = character_tokenizer(characters), max(characters.values()) + 1
        else:
            tok, declared = load_tokenizer(name), load_declared(name)
            ids = vocabulary_size(tok)
    end = end_of_text(tok, declared, asked)
    return Chosen(as_trained(tok, end), end, declared, ids)


def check_alike(files: list[TokenFile]) -> None:
    """Raise DataError unless all files have the same format."""
    first = files[0]
    for file in files:
        if (file.offset, file.dtype) != (first.offset, first.dtype):
            shown = [f"{'a header' if f.offset else 'no header'} and {f.dtype} tokens" for f in (first, file)]
            raise DataError(f"{file.path}: {shown[1]}, but {first.path.name} has {shown[0]}")


def describe(
    files: dict[str, list[TokenFile]], out: Path, tok: Tokenizer, end: int, ids: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Read each file once, and return the index. Raises DataError unless all tokens are below `ids`."""
    every = [file for split in files.values() for file in split]
    base = Path(os.path.commonpath([os.path.abspath(file.path.parent) for file in every]))
    inside = base.is_relative_to(os.path.abspath(out))
    content: dict[str, dict] = {}
    with ThreadPoolExecutor(min(8, cores())) as pool:
        stamps = {file.path: os.stat(file.path).st_mtime_ns for file in every}
        scans = {file.path: pool.submit(scan, file, ids, end) for file in every}
        try:
            for split, part in files.items():
                shards: list[dict[str, Any]] = []
                for file in part:
                    found: Scan = scans[file.path].result()
                    name = Path(os.path.relpath(os.path.abspath(file.path), base)).as_posix()
                    say(f"ok  {name}  {file.tokens:,} tokens")
                    place = {"name": name, "offset": file.offset, "mtime_ns": stamps[file.path]}
                    shards.append({**place, "tokens": file.tokens, "sha256": found.sha256, "documents": found.ends})
                totals = {key: sum(shard[key] for shard in shards) for key in ("tokens", "documents")}
                if totals["tokens"] < 2:
                    raise DataError(f"{part[0].path}: the split {split!r} has a single token")
                content[split] = {**totals, "shards": shards}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {
        "format": FILES_FORMAT,
        "version": VERSION,
        "dtype": np.dtype(every[0].dtype).name,
        "vocab_size": vocabulary_size(tok),
        "end_of_text_id": end,
        "tokenizer_sha256": tokenizer_hash(tok),
        "files": os.path.relpath(base, os.path.abspath(out)) if inside else str(base),
        "splits": content,
        "inventory": {},
        "notes": [],
    }


def publish(out: Path, index: dict[str, Any], tok: Tokenizer, end: str, declared: dict[str, str]) -> None:
    """Write tokenizer and index. If the same data has moved, the new index points at its new place.

    Raises DataError if the folder holds another data set.
    """
    if (out / "index.json").exists() and fingerprint(read_index(out)) != fingerprint(index):
        raise DataError(f"{out} holds another data set: choose another folder, or remove it")
    save_tokenizer(tok, out, end, declared)
    replace_text(out / "index.json", json.dumps(index, indent=1))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0, 2 after an error, 130 after SIGINT."""
    parser = argparse.ArgumentParser(prog="python -m data.adopt", description=__doc__.split("\n\n")[0].split(": ", 1)[1])
    parser.add_argument("source", metavar="SOURCE", help="folder, glob or file of token files, or a data set saved to disk")
    parser.add_argument("out", metavar="FOLDER", help="folder for the index and the tokenizer: the data.dir of training")
    parser.add_argument(
        "--tokenizer", help="tokenizer that wrote the tokens: a pretrained name, a path, or a JSON file {character: id}"
    )
    parser.add_argument(
        "--vocab-size", type=int, help="instead of --tokenizer: number of token ids; the tokens then have no text"
    )
    parser.add_argument("--end-token", help="the token that ends, or begins, a document; without it, the end-of-text token")
    parser.add_argument("--val", metavar="FILES", help="glob or path of the files for validation, if their names do not say so")
    options = vars(parser.parse_args(arguments))
    try:
        adopt(**options)
    except KeyboardInterrupt:
        print("data.adopt: stopped; run the same command to start over", file=sys.stderr)
        return 128 + signal.SIGINT
    except (DataError, OSError) as error:
        print(f"data.adopt: {printable(str(error))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
