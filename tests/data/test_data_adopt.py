"""Token files of other projects in place, and saved data sets copied."""

import json
import os
import stat

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from data import DataError, shards, token_files
from data.adopt import adopt, main
from data.batches import Batches
from data.prepare import prepare
from data.shards import TokenShards, read_index
from data.text_bytes import token_bytes
from data.tokenizer import byte_tokenizer, load_tokenizer
from data.verify import verify

END = 256


def tokens_of(n: int, seed: int = 0) -> np.ndarray:
    """Byte tokens with an end of text in front of each document, as llm.c has it."""
    tokens = np.random.default_rng(seed).integers(0, 256, n)
    tokens[::50] = END
    return tokens


def write(path, tokens, magic=20240520, version=1, dtype="<u2", count=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype).tobytes())
    return path


@pytest.fixture
def tokenizer(tmp_path):
    path = tmp_path / "tokenizer" / "tokenizer.json"
    path.parent.mkdir()
    byte_tokenizer().save(str(path))
    return str(path)


@pytest.fixture
def fineweb(tmp_path):
    """A folder as modded-nanogpt has it, read-only."""
    folder = tmp_path / "fineweb10B"
    folder.mkdir()
    for i in (1, 2, 3):
        write(folder / f"fineweb_train_{i:06d}.bin", tokens_of(4000 + i, i))
    write(folder / "fineweb_val_000000.bin", tokens_of(3000))
    for path in folder.iterdir():
        path.chmod(0o444)
    folder.chmod(0o555)
    yield folder
    folder.chmod(0o755)


def adopted(source, out, quiet=lambda line: None, **options):
    return adopt(str(source), out, **options, log=quiet)


def test_files_with_a_header_stay_where_they_are(fineweb, tokenizer, tmp_path, capsys):
    before = {path: path.stat() for path in fineweb.iterdir()}
    assert main([str(fineweb), str(tmp_path / "out"), "--tokenizer", tokenizer]) == 0
    out = capsys.readouterr().out
    assert "end of text: '<|endoftext|>', id 256" in out and "ok  fineweb_train_000002.bin  4,002 tokens" in out
    assert "train 12,006 tokens in 243 documents, val 3,000 tokens in 60 documents; vocabulary 257, fingerprint " in out
    assert {path: path.stat() for path in fineweb.iterdir()} == {**before, **{p: os.stat(p) for p in before}}
    assert sum(path.stat().st_size for path in (tmp_path / "out").iterdir()) < 30_000  # no tokens
    train, val = (TokenShards(tmp_path / "out", split) for split in ("train", "val"))
    expected = np.concatenate([tokens_of(4000 + i, i) for i in (1, 2, 3)])
    for start, stop in ((0, 5), (3990, 4010), (0, len(expected)), (8002, 8004)):
        assert np.array_equal(train.read(start, stop), expected[start:stop])
    assert np.array_equal(val.read(0, 3000), tokens_of(3000)) and val.fingerprint == train.fingerprint
    assert train.locate(4001) == (fineweb / "fineweb_train_000002.bin", 0)
    inputs, targets = Batches(train, 64, 4, seed=1).micro_batches(7, 0, 1, 4)[0]
    i = int(Batches(train, 64, 4, seed=1).sequences(7)[2])
    assert inputs[2].tolist() == expected[64 * i : 64 * i + 64].tolist() and targets[2, 0] == expected[64 * i + 1]
    lines = []
    verify(tmp_path / "out", lines.append)
    assert [line.split()[1] for line in lines[1:]] == [f"fineweb_train_{i:06d}.bin" for i in (1, 2, 3)] + [
        "fineweb_val_000000.bin"
    ]


def test_the_fingerprint_is_that_of_the_files(fineweb, tokenizer, tmp_path):
    """Not of where they lie; and a folder can be pointed at files that moved."""
    first = TokenShards(adopted(fineweb, tmp_path / "a", tokenizer=tokenizer), "train").fingerprint
    moved = tmp_path / "deeper" / "moved"
    moved.parent.mkdir()
    fineweb.chmod(0o755)
    fineweb.rename(moved)
    with pytest.raises(DataError, match=r"fineweb10B/fineweb_train_000001.bin: missing"):
        TokenShards(tmp_path / "a", "train")
    assert TokenShards(adopted(f"{moved}/fineweb_*.bin", tmp_path / "a", tokenizer=tokenizer), "train").fingerprint == first
    inside = TokenShards(adopted(moved, moved, tokenizer=tokenizer), "train")
    assert inside.fingerprint == first and read_index(moved)["files"] == "."
    moved.rename(fineweb)
    assert TokenShards(fineweb, "val").fingerprint == first
    again = adopted(f"{fineweb}/", fineweb, tokenizer=tokenizer, val=str(fineweb / "*val*"))  # in its own place
    assert TokenShards(again, "val").fingerprint == first
    with pytest.raises(DataError, match=r"fineweb10B is a prepared folder: use it as data.dir"):
        adopted(fineweb, tmp_path / "b", tokenizer=tokenizer)
    (fineweb / "index.json").unlink()
    (fineweb / "fineweb_train_000003.bin").unlink()
    with pytest.raises(DataError, match=r"a holds another data set: choose another folder, or remove it"):
        adopted(fineweb, tmp_path / "a", tokenizer=tokenizer)


def test_a_folder_of_data_prepare_is_not_adopted_into_itself(tmp_path, tokenizer):
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n' * 20)
    out = prepare(str(tmp_path / "text.jsonl"), tmp_path / "out", tokenizer="bytes", workers=1, log=lambda line: None)
    with pytest.raises(DataError, match=r"out is a prepared folder: use it as data.dir$"):
        adopted(out, out, tokenizer=tokenizer)


def test_validation_that_is_the_training_data_is_said(tmp_path, tokenizer):
    for split in ("train", "val"):
        write(tmp_path / f"{split}.bin", tokens_of(300))
    note = "validation holds the tokens of training: val.bin is train.bin; its loss says nothing about new text"
    lines: list[str] = []
    out = adopted(tmp_path, tmp_path / "a", lines.append, tokenizer=tokenizer)
    assert note in lines and note in read_index(out)["notes"]
    write(tmp_path / "val.bin", tokens_of(300, 1))
    assert note not in read_index(adopted(tmp_path, tmp_path / "b", tokenizer=tokenizer))["notes"]
    folder = save(tmp_path / "saved", {"train": [[1, 2], [3], [4]]})
    out = adopted(folder, tmp_path / "c", lines.append, tokenizer=tokenizer, val=str(folder))
    assert read_index(out)["notes"][-1] == lines[-2] == note.replace(".bin", "_00000.bin")


@pytest.mark.parametrize("version", [1, 7])
def test_uint32(tmp_path, version):
    for split, n in (("train", 900), ("val", 300)):
        tokens = np.random.default_rng(n).integers(0, 400, n)
        write(tmp_path / f"shakespeare_{split}.bin", tokens, 20240801, version, "<u4")
    out = adopted(tmp_path, tmp_path / "out", vocab_size=500, end_token="399")
    found = TokenShards(out, "train")
    assert found.dtype == np.uint32 and (found.vocab_size, found.eot_id) == (500, 399)
    assert found.read(0, 900).tolist() == np.random.default_rng(900).integers(0, 400, 900).tolist()


@pytest.fixture
def nano(tmp_path):
    """A folder as nanoGPT's shakespeare_char has it; opening its pickle would be noticed."""
    folder = tmp_path / "char"
    folder.mkdir()
    text = "To be, or not to be:\nthat is the question — 漢\n" * 40
    characters = sorted(set(text))
    ids = np.array([characters.index(c) for c in text], "<u2")
    ids[:1500].tofile(folder / "train.bin")
    ids[1500:].tofile(folder / "val.bin")
    (folder / "meta.pkl").write_bytes(b"cos\nsystem\n(S'touch %s'\ntR." % str(tmp_path / "opened").encode())
    return folder, text, characters


@pytest.mark.parametrize("form", ["stoi", "itos", "list", "mapping"])
def test_files_without_a_header_and_a_vocabulary_of_characters(nano, tmp_path, form):
    folder, text, characters = nano
    stoi, itos = {c: i for i, c in enumerate(characters)}, dict(enumerate(characters))
    forms = {"stoi": {"vocab_size": 9, "stoi": stoi, "itos": itos}, "itos": {"itos": itos}, "list": characters, "mapping": stoi}
    (tmp_path / "v.json").write_text(json.dumps(forms[form]))
    lines: list[str] = []
    out = adopted(folder, tmp_path / "out", lines.append, tokenizer=str(tmp_path / "v.json"))
    train, tok = TokenShards(out, "train"), load_tokenizer(out)
    assert tok.decode(train.read(0, 1500).tolist()) == text[:1500]
    assert tok.encode(text).ids[:1500] == train.read(0, 1500).tolist()
    assert train.vocab_size == len(characters) + 1 and train.eot_id == len(characters)
    lengths = token_bytes(tok, train.vocab_size, train.eot_id)
    assert lengths.tolist() == [len(c.encode()) for c in characters] + [0]
    assert any("is not in the files: nothing tells their documents apart" in line for line in lines)
    assert not (tmp_path / "opened").exists()


def test_a_size_alone(nano, tmp_path):
    folder, _, characters = nano
    out = adopted(folder, tmp_path / "out", vocab_size=len(characters))
    train, tok = TokenShards(out, "train"), load_tokenizer(out)
    assert train.vocab_size == len(characters) + 1
    assert tok.encode("3 1 2").ids == [3, 1, 2] and tok.decode([3, 1, 2]) == "3 1 2"
    assert not token_bytes(tok, train.vocab_size, train.eot_id).any()  # no text: bits per byte are not known


def refused(source, out, **options) -> str:
    with pytest.raises(DataError) as error:
        adopted(source, out, **options)
    assert "\n" not in str(error.value) and not (out / "index.json").exists()
    return str(error.value)


def test_damaged_files_are_named(tmp_path, tokenizer):
    folder, out = tmp_path / "files", tmp_path / "out"
    folder.mkdir()
    write(folder / "a_val_0.bin", tokens_of(100))
    bad = folder / "a_train_1.bin"

    def message(**options) -> str:
        return refused(folder, out, **{"tokenizer": tokenizer, **options}).removeprefix(f"{bad}: ")

    write(bad, tokens_of(100), magic=20240522)
    assert message() == "its header has the magic number 20240522; token files have 20240520 or 20240801"
    write(bad, tokens_of(100), version=3)
    assert message() == "version 3 of the format 20240520 is not supported, expected 1"
    write(bad, tokens_of(100), count=101)
    assert message() == "cut short, its header says 101 uint16 tokens, which are 1,226 bytes, but it has 1,224"
    write(bad, tokens_of(100), count=99)
    assert message().startswith("damaged, its header says 99 uint16 tokens")
    write(bad, [], count=0)
    assert message() == "its header says that it has no tokens"
    bad.write_bytes(b"")
    assert message() == "empty"
    bad.write_bytes(write(tmp_path / "x", tokens_of(1)).read_bytes()[:700])
    assert message() == "cut short within its header, which has 1024 bytes"
    bad.write_bytes(tokens_of(100).astype("<u2").tobytes()[:-1])
    assert message() == "199 bytes are not a whole number of uint16 tokens; the file is cut short or damaged"
    tokens_of(100).astype("<u2").tofile(bad)
    assert refused(folder, out, tokenizer=tokenizer) == (
        f"{folder / 'a_val_0.bin'}: a header and uint16 tokens, but a_train_1.bin has no header and uint16 tokens"
    )
    tokens = tokens_of(100)
    tokens[77] = 300
    write(bad, tokens)
    assert message().startswith("token 300 at position 77 is outside the tokenizer's vocabulary of 257: another tokenizer")
    np.save(bad.open("wb"), tokens_of(100))
    assert message() == "an array of numpy.save, with a header of its own; write the tokens with array.tofile(FILE)"
    bad.unlink()
    bad.symlink_to("nowhere")
    assert message() == "a broken link"


@pytest.mark.parametrize(
    ("written", "size", "needed"), [("<u4", 257, "uint16"), ("<i8", 257, "uint16"), ("<i8", 70_000, "uint32")]
)
def test_tokens_wider_than_the_vocabulary_needs_are_refused(tmp_path, written, size, needed):
    for split in ("train", "val"):
        tokens_of(200).astype(written).tofile(tmp_path / f"{split}.bin")
    assert refused(tmp_path, tmp_path / "out", vocab_size=size).endswith(
        f"train.bin: every second {needed} is 0, so that its tokens have more bytes, as those of int32 or int64; a vocabulary of "
        f"{size:,} needs {needed}: array.astype('{needed}').tofile(FILE)"
    )


def test_the_first_id_outside_is_refused(tmp_path):
    """Though the end of text, which the data lacks, has that id in the folder."""
    characters = tmp_path / "characters.json"
    characters.write_text(json.dumps([chr(97 + i) for i in range(10)]))
    for split in ("train", "val"):
        np.arange(200).__mod__(11).astype("<u2").tofile(tmp_path / f"{split}.bin")
    save(tmp_path / "saved", {split: [[1, 2], [10], [3]] for split in ("train", "val")})
    for options in ({"vocab_size": 10}, {"vocab_size": 10, "end_token": "9"}, {"tokenizer": str(characters)}):
        assert "token 10 at position 10 is outside the tokenizer's vocabulary of 10" in refused(
            tmp_path, tmp_path / "a", **options
        )
        assert "id 10 is outside the tokenizer's vocabulary of 10" in refused(tmp_path / "saved", tmp_path / "b", **options)
    out = adopted(tmp_path, tmp_path / "out", vocab_size=11)
    assert (read_index(out)["vocab_size"], read_index(out)["splits"]["train"]["documents"]) == (12, 0)


def test_empty_names_are_refused(fineweb, tmp_path, tokenizer, monkeypatch):
    """As of an unset variable of a shell."""
    monkeypatch.chdir(fineweb)
    for name, given in (
        ("SOURCE", ("", tmp_path / "out", tokenizer, None)),
        ("FOLDER", (fineweb, "", tokenizer, None)),
        ("--tokenizer", (fineweb, tmp_path / "out", " ", None)),
        ("--val", (fineweb, tmp_path / "out", tokenizer, "")),
    ):
        source, out, named, val = given
        with pytest.raises(DataError, match=f"^{name} is empty$"):
            adopt(str(source), out, tokenizer=named, val=val)
    assert not (tmp_path / "out").exists() and not (fineweb / "index.json").exists()


def test_an_end_of_text_that_the_files_lack_does_not_widen_them(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 2**16, 200).astype("<u2")
    for split in ("train", "val"):
        tokens.tofile(tmp_path / f"{split}.bin")
    train = TokenShards(adopted(tmp_path, tmp_path / "out", vocab_size=2**16), "train")
    assert np.array_equal(train.read(0, 200), tokens) and train.eot_id == 2**16


def test_bad_arguments_are_one_line(fineweb, nano, tokenizer, tmp_path, capsys):
    out = tmp_path / "out"
    assert "which tokenizer wrote the data? Give --tokenizer: a name such as gpt2" in refused(fineweb, out)
    assert "meta.pkl is a pickle, which is never opened" in refused(nano[0], out)
    assert "meta.pkl is a pickle, which is never opened" in refused(nano[0], out, tokenizer=str(nano[0] / "meta.pkl"))
    assert "no file of the split 'train' among 4: fineweb_train_000001.bin, ...; --val names all of them" in refused(
        fineweb, out, tokenizer=tokenizer, val=str(fineweb / "*.bin")
    )
    assert "exclude each other" in refused(fineweb, out, tokenizer=tokenizer, vocab_size=9)
    assert "--vocab-size 1: at least 2" in refused(fineweb, out, vocab_size=1)
    assert "--vocab-size 99999999999: at most 16777216" in refused(fineweb, out, vocab_size=99999999999)
    for name, found in (("characters", {"a": 0, "b": 4 * 10**9}), ("words", None)):
        path = tmp_path / f"{name}.json"
        if found is None:
            Tokenizer(models.WordLevel({"a": 0, "</s>": 4 * 10**9}, unk_token="a")).save(str(path))
        else:
            path.write_text(json.dumps(found))
        assert "the id 4000000000; ids must be below 16777216" in refused(fineweb, out, tokenizer=str(path))
    assert "--end-token '300': with --vocab-size it is the number of a token, below 300" in refused(
        fineweb, out, vocab_size=300, end_token="300"
    )
    assert "no tokenizer at" in refused(fineweb, out, tokenizer=str(tmp_path / "none.json"))
    assert "--end-token is '<eos>', which the tokenizer does not have" in refused(
        fineweb, out, tokenizer=tokenizer, end_token="<eos>"
    )
    assert "no token files (*.bin) in it" in refused(tmp_path, out, vocab_size=9)
    assert "nowhere: no such file" in refused(tmp_path / "nowhere", out, vocab_size=9)
    assert "no file of the split 'val'" in refused(fineweb / "*train*", out, tokenizer=tokenizer)
    assert "no file of the split 'train'" in refused(fineweb / "*val*", out, tokenizer=tokenizer)
    for text, problem in (
        ("{", "not JSON"),
        ('{"ab": 0}', "'ab' is not one character"),
        ("[]", "not a vocabulary"),
        ('{"a": 0, "b": 0}', "occurs twice"),
    ):
        (tmp_path / "v.json").write_text(text)
        assert problem in refused(nano[0], out, tokenizer=str(tmp_path / "v.json"))
    assert main([str(fineweb), str(out)]) == 2 and capsys.readouterr().err.startswith("data.adopt: which tokenizer")


def test_names_without_a_split_need_val(tmp_path, tokenizer):
    for i in (0, 1, 2):
        write(tmp_path / f"fineweb_{i:06d}.bin", tokens_of(100, i))
    assert "fineweb_000000.bin: its name has neither train nor val; say with --val" in refused(
        tmp_path, tmp_path / "out", tokenizer=tokenizer
    )
    out = adopted(tmp_path, tmp_path / "out", tokenizer=tokenizer, val=str(tmp_path / "*_000001.bin"))
    assert TokenShards(out, "train").read(0, 200).tolist() == [*tokens_of(100, 0), *tokens_of(100, 2)]
    assert TokenShards(out, "val").read(0, 100).tolist() == tokens_of(100, 1).tolist()


def test_files_that_changed_since_are_refused(fineweb, tokenizer, tmp_path, monkeypatch):
    out = adopted(fineweb, tmp_path / "out", tokenizer=tokenizer)
    path, hashed = fineweb / "fineweb_train_000002.bin", []
    monkeypatch.setattr(shards, "VERIFY_BYTES", 0)  # as for a large split, of which sizes and times are compared
    monkeypatch.setattr(shards, "check_hash", lambda file, check=shards.check_hash: (hashed.append(file.path), check(file)))
    tokens = TokenShards(out, "train")
    assert not hashed
    path.chmod(stat.S_IRUSR | stat.S_IWUSR)
    content = path.read_bytes()
    path.write_bytes(content)
    TokenShards(out, "train")
    assert hashed == [path]  # written to, and the same
    path.write_bytes(content[:-2] + bytes([content[-2] ^ 1, content[-1]]))
    with pytest.raises(DataError, match=r"fineweb_train_000002.bin: damaged, its sha256 is "):
        TokenShards(out, "train")
    with pytest.raises(DataError, match=r"fineweb_train_000002.bin: changed while it was in use: its tokens are others"):
        tokens.read(5000, 5010)
    path.write_bytes(content[:-2])
    with pytest.raises(DataError, match=r"fineweb_train_000002.bin: damaged, 9,026 bytes instead of 9,028"):
        TokenShards(out, "train")
    (tmp_path / "fineweb10B").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"000001.bin: missing; restore it, or run data.adopt again if it moved"):
        TokenShards(out, "train")
    (tmp_path / "elsewhere").rename(tmp_path / "fineweb10B")


def test_an_index_leads_to_no_file_outside(fineweb, tokenizer, tmp_path):
    out = adopted(fineweb, tmp_path / "out", tokenizer=tokenizer)
    for name in ("../fineweb10B/fineweb_train_000001.bin", str(fineweb / "fineweb_train_000001.bin")):
        index = json.loads((out / "index.json").read_text())
        index["splits"]["train"]["shards"][0]["name"] = name
        (out / "index.json").write_text(json.dumps(index))
        with pytest.raises(DataError, match=r"index.json: damaged, a shard is named"):
            read_index(out)


def test_another_preparation_does_not_overwrite_it(fineweb, tokenizer, tmp_path):
    out = adopted(fineweb, tmp_path / "out", tokenizer=tokenizer)
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match=r"out is already prepared with other arguments: SOURCE was None"):
        prepare(str(tmp_path / "text.jsonl"), out, tokenizer="bytes", log=lambda line: None)
    with pytest.raises(
        DataError, match=r"no file that can be read; left out: 4 .bin .*; files of tokens are for python -m data.adopt"
    ):
        prepare(str(fineweb), tmp_path / "other", tokenizer="bytes", log=lambda line: None)
    with pytest.raises(
        DataError, match=r"fineweb10B: no index.json; to use its tokens: python -m data.adopt .*fineweb10B FOLDER"
    ):
        TokenShards(fineweb, "train")


def test_pieces_of_a_file_are_read_alike(fineweb, tokenizer, tmp_path, monkeypatch):
    whole = read_index(adopted(fineweb, tmp_path / "a", tokenizer=tokenizer))
    monkeypatch.setattr(token_files, "CHUNK", 64)
    assert read_index(adopted(fineweb, tmp_path / "b", tokenizer=tokenizer)) == whole


# Data sets that `datasets` saved.


def save(folder, rows, **more):
    from datasets import Dataset, DatasetDict, disable_progress_bars

    disable_progress_bars()
    parts = {name: Dataset.from_dict({"input_ids": part, **more}) for name, part in rows.items()}
    (DatasetDict(parts) if len(parts) > 1 else parts["train"]).save_to_disk(str(folder))
    return folder


def test_saved_rows_become_documents(tmp_path, tokenizer):
    rows = [[1, 2, 3], [4, END], [END, 7, 8], [], [9]] * 300  # more than are read at a time
    folder = save(tmp_path / "ds", {"train": rows, "validation": [[5, 6]] * 3 + [[7]], "test": [[1]]})
    lines: list[str] = []
    out = adopted(folder, tmp_path / "out", lines.append, tokenizer=tokenizer)
    train, val = (TokenShards(out, split) for split in ("train", "val"))
    assert train.read(0, train.n_tokens).tolist() == [1, 2, 3, END, 4, END, END, 7, 8, 9, END] * 300
    assert val.read(0, val.n_tokens).tolist() == [5, 6, END] * 3 + [7, END]
    assert read_index(out)["splits"]["train"]["documents"] == 1200
    assert "left out: the split(s) test" in lines and train.dtype == np.uint16
    adopted(folder, out, lines.append, tokenizer=tokenizer)
    assert lines[-1].startswith(f"already adopted: {out}, train 3,300 tokens")
    other = save(tmp_path / "other", {"train": [[1, 2]] * 5 + [[1]], "val": [[3, 4], [1], [1]]})
    with pytest.raises(DataError, match="out holds another data set"):
        adopted(other, out, tokenizer=tokenizer)


def test_saved_pieces_of_one_length_stay_as_they_are(tmp_path, tokenizer):
    rows = [[1, 2, END, 3], [4, 5, 6, 7], [8, 9, END, 1], [2]]
    folder, val = save(tmp_path / "ds", {"train": rows}), save(tmp_path / "val", {"train": [[5, 6], [7], [8]]})
    lines: list[str] = []
    out = adopted(folder, tmp_path / "out", lines.append, tokenizer=tokenizer, val=str(val))
    assert TokenShards(out, "train").read(0, 13).tolist() == [i for row in rows for i in row]
    assert any("all rows have one length" in line for line in lines)
    assert TokenShards(out, "val").read(0, 7).tolist() == [5, 6, END, 7, END, 8, END]
    rows_of = "its rows are documents, each of which gets the end of text, unless it begins or ends with it"
    assert f"{val}: {rows_of}" in lines and f"{val}: {rows_of}" in read_index(out)["notes"]


def test_saved_pieces_with_some_shorter_rows(tmp_path, tokenizer):
    """As of texts that are grouped by batches, the last piece of each being what is left."""
    batch = [[1, 2, 3, 4]] * 99 + [[5, 6]]
    folder = save(tmp_path / "ds", {"train": batch * 2, "val": [[7, 8, 9]]})
    lines: list[str] = []
    out = adopted(folder, tmp_path / "out", lines.append, tokenizer=tokenizer)
    train, val = (TokenShards(out, split) for split in ("train", "val"))
    assert train.read(0, train.n_tokens).tolist() == [i for row in batch * 2 for i in row]
    assert val.read(0, val.n_tokens).tolist() == [7, 8, 9]
    note = (
        "all rows but 1 of 200 have one length: pieces of a longer text, to which no end of text is added; if they are documents "
        "that were cut off, prepare their text with data.prepare"
    )
    assert f"{folder / 'train'}: {note}" in lines
    longer = save(tmp_path / "longer", {"train": batch, "val": [[7, 8, 9, 1, 2], [3]]})
    val = TokenShards(adopted(longer, tmp_path / "b", tokenizer=tokenizer), "val")
    assert val.read(0, val.n_tokens).tolist() == [7, 8, 9, 1, 2, END, 3, END]
    cut = save(tmp_path / "cut", {"train": [[1, 2]] * 95 + [[3]] * 5, "val": [[4], [5]]})  # long documents, cut off
    assert TokenShards(adopted(cut, tmp_path / "d", tokenizer=tokenizer), "train").n_tokens == 95 * 3 + 5 * 2
    mixed = save(tmp_path / "mixed", {"train": ([[1, 2]] * 4 + [[3]]) * 9, "val": [[4], [5]]})
    assert TokenShards(adopted(mixed, tmp_path / "c", tokenizer=tokenizer), "train").n_tokens == 9 * 14


def test_saved_sets_without_rows(tmp_path, tokenizer):
    from datasets import Dataset, DatasetDict, Features, Sequence, Value

    features = Features({"input_ids": Sequence(Value("int32"))})
    parts = {"train": [[1, 2], [3], [4]], "validation": []}
    parts = {name: Dataset.from_dict({"input_ids": rows}, features=features) for name, rows in parts.items()}
    DatasetDict(parts).save_to_disk(str(tmp_path / "ds"))
    message = refused(tmp_path / "ds", tmp_path / "out", tokenizer=tokenizer)
    assert message == f"{tmp_path / 'ds' / 'validation'}: holds no rows"


def test_bad_saved_sets_are_one_line(tmp_path, tokenizer):
    def message(name, rows, **more):
        return refused(save(tmp_path / name, rows, **more), tmp_path / "out", tokenizer=tokenizer)

    good = [[1, 2], [3], [4, 5]]
    assert "no validation split; save a DatasetDict" in message("a", {"train": good})
    assert "no split 'train', but validation, test" in message("b", {"validation": good, "test": good})
    both = {"train": [[1, 2], [300], [3]], "val": good}
    assert "id 300 is outside the tokenizer's vocabulary of 257" in message("c", both)
    assert "id -1 is outside" in message("d", {"train": [[1, 2], [-1], [3]], "val": good})
    mask = [[1, 1], [0], [1, 1]]
    assert "are padded (their attention_mask has 0)" in message("e", {"train": good, "val": good}, attention_mask=mask)
    assert "must be lists of whole numbers" in message("f", {"train": [[0.5], [1.0, 2.0], [3.0]], "val": good})
    assert "must be lists of whole numbers, without null" in message("g", {"train": [[1, None], [1], [2]], "val": good})
    assert "holds no lists" in message("h", {"train": [1, 2, 3], "val": good})
    folder = save(tmp_path / "i", {"train": good, "val": good})
    for part in ("train", "val"):
        from datasets import load_from_disk

        load_from_disk(str(folder / part)).rename_column("input_ids", "text").save_to_disk(str(tmp_path / "renamed" / part))
    (tmp_path / "renamed" / "dataset_dict.json").write_text('{"splits": ["train", "val"]}')
    assert "no column 'input_ids', but text; data.prepare tokenizes text" in refused(
        tmp_path / "renamed", tmp_path / "out", tokenizer=tokenizer
    )
