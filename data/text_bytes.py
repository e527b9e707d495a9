"""Computes how many bytes of text each token stands for, for the bits per byte of a model."""

import json

import numpy as np
from tokenizers import Tokenizer

from data.shards import VERIFY_BYTES, TokenShards
from data.tokenizer import load_tokenizer
from data.vocabularies import has_text

BYTE_FALLBACK = frozenset(f"<0x{byte:02X}>" for byte in range(256))  # what SentencePiece calls the tokens of single bytes
CHUNK = 2**22  # tokens of one read


def bytes_of_tokens(shards: TokenShards) -> np.ndarray:
    """Return the bytes of text that each token of a split stands for, (V,) float64.

    They are those of `token_bytes`, scaled so that their sum over the split is its `n_bytes`. So the sum is right for any
    tokenizer, even if it drops white space or changes the text before cutting it. They are not scaled if the bytes of the text
    are unknown, or if the split has more than VERIFY_BYTES.
    """
    lengths = token_bytes(load_tokenizer(shards.folder), shards.vocab_size, shards.eot_id).astype(np.float64)
    if not shards.n_bytes or shards.n_tokens * shards.dtype.itemsize > VERIFY_BYTES:
        return lengths
    counts = np.zeros(shards.vocab_size, np.int64)
    for start in range(0, shards.n_tokens, CHUNK):
        counts += np.bincount(shards.read(start, min(start + CHUNK, shards.n_tokens)), minlength=shards.vocab_size)
    counted = float(counts @ lengths)
    return lengths * (shards.n_bytes / counted) if counted else lengths


def token_bytes(tok: Tokenizer, size: int, end: int) -> np.ndarray:
    """Return the bytes of UTF-8 text that each token stands for inside a text, (size,).

    They are 0 for special tokens, `end` and ids without a token.

    Exact for byte-level tokenizers. Others may change the text before cutting it, for example to lower case; then the bytes of
    the changed text count.
    """
    added = tok.get_added_tokens_decoder()
    tokens = [(i, text) for text, i in tok.get_vocab(with_added_tokens=True).items() if i < size and i != end]
    lengths = np.zeros(size, np.int64)
    if not has_text(tokens):
        return lengths
    state = json.loads(tok.to_str())
    suffix = state["model"].get("end_of_word_suffix") or ""
    if "ByteLevel" in json.dumps([state["normalizer"], state["pre_tokenizer"], state["decoder"]]):
        for i, text in tokens:
            if i not in added:  # a character of the byte-level alphabet is a byte, and the end of a word is a space
                lengths[i] = len(text.removesuffix(suffix)) + (bool(suffix) and text.endswith(suffix))
            elif not added[i].special:
                lengths[i] = len(text.encode())
    elif state["decoder"] is None:  # `decode` would put a space between any two tokens
        prefix = state["model"].get("continuing_subword_prefix") or ""
        metaspace = "\u2581" in json.dumps([state["normalizer"], state["pre_tokenizer"]], ensure_ascii=False)
        for i, text in tokens:
            if i not in added:
                text = text.removeprefix(prefix).removesuffix(suffix)
                text = text.replace("\u2581", " ") if metaspace else text
                lengths[i] = 1 if text in BYTE_FALLBACK else len(text.encode())
            elif not added[i].special:
                lengths[i] = len(text.encode())
    else:
        # Decode each token together with another one, because decoders drop the space before the first token, or after the last
        # token if words end with a space.
        anchor = tok.encode("a", add_special_tokens=False).ids[-1:]
        alone = len(tok.decode(anchor).encode())
        decoded = tok.decode_batch([[i, *anchor] if suffix else [*anchor, i] for i, _ in tokens])  # skips special tokens
        for (i, text), both in zip(tokens, decoded, strict=True):
            lengths[i] = 1 if text in BYTE_FALLBACK else len(both.encode()) - alone
    return lengths
