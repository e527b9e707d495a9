"""Documents of one unit into token ids on disk: NAME.tokens, and NAME.docs with each document's start and hash.

What is written depends on the unit and the tokenizer alone. NAME.tokens is put in place last, and whole: where it
exists, the unit is finished.
"""

import hashlib
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from data.files import replacing
from data.tokenizer import end_of_text_id, is_byte_tokenizer, vocabulary_size

DOCUMENT = np.dtype([("start", "<u8"), ("hash", "<u8")])  # its first token in NAME.tokens; text_hash
PART = 2**20  # characters encoded in one call; a longer document is encoded in parts, cut after a line end
DOCUMENT_COST = 100  # characters: what a document costs in a call besides its length


def token_dtype(tok: Tokenizer) -> np.dtype:
    """Little-endian uint16 if every id fits, else uint32."""
    return np.dtype("<u2" if vocabulary_size(tok) <= 2**16 else "<u4")


class Encoder:
    """The function from texts to their ids (n,). Special tokens in a text, such as '<|endoftext|>', count as plain text."""

    def __init__(self, tok: Tokenizer):
        self.dtype = token_dtype(tok)
        self.end = end_of_text_id(tok).to_bytes(self.dtype.itemsize, "little")
        self.bytes_only = is_byte_tokenizer(tok)
        self.tok = Tokenizer.from_str(tok.to_str())  # a copy: the caller's stays as it is
        self.tok.encode_special_tokens = True

    def __call__(self, texts: list[str]) -> list[np.ndarray]:
        if self.bytes_only:  # 100 times as fast as the tokenizer
            return [np.frombuffer(text.encode(), np.uint8).astype(self.dtype) for text in texts]
        return [np.array(e.ids, self.dtype) for e in self.tok.encode_batch_fast(texts, add_special_tokens=False)]


def encode_unit(texts: Iterable[str], target: Path, encode: Encoder, report: Callable[[int], None]) -> None:
    """Write target.tokens (token_dtype) and target.docs (DOCUMENT); calls report(n) after every n tokens."""
    with replacing(target.with_suffix(".tokens")) as tokens, replacing(target.with_suffix(".docs")) as docs:
        start = position = 0
        for batch in _batches(texts):
            before = position
            for ids, (_, document_hash) in zip(encode([part for part, _ in batch]), batch, strict=True):
                tokens.write(ids.data)
                position += len(ids)
                if document_hash is not None:
                    tokens.write(encode.end)
                    position += 1
                    docs.write(struct.pack("<QQ", start, document_hash))
                    start = position
            report(position - before)


def text_hash(text: str) -> int:
    """64 bits of BLAKE2b of the UTF-8 text. It decides to which split a document belongs."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _batches(texts: Iterable[str]) -> Iterator[list[tuple[str, int | None]]]:
    """Parts of documents, about PART characters together; the hash comes with a document's last part, else None."""
    batch: list[tuple[str, int | None]] = []
    weight = 0
    for text in texts:
        begin = 0
        while begin < len(text):
            end = _part_end(text, begin)
            batch.append((text[begin:end], text_hash(text) if end == len(text) else None))
            weight += end - begin + DOCUMENT_COST
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
