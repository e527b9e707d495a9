"""Finds the token that ends a document, and reads and writes a tokenizer's declaration of special tokens.

In training, a document is its tokens followed by the end of text: no BOS, no [CLS]. So the stored tokenizer adds none either. The
token before a document is the end of the previous document, and so serves as BOS.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from data import DataError

END_OF_TEXT = "<|endoftext|>"
# Names of the end of a document in published tokenizers; the last names are for tokenizers that have no better one.
END_OF_TEXT_NAMES = (
    *(END_OF_TEXT, "<|end_of_text|>", "<｜end▁of▁sentence｜>", "<|eos|>", "<eos>", "</s>", "[EOS]", "<EOS>"),
    *("<|END_OF_TEXT|>", "<end_of_text>", "<EOS_TOKEN>", "<|eod|>", "<eod>", "<EOD>", "<|eot|>", "<eot>", "[SEP]", "<sep>"),
)
PAD_NAMES = ("<pad>", "[PAD]", "<PAD>", "<|pad|>", "<|padding|>", "<｜▁pad▁｜>", "<|finetune_right_pad_id|>")
CONFIG = "tokenizer_config.json"
END_TOKEN_REMEDY = "name one of its tokens with --end-token"


def declared_tokens(folder: Path) -> dict[str, str]:
    """Return eos_token and pad_token of a folder's tokenizer_config.json or, in older folders, special_tokens_map.json."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", CONFIG):
        path = folder / name
        if path.is_file():
            try:
                found |= parse_declared(path.read_text(encoding="utf-8"))
            except (ValueError, RecursionError):
                raise DataError(f"{path}: damaged, not a JSON object of UTF-8") from None
    return found


def parse_declared(text: str) -> dict[str, str]:
    """Return eos_token and pad_token in the text of such a file.

    Raises ValueError if it is not a JSON object, or if a token cannot be encoded in UTF-8.
    """
    config = json.loads(text)
    if not isinstance(config, dict):
        raise ValueError("not an object")
    tokens = {key: config.get(key) for key in ("eos_token", "pad_token")}
    tokens = {key: token.get("content") if isinstance(token, dict) else token for key, token in tokens.items()}
    found = {key: token for key, token in tokens.items() if isinstance(token, str)}
    "".join(found.values()).encode()  # fails for a lone surrogate
    return found


def end_of_text(
    tok: Tokenizer, declared: dict[str, str] | None = None, asked: str | None = None, remedy: str = END_TOKEN_REMEDY
) -> str:
    """Return the token that ends a document: `asked`, else the declared eos_token, else the first of END_OF_TEXT_NAMES.

    Among tokens with these names, special tokens have priority over other added tokens, and these over plain entries of the
    vocabulary. Raises DataError with `remedy` if there is none.
    """
    added = tok.get_added_tokens_decoder().values()
    special = [token.content for token in added if token.special]
    for token, origin in ((asked, "--end-token"), ((declared or {}).get("eos_token"), f"eos_token in {CONFIG}")):
        if token is not None:
            if tok.token_to_id(token) is None:
                raise DataError(f"{origin} is {token!r}, which the tokenizer does not have; {_choice(special)}")
            return token
    for known in (special, [token.content for token in added]):
        for name in END_OF_TEXT_NAMES:
            if name in known:
                return name
    for name in END_OF_TEXT_NAMES:
        if tok.token_to_id(name) is not None:
            return name
    raise DataError(
        f"the tokenizer has no end-of-text token: none of {', '.join(END_OF_TEXT_NAMES)}; {remedy} ({_choice(special)})"
    )


def check_not_of_texts(tok: Tokenizer, end: str) -> None:
    """Raise DataError if `end` is a character, or stands for a byte, that texts contain: they would lose it."""
    added = tok.get_added_tokens_decoder().values()
    if len(end) == 1 and end not in [token.content for token in added]:
        special = [token.content for token in added if token.special]
        raise DataError(f"the end of text would be {end!r}, which texts are made of: they would lose it; {_choice(special)}")


def as_trained(tok: Tokenizer, end: str) -> Tokenizer:
    """Return `tok` as training uses it: `end` is special, and nothing is added around a text. Returns a copy if it changes."""
    if not any(token.special and token.content == end for token in tok.get_added_tokens_decoder().values()):
        tok = Tokenizer.from_str(tok.to_str())
        tok.add_special_tokens([AddedToken(end, special=True, normalized=False)])  # keeps its id
    if tok.num_special_tokens_to_add(False):
        state = json.loads(tok.to_str())
        state["post_processor"] = _without_additions(state["post_processor"])
        tok = Tokenizer.from_str(json.dumps(state))
    return tok


def tokenizer_config(tok: Tokenizer, end: str, declared: dict[str, str] | None = None) -> dict[str, Any]:
    """Return the tokenizer_config.json beside tokenizer.json. BOS is the end of text.

    Padding is a padding token if there is one; else, with byte_fallback, the unknown token, which then never occurs; else the end
    of text.
    """
    special = [token.content for token in tok.get_added_tokens_decoder().values() if token.special]
    pads = [name for name in ((declared or {}).get("pad_token"), *PAD_NAMES) if name in special]
    model = json.loads(tok.to_str())["model"]
    unknown = _unknown(model)
    if unknown is not None and model.get("byte_fallback"):
        pads.append(unknown)
    config = {"bos_token": end, "eos_token": end, "pad_token": pads[0] if pads else end}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **config,
        **({} if unknown is None else {"unk_token": unknown}),
        "clean_up_tokenization_spaces": False,  # which would change the text
    }


def unknown_token(tok: Tokenizer) -> str | None:
    """Return the token for characters that the tokenizer does not know; None if there is none."""
    return _unknown(json.loads(tok.to_str())["model"])


def _unknown(model: dict[str, Any]) -> str | None:
    if model["type"] == "Unigram":
        return None if model["unk_id"] is None else model["vocab"][model["unk_id"]][0]
    return model.get("unk_token") if model.get("unk_token") in model["vocab"] else None


def _without_additions(processor: dict | None) -> dict | None:
    """Return the parts of a post-processor that add no tokens; None if there are none."""
    if processor is not None and processor["type"] == "Sequence":
        kept = [part for part in map(_without_additions, processor["processors"]) if part is not None]
        return {**processor, "processors": kept} if kept else None
    return processor if processor is not None and processor["type"] == "ByteLevel" else None


def _choice(special: list[str]) -> str:
    """Return a text on the special tokens from which the user may choose."""
    return f"its special tokens: {', '.join(special[:12]) or 'none'}{', ...' if len(special) > 12 else ''}"
