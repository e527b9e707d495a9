"""Documents of one unit into token ids on disk: NAME.tokens, and NAME.docs with each document's start and hash.

What is written depends on the unit and the tokenizer alone. Both files are written aside and renamed, NAME.tokens
last, so that a NAME.tokens is always whole.
"""

import hashlib
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from data.tokenizer import byte_tokenizer, end_of_text_id, tokenizer_hash, vocabulary_size

DOCUMENT = np.dtype([("start", "<u8"), ("hash", "<u8")])  # place in NAME.tokens; text_hash
PART = 2**20  # characters encoded in one call; a longer document is encoded in parts, cut after a line end


def token_dtype(tok: Tokenizer) -> np.dtype:
    """Little-endian uint16 if every id fits, else uint32."""
    return np.dtype("<u2" if vocabulary_size(tok) <= 2**16 else "<u4")


def encoder(tok: Tokenizer) -> Callable[[list[str]], list[np.ndarray]]:
    """The function from texts to their ids (n,). Special tokens in a text, '<|endoftext|>' say, count as plain text."""
    if tokenizer_hash(tok) == tokenizer_hash(byte_tokenizer()):
        return lambda texts: [np.frombuffer(text.encode(), np.uint8) for text in texts]  # 100 times as fast
    tok = Tokenizer.from_str(tok.to_str())  # the caller's stays as it is
    tok.encode_special_tokens = True
    return lambda texts: [np.array(e.ids, np.uint32) for e in tok.encode_batch_fast(texts, add_special_tokens=False)]


class Encoding:
    """What a tokenizer does to documents, made ready once for many units."""

    def __init__(self, tok: Tokenizer):
        self.encode, self.dtype = encoder(tok), token_dtype(tok)
        self.end = end_of_text_id(tok).to_bytes(self.dtype.itemsize, "little")


def encode_unit(texts: Iterable[str], target: Path, encoding: Encoding, report: Callable[[int], None]) -> None:
    """Write target.tokens (token_dtype) and target.docs (DOCUMENT); report(n) for every n tokens on their way."""
    aside = [target.with_suffix(f".{kind}.{os.getpid()}.tmp") for kind in ("docs", "tokens")]
    with open(aside[0], "wb") as docs, open(aside[1], "wb") as tokens:
        start = position = 0
        for batch in _batches(texts):
            before = position
            encoded = encoding.encode([part for part, _ in batch])
            for ids, (_, document_hash) in zip(encoded, batch, strict=True):
                tokens.write(ids.astype(encoding.dtype).data)
                position += len(ids)
                if document_hash is not None:
                    tokens.write(encoding.end)
                    position += 1
                    docs.write(struct.pack("<QQ", start, document_hash))
                    start = position
            report(position - before)
        for file in (docs, tokens):
            file.flush()
            os.fsync(file.fileno())
    os.replace(aside[0], target.with_suffix(".docs"))
    os.replace(aside[1], target.with_suffix(".tokens"))


def text_hash(text: str) -> int:
    """64 bits of BLAKE2b of the UTF-8 text: what decides the split that a document belongs to."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _batches(texts: Iterable[str]) -> Iterator[list[tuple[str, int | None]]]:
    """Parts of documents, about PART characters together; the hash comes with a document's last part, else None."""
    batch, weight = [], 0
    for text in texts:
        begin = 0
        while begin < len(text):
            end = _part_end(text, begin)
            batch.append((text[begin:end], text_hash(text) if end == len(text) else None))
            weight += end - begin + 100  # short documents have a cost of their own
            begin = end
            if weight >= PART:
                yield batch
                batch, weight = [], 0
    if batch:
        yield batch


def _part_end(text: str, begin: int) -> int:
    if len(text) - begin <= PART:
        return len(text)
    return text.rfind("\n", begin, begin + PART) + 1 or begin + PART
