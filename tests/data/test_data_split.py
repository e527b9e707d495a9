"""Validation by hash, by position where that would not do, and from a source of its own."""

import json

import pytest

from data import DataError
from data.preparation import sources, split
from data.prepare import prepare
from data.shards import TokenShards, read_index


def text_of(folder, name: str) -> list[str]:
    shards = TokenShards(folder, name)
    return bytes(shards.read(0, shards.n_tokens).clip(max=255).astype("u1")).replace(b"\xff", b"\0").decode().split("\0")[:-1]


@pytest.fixture
def prepared_from(tmp_path, write_jsonl):
    """prepared_from(texts, **options): the folder, prepared as bytes, and the lines that were said."""

    def run(texts, **options):
        lines: list[str] = []
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        prepare(write_jsonl(tmp_path / "c.jsonl", texts), out, tokenizer="bytes", workers=1, log=lines.append, **options)
        return out, lines

    return run


BOOK = "".join(f"line {i} of a small book\n" for i in range(500))


@pytest.mark.parametrize(
    "texts",
    [
        [BOOK],
        [BOOK, "short"],
        ["short", BOOK, ""],
        [BOOK] * 3,
        [BOOK, "a"],
        ["x" * 5000],
        [BOOK, BOOK + "end\n"],  # by hash one of both would be validation
        [BOOK + f"line {i} of the end\n" for i in range(3)],
    ],
)
def test_few_or_unequal_documents_are_split_by_position(prepared_from, texts):
    out, lines = prepared_from(texts, val_fraction=0.1)
    train, val = text_of(out, "train"), text_of(out, "val")
    assert "".join(train + val) == "".join(texts)
    share = TokenShards(out, "val").n_tokens / sum(len(text) + 1 for text in texts)
    assert 0.08 < share < 0.12
    if "x" not in texts[0]:
        assert train[-1].endswith("\n") and val[0].startswith("line ")
    assert any("the last 0.1 of the text, by position, with an end of text at the cut" in line for line in lines)
    assert read_index(out)["notes"][-1] == next(line for line in lines if "by position" in line)


def test_bytes_of_each_split(prepared_from, texts):
    for corpus in (texts, [BOOK + "é"]):
        out, _ = prepared_from(corpus, val_fraction=0.1)
        assert sum(part["bytes"] for part in read_index(out)["splits"].values()) == sum(len(t.encode()) for t in corpus)
        for name in ("train", "val"):
            shards = TokenShards(out, name)
            assert shards.n_bytes == sum(len(text.encode()) for text in text_of(out, name))
            assert shards.n_bytes == shards.n_tokens - read_index(out)["splits"][name]["documents"]


@pytest.mark.parametrize(("texts", "message"), [(["a"], "the split 'val' gets 0 tokens"), (["", " \n"], "it holds no text")])
def test_too_little_text_is_refused_while_preparing(prepared_from, texts, message):
    with pytest.raises(DataError, match=message):
        prepared_from(texts)
    if texts == ["a"]:
        assert text_of(prepared_from(texts, val_fraction=0)[0], "train") == ["a"]


def test_documents_of_one_character_are_not_cut(prepared_from):
    out, _ = prepared_from(["a"] * 10, val_fraction=0.25)
    assert [len(text_of(out, name)) for name in ("train", "val")] == [7, 3]


def test_units_do_not_move_the_cut(tmp_path, monkeypatch, quiet):
    """A large text file, whose documents lie in several units."""
    (tmp_path / "large.txt").write_text(BOOK * 40)
    monkeypatch.setattr(split, "LEAST_VALIDATION", 1000)
    fingerprints = set()
    for unit in (sources.WINDOW, sources.UNIT_BYTES):
        monkeypatch.setattr(sources, "UNIT_BYTES", unit)
        out = prepare(tmp_path / "large.txt", tmp_path / str(unit), tokenizer="bytes", workers=1, log=quiet)
        fingerprints.add(TokenShards(out, "val").fingerprint)
        assert TokenShards(out, "val").n_tokens == pytest.approx(len(BOOK) * 40 * 0.01, rel=0.03)
    assert len(fingerprints) == 1


def test_a_validation_source(tmp_path, texts, write_jsonl):
    train, val = write_jsonl(tmp_path / "t.jsonl", texts[:200]), write_jsonl(tmp_path / "v.jsonl", [*texts[200:], texts[0]])
    lines: list[str] = []
    options = {"tokenizer": "bpe", "vocab_size": 9000, "workers": 1, "log": lines.append, "val_source": val}
    out = prepare(train, tmp_path / "out", **options)
    assert read_index(out)["splits"]["train"]["documents"] == 200
    assert read_index(out)["splits"]["val"]["documents"] == 101
    assert "1 training documents are in the validation source too" in lines
    assert any(
        line.startswith("the vocabulary has ") and "entries, not 9000: no more pairs occur twice" in line for line in lines
    )
    prepare(train, tmp_path / "out", **options)
    assert lines[-1].startswith("already prepared")
    write_jsonl(val, texts[201:])
    with pytest.raises(DataError, match=r"already prepared, but the files of .*v.jsonl changed: bytes was"):
        prepare(train, tmp_path / "out", **options)
    with pytest.raises(DataError, match="--val-source and --val-fraction exclude each other"):
        prepare(train, tmp_path / "other", val_fraction=0.1, **options)
    write_jsonl(val, [""])
    with pytest.raises(DataError, match=r"v.jsonl: it holds no text"):
        prepare(train, tmp_path / "other", **options)


def test_an_index_of_a_former_version_is_read(prepared_from, texts):
    out, lines = prepared_from(texts)
    index = json.loads((out / "index.json").read_text())
    for key in ("val_inventory", "notes"):
        del index[key]
    for part in index["splits"].values():
        del part["bytes"]
    for key in ("end_token", "val_source"):
        del index["arguments"][key]
    (out / "index.json").write_text(json.dumps(index))
    (out / "tokenizer_config.json").unlink()
    assert TokenShards(out, "val").n_bytes is None
    prepare(out.parent / "c.jsonl", out, tokenizer="bytes", log=lines.append)
    assert lines[-1].startswith("already prepared")
