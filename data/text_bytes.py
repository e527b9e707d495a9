"""How many bytes of text a token stands for, for the bits per byte of a model."""

import numpy as np
from tokenizers import Tokenizer

from data.vocabularies import has_text

BYTE_FALLBACK = frozenset(f"<0x{byte:02X}>" for byte in range(256))  # what SentencePiece calls the tokens of single bytes


def token_bytes(tok: Tokenizer, size: int, end: int) -> np.ndarray:
    """Bytes (size,) of UTF-8 text that each token stands for inside a text; 0 for special tokens, `end` and ids without a token.

    Exact for byte-level tokenizers. Others may change the text before they cut it, as into lower case; the text that they cut
    counts.
    """
    added = tok.get_added_tokens_decoder()
    anchor = tok.encode("a", add_special_tokens=False).ids[-1:]  # a token in front, as decoders drop the space before the first
    before = len(tok.decode(anchor).encode())
    tokens = [(i, text) for text, i in tok.get_vocab(with_added_tokens=True).items() if i < size and i != end]
    lengths = np.zeros(size, np.int64)
    if not has_text(tokens):
        return lengths
    if "ByteLevel" in repr(tok.decoder):
        for i, text in tokens:
            if i not in added:
                lengths[i] = len(text)  # a character of the byte-level alphabet is a byte
            elif not added[i].special:
                lengths[i] = len(text.encode())
    else:
        decoded = tok.decode_batch([[*anchor, i] for i, _ in tokens])  # leaves special tokens out
        for (i, text), both in zip(tokens, decoded, strict=True):
            lengths[i] = 1 if text in BYTE_FALLBACK else len(both.encode()) - before
    return lengths
