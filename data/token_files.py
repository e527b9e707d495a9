"""Reads files of token ids that other projects wrote: their header, or their whole content once.

llm.c and modded-nanogpt: a header of 256 int32 (magic, version, number of tokens, zeros), then the tokens. nanoGPT: tokens alone.
Everything is little-endian.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import DataError

HEADER = 256 * 4  # bytes
# magic -> (existing versions, type of a token); 20240520 is llm.c's GPT-2, 20240801 its Llama 3.
MAGIC: dict[int, tuple[tuple[int, ...], str]] = {20240520: ((1,), "uint16"), 20240801: ((1, 7), "uint32")}
CHUNK = 1 << 24  # bytes of one read


class TokenFile(NamedTuple):
    """A file of tokens: the offset of the first (bytes), their number, and their type."""

    path: Path
    offset: int
    tokens: int
    dtype: str


class Scan(NamedTuple):
    """The result of reading a whole file."""

    sha256: str  # of the file, header included
    ends: int  # number of end-of-text tokens in it


def holds_tokens(folder: Path) -> bool:
    """Return whether data.adopt may accept a folder: it holds token files, or a data set that `datasets` saved."""
    return is_saved(folder) or (any(folder.glob("*.bin")) and not any(folder.glob("*.docs.bin")))


def is_saved(path: Path) -> bool:
    """Return whether `path` is a data set that `datasets` saved."""
    return (path / "dataset_dict.json").is_file() or ((path / "state.json").is_file() and (path / "dataset_info.json").is_file())


def open_token_file(path: Path, raw_dtype: str) -> TokenFile:
    """Return the description of a file from its header and size. Without a header, the tokens have the type `raw_dtype`.

    Raises:
        DataError: the file is empty, too short, too long, or has an unknown header.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(HEADER)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if not size:
        raise DataError(f"{path}: empty")
    header = np.frombuffer(head, "<i4", count=len(head) // 4)
    magic = int(header[0]) if len(header) else 0
    if magic not in MAGIC:
        if len(head) == HEADER and not header[3:].any() and header[:3].any():  # no text begins with 506 tokens 0
            known = " or ".join(map(str, MAGIC))
            raise DataError(f"{path}: its header has the magic number {magic}; token files have {known}")
        if head.startswith(b"\x93NUMPY"):
            raise DataError(f"{path}: an array of numpy.save, with a header of its own; write the tokens with array.tofile(FILE)")
        item = np.dtype(raw_dtype).itemsize
        if size % item:
            raise DataError(
                f"{path}: {size:,} bytes are not a whole number of {raw_dtype} tokens; the file is cut short or damaged"
            )
        return TokenFile(path, 0, size // item, raw_dtype)
    versions, dtype = MAGIC[magic]
    if len(head) < HEADER:
        raise DataError(f"{path}: cut short within its header, which has {HEADER} bytes")
    version, tokens = int(header[1]), int(header[2])
    if version not in versions:
        known = " or ".join(map(str, versions))
        raise DataError(f"{path}: version {version} of the format {magic} is not supported, expected {known}")
    expected = HEADER + tokens * np.dtype(dtype).itemsize
    if tokens < 0 or size != expected:
        what = "cut short" if size < expected else "damaged"
        raise DataError(
            f"{path}: {what}, its header says {tokens:,} {dtype} tokens, which are {expected:,} bytes, but it has {size:,}"
        )
    if not tokens:
        raise DataError(f"{path}: its header says that it has no tokens")
    return TokenFile(path, HEADER, tokens, dtype)


def scan(file: TokenFile, vocab_size: int, end: int) -> Scan:
    """Read the whole file once. Returns its hash and the number of end-of-text tokens (id `end`).

    Raises:
        DataError: a token is outside the vocabulary; or, without a header, the tokens have more bytes than the vocabulary needs.
    """
    digest, ends, before = hashlib.sha256(), 0, 0
    with open(file.path, "rb") as opened:
        digest.update(opened.read(file.offset))
        while chunk := opened.read(CHUNK):
            digest.update(chunk)
            tokens = np.frombuffer(chunk, np.dtype(file.dtype).newbyteorder("<"))
            if not (before or file.offset or len(tokens) < 16 or tokens[1::2].any()):
                raise DataError(
                    f"{file.path}: every second {file.dtype} is 0, so that its tokens have more bytes, as those of int32 or "
                    f"int64; a vocabulary of {vocab_size:,} needs {file.dtype}: array.astype({file.dtype!r}).tofile(FILE)"
                )
            if tokens.max() >= vocab_size:
                at = int(np.argmax(tokens >= vocab_size))
                raise DataError(
                    f"{file.path}: token {int(tokens[at])} at position {before + at:,} is outside the tokenizer's vocabulary of "
                    f"{vocab_size:,}: another tokenizer wrote the file, or it is damaged"
                )
            ends += int(np.count_nonzero(tokens == end))
            before += len(tokens)
    if before != file.tokens:
        raise DataError(f"{file.path}: changed while it was read")
    return Scan(digest.hexdigest(), ends)
