"""Tokenizers for data without a tokenizer.json: one of characters, and one for which only the number of tokens is known."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from data import DataError
from data.special_tokens import END_OF_TEXT

ADVICE = "expected {character: id}, [characters], or an object with such a 'stoi', 'itos' or 'vocabulary'"


def character_vocabulary(path: Path) -> dict[str, int] | None:
    """Return the ids of the characters in a JSON file, in the form of nanoGPT's meta.pkl; None for a tokenizer.json.

    Raises:
        DataError: the file is neither.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise DataError(f"{path}: not JSON") from None
    if isinstance(found, dict) and isinstance(found.get("model"), dict):
        return None
    if isinstance(found, dict):
        found = next((found[key] for key in ("stoi", "vocabulary", "itos") if isinstance(found.get(key), dict | list)), found)
    pairs = _pairs(found)
    if not pairs or not all(isinstance(text, str) and type(i) is int and i >= 0 for text, i in pairs):
        raise DataError(f"{path}: not a vocabulary: {ADVICE}")
    if words := [text for text, _ in pairs if len(text) != 1]:
        raise DataError(f"{path}: {words[0]!r} is not one character; for a vocabulary of words name a tokenizer.json")
    vocabulary = dict(pairs)
    if len(vocabulary) < len(pairs) or len(set(vocabulary.values())) < len(pairs):
        raise DataError(f"{path}: a character or an id occurs twice")
    return vocabulary


def _pairs(found: Any) -> list[tuple[Any, Any]]:
    """Return (character, id) pairs from a list, a mapping, or a mapping from ids to characters."""
    if isinstance(found, list):
        return [(text, i) for i, text in enumerate(found)]
    if not isinstance(found, dict):
        return []
    if all(isinstance(value, str) and key.isascii() and key.isdecimal() for key, value in found.items()):
        return [(value, int(key)) for key, value in found.items()]
    return list(found.items())


def character_tokenizer(vocabulary: dict[str, int]) -> Tokenizer:
    """Return a tokenizer of characters. The end of text gets an additional id, and also stands for unknown characters."""
    tok = _words(vocabulary)
    tok.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tok.decoder = decoders.Fuse()
    return tok


def number_tokenizer(size: int, end: str = END_OF_TEXT) -> Tokenizer:
    """Return a tokenizer for data whose tokens have no known text: the text of token i (0 to size - 1) is the number i.

    The end of text is one of these tokens, or an additional one.
    """
    tok = _words({str(i): i for i in range(size)}, end)
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tok


def has_text(tokens: list[tuple[int, str]]) -> bool:
    """Return whether tokens (id, text) have texts of their own, unlike those of `number_tokenizer`."""
    return any(text != str(i) for i, text in tokens)


def _words(vocabulary: dict[str, int], end: str = END_OF_TEXT) -> Tokenizer:
    tok = Tokenizer(models.WordLevel({end: max(vocabulary.values()) + 1} | vocabulary, unk_token=end))
    tok.add_special_tokens([AddedToken(end, special=True, normalized=False)])
    return tok
