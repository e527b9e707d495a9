"""python -m data.prepare SOURCE OUT: a corpus into token shards, which data.shards.TokenShards reads.

SOURCE is cut into units. Processes encode them into OUT/.partial. Then the shards are written in the order of the
source, and index.json last. So the files are the same for any number of workers, memory does not grow with the corpus,
and after a kill the same command continues with the units that are not finished. While it runs, the tokens take twice
their disk space.
"""

import argparse
import inspect
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from data import DataError
from data.preparation.assemble import assemble
from data.preparation.encode import token_dtype
from data.preparation.output import begin, is_finished, locked, publish, summary
from data.preparation.progress import progress
from data.preparation.sources import Source, Unit, open_source, total_bytes
from data.preparation.workers import cores, encode_units, save_bpe, save_tokenizer, unit_path
from data.shards import FORMAT, VERSION
from data.tokenizer import byte_tokenizer, end_of_text_id, is_byte_tokenizer, load_tokenizer, tokenizer_hash, vocabulary_size

BPE_BYTES_PER_TOKEN = 3  # of English text, a low estimate; the byte tokenizer has 1


class Stopped(BaseException):
    """SIGINT or SIGTERM arrived; `args[0]` is its number."""


def prepare(
    source: str,
    out: str | Path,
    *,
    tokenizer: str = "bpe",
    vocab_size: int = 8192,
    val_fraction: float = 0.01,
    shard_tokens: int = 100_000_000,
    workers: int | None = None,
    text_key: str = "text",
    hub_config: str | None = None,
    hub_split: str = "train",
    log: Callable[[str], None] = print,
) -> Path:
    """Prepare `source` (see data/preparation/sources.py) into the folder `out` and return it; a finished one is left as it is.

    tokenizer: "bytes"; "bpe", trained on a sample with vocab_size; or what load_tokenizer takes. val_fraction, in
    [0, 1): of documents, chosen by a hash of their text. shard_tokens: tokens of a file. workers: processes, by default
    one for each core, spawned (so a script calls this under `if __name__ == "__main__"`); 1 is this process itself, in
    which the package tokenizers may still use threads. text_key: of JSON lines, Parquet and hub rows. hub_config,
    hub_split: of a hub data set. DataError for whatever the user can put right, such as an `out` that holds another
    preparation, finished or not. If the source changed before its preparation was finished, it starts over.
    """
    out = Path(out)
    arguments: dict[str, Any] = {
        "source": str(source),
        "text_key": text_key,
        "hub_config": hub_config,
        "hub_split": hub_split,
        "tokenizer": str(tokenizer),
        "vocab_size": vocab_size if tokenizer == "bpe" else None,
        "val_fraction": float(val_fraction),
        "shard_tokens": shard_tokens,
    }
    workers = cores() if workers is None else workers
    _check_arguments(out, arguments, workers)
    if is_finished(out, arguments, log):
        return out
    begun = time.monotonic()
    opened = open_source(arguments["source"], hub_config, hub_split)
    out.mkdir(parents=True, exist_ok=True)
    partial = out / ".partial"
    with locked(out):
        if is_finished(out, arguments, log):
            return out
        begin(partial, arguments, opened, log)
        log(f"source: {source}, {total_bytes(opened.units) / 1e6:,.1f} MB of text in {len(opened.units)} units")
        tok = _tokenizer(partial, arguments, opened.units, workers, log)
        todo = {i: unit for i, unit in enumerate(opened.units) if not unit_path(partial, i).with_suffix(".tokens").exists()}
        if len(todo) < len(opened.units):
            log(f"continuing: {len(opened.units) - len(todo)} of {len(opened.units)} units are kept from before")
        _check_space(partial, opened.units, todo, tok)
        with progress({i: total_bytes([unit]) for i, unit in todo.items()}, log) as update:
            encode_units(todo, partial, partial / "tokenizer.json", text_key, workers, update)
        index = _write_shards(partial, arguments, opened, tok)
        publish(partial, partial / "shards", out, index)
    log(f"prepared {out} in {time.monotonic() - begun:.1f} s: {summary(index)}")
    return out


def _check_arguments(out: Path, arguments: dict, workers: int) -> None:
    if not 0 <= arguments["val_fraction"] < 1:
        raise DataError(f"val_fraction {arguments['val_fraction']} is not in [0, 1)")
    if arguments["shard_tokens"] < 1:
        raise DataError(f"shard_tokens {arguments['shard_tokens']} is not positive")
    if workers < 1:
        raise DataError(f"workers {workers} is not positive")
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: not a folder")
    source = Path(arguments["source"])
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise DataError(f"{out} lies inside the source {source}: choose a folder outside it")


def _tokenizer(partial: Path, arguments: dict, units: list[Unit], workers: int, log: Callable[[str], None]) -> Tokenizer:
    """The tokenizer of this preparation, made at its first start and kept in `partial`."""
    path = partial / "tokenizer.json"
    if path.exists():
        return Tokenizer.from_file(str(path))
    if arguments["tokenizer"] == "bpe":
        begun = time.monotonic()
        save_bpe(path, units, arguments["text_key"], arguments["vocab_size"], workers)
        tok = Tokenizer.from_file(str(path))
        log(f"tokenizer: {vocabulary_size(tok)} entries, trained in {time.monotonic() - begun:.1f} s")
        return tok
    tok = byte_tokenizer() if arguments["tokenizer"] == "bytes" else load_tokenizer(arguments["tokenizer"])
    end_of_text_id(tok)  # or a DataError, before any work
    save_tokenizer(tok, path)
    return tok


def _check_space(partial: Path, units: list[Unit], todo: dict[int, Unit], tok: Tokenizer) -> None:
    bytes_per_token = 1 if is_byte_tokenizer(tok) else BPE_BYTES_PER_TOKEN
    text = total_bytes(units) + total_bytes(todo.values())  # the shards, and the units that are still to be written
    needed = text // bytes_per_token * token_dtype(tok).itemsize
    free = shutil.disk_usage(partial).free
    if needed > free:
        raise DataError(f"{partial.parent}: about {needed / 1e9:.1f} GB of disk needed, {free / 1e9:.1f} GB free")


def _write_shards(partial: Path, arguments: dict, source: Source, tok: Tokenizer) -> dict:
    """Write the shards into partial/shards and return the index. DataError if no document has any text."""
    folder = partial / "shards"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    dtype = token_dtype(tok)
    units = [unit_path(partial, i) for i in range(len(source.units))]
    splits = assemble(units, folder, dtype, arguments["val_fraction"], arguments["shard_tokens"])
    if not splits["train"]["documents"]:
        shutil.rmtree(partial)
        raise DataError(f"source {arguments['source']}: it holds no text")
    return {
        "format": FORMAT,
        "version": VERSION,
        "dtype": dtype.name,
        "vocab_size": vocabulary_size(tok),
        "end_of_text_id": end_of_text_id(tok),
        "tokenizer_sha256": tokenizer_hash(tok),
        "splits": splits,
        "arguments": arguments,
        "inventory": source.inventory,
    }


def main(arguments: list[str] | None = None) -> int:
    """The command line. Status: 0, 2 after an error, 130 and 143 after SIGINT and SIGTERM."""
    default = {name: parameter.default for name, parameter in inspect.signature(prepare).parameters.items()}
    parser = argparse.ArgumentParser(
        prog="python -m data.prepare",
        description="Tokenize a corpus into memory-mapped shards. Stopped or killed, the same command continues.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", help="file, folder, glob, hub:NAME or stdlib")
    parser.add_argument("out", metavar="OUT", help="folder for the shards")
    parser.add_argument("--tokenizer", default=default["tokenizer"], help="bytes, bpe, or a path or pretrained name")
    parser.add_argument("--vocab-size", type=int, default=default["vocab_size"], help="entries of the bpe vocabulary")
    parser.add_argument("--val-fraction", type=float, default=default["val_fraction"], help="fraction for validation")
    parser.add_argument("--shard-tokens", type=int, default=default["shard_tokens"], help="tokens in each shard file")
    parser.add_argument("--workers", type=int, default=default["workers"], help="processes; without it one for each core")
    parser.add_argument("--text-key", default=default["text_key"], help="key of the text in JSON lines, Parquet and hub rows")
    parser.add_argument("--hub-config", default=default["hub_config"], help="configuration of a hub data set")
    parser.add_argument("--hub-split", default=default["hub_split"], help="split of a hub data set")
    options = vars(parser.parse_args(arguments))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        prepare(**options)
    except Stopped as stopped:
        name = signal.Signals(stopped.args[0]).name
        print(f"data.prepare: stopped by {name}; the same command continues from here", file=sys.stderr)
        return 128 + stopped.args[0]
    except (DataError, OSError) as error:
        print(f"data.prepare: {error}", file=sys.stderr)
        return 2
    return 0


def _stop(number: int, _) -> None:
    for other in (signal.SIGINT, signal.SIGTERM):
        signal.signal(other, signal.SIG_IGN)
    raise Stopped(number)


if __name__ == "__main__":
    sys.exit(main())
