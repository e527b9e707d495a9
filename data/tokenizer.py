"""Tokenizers: every one is a `tokenizers.Tokenizer`, kept as one tokenizer.json that transformers loads as it is."""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from data import DataError, first_line

END_OF_TEXT = "<|endoftext|>"
# What published tokenizers call the end of a document.
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "<｜end▁of▁sentence｜>", "<|eos|>", "<eos>", "</s>", "[EOS]")
SMALLEST_BPE = 257  # 256 bytes and the end of text


def byte_tokenizer() -> Tokenizer:
    """One token a byte: id == byte value, and 256 is the end of text. Byte-level BPE without a single merge."""
    tok = Tokenizer(models.BPE(vocab={char: byte for byte, char in enumerate(_byte_characters())}, merges=[]))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return tok


def is_byte_tokenizer(tok: Tokenizer) -> bool:
    """Whether `tok` is `byte_tokenizer()`, from a file too."""
    return tokenizer_hash(tok) == tokenizer_hash(byte_tokenizer())


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with GPT-2's word pattern; the end of text is id 0. The same texts give the same tokenizer.

    The vocabulary may come out smaller than `vocab_size`: pairs seen only once are not merged. DataError below 257.
    """
    if vocab_size < SMALLEST_BPE:
        raise DataError(f"vocab_size {vocab_size} is too small for byte-level BPE: at least {SMALLEST_BPE}")
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tok.train_from_iterator(texts, trainer)
    return tok


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """A tokenizer.json, a folder that holds one, or a pretrained name of the Hugging Face hub (needs the network).

    Truncation and padding, which some published files switch on, are switched off: they would drop or add tokens.
    """
    path = Path(name_or_path)
    if path.is_dir():
        path = path / "tokenizer.json"
    if path.exists():
        tok = _from_file(path)
    elif path.suffix != ".json" and re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", str(name_or_path)):
        tok = _from_hub(str(name_or_path))
    else:
        raise DataError(f"no tokenizer at {path}")
    tok.no_truncation()
    tok.no_padding()
    return tok


def tokenizer_hash(tok: Tokenizer) -> str:
    """sha256 of the tokenizer's canonical JSON: independent of white space and of the order of keys."""
    return json_hash(tok.to_str())


def json_hash(text: str) -> str:
    """sha256 of a JSON text in canonical form; the hash of a tokenizer.json file is that of its text."""
    canonical = json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def end_of_text_id(tok: Tokenizer) -> int:
    """The id that ends a document: the first of END_OF_TEXT_NAMES that the tokenizer has."""
    for name in END_OF_TEXT_NAMES:
        if (token := tok.token_to_id(name)) is not None:
            return token
    raise DataError(f"the tokenizer has no end-of-text token: none of {', '.join(END_OF_TEXT_NAMES)}")


def vocabulary_size(tok: Tokenizer) -> int:
    """Largest id plus one: the rows that an embedding needs, also where a vocabulary has gaps."""
    return max(tok.get_vocab(with_added_tokens=True).values()) + 1


def _from_file(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise DataError(f"{path} is not a tokenizer.json: {first_line(error)}") from None


def _from_hub(name: str) -> Tokenizer:
    try:
        return Tokenizer.from_pretrained(name)
    except Exception as error:  # tokenizers raises nothing narrower
        raise DataError(
            f"tokenizer {name!r} is no file or folder here and cannot be read from the Hugging Face hub "
            f"({first_line(error)}); without a network, give the path of a tokenizer.json"
        ) from None


def _byte_characters() -> list[str]:
    """The printable character that byte-level BPE writes for each byte value: GPT-2's table."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]
