"""Turns a data set that `datasets` saved to disk (Dataset or DatasetDict, with a column input_ids) into token shards.

The data is copied: Arrow stores ids as int32 or int64 in small batches, and shards of uint16 take a half or a quarter of that.
Each row is a document, and gets the end of text unless it begins or ends with it. But if nearly all rows of the training split
have the same length, and the others are shorter, the rows are pieces of a longer text and are not changed. The same holds for
validation rows of that length.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from data import DataError, first_line
from data.files import read_json
from data.preparation.assemble import ShardWriter
from data.preparation.encode import token_dtype
from data.preparation.output import locked, publish, repetition, summary
from data.shards import FORMAT, VERSION, check_files, read_index
from data.token_files import is_saved
from data.tokenizer import save_tokenizer, token_id, tokenizer_hash, vocabulary_size

COLUMN = "input_ids"
VALIDATION_NAMES = ("validation", "val", "valid", "dev", "test")
SHARD_TOKENS = 100_000_000
ROWS = 1000  # rows of one read
PIECES = 0.98  # rows are pieces if at least this fraction has the greatest length: the last row of a batch may be shorter
LINE_SECONDS = 10  # s between two lines on progress


class Chosen(NamedTuple):
    """The tokenizer of the data, its end of text, and the special tokens that its files declare. The data's ids are below `ids`.

    The id of the end of text may equal `ids`: it is added if the data comes without a tokenizer.
    """

    tokenizer: Tokenizer
    end: str
    declared: dict[str, str]
    ids: int


def copy_saved(
    source: Path,
    out: Path,
    val: str | None,
    tokenizer: Chosen,
    arguments: dict[str, Any],
    say: Callable[[str], None],
) -> Path:
    """Write the shards of `source`, and of the separate validation set `val` if it is given, into the folder `out`.

    Raises:
        DataError: there is no validation split or no column, rows are padded, or ids are outside the vocabulary.
    """
    begun = time.monotonic()
    tok, end_text, declared, ids = tokenizer
    end, vocab_size, dtype = token_id(tok, end_text), vocabulary_size(tok), token_dtype(tok)
    paths = split_paths(source, val, say)
    inventory = {split: read_entry(path / "state.json", "_fingerprint") for split, path in paths.items()}
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        if (out / "index.json").exists():
            index = read_index(out)
            if (index.get("inventory"), index["tokenizer_sha256"]) != (inventory, tokenizer_hash(tok)):
                raise DataError(f"{out} holds another data set: choose another folder, or remove it")
            check_files(out, index, *index["splits"])
            say(f"already adopted: {out}, {summary(index)}")
            return out
        say(f"end of text: {end_text!r}, id {end}")
        partial = out / ".partial"
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "shards").mkdir(parents=True)
        notes: list[str] = []
        splits = {}
        data = {split: _load(path) for split, path in paths.items()}
        lengths = {split: _lengths(data[split], path) for split, path in paths.items()}
        block = piece_length(lengths["train"])
        for split, path in paths.items():
            pieces = block is not None and are_pieces(lengths[split], block)
            notes.append(f"{path}: {row_note(lengths[split], pieces)}")
            say(notes[-1])
            writer, last = ShardWriter(partial / "shards", split, SHARD_TOKENS), time.monotonic()
            for tokens in _rows(data[split], path, ids):
                if not pieces and end not in (tokens[0], tokens[-1]):
                    tokens = np.append(tokens, end)
                writer.write(tokens.astype(dtype), 0)
                if time.monotonic() - last >= LINE_SECONDS:
                    last = time.monotonic()
                    say(f"copying {split}: {writer.documents:,} of {len(data[split]):,} rows, {writer.tokens:,} tokens")
            splits[split] = writer.close()
            del splits[split]["bytes"]  # the bytes of text are unknown
            if splits[split]["tokens"] < 2:
                raise DataError(f"{path}: the split {split!r} has too few tokens")
        for note in repetition(splits):
            say(note)
            notes.append(note)
        save_tokenizer(tok, partial, end_text, declared)
        index = {"format": FORMAT, "version": VERSION, "dtype": dtype.name, "vocab_size": vocab_size, "end_of_text_id": end}
        index |= {"tokenizer_sha256": tokenizer_hash(tok), "splits": splits, "arguments": arguments}
        publish(partial, partial / "shards", out, index | {"inventory": inventory, "val_inventory": None, "notes": notes})
    say(f"copied {source} into {out} in {time.monotonic() - begun:.1f} s: {summary(index)}")
    return out


def read_entry(path: Path, key: str) -> Any:
    """Return an entry of a JSON file that `datasets` wrote."""
    try:
        return read_json(path)[key]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{path}: damaged, without {key}; save the data set again") from None


def split_paths(source: Path, val: str | None, say: Callable[[str], None]) -> dict[str, Path]:
    """Return the folder of each split. Raises DataError if a split is missing."""
    of_dict = source / "dataset_dict.json"
    names = read_entry(of_dict, "splits") if of_dict.is_file() else []
    training = source / "train" if names else source
    if names and "train" not in names:
        raise DataError(f"{source}: no split 'train', but {', '.join(names)}")
    if val is not None:
        if not is_saved(Path(val)) or (Path(val) / "dataset_dict.json").is_file():
            raise DataError(f"--val {val}: not one data set that `datasets` saved to disk")
        return {"train": training, "val": Path(val)}
    found = next((name for name in VALIDATION_NAMES if name in names), None)
    if found is None:
        raise DataError(
            f"{source}: no validation split; save a DatasetDict with one ({', '.join(VALIDATION_NAMES)}), or name a data set "
            "with --val"
        )
    if left := [name for name in names if name not in ("train", found)]:
        say(f"left out: the split(s) {', '.join(left)}")
    return {"train": training, "val": source / found}


def _load(path: Path) -> Any:
    """Load the data set. Its batches are Arrow tables of COLUMN and, if there is one, attention_mask."""
    from datasets import load_from_disk

    if not read_entry(path / "state.json", "_data_files"):  # load_from_disk fails without rows
        raise DataError(f"{path}: holds no rows")
    try:
        data = load_from_disk(str(path))
    except Exception as error:  # pyarrow, json and datasets raise errors of their own
        raise DataError(f"{path}: `datasets` cannot read it: {first_line(error)}") from None
    if not len(data):
        raise DataError(f"{path}: holds no rows")
    if COLUMN not in data.column_names:
        has = f"but {', '.join(data.column_names)}" if data.column_names else "and no other"
        raise DataError(f"{path}: no column {COLUMN!r}, {has}; data.prepare tokenizes text")
    return data.select_columns([name for name in (COLUMN, "attention_mask") if name in data.column_names]).with_format("arrow")


def _lengths(data: Any, path: Path) -> np.ndarray:
    """Return the number of ids in each row, (n,) int64."""
    import pyarrow.compute as pc

    found = []
    for table in data.iter(ROWS):
        try:
            found.append(pc.fill_null(pc.list_value_length(table[COLUMN]), 0).to_numpy().astype(np.int64))
        except Exception as error:
            raise DataError(f"{path}: its column {COLUMN!r} holds no lists: {first_line(error)}") from None
    return np.concatenate(found)


def piece_length(lengths: np.ndarray) -> int | None:
    """Return the length of a piece if rows of these lengths (n,) are pieces; None if they are documents."""
    longest = int(lengths.max())
    return longest if len(lengths) > 2 and are_pieces(lengths, longest) else None


def are_pieces(lengths: np.ndarray, block: int) -> bool:
    """Return whether rows of these lengths (n,) are pieces of the length `block`. The last and a few others may be shorter."""
    whole = lengths[:-1] == block
    return bool(lengths.max() <= block and (not len(whole) or whole.mean() >= PIECES))


def row_note(lengths: np.ndarray, pieces: bool) -> str:
    """Return a text that says how rows of these lengths (n,) are used: as documents or as pieces."""
    if not pieces:
        return "its rows are documents, each of which gets the end of text, unless it begins or ends with it"
    shorter = int((lengths[:-1] < lengths.max()).sum())
    kind = f"all rows but {shorter:,} of {len(lengths):,} have one length" if shorter else "all rows have one length"
    return (
        f"{kind}: pieces of a longer text, to which no end of text is added; if they are documents that were cut off, prepare "
        "their text with data.prepare"
    )


def _rows(data: Any, path: Path, limit: int) -> Iterator[np.ndarray]:
    """Yield the ids (n,) int64 of each row that is not empty. Raises DataError for padded rows and for ids beyond `limit`."""
    import pyarrow as pa
    import pyarrow.compute as pc

    row = 0
    for table in data.iter(ROWS):
        if "attention_mask" in table.column_names and pc.min(pc.list_flatten(table["attention_mask"])).as_py() == 0:
            raise DataError(f"{path}: rows from {row:,} on are padded (their attention_mask has 0): save them without padding")
        column = table[COLUMN].combine_chunks()
        values = pc.list_flatten(column)
        if not pa.types.is_integer(values.type) or column.null_count or values.null_count:
            raise DataError(
                f"{path}: rows from {row:,} on: {COLUMN!r} must be lists of whole numbers, without null; found {column.type}"
            )
        ids = values.to_numpy(zero_copy_only=False)
        if len(ids) and not (ids.min() >= 0 and ids.max() < limit):
            bad = int(ids.min() if ids.min() < 0 else ids.max())
            raise DataError(f"{path}: rows from {row:,} on: id {bad} is outside the tokenizer's vocabulary of {limit:,}")
        stops = np.cumsum(pc.list_value_length(column).to_numpy(zero_copy_only=False))
        for tokens in np.split(ids.astype(np.int64), stops[:-1]):
            if len(tokens):
                yield tokens
        row += len(column)
