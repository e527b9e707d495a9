"""Documents of one unit into token ids on disk: NAME.tokens, and NAME.docs with a record for each document.

What is written depends on the unit and the tokenizer alone. NAME.tokens is put in place last, and whole: where it
exists, the unit is finished.
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

# Its first token in NAME.tokens; text_hash; bytes of its UTF-8 text, 0 for one that is empty and has no tokens; how many of
# its tokens stand for characters that the tokenizer does not know or, where it has no token for them, how many are left out.
DOCUMENT = np.dtype([("start", "<u8"), ("hash", "<u8"), ("bytes", "<u8"), ("unknown", "<u8")])
BATCH = 2**20  # characters encoded in one call, about; a longer document is one call, since parts of it could give other tokens
DOCUMENT_COST = 100  # characters: what a document costs in a call besides its length
UNMATCHED = "\U0010ffff" * 4  # before the name of a special token: a text holds it never


def token_dtype(tok: Tokenizer) -> np.dtype:
    """Little-endian uint16 if every id fits, else uint32."""
    return np.dtype("<u2" if vocabulary_size(tok) <= 2**16 else "<u4")


class Encoder:
    """The function from texts to their ids (n,). Special tokens in a text, such as '<|endoftext|>', count as plain text.

    `end`: the bytes of the id `end_id`, which is not added. `unknown`: the id of unknown characters, or None. If it is
    `end_id`, unknown characters are left out.
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
        """DataError for a text that the tokenizer refuses."""
        if self.bytes_only:  # 100 times as fast as the tokenizer
            return [np.frombuffer(text.encode(), np.uint8).astype(self.dtype) for text in texts]
        try:
            found = [np.array(e.ids, self.dtype) for e in self.tok.encode_batch_fast(texts, add_special_tokens=False)]
        except Exception as error:  # of class Exception itself: word-level and Unigram models without an unknown token
            raise DataError(
                f"the tokenizer cannot encode a text, and has no token for what it does not know: {first_line(error)}"
            ) from None
        return [ids[ids != self.end_id] for ids in found] if self.unknown == self.end_id else found

    def unknown_in(self, text: str, ids: np.ndarray) -> int:
        """How many characters of a text, with these ids, the tokenizer does not know."""
        if self.leaves_out:
            known = set[int]()
            encoding = self.tok.encode(text, add_special_tokens=False)
            for id, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
                if id != self.end_id:
                    known.update(range(start, stop))
            return sum(i not in known and not char.isspace() for i, char in enumerate(text))
        return 0 if self.unknown is None else int(np.count_nonzero(ids == self.unknown))


def leaves_out(tok: Tokenizer, end_id: int) -> bool:
    """Whether characters may vanish: there is no token for the unknown, or it is `end_id`, and BPE does not have every byte.

    Without a token for the unknown, models other than BPE refuse a text.
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
    """A copy that never reads a special token out of a text, whether by its name or because the model's vocabulary has it.

    A Unigram model finds '</s>' in a text like any other entry, and merges may lead to it. So the entries of special tokens
    are renamed, and merges that lead to them removed; ids stay. The bytes of byte_fallback keep their names, which are needed.
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
    """Write target.tokens (token_dtype) and target.docs (DOCUMENT); calls report(n) after every n tokens."""
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
    """64 bits of BLAKE2b of a text. It decides to which split a document belongs."""
    return int.from_bytes(hashlib.blake2b(utf8, digest_size=8).digest(), "little")


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Whole documents, about BATCH characters together."""
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
