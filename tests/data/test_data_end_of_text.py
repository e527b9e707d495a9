"""Every kind of tokenizer: which token ends a document, and that no text gives it."""

import json

import numpy as np
import pytest
from tokenizer_zoo import ZOO, corpus, llama
from tokenizers import AddedToken, Tokenizer, models

from data import DataError
from data.preparation.encode import Encoder
from data.prepare import prepare
from data.shards import TokenShards
from data.special_tokens import as_trained, end_of_text
from data.tokenizer import byte_tokenizer, load_tokenizer, token_id, train_bpe
from data.vocabularies import character_tokenizer

ENDS = ["</s>", "<|endoftext|>", "<eos>", "<|im_end|>", "[SEP]", "<|END|>", "<|eot_id|>", "<pad>", "<s>", "a</s>b"]


def write(folder, name):
    """The tokenizer's folder, as published."""
    tok, config, _ = ZOO[name]
    folder.mkdir(exist_ok=True)
    tok.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", ZOO)
def test_a_document_is_its_tokens_and_the_end_of_text(tmp_path, write_jsonl, quiet, name):
    tok, _, end = ZOO[name]
    texts = [*corpus(20), *ENDS, "end </s> of <|endoftext|> text <eos> [SEP] <|im_end|>"]
    source = write_jsonl(tmp_path / "c.jsonl", texts)
    out = prepare(source, tmp_path / "out", tokenizer=write(tmp_path / "tok", name), val_fraction=0, workers=1, log=quiet)
    shards = TokenShards(out, "train")
    tokens = shards.read(0, shards.n_tokens)
    assert shards.eot_id == tok.token_to_id(end)
    ends = np.flatnonzero(tokens == shards.eot_id)
    assert len(ends) == len(texts)  # none of them out of a text
    for text, part in zip(texts[:20], np.split(tokens, ends + 1), strict=False):
        assert part[:-1].tolist() == tok.encode(text, add_special_tokens=False).ids
    kept = load_tokenizer(out)
    assert kept.encode(texts[0]).ids == tok.encode(texts[0], add_special_tokens=False).ids
    special = {id for id, token in kept.get_added_tokens_decoder().items() if token.special}
    unknown = {kept.token_to_id(unk) for unk in ("<unk>", "[UNK]")}
    assert not set(tokens.tolist()) & (special - unknown) - {shards.eot_id}
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert config["eos_token"] == config["bos_token"] == end
    # The prepared folder is a tokenizer with the same end of text.
    again = prepare(source, tmp_path / "again", tokenizer=out, val_fraction=0, workers=1, log=quiet)
    assert TokenShards(again, "train").fingerprint == shards.fingerprint


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name != "llama" else ()) for name in ZOO])
def test_a_long_document_has_the_tokens_of_encoding_at_once(tmp_path, write_jsonl, quiet, name):
    """More than 2**20 characters; a dummy prefix must come once, and no word is cut."""
    text = " ".join(corpus(20_000))[: 2**20 + 50_000]
    assert len(text) > 2**20
    source = write_jsonl(tmp_path / "c.jsonl", [text, "b"])
    out = prepare(source, tmp_path / "out", tokenizer=write(tmp_path / "tok", name), val_fraction=0, workers=1, log=quiet)
    shards = TokenShards(out, "train")
    expected = ZOO[name][0].encode(text, add_special_tokens=False).ids
    assert shards.read(0, len(expected) + 1).tolist() == [*expected, shards.eot_id]


def test_an_end_token_that_is_asked_for(tmp_path, write_jsonl, quiet):
    source = write_jsonl(tmp_path / "c.jsonl", corpus())
    options = {"tokenizer": write(tmp_path / "tok", "qwen"), "workers": 1, "log": quiet}
    for number, end in enumerate(("<|im_start|>", "<|im_end|>", "Ġthe")):
        out = prepare(source, tmp_path / str(number), end_token=end, **options)
        assert TokenShards(out, "train").eot_id == ZOO["qwen"][0].token_to_id(end)
        assert json.loads((out / "tokenizer_config.json").read_text())["eos_token"] == end
        prepare(source, out, end_token=end, **options)
        with pytest.raises(DataError, match="already prepared with other arguments: --end-token was"):
            prepare(source, out, **options)
    with pytest.raises(DataError, match=r"--end-token is '<e>', which the tokenizer does not have; its special tokens: <\|endof"):
        prepare(source, tmp_path / "out", end_token="<e>", **options)
    with pytest.raises(DataError, match=r"--end-token is '</s>', which the tokenizer does not have"):
        prepare(source, tmp_path / "out", **{**options, "tokenizer": "bytes", "end_token": "</s>"})
    out = prepare(source, tmp_path / "bpe", **{**options, "tokenizer": "bpe", "vocab_size": 300, "end_token": "</s>"})
    assert TokenShards(out, "train").eot_id == load_tokenizer(out).token_to_id("</s>") == 0


@pytest.mark.parametrize("end", ["§", "#", "a", "Ġ"])
@pytest.mark.parametrize("kind", ["bpe", "byte-level"])
def test_an_end_token_that_texts_are_made_of_is_refused(tmp_path, write_jsonl, quiet, kind, end):
    """Byte-level tokens stand for bytes: § for one that ç has, too. As the end of text they would vanish from texts."""
    source = write_jsonl(tmp_path / "c.jsonl", [f"# Title {i}, a façade §" for i in range(50)])
    options = {"tokenizer": "bpe", "vocab_size": 300, "workers": 1, "log": quiet}
    if kind != "bpe":
        train_bpe(["# Title, a façade §"] * 3, 300).save(str(tmp_path / "tokenizer.json"))
        options = {"tokenizer": str(tmp_path / "tokenizer.json"), "workers": 1, "log": quiet}
    with pytest.raises(DataError, match=r"which (texts are made of|stands for a byte).*would lose it"):
        prepare(source, tmp_path / "out", end_token=end, **options)
    out = prepare(source, tmp_path / "good", end_token="☃" if kind == "bpe" else None, **options)
    shards = TokenShards(out, "train")
    ids = shards.read(0, shards.n_tokens).tolist()
    assert "0, a façade §# Title" in load_tokenizer(out).decode([i for i in ids if i != shards.eot_id])


def test_no_end_token(tmp_path, write_jsonl, quiet):
    tok = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "<x>": 2}, unk_token="[UNK]"))
    tok.add_special_tokens(["<x>"])
    with pytest.raises(
        DataError, match=r"no end-of-text token: none of .*name one of its tokens with --end-token \(its special tokens: <x>\)"
    ):
        end_of_text(tok)
    with pytest.raises(DataError, match=r"eos_token in tokenizer_config.json is '</s>', which the tokenizer does not have"):
        end_of_text(tok, {"eos_token": "</s>"})
    (tmp_path / "tokenizer.json").write_text(byte_tokenizer().to_str())
    for text in ("{", "[]", "[" * 10**5):
        (tmp_path / "tokenizer_config.json").write_text(text)
        with pytest.raises(DataError, match=r"tokenizer_config.json: damaged, not a JSON object"):
            prepare(write_jsonl(tmp_path / "c.jsonl", ["a"]), tmp_path / "out", tokenizer=tmp_path, workers=1, log=quiet)


def test_special_goes_before_added_and_added_before_plain():
    tok = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "a": 1}, unk_token="a"))
    assert end_of_text(tok) == "<|endoftext|>"
    tok.add_tokens(["<eos>"])
    assert end_of_text(tok) == "<eos>"
    assert not tok.get_added_tokens_decoder()[2].special
    tok.add_special_tokens([AddedToken("[SEP]", special=True)])
    assert end_of_text(tok) == "[SEP]"
    plain = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "a": 1}, unk_token="a"))
    trained = as_trained(plain, "<|endoftext|>")
    assert trained.get_added_tokens_decoder()[0].special and token_id(trained, end_of_text(trained)) == 0
    assert Encoder(trained, 0)(["<|endoftext|>"])[0].tolist() == [1]


def test_unknown_characters_are_counted(tmp_path, write_jsonl):
    lines: list[str] = []
    source = write_jsonl(tmp_path / "c.jsonl", ["the cat 漢", "漢 漢 sat"])
    prepare(source, tmp_path / "o", tokenizer=write(tmp_path / "tok", "bert"), val_fraction=0, workers=1, log=lines.append)
    assert "3 of 8 tokens stand for characters that the tokenizer does not know" in lines


BPE_ALONE = {"a": 0, "b": 1, "c": 2, "ab": 3, "</s>": 4}


@pytest.mark.parametrize(
    ("tok", "left_out"),
    [
        (Tokenizer(models.BPE(vocab=BPE_ALONE, merges=[("a", "b")])), 4),  # d, é, 漢, 漢; white space does not count
        (Tokenizer(models.BPE(vocab={"</s>": 0}, merges=[])), 9),
        (train_bpe(["abc"] * 3, 300, "</s>"), 0),  # every byte
        (Tokenizer(models.BPE(vocab={**BPE_ALONE, "?": 5}, merges=[], unk_token="?")), 0),
    ],
)
def test_characters_that_a_tokenizer_leaves_out_are_counted(tmp_path, write_jsonl, tok, left_out):
    lines: list[str] = []
    tok.add_special_tokens([AddedToken("</s>", special=True)])
    tok.save(str(tmp_path / "tokenizer.json"))
    source = write_jsonl(tmp_path / "c.jsonl", ["ab dé", "abc漢漢"])
    prepare(source, tmp_path / "o", tokenizer=str(tmp_path / "tokenizer.json"), val_fraction=0, workers=1, log=lines.append)
    note = f"left out: {left_out} characters that the tokenizer does not know, since it has no token for the unknown"
    assert (note in lines) == bool(left_out) and any("left out" in line for line in lines) == bool(left_out)


def unigram(unknown: int) -> Tokenizer:
    return Tokenizer(models.Unigram([("</s>", 0.0), ("?", 0.0), ("a", -1.0), ("b", -1.0), ("c", -1.0), (" ", -1.0)], unknown))


BPE_UNKNOWN = {**BPE_ALONE, "<": 5, "/": 6, "s": 7, ">": 8, "</": 9, "</s": 10}
MERGES = [("a", "b"), ("<", "/"), ("</", "s"), ("</s", ">")]


@pytest.mark.parametrize(
    ("tok", "documents"),
    [
        (character_tokenizer({char: i for i, char in enumerate("abcdefghijklmnopqrstuvwxyz ")}), ["ab d", "abc", "a s b"]),
        (Tokenizer(models.BPE(vocab=BPE_UNKNOWN, merges=MERGES, unk_token="</s>")), ["ab", "abc", "a</s>b"]),
        (unigram(0), ["ab ", "abc", "a  b"]),
        (Tokenizer(models.WordPiece({"ab": 0, "##c": 1, "</s>": 2, "a": 3}, unk_token="</s>")), ["", "", ""]),
    ],
)
def test_unknown_characters_never_become_the_end_of_text(tmp_path, write_jsonl, tok, documents):
    """Where the unknown token is the end of text, they are left out and counted; the name of the token is plain text."""
    lines: list[str] = []
    end = end_of_text(tok)
    tok.add_special_tokens([AddedToken(end, special=True, normalized=False)])
    tok.save(str(tmp_path / "tokenizer.json"))
    texts = ["ab dé", "abc漢漢", "a </s> b"]
    source = write_jsonl(tmp_path / "c.jsonl", texts)
    prepare(source, tmp_path / "o", tokenizer=str(tmp_path / "tokenizer.json"), val_fraction=0, workers=1, log=lines.append)
    shards = TokenShards(tmp_path / "o", "train")
    tokens = shards.read(0, shards.n_tokens)
    ends = np.flatnonzero(tokens == shards.eot_id)
    assert len(ends) == len(texts)
    found = [[tok.id_to_token(i).removeprefix("##") for i in part if i != shards.eot_id] for part in np.split(tokens, ends + 1)]
    assert ["".join(pieces) for pieces in found[:-1]] == documents
    left_out = sum(len(text.replace(" ", "")) - len(kept.replace(" ", "")) for text, kept in zip(texts, documents, strict=True))
    note = f"left out: {left_out} characters that the tokenizer does not know, since its token for the unknown is the end of text"
    assert note in lines


def test_the_name_of_the_unknown_token_is_plain_text():
    """Merges lead to it."""
    tok = Tokenizer(models.BPE(vocab={**BPE_UNKNOWN, "?": 11}, merges=MERGES, unk_token="</s>"))
    tok.add_special_tokens(["</s>", "?"])
    assert Encoder(tok, 11)(["a</s>漢"])[0].tolist() == [0, 10, 8, 4]


def test_a_tokenizer_that_refuses_a_text_is_one_line(tmp_path, write_jsonl, quiet):
    """A word-level model without an unknown token."""
    tok = Tokenizer(models.WordLevel({"the": 0, "</s>": 1}))
    tok.save(str(tmp_path / "tokenizer.json"))
    source = write_jsonl(tmp_path / "c.jsonl", ["the", "cat"])
    with pytest.raises(DataError, match="cannot encode a text, and has no token for what it does not know: WordLevel error"):
        prepare(source, tmp_path / "o", tokenizer=str(tmp_path / "tokenizer.json"), val_fraction=0, workers=1, log=quiet)


def test_padding_is_a_token_that_training_does_not_need(tmp_path, write_jsonl, quiet):
    expected = {"gemma": "<pad>", "bert": "[PAD]", "qwen": "<|endoftext|>", "llama": "<unk>", "bytes": "<|endoftext|>"}
    for name, pad in expected.items():
        out = tmp_path / f"{name} out"
        source = write_jsonl(tmp_path / "c.jsonl", corpus())
        prepare(source, out, tokenizer=write(tmp_path / name, name), workers=1, log=quiet)
        assert json.loads((out / "tokenizer_config.json").read_text())["pad_token"] == pad


def test_the_caller_s_tokenizer_stays_as_it_is():
    tok = llama()
    before = tok.to_str()
    Encoder(as_trained(tok, "</s>"), 2)(["a"])
    assert tok.to_str() == before


def test_merges_that_are_dropped_at_random_are_not(tmp_path, write_jsonl, quiet):
    tok = Tokenizer.from_str(ZOO["gpt2"][0].to_str())
    tok.model.dropout = 0.5
    tok.save(str(tmp_path / "tokenizer.json"))
    source = write_jsonl(tmp_path / "c.jsonl", corpus())
    for name, tokenizer in (("dropout", tmp_path), ("none", write(tmp_path / "tok", "gpt2"))):
        prepare(source, tmp_path / name, tokenizer=tokenizer, workers=1, log=quiet)
    one, two = (TokenShards(tmp_path / name, "train").fingerprint for name in ("dropout", "none"))
    assert one == two
