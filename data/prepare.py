"""python -m data.prepare SOURCE OUT: turn a corpus into token shards, which data.shards.TokenShards reads.

SOURCE is cut into units. Worker processes encode them into OUT/.partial. Then the shards are written in the order of the
source, and index.json last. So the files are the same for any number of workers, and memory does not grow with the corpus.
After a kill, the same command continues with the units that are not finished. While the command runs, the tokens take
twice their disk space.
"""

import argparse
import inspect
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from data import DataError, printable
from data.preparation.assemble import assemble
from data.preparation.encode import Encoder, token_dtype
from data.preparation.output import begin, is_finished, locked, publish, summary
from data.preparation.progress import progress
from data.preparation.sources import Source, Unit, open_source, total_bytes
from data.preparation.split import choose_split, cut_document, hashes_of_units, text_notes, texts_hash
from data.preparation.workers import cores, encode_units, save_bpe, unit_path
from data.shards import FORMAT, VERSION, is_prepared
from data.special_tokens import CONFIG, END_OF_TEXT, as_trained, check_not_of_texts, declared_tokens, end_of_text
from data.token_files import is_saved
from data.tokenizer import (
    byte_tokenizer,
    is_byte_tokenizer,
    load_declared,
    load_tokenizer,
    save_tokenizer,
    token_id,
    tokenizer_hash,
    vocabulary_size,
)

VAL_FRACTION = 0.01
BPE_BYTES_PER_TOKEN = 3  # a low estimate for English text; with the byte tokenizer it is 1


class Stopped(BaseException):
    """SIGINT or SIGTERM arrived; `args[0]` is its number."""


def prepare(
    source: str,
    out: str | Path,
    *,
    tokenizer: str = "bpe",
    vocab_size: int = 8192,
    end_token: str | None = None,
    val_fraction: float | None = None,
    val_source: str | None = None,
    shard_tokens: int = 100_000_000,
    workers: int | None = None,
    text_key: str = "text",
    hub_config: str | None = None,
    hub_split: str = "train",
    log: Callable[[str], None] = print,
) -> Path:
    """Prepare `source` (see data/preparation/sources.py) into the folder `out`. Returns `out`.

    A finished preparation with the same arguments is left unchanged. If a source changed before its preparation was finished,
    the preparation starts over.

    tokenizer: "bytes"; "bpe", trained on a sample with vocab_size entries; or an argument of load_tokenizer. end_token: the token
    that ends a document; by default, special_tokens.end_of_text finds it. val_fraction: the fraction of the text for validation,
    in [0, 1), see data/preparation/split.py; by default VAL_FRACTION. val_source: a source for validation instead. shard_tokens:
    tokens of a shard file. workers: number of processes, by default one for each core. They are spawned, so a script must call
    this under `if __name__ == "__main__"`. With 1, this process does the work; the package tokenizers may still use threads.
    text_key: key of the text in JSON lines, Parquet and hub rows. hub_config, hub_split: of a hub data set; the split of
    val_source is always "validation". Raises DataError for anything that the user can correct, such as an `out` that holds
    another preparation.
    """
    given = {"SOURCE": source, "OUT": out, "--tokenizer": tokenizer, "--val-source": val_source}
    for name, value in given.items():
        if not str(value).strip():  # an unset shell variable; Path("") would be the current folder
            raise DataError(f"{name} is empty")
    out = Path(out)
    arguments: dict[str, Any] = {
        "source": str(source),
        "text_key": text_key,
        "hub_config": hub_config,
        "hub_split": hub_split,
        "tokenizer": str(tokenizer),
        "vocab_size": vocab_size if tokenizer == "bpe" else None,
        "end_token": end_token,
        "val_fraction": float((0 if val_source else VAL_FRACTION) if val_fraction is None else val_fraction),
        "val_source": None if val_source is None else str(val_source),
        "shard_tokens": shard_tokens,
    }
    workers = cores() if workers is None else workers

    def say(line: str) -> None:
        log(printable(line))

    _check_arguments(out, arguments, workers)
    if is_finished(out, arguments, say):
        return out
    begun = time.monotonic()
    sources = [open_source(arguments["source"], hub_config, hub_split)]
    if arguments["val_source"]:
        sources.append(open_source(arguments["val_source"], hub_config, "validation"))
    _check_overlap(out, sources)
    units = [unit for opened in sources for unit in opened.units]
    out.mkdir(parents=True, exist_ok=True)
    partial = out / ".partial"
    with locked(out):
        if is_finished(out, arguments, say):
            return out
        begin(partial, arguments, sources, say)
        for name, opened in zip((arguments["source"], arguments["val_source"]), sources, strict=False):
            say(f"source: {name}, {total_bytes(opened.units) / 1e6:,.1f} MB of text in {len(opened.units)} units")
            for note in opened.notes:
                say(note)
        tok, end = _tokenizer(partial, arguments, sources[0].units, workers, say)
        todo = {i: unit for i, unit in enumerate(units) if not unit_path(partial, i).with_suffix(".tokens").exists()}
        if len(todo) < len(units):
            say(f"continuing: {len(units) - len(todo)} of {len(units)} units are kept from before")
        _check_space(partial, units, todo, tok)
        with progress({i: total_bytes([unit]) for i, unit in todo.items()}, say) as update:
            encode_units(todo, partial, partial / "tokenizer.json", end, text_key, workers, update)
        index = _write_shards(partial, arguments, sources, tok, end, say)
        publish(partial, partial / "shards", out, index)
    say(f"prepared {out} in {time.monotonic() - begun:.1f} s: {summary(index)}")
    return out


def _check_arguments(out: Path, arguments: dict, workers: int) -> None:
    if not 0 <= arguments["val_fraction"] < 1:
        raise DataError(f"--val-fraction {arguments['val_fraction']} is not in [0, 1)")
    if arguments["val_source"] and arguments["val_fraction"]:
        raise DataError("--val-source and --val-fraction exclude each other: validation is a source of its own, or a part")
    if arguments["shard_tokens"] < 1:
        raise DataError(f"--shard-tokens {arguments['shard_tokens']} is not positive")
    if workers < 1:
        raise DataError(f"--workers {workers} is not positive")
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: not a folder")
    source = Path(arguments["source"])
    if is_saved(source):
        raise DataError(
            f"{source}: a data set that `datasets` saved; its tokens: python -m data.adopt {source} {out} --tokenizer NAME"
        )
    if is_prepared(source):
        raise DataError(f"{source} is a prepared folder, not text: use it as data.dir, or name the text that it was made of")
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise DataError(f"{out} lies inside the source {source}: choose a folder outside it")


def _check_overlap(out: Path, sources: list[Source]) -> None:
    """Raise DataError if a source has files in `out`, or if the preparation would overwrite files in `out` from elsewhere."""
    inside = os.path.join(os.path.realpath(out), "")
    pieces = [piece for opened in sources for unit in opened.units for piece in unit if piece.kind not in ("hub", "topics")]
    for folder in sorted({os.path.dirname(piece.path) for piece in pieces}):
        if os.path.join(os.path.realpath(folder), "").startswith(inside):
            name = next(piece.path for piece in pieces if os.path.dirname(piece.path) == folder)
            raise DataError(f"{name} lies inside {out}: choose a folder outside the source")
    if out.is_dir() and not (out / ".partial").exists() and not (out / "index.json").exists():
        for pattern in ("tokenizer.json", CONFIG, "*_[0-9][0-9][0-9][0-9][0-9].bin"):
            for path in sorted(out.glob(pattern)):
                raise DataError(f"{path} exists and belongs to no preparation: choose another folder, or remove it")


def _tokenizer(
    partial: Path, arguments: dict, units: list[Unit], workers: int, say: Callable[[str], None]
) -> tuple[Tokenizer, int]:
    """Return the tokenizer, which the first start makes and stores in `partial`, and the id of the end of text."""
    path, kind, asked = partial / "tokenizer.json", arguments["tokenizer"], arguments["end_token"]
    if not path.exists() and kind == "bpe":
        begun = time.monotonic()
        save_bpe(partial, units, arguments["text_key"], arguments["vocab_size"], asked or END_OF_TEXT, workers)
        size = vocabulary_size(Tokenizer.from_file(str(path)))
        say(f"tokenizer: {size} entries, trained in {time.monotonic() - begun:.1f} s")
        if size < arguments["vocab_size"]:
            say(f"the vocabulary has {size} entries, not {arguments['vocab_size']}: no more pairs occur twice in the text")
    elif not path.exists():
        tok, declared = (byte_tokenizer(), {}) if kind == "bytes" else (load_tokenizer(kind), load_declared(kind))
        end = end_of_text(tok, declared, asked)
        check_not_of_texts(tok, end)
        save_tokenizer(as_trained(tok, end), partial, end, declared)
    tok = Tokenizer.from_file(str(path))
    end = end_of_text(tok, declared_tokens(partial), asked)
    say(f"end of text: {end!r}, id {token_id(tok, end)}")
    return tok, token_id(tok, end)


def _check_space(partial: Path, units: list[Unit], todo: dict[int, Unit], tok: Tokenizer) -> None:
    bytes_per_token = 1 if is_byte_tokenizer(tok) else BPE_BYTES_PER_TOKEN
    text = total_bytes(units) + total_bytes(todo.values())  # all shards, and the units that are not yet encoded
    needed = text // bytes_per_token * token_dtype(tok).itemsize
    free = shutil.disk_usage(partial).free
    if needed > free:
        raise DataError(f"{partial.parent}: about {needed / 1e9:.1f} GB of disk needed, {free / 1e9:.1f} GB free")


def _write_shards(
    partial: Path, arguments: dict, sources: list[Source], tok: Tokenizer, end: int, say: Callable[[str], None]
) -> dict:
    """Write the shards into partial/shards, and return the index. Raises DataError if there is too little text."""
    folder = partial / "shards"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    dtype, fraction = token_dtype(tok), arguments["val_fraction"]
    units = [unit for opened in sources for unit in opened.units]
    paths = [unit_path(partial, i) for i in range(len(units))]
    first_val = len(sources[0].units)
    split = choose_split(paths, dtype, first_val, fraction)
    encode = Encoder(tok, end)
    cut = cut_document(split, units, arguments["text_key"], encode)
    splits = assemble(paths, folder, dtype, split, cut, arguments["shard_tokens"])
    try:
        _check_splits(splits, arguments)
    except DataError:
        shutil.rmtree(partial)
        raise
    notes = [note for opened in sources for note in opened.notes]
    for note in text_notes(paths, encode, split, fraction):
        say(note)
        notes.append(note)
    return {
        "format": FORMAT,
        "version": VERSION,
        "dtype": dtype.name,
        "vocab_size": vocabulary_size(tok),
        "end_of_text_id": end,
        "tokenizer_sha256": tokenizer_hash(tok),
        "splits": splits,
        "arguments": arguments,
        "sources": [
            {"written_sha256": opened.written, "texts_sha256": texts_hash(hashes_of_units(part, dtype))}
            for opened, part in zip(sources, (paths[:first_val], paths[first_val:]), strict=False)
        ],
        "inventory": sources[0].inventory,
        "val_inventory": sources[1].inventory if sources[1:] else None,
        "notes": notes,
    }


def _check_splits(splits: dict[str, dict], arguments: dict) -> None:
    """Raise DataError if a split has no target. An empty validation split is allowed if no validation is asked for."""
    if not splits["train"]["documents"] and not splits["val"]["documents"]:
        raise DataError(f"source {arguments['source']}: it holds no text")
    if arguments["val_source"] and not splits["val"]["documents"]:
        raise DataError(f"source {arguments['val_source']}: it holds no text")
    for name in ("train", "val") if arguments["val_source"] or arguments["val_fraction"] else ("train",):
        if splits[name]["tokens"] < 2:
            found = f"source {arguments['source']}: too little text, the split {name!r} gets {splits[name]['tokens']} tokens"
            raise DataError(f"{found}; add text, or give --val-source or --val-fraction 0")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0, 2 after an error, 130 after SIGINT, 143 after SIGTERM."""
    default = {name: parameter.default for name, parameter in inspect.signature(prepare).parameters.items()}
    parser = argparse.ArgumentParser(
        prog="python -m data.prepare",
        description="Tokenize a corpus into shards. Stopped or killed, the same command continues.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", help="file, folder, glob, hub:NAME or stdlib")
    parser.add_argument("out", metavar="OUT", help="folder for the shards")
    parser.add_argument("--tokenizer", default=default["tokenizer"], help="bytes, bpe, or a path or pretrained name")
    parser.add_argument("--vocab-size", type=int, default=default["vocab_size"], help="entries of the bpe vocabulary")
    parser.add_argument("--end-token", help="the tokenizer's token that ends a document; without it, its end-of-text token")
    parser.add_argument("--val-fraction", type=float, help=f"fraction for validation; without it {VAL_FRACTION}")
    parser.add_argument("--val-source", metavar="SOURCE", help="a source for validation, instead of a fraction of SOURCE")
    parser.add_argument("--shard-tokens", type=int, default=default["shard_tokens"], help="tokens in each shard file")
    parser.add_argument("--workers", type=int, default=default["workers"], help="processes; without it one for each core")
    parser.add_argument("--text-key", default=default["text_key"], help="key of the text in JSON lines, Parquet and hub rows")
    parser.add_argument("--hub-config", default=default["hub_config"], help="configuration of a hub data set")
    parser.add_argument("--hub-split", default=default["hub_split"], help="split of a hub data set")
    options = vars(parser.parse_args(arguments))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        prepare(**options, log=_print)
    except Stopped as stopped:
        name = signal.Signals(stopped.args[0]).name
        print(f"data.prepare: stopped by {name}; the same command continues from here", file=sys.stderr)
        return 128 + stopped.args[0]
    except (DataError, OSError) as error:
        print(f"data.prepare: {printable(str(error))}", file=sys.stderr)
        return 2
    return 0


def _print(line: str) -> None:
    """Print a line; characters that the terminal's encoding lacks are escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    print(line.encode(encoding, "backslashreplace").decode(encoding))


def _stop(number: int, _) -> None:
    for other in (signal.SIGINT, signal.SIGTERM):
        signal.signal(other, signal.SIG_IGN)
    raise Stopped(number)


if __name__ == "__main__":
    sys.exit(main())
