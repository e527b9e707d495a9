"""Encodes the documents of one unit into token ids on disk: NAME.tokens, and NAME.docs with a record for each document.

Both files depend only on the unit and the tokenizer. NAME.tokens appears last, and whole: if it exists, the unit is
finished.
"""

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, pre_tokenizers

from data import DataError, first_line
from data.files import replacing
from data.special_tokens import unknown_token
from data.tokenizer import is_byte_tokenizer, vocabulary_size

# The record of a document. start: position of its first token in NAME.tokens. hash: text_hash. bytes: of its UTF-8 text; 0 for
# an empty document, which has no tokens. unknown: how many of its tokens stand for characters that the tokenizer does not know;
# if the tokenizer has no token for them, how many characters are left out.
DOCUMENT = np.dtype([("start", "<u8"), ("hash", "<u8"), ("bytes", "<u8"), ("unknown", "<u8")])
BATCH = 2**20  # about the characters of one call; a longer document is not cut, since its parts could give other tokens
DOCUMENT_COST = 100  # the cost of a document in a call, beside its length, in characters
UNMATCHED = "\U0010ffff" * 4  # a prefix for the names of special tokens, which no text contains


def token_dtype(tok: Tokenizer) -> np.dtype:
    """Return little-endian uint16 if every id fits, else uint32."""
    return np.dtype("<u2" if vocabulary_size(tok) <= 2**16 else "<u4")


class Encoder:
    """Encodes texts into ids (n,). A special token in a text, such as '<|endoftext|>', counts as plain text.

    `end`: the bytes of the id `end_id`, which is not added to the ids. `unknown`: the id for unknown characters, or None. If it
    is `end_id`, unknown characters are left out.
    """

    def __init__(self, tok: Tokenizer, end_id: int):
        self.dtype = token_dtype(tok)
        self.end_id = end_id
        self.end = end_id.to_bytes(self.dtype.itemsize, "little")
        self.bytes_only = is_byte_tokenizer(tok)
        self.tok = plain_text_tokenizer(tok)
        unknown = unknown_token(tok)
        self.unknown = None if unknown is None else tok.token_to_id(unknown)
        self.leaves_out = leaves_out(tok, end_id)

    def __call__(self, texts: list[str]) -> list[np.ndarray]:
        """Return the ids (n,) of each text. Raises DataError for a text that the tokenizer refuses."""
        if self.bytes_only:  # 100 times as fast as the tokenizer
            return [np.frombuffer(text.encode(), np.uint8).astype(self.dtype) for text in texts]
        try:
            found = [np.array(e.ids, self.dtype) for e in self.tok.encode_batch_fast(texts, add_special_tokens=False)]
        except Exception as error:  # a bare Exception, from word-level and Unigram models without an unknown token
            raise DataError(
                f"the tokenizer cannot encode a text, and has no token for what it does not know: {first_line(error)}"
            ) from None
        return [ids[ids != self.end_id] for ids in found] if self.unknown == self.end_id else found

    def unknown_in(self, text: str, ids: np.ndarray) -> int:
        """Return how many characters of a text, which has these ids, the tokenizer does not know."""
        if self.leaves_out:
            known = set[int]()
            encoding = self.tok.encode(text, add_special_tokens=False)
            for id, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
                if id != self.end_id:
                    known.update(range(start, stop))
            return sum(i not in known and not char.isspace() for i, char in enumerate(text))
        return 0 if self.unknown is None else int(np.count_nonzero(ids == self.unknown))


def leaves_out(tok: Tokenizer, end_id: int) -> bool:
    """Return whether characters may be lost: there is no unknown token, or it is `end_id`, and BPE lacks a token for some byte.

    Without an unknown token, models other than BPE refuse a text.
    """
    state = json.loads(tok.to_str())
    model, unknown = state["model"], unknown_token(tok)
    if unknown is not None and tok.token_to_id(unknown) != end_id:
        return False
    if model["type"] != "BPE":
        return unknown is not None
    if model.get("byte_fallback"):
        return not {f"<0x{byte:02X}>" for byte in range(256)} <= model["vocab"].keys()
    by_bytes = "ByteLevel" in json.dumps([state["normalizer"], state["pre_tokenizer"]])
    return not (by_bytes and set(pre_tokenizers.ByteLevel.alphabet()) <= model["vocab"].keys())


def plain_text_tokenizer(tok: Tokenizer) -> Tokenizer:
    """Return a copy of the tokenizer that never finds a special token in a text, neither by its name nor by the vocabulary.

    A Unigram model finds '</s>' in a text like any other entry of its vocabulary, and merges may produce it. So special tokens
    are renamed, and merges that involve them are removed. Ids stay the same. The bytes of byte_fallback keep their names, because
    the model needs them.
    """
    state = json.loads(tok.to_str())
    model = state["model"]
    vocab = model["vocab"] if isinstance(model["vocab"], dict) else {piece: None for piece, _ in model["vocab"]}
    special = {token["content"] for token in state["added_tokens"] if token["special"]} & vocab.keys()
    if model.get("byte_fallback"):
        special -= {f"<0x{byte:02X}>" for byte in range(256)}
    if special:
        if isinstance(model["vocab"], dict):
            model["vocab"] = {UNMATCHED + piece if piece in special else piece: i for piece, i in vocab.items()}
        else:
            model["vocab"] = [[UNMATCHED + piece if piece in special else piece, score] for piece, score in model["vocab"]]
        if model.get("unk_token") in special:
            model["unk_token"] = UNMATCHED + model["unk_token"]
        if "merges" in model:
            model["merges"] = [m for m in model["merges"] if not special & {*m, "".join(m)}]
        for token in state["added_tokens"]:
            if token["content"] in special:
                token["content"] = UNMATCHED + token["content"]
    state["post_processor"] = None
    plain = Tokenizer.from_str(json.dumps(state))
    plain.encode_special_tokens = True
    return plain


def encode_unit(texts: Iterable[str], target: Path, encode: Encoder, report: Callable[[int], None]) -> None:
    """Write target.tokens (token_dtype) and target.docs (DOCUMENT). Calls report(n) after each batch of n tokens."""
    with replacing(target.with_suffix(".tokens")) as tokens, replacing(target.with_suffix(".docs")) as docs:
        position = 0
        for batch in _batches(texts):
            before = position
            for text, ids in zip(batch, encode(batch), strict=True):
                if not text:
                    docs.write(struct.pack("<QQQQ", position, 0, 0, 0))
                    continue
                utf8 = text.encode()
                docs.write(struct.pack("<QQQQ", position, text_hash(utf8), len(utf8), encode.unknown_in(text, ids)))
                tokens.write(ids.data)
                tokens.write(encode.end)
                position += len(ids) + 1
            report(position - before)


def text_hash(utf8: bytes) -> int:
    """Return 64 bits of the BLAKE2b hash of a text, which decides the split of a document."""
    return int.from_bytes(hashlib.blake2b(utf8, digest_size=8).digest(), "little")


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yield lists of whole documents with about BATCH characters each."""
    batch: list[str] = []
    weight = 0
    for text in texts:
        batch.append(text)
        weight += len(text) + DOCUMENT_COST
        if weight >= BATCH:
            yield batch
            batch, weight = [], 0
    if batch:
        yield batch
