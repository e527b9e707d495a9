"""The bytes of text that tokens stand for, of tokenizers of every kind."""

import json
import random

import numpy as np
import pytest
from tokenizer_zoo import llama, sentencepiece, unigram
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from data import text_bytes
from data.mixture import Mixture
from data.prepare import prepare
from data.shards import TokenShards
from data.text_bytes import bytes_of_tokens, token_bytes
from data.tokenizer import load_tokenizer, train_bpe, vocabulary_size

WORDS = ["The", "cats", "sat", "on", "mats", "under", "Größe", "stars", "while", "rivers", "and", "hills", "ran", "by", "漢字"]


def prose(count: int = 200) -> list[str]:
    """Sentences with capitals, commas and some words that are rare."""
    rng = random.Random(1)
    parts = [" ".join(rng.choices(WORDS, k=rng.randint(2, 6))) for _ in range(3 * count)]
    return [f"{', '.join(parts[3 * i : 3 * i + 3])}.\n{rng.randint(0, 10**9):x}" for i in range(count)]


def bpe(pre_tokenizer, decoder=None, normalizer=None, suffix=None, alphabet=(), unknown=True) -> Tokenizer:
    options = {} if suffix is None else {"end_of_word_suffix": suffix}
    tok = Tokenizer(models.BPE(**({"unk_token": "[UNK]"} if unknown else {}), **options))
    tok.pre_tokenizer = pre_tokenizer
    if decoder is not None:
        tok.decoder = decoder
    if normalizer is not None:
        tok.normalizer = normalizer
    names = ["[UNK]", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=names, initial_alphabet=list(alphabet), show_progress=False, **options
    )
    tok.train_from_iterator(prose(), trainer)
    return tok


def wordpiece(decoder=None) -> Tokenizer:
    tok = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tok.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tok.normalizer = normalizers.BertNormalizer(lowercase=True)
    if decoder is not None:
        tok.decoder = decoder
    tok.train_from_iterator(
        prose(), trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    )
    return tok


def word_level() -> Tokenizer:
    tok = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=30, special_tokens=["[UNK]", "</s>"], show_progress=False)
    tok.train_from_iterator(prose(), trainer)
    return tok


ALPHABET = pre_tokenizers.ByteLevel.alphabet()
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
WORD = Regex(r"\w+|[^\w\s]+")
# The kinds, and what token_bytes counts over the bytes of the text where both are the same.
KINDS = {
    "byte-level": lambda: train_bpe(prose(), 400),
    "byte-level, without a decoder": lambda: bpe(BYTE_LEVEL, alphabet=ALPHABET),
    "byte-level by its normalizer": lambda: bpe(
        pre_tokenizers.Split(Regex(r"Ġ+"), "isolated"), normalizer=normalizers.ByteLevel(), alphabet=ALPHABET
    ),
    "white space kept, without a decoder": lambda: bpe(pre_tokenizers.Split(Regex(r"\s+"), "isolated")),
    "Metaspace, without a decoder": lambda: bpe(pre_tokenizers.Metaspace(prepend_scheme="never")),
    "quick tour": lambda: bpe(pre_tokenizers.Whitespace()),
    "gpt": lambda: bpe(pre_tokenizers.BertPreTokenizer(), decoders.BPEDecoder("</w>"), suffix="</w>"),
    "clip": lambda: bpe(
        pre_tokenizers.Sequence([pre_tokenizers.Split(WORD, "removed", invert=True), BYTE_LEVEL]),
        decoders.ByteLevel(),
        suffix="</w>",
        alphabet=ALPHABET,
    ),
    "bert": lambda: wordpiece(decoders.WordPiece()),
    "bert, without a decoder": wordpiece,
    "words": word_level,
    "llama": llama,
    "gemma": sentencepiece,
    "t5": unigram,
}
EXACT = list(KINDS)[:5]


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_a_split_are_those_of_its_text(kind, tmp_path, write_jsonl, quiet):
    folder, corpus = tmp_path / "tokenizer", write_jsonl(tmp_path / "c.jsonl", prose())
    folder.mkdir()
    KINDS[kind]().save(str(folder / "tokenizer.json"))
    out = prepare(corpus, tmp_path / "out", tokenizer=str(folder), val_fraction=0.3, workers=1, log=quiet)
    for split in ("train", "val"):
        shards = TokenShards(out, split)
        tokens = shards.read(0, shards.n_tokens)
        if kind in EXACT:
            counted = token_bytes(load_tokenizer(out), shards.vocab_size, shards.eot_id)
            assert counted[tokens].sum() == shards.n_bytes
        lengths = bytes_of_tokens(shards)
        assert lengths[tokens].sum() == pytest.approx(shards.n_bytes, rel=1e-12)
        assert (lengths >= 0).all()
    mixture = Mixture([TokenShards(out, "val")], [{0: 1}])
    assert np.array_equal(bytes_of_tokens(mixture), lengths)


def test_words_that_end_with_a_mark():
    """A space follows the end of a word, and none the pieces before it."""
    vocabulary = {"</s>": 0, "a": 1, "the</w>": 2, "ru": 3, "n</w>": 4, "b</w>": 5, "a</w>": 6}
    tok = Tokenizer(models.BPE(vocabulary, [], end_of_word_suffix="</w>"))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.BertPreTokenizer(), decoders.BPEDecoder("</w>")
    assert token_bytes(tok, 7, 0).tolist() == [0, 1, 4, 2, 2, 2, 2]
    tok.pre_tokenizer, tok.decoder = BYTE_LEVEL, decoders.ByteLevel()
    assert token_bytes(tok, 7, 0).tolist() == [0, 1, 4, 2, 2, 2, 2]


def test_without_a_decoder_no_space_is_counted():
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "the": 2, "##ing": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    assert token_bytes(words, 4, 0).tolist() == [0, 1, 3, 3]


def test_only_known_bytes_of_a_moderate_split_are_used(tmp_path, write_jsonl, quiet, monkeypatch):
    folder, corpus = tmp_path / "tokenizer", write_jsonl(tmp_path / "c.jsonl", prose())
    folder.mkdir()
    wordpiece().save(str(folder / "tokenizer.json"))
    out = prepare(corpus, tmp_path / "out", tokenizer=str(folder), val_fraction=0.3, workers=1, log=quiet)
    shards = TokenShards(out, "val")
    plain = token_bytes(load_tokenizer(out), vocabulary_size(load_tokenizer(out)), shards.eot_id)
    assert not np.array_equal(bytes_of_tokens(shards), plain)
    with monkeypatch.context() as patch:
        patch.setattr(text_bytes, "VERIFY_BYTES", 100)
        assert np.array_equal(bytes_of_tokens(shards), plain)
    whole = bytes_of_tokens(shards)
    monkeypatch.setattr(text_bytes, "CHUNK", 7)
    assert np.array_equal(bytes_of_tokens(shards), whole)
    index = json.loads((out / "index.json").read_text())
    del index["splits"]["val"]["bytes"]
    (out / "index.json").write_text(json.dumps(index))
    assert np.array_equal(bytes_of_tokens(TokenShards(out, "val")), plain)
