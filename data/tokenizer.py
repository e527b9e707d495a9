"""Makes, loads and saves tokenizers. Each is a `tokenizers.Tokenizer`, stored as a tokenizer.json that transformers can load."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from data import DataError, first_line
from data.files import replacing
from data.special_tokens import CONFIG, END_OF_TEXT, declared_tokens, parse_declared, tokenizer_config

SMALLEST_BPE = 257  # 256 bytes and the end of text
# Files of tokenizers that have no tokenizer.json beside them.
OTHER_FILES = ("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
PROBE = 4096  # tokens of a data set whose text two tokenizers must encode alike
LARGEST_VOCABULARY = 2**24  # 16.8 million, 60 times the largest published one; a model has a row of weights for each id


def byte_tokenizer() -> Tokenizer:
    """Return a tokenizer with one token a byte: id == byte value; 256 is the end of text. It is byte-level BPE without merges."""
    tok = Tokenizer(models.BPE(vocab={char: byte for byte, char in enumerate(_byte_characters())}, merges=[]))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return tok


def is_byte_tokenizer(tok: Tokenizer) -> bool:
    """Return whether `tok` equals `byte_tokenizer()`, even if it was read from a file."""
    return tokenizer_hash(tok) == tokenizer_hash(byte_tokenizer())


def train_bpe(texts: Iterable[str], vocab_size: int, end: str = END_OF_TEXT) -> Tokenizer:
    """Train byte-level BPE with GPT-2's word pattern. The end of text, `end`, is id 0. The same texts give the same tokenizer.

    The vocabulary may be smaller than `vocab_size`, because pairs that occur only once are not merged. Raises DataError for a
    `vocab_size` below 257 or above LARGEST_VOCABULARY, and for an `end` that is one of the characters which stand for bytes.
    """
    if vocab_size < SMALLEST_BPE:
        raise DataError(f"--vocab-size {vocab_size} is too small for byte-level BPE: at least {SMALLEST_BPE}")
    if vocab_size > LARGEST_VOCABULARY:
        raise DataError(f"--vocab-size {vocab_size} is too large: at most {LARGEST_VOCABULARY}")
    if end in pre_tokenizers.ByteLevel.alphabet():
        raise DataError(f"the end of text would be {end!r}, which stands for a byte: texts would lose it; name one like </s>")
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[end],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tok.train_from_iterator(texts, trainer)
    return tok


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """Load a tokenizer from a tokenizer.json, a folder that holds one, or a name on the Hugging Face hub (needs the network).

    Truncation, padding and dropout of merges, which some files switch on, are switched off, because they would change tokens.
    """
    path = _local_path(name_or_path)
    tok = _from_hub(str(name_or_path)) if path is None else _from_file(path)
    largest = max(tok.get_vocab(with_added_tokens=True).values(), default=0)
    if largest >= LARGEST_VOCABULARY:
        raise DataError(f"tokenizer {name_or_path}: a token has the id {largest}; ids must be below {LARGEST_VOCABULARY}")
    tok.no_truncation()
    tok.no_padding()
    if getattr(tok.model, "dropout", None):
        tok.model.dropout = None
    return tok


def load_declared(name_or_path: str | Path) -> dict[str, str]:
    """Return what the tokenizer_config.json beside such a tokenizer declares; see `special_tokens.declared_tokens`."""
    path = _local_path(name_or_path)
    if path is None:
        return _declared_on_hub(str(name_or_path))
    return declared_tokens(path.parent) if path.name == "tokenizer.json" else {}


def save_tokenizer(tok: Tokenizer, folder: Path, end: str, declared: dict[str, str] | None = None) -> None:
    """Write tokenizer_config.json and then tokenizer.json, each whole or not at all. `end`: the end of text."""
    _save_config(tok, folder, end, declared)
    with replacing(folder / "tokenizer.json") as file:
        file.write(tok.to_str(pretty=True).encode())


def copy_tokenizer(folder: Path, target: Path, end_id: int) -> None:
    """Copy tokenizer.json, and write a tokenizer_config.json with the end of text, which folders of earlier versions lack."""
    tok = load_tokenizer(folder)
    end = tok.id_to_token(end_id)
    if end is None:
        raise DataError(f"{folder}: tokenizer.json has no token {end_id}, which ends documents there")
    with replacing(target / "tokenizer.json") as file:
        file.write((folder / "tokenizer.json").read_bytes())
    _save_config(tok, target, end, declared_tokens(folder))


def tokenizer_hash(tok: Tokenizer) -> str:
    """Return the sha256 of the tokenizer's canonical JSON, which is independent of white space and of the order of keys."""
    return json_hash(tok.to_str())


def json_hash(text: str) -> str:
    """Return the sha256 of a JSON text in canonical form. For the text of a tokenizer.json, this is the tokenizer's hash."""
    canonical = json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def token_id(tok: Tokenizer, token: str) -> int:
    """Return the id of a token that must exist."""
    found = tok.token_to_id(token)
    assert found is not None, token
    return found


def encode_alike(tok: Tokenizer, other: Tokenizer, ids: Sequence[int]) -> bool:
    """Whether `other` encodes the text of `ids`, tokens of `tok`, as `tok` does. Texts that both refuse count as alike."""
    text = tok.decode(ids)
    return _ids_of(tok, text) == _ids_of(other, text)


def vocabulary_size(tok: Tokenizer) -> int:
    """Return the largest id plus one: the rows that an embedding needs, even if the vocabulary has gaps."""
    return max(tok.get_vocab(with_added_tokens=True).values()) + 1


def _save_config(tok: Tokenizer, folder: Path, end: str, declared: dict[str, str] | None) -> None:
    with replacing(folder / CONFIG) as file:
        file.write(json.dumps(tokenizer_config(tok, end, declared), indent=1, ensure_ascii=False).encode())


def _ids_of(tok: Tokenizer, text: str) -> list[int] | None:
    try:
        return tok.encode(text, add_special_tokens=False).ids
    except Exception:  # tokenizers raises nothing narrower: the text has something that `tok` does not know
        return None


def _local_path(name_or_path: str | Path) -> Path | None:
    """Return the path of the tokenizer.json; None for a name on the hub. Raises DataError if it is neither."""
    path = Path(name_or_path)
    if path.is_dir():
        if not (path / "tokenizer.json").exists() and (other := next((n for n in OTHER_FILES if (path / n).exists()), None)):
            raise DataError(f"{path} holds {other}, but no tokenizer.json; {_conversion(path)}")
        path = path / "tokenizer.json"
    if path.exists():
        return path
    if path.suffix != ".json" and re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", str(name_or_path)):
        return None
    hint = "; a name of the Hugging Face hub is written without hub:" if str(name_or_path).startswith("hub:") else ""
    raise DataError(f"no tokenizer at {path}{hint}")


def _from_file(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        if path.name in OTHER_FILES:
            raise DataError(f"{path} is not a tokenizer.json; {_conversion(path.parent)}") from None
        raise DataError(f"{path} is not a tokenizer.json: {first_line(error)}") from None


def _conversion(folder: Path) -> str:
    """Return advice on making a tokenizer.json from a folder's other files."""
    return (
        f"transformers writes one: AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({f'{folder}-converted'!r}), "
        "the folder to name then"
    )


def _from_hub(name: str) -> Tokenizer:
    try:
        return Tokenizer.from_pretrained(name)
    except Exception as error:  # tokenizers raises nothing narrower
        raise _unreadable(name, error) from None


def _declared_on_hub(name: str) -> dict[str, str]:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        return parse_declared(Path(hf_hub_download(name, CONFIG)).read_text(encoding="utf-8"))
    except EntryNotFoundError:
        return {}
    except Exception as error:  # the hub's client, HTTP and the socket raise errors of their own
        raise _unreadable(name, error) from None


def _unreadable(name: str, error: Exception) -> DataError:
    return DataError(
        f"tokenizer {name!r} is not a file or folder on this machine, and it cannot be read from the Hugging Face hub "
        f"({first_line(error)}); without a network, give the path of a tokenizer.json"
    )


def _byte_characters() -> list[str]:
    """Return the printable character that byte-level BPE writes for each byte value: GPT-2's table."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]
