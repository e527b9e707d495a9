import hashlib
import json
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from data import DataError
from data.preparation.encode import Encoder
from data.special_tokens import end_of_text
from data.tokenizer import byte_tokenizer, encode_alike, load_tokenizer, token_id, tokenizer_hash, train_bpe, vocabulary_size

TEXT = "Crème brûlée, 漢字 🙂\r\n\ttabs \x00\x7f and <|endoftext|> as text  \n"


@pytest.fixture(scope="module")
def bpe(texts):
    return train_bpe(texts, 400)


def end_id(tok: Tokenizer) -> int:
    return token_id(tok, end_of_text(tok))


def test_byte_ids_are_byte_values():
    tok = byte_tokenizer()
    ids = Encoder(tok, end_id(tok))([TEXT])[0].tolist()
    assert ids == list(TEXT.encode())
    assert vocabulary_size(tok) == 257
    assert end_id(tok) == 256
    assert [tok.token_to_id(tok.id_to_token(byte)) for byte in range(257)] == list(range(257))


def test_byte_shortcut_equals_the_tokenizer():
    tok = byte_tokenizer()
    tok.encode_special_tokens = True
    texts = [TEXT, "a", "".join(map(chr, range(0x300)))]
    assert [tok.encode(text).ids for text in texts] == [ids.tolist() for ids in Encoder(tok, end_id(tok))(texts)]


def test_text_survives_bpe(bpe, texts):
    for text, ids in zip([TEXT, *texts], Encoder(bpe, end_id(bpe))([TEXT, *texts]), strict=True):
        assert bpe.decode(ids.tolist(), skip_special_tokens=False) == text
        assert end_id(bpe) not in ids.tolist()
    assert len(Encoder(bpe, end_id(bpe))(texts[:1])[0]) < len(texts[0].encode()) / 2


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_transformers_loads_the_file(kind, bpe, tmp_path):
    tok = byte_tokenizer() if kind == "bytes" else bpe
    tok.save(str(tmp_path / "tokenizer.json"))
    fast = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token="<|endoftext|>")
    plain = TEXT.replace("<|endoftext|>", "")
    ids = fast(plain)["input_ids"]
    assert ids == tok.encode(plain).ids
    assert fast.decode(ids) == plain
    assert fast.eos_token_id == end_id(tok)


def test_same_texts_same_tokenizer_in_another_process(texts):
    code = "import sys, json; from data.tokenizer import *; print(tokenizer_hash(train_bpe(json.load(sys.stdin), 400)))"
    run = subprocess.run([sys.executable, "-c", code], input=json.dumps(texts), capture_output=True, text=True, check=True)
    assert run.stdout.strip() == tokenizer_hash(train_bpe(texts, 400))
    assert tokenizer_hash(train_bpe(texts[1:], 400)) != tokenizer_hash(train_bpe(texts, 400))


def test_hash_ignores_layout_and_sees_content(bpe, tmp_path):
    bpe.save(str(tmp_path / "pretty.json"), pretty=True)
    bpe.save(str(tmp_path / "dense.json"), pretty=False)
    digests = {hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in ("pretty.json", "dense.json")}
    assert len(digests) == 2
    assert tokenizer_hash(load_tokenizer(tmp_path / "pretty.json")) == tokenizer_hash(bpe)
    assert tokenizer_hash(load_tokenizer(tmp_path / "dense.json")) == tokenizer_hash(bpe)


def test_texts_are_encoded_alike(bpe):
    ids = bpe.encode(TEXT).ids
    assert encode_alike(bpe, Tokenizer.from_str(bpe.to_str()), ids)
    lower = json.loads(bpe.to_str()) | {"normalizer": {"type": "Lowercase"}}
    assert not encode_alike(bpe, Tokenizer.from_str(json.dumps(lower)), bpe.encode("The").ids)
    # A word-level model without an unknown token refuses the decoded text, which has a space.
    words = Tokenizer(models.WordLevel({"the": 0, "cat": 1}))
    assert encode_alike(words, words, [0, 1]) and not encode_alike(words, bpe, [0, 1])


def test_load_from_file_or_folder_without_truncation(bpe, tmp_path):
    cut = Tokenizer.from_str(bpe.to_str())
    cut.enable_truncation(4)
    cut.enable_padding(length=10)
    cut.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert load_tokenizer(path).encode(TEXT).ids == bpe.encode(TEXT).ids


def test_errors(tmp_path, monkeypatch):
    import huggingface_hub

    def refuse(*_, **__):
        raise ConnectionError("no network today\nsecond line")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(DataError, match=r"'some/name' is not a file.*no network today\); without a network") as caught:
        load_tokenizer("some/name")
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"no tokenizer at .*missing\.json"):
        load_tokenizer(tmp_path / "missing.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json is not a tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match=r"256 is too small.*at least 257"):
        train_bpe(["text"], 256)
    with pytest.raises(DataError, match=r"no end-of-text token: none of <\|endoftext\|>"):
        end_of_text(Tokenizer(models.BPE(vocab={"a": 0}, merges=[])))


def test_vocabulary_with_a_gap_counts_its_largest_id():
    assert vocabulary_size(Tokenizer(models.BPE(vocab={"a": 0, "b": 9}, merges=[]))) == 10


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.model", "vocab.txt"])
def test_a_folder_without_tokenizer_json_names_the_remedy(tmp_path, name):
    (tmp_path / name).write_text("{}")
    remedy = f"transformers writes one: AutoTokenizer.from_pretrained('{tmp_path}').save_pretrained('{tmp_path}-converted')"
    for given, problem in ((tmp_path, f"{tmp_path} holds {name}, but no"), (tmp_path / name, f"{tmp_path / name} is not a")):
        with pytest.raises(DataError) as error:
            load_tokenizer(given)
        assert str(error.value) == f"{problem} tokenizer.json; {remedy}, the folder to name then"
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    load_tokenizer(tmp_path)
