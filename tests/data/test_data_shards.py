import hashlib
import json
import shutil

import numpy as np
import pytest

from data import DataError, shard_files, shards
from data.shards import TokenShards, read_index
from data.tokenizer import byte_tokenizer, train_bpe
from data.verify import main, verify


@pytest.fixture
def folder(prepared, tmp_path):
    """A copy that may be damaged."""
    return shutil.copytree(prepared, tmp_path / "copy")


def flip(path, offset) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def edit_index(folder, **values) -> None:
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, **values}))


def test_read_across_shards(prepared, train):
    index = read_index(prepared)
    names = [shard["name"] for shard in index["splits"]["train"]["shards"]]
    tokens = np.concatenate([np.fromfile(prepared / name, "<u2") for name in names])
    assert len(names) > 4
    assert train.n_tokens == len(tokens)
    for start, stop in (
        (0, 10),
        (4990, 5010),
        (5000, 10_000),
        (3, len(tokens)),
        (4999, 15_001),
        (7, 7),
        (len(tokens), len(tokens)),
    ):
        found = train.read(start, stop)
        assert found.dtype == np.uint16
        assert np.array_equal(found, tokens[start:stop])
    for position in (0, 4999, 5000, len(tokens) - 1):
        path, offset = train.locate(position)
        assert path.parent == prepared and np.fromfile(path, "<u2")[offset] == tokens[position]
    for start, stop in ((-1, 3), (3, 2), (0, len(tokens) + 1)):
        with pytest.raises(IndexError, match=f"tokens \\[{start}, {stop}\\) of a split of {len(tokens)}"):
            train.read(start, stop)


def test_facts(prepared, train):
    assert (train.vocab_size, train.eot_id) == (257, 256)
    assert train.tokenizer_hash == read_index(prepared)["tokenizer_sha256"]
    assert len(train.fingerprint) == 64
    assert TokenShards(prepared, "val").fingerprint == train.fingerprint


def test_fingerprint_follows_the_tokens_not_the_place(folder, train):
    assert TokenShards(folder, "train").fingerprint == train.fingerprint
    edit_index(folder, arguments={"source": "elsewhere"}, inventory={})
    assert TokenShards(folder, "train").fingerprint == train.fingerprint
    index = read_index(folder)
    index["splits"]["val"]["shards"][0]["sha256"] = "0" * 64
    edit_index(folder, **index)
    assert TokenShards(folder, "train").fingerprint != train.fingerprint


def test_missing_folder_and_index(tmp_path, folder):
    with pytest.raises(DataError, match=r"none: no such folder; prepare it first: python -m data.prepare SOURCE .*none$"):
        TokenShards(tmp_path / "none", "train")
    with pytest.raises(DataError, match=rf"index.json: a file, not a prepared folder; name the folder: {folder}$"):
        TokenShards(folder / "index.json", "train")
    with pytest.raises(DataError, match=r"tokenizer.json: a file, not a prepared folder; name the folder$"):
        TokenShards(folder / "tokenizer.json", "train")
    with pytest.raises(DataError, match="no split 'test', but train, val"):
        TokenShards(folder, "test")
    (folder / "index.json").unlink()
    with pytest.raises(DataError, match=r"copy: no index.json; prepare it first: python -m data.prepare SOURCE"):
        TokenShards(folder, "train")


def test_unknown_index(folder):
    edit_index(folder, version=2)
    with pytest.raises(DataError, match=r"index.json: format token-shards version 2; this code reads token-shards version 1"):
        TokenShards(folder, "train")
    for text in ("{", "[]", "{}"):
        (folder / "index.json").write_text(text)
        with pytest.raises(DataError, match=r"index.json: not an index of token shards"):
            TokenShards(folder, "train")


@pytest.mark.parametrize("wrong", [{"vocab_size": -1}, {"vocab_size": 0}, {"end_of_text_id": 999}, {"end_of_text_id": -1}])
def test_numbers_out_of_range(folder, wrong):
    """`data.verify` says so, too, before training does."""
    edit_index(folder, **wrong)
    with pytest.raises(
        DataError, match=r"index.json: damaged, it(s end of text is not in its vocabulary| is not what data.prepare writes)"
    ):
        verify(folder)


@pytest.mark.parametrize("text", ["{", "[" * 200_000])
def test_a_damaged_tokenizer_is_one_line(text, folder):
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(DataError, match=r"tokenizer.json: damaged, not JSON$"):
        verify(folder)


@pytest.mark.parametrize(
    "wrong", [{"arguments": None}, {"arguments": 5}, {"notes": None}, {"documents": "many"}, {"documents": None}]
)
def test_an_index_of_other_types_is_damaged(folder, wrong):
    index = read_index(folder)
    if "documents" in wrong:
        index["splits"]["train"] |= wrong
        wrong = {"splits": index["splits"]}
    edit_index(folder, **wrong)
    with pytest.raises(DataError, match=r"index.json: damaged, it is not what data.prepare writes"):
        verify(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", '"x"', "\udcff", '{"eos_token": "\\ud800"}'])
def test_verify_reads_what_the_tokenizer_declares(text, folder):
    path = folder / "tokenizer_config.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=r"tokenizer_config.json: damaged, not a JSON object"):
        verify(folder)
    path.write_text('{"eos_token": "a"}')
    with pytest.raises(DataError, match=r"tokenizer_config.json: its eos_token 'a' is not the end of text of these shards"):
        verify(folder)
    for harmless in ("{}", '{"eos_token": {}}', '{"eos_token": null}'):
        path.write_text(harmless)
        verify(folder)


def test_empty_split(folder):
    index = read_index(folder)
    index["splits"]["val"] = {"tokens": 0, "documents": 0, "shards": []}
    edit_index(folder, **index)
    with pytest.raises(DataError, match="the split 'val' is empty; prepare it with --val-source or --val-fraction above 0"):
        TokenShards(folder, "val")


@pytest.mark.parametrize("name", ["train_00001.bin", "train_00001.docs.bin"])
def test_missing_short_and_flipped(folder, name):
    path = folder / name
    whole = path.read_bytes()
    path.unlink()
    with pytest.raises(DataError, match=f"{name}: missing; restore it, or prepare the corpus into a new folder"):
        TokenShards(folder, "train")
    path.write_bytes(whole[:-2])
    with pytest.raises(DataError, match=f"{name}: damaged, {len(whole) - 2:,} bytes instead of {len(whole):,}"):
        TokenShards(folder, "train")
    path.write_bytes(whole)
    flip(path, len(whole) // 2)
    with pytest.raises(DataError, match=f"{name}: damaged, its sha256 is .* instead of "):
        TokenShards(folder, "train")
    TokenShards(folder, "val")


def test_large_splits_are_hashed_by_verify_only(folder, monkeypatch, capsys):
    flip(folder / "train_00002.bin", 99)
    monkeypatch.setattr(shards, "VERIFY_BYTES", 1000)
    TokenShards(folder, "train")
    assert main([str(folder)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"data.verify: {folder / 'train_00002.bin'}: damaged, its sha256 is ")
    assert captured.err.count("\n") == 1
    assert "ok  train_00001.bin  10,000 bytes" in captured.out


def test_verify_covers_every_file(folder):
    lines = []
    verify(folder, lines.append)
    unhashed = {"index.json", "tokenizer_config.json"}
    assert sorted(line.split()[1] for line in lines) == sorted({path.name for path in folder.iterdir()} - unhashed)


def test_another_tokenizer(folder, texts):
    train_bpe(texts, 300).save(str(folder / "tokenizer.json"))
    with pytest.raises(DataError, match=r"tokenizer.json: not the tokenizer of these shards \(sha256 "):
        TokenShards(folder, "train")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer.json: damaged, not JSON"):
        TokenShards(folder, "train")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer.json: missing"):
        TokenShards(folder, "train")
    byte_tokenizer().save(str(folder / "tokenizer.json"), pretty=False)
    TokenShards(folder, "train")


def first_shard(folder):
    return folder / read_index(folder)["splits"]["train"]["shards"][0]["name"]


@pytest.mark.parametrize("verify_bytes", [10**9, 0])  # hashed when it was opened, and not
def test_a_shard_that_changes_while_it_is_read_is_named(folder, monkeypatch, verify_bytes):
    monkeypatch.setattr(shards, "VERIFY_BYTES", verify_bytes)
    tokens = TokenShards(folder, "train")
    tokens.read(0, 10)
    flip(first_shard(folder), 9000)
    with pytest.raises(DataError, match=r"train_00000\.bin: changed while it was in use: its tokens are others; restore it"):
        tokens.read(0, 10)  # other tokens of the file, even where those that were asked for are as before
    tokens.read(5000, 5010)  # of the next file


def test_a_shard_that_is_cut_short_while_it_is_read_is_named(folder):
    """No SIGBUS, as a mapping into memory has behind the end of the file."""
    tokens = TokenShards(folder, "train")
    path = first_shard(folder)
    with open(path, "r+b") as file:
        file.truncate(100)
    for start in (4000, 0):
        with pytest.raises(DataError, match=r"it has 100 bytes instead of 10,000"):
            tokens.read(start, start + 10)


def test_a_shard_that_is_gone_or_replaced(folder, monkeypatch):
    """What is open stays as it was; what is opened anew is compared."""
    monkeypatch.setattr(shard_files, "OPEN", 1)
    tokens = TokenShards(folder, "train")
    before, path = tokens.read(0, 10), first_shard(folder)
    other = path.with_name("other")
    other.write_bytes(bytes(10_000))
    other.replace(path)
    assert np.array_equal(tokens.read(0, 10), before)
    tokens.read(5000, 5010)
    with pytest.raises(DataError, match="its tokens are others"):
        tokens.read(0, 10)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read any more"):
        tokens.read(0, 10)


def test_a_new_time_alone_is_no_change(folder):
    """A backup that is put back, or `touch`, leaves the same tokens."""
    tokens = TokenShards(folder, "train")
    before = tokens.read(0, 10)
    first_shard(folder).touch()
    assert np.array_equal(tokens.read(0, 10), before)


@pytest.mark.parametrize("name", ["../train_00000.bin", "/dev/zero", "sub/x.bin"])
def test_an_index_names_files_of_its_folder_alone(folder, name):
    index = read_index(folder)
    index["splits"]["train"]["shards"][0]["name"] = name
    edit_index(folder, **index)
    with pytest.raises(DataError, match=r"index\.json: damaged, a shard is named"):
        TokenShards(folder, "val")


def test_an_index_that_lacks_something_is_named(folder):
    index = read_index(folder)
    shard = index["splits"]["train"]["shards"][0]
    no_hash = {"tokens": shard["tokens"], "shards": [shard | {"sha256": None}]}
    for entry in (
        *({"splits": splits} for splits in ({"train": {}}, {"train": {"shards": [{"name": "x"}]}}, [], {"train": no_hash})),
        {"tokenizer_sha256": None},
        {"vocab_size": True},
    ):
        edit_index(folder, **index | entry)
        with pytest.raises(DataError, match=r"index\.json: damaged"):
            read_index(folder)


def test_an_index_that_counts_on_more_than_a_file_has_is_named(tmp_path):
    path = tmp_path / "train_00000.bin"
    path.write_bytes(bytes(10))
    files = shard_files.ShardFiles([shard_files.ShardFile(path, 10, hashlib.sha256(bytes(10)).hexdigest())])
    assert files.read(0, 4, 6) == bytes(6)
    with pytest.raises(DataError, match=r"has 10 bytes, but its index counts on 12: prepare the data again"):
        files.read(0, 4, 8)
