import gzip
import io
import json
import os
import shutil
import sys
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from data import DataError
from data.preparation import hub, output, progress, sources
from data.preparation.split import hash_limit
from data.preparation.stdlib import stdlib_files
from data.prepare import main, prepare
from data.shards import TokenShards, read_index
from data.tokenizer import byte_tokenizer, load_tokenizer


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def documents_of(folder: Path, split: str) -> list[str]:
    """The split's documents as text again, cut at the end of text."""
    shards, tok = TokenShards(folder, split), load_tokenizer(folder)
    tokens = shards.read(0, shards.n_tokens)
    assert tokens[-1] == shards.eot_id
    ends = np.flatnonzero(tokens == shards.eot_id)
    starts = [0, *(ends[:-1] + 1).tolist()]
    return [tok.decode(tokens[start:end].tolist()) for start, end in zip(starts, ends, strict=True)]


@pytest.fixture
def small_units(monkeypatch):
    monkeypatch.setattr(sources, "UNIT_BYTES", sources.WINDOW)


@pytest.fixture
def mixed(tmp_path, make_texts, write_jsonl):
    """A folder with every kind of file."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = tmp_path / "mixed"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", make_texts(200, 1))
    with gzip.open(folder / "b.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in make_texts(100, 2))
    (folder / "c.txt").write_text("\n\n".join(make_texts(2500, 3)))
    (folder / "d.txt").write_text(make_texts(1, 4)[0])
    parquet.write_table(pyarrow.table({"text": make_texts(100, 5)}), folder / "e.parquet", row_group_size=30)
    return folder


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_text_comes_back(tmp_path, texts, write_jsonl, tokenizer, quiet):
    corpus = write_jsonl(tmp_path / "c.jsonl", texts)
    out = prepare(corpus, tmp_path / "out", tokenizer=tokenizer, vocab_size=400, val_fraction=0.1, workers=1, log=quiet)
    train, val = documents_of(out, "train"), documents_of(out, "val")
    assert sorted(train + val) == sorted(texts)
    assert train == [text for text in texts if text in set(train)]
    assert val == [text for text in texts if text in set(val)]
    assert sorted(path.name for path in out.iterdir()) == [
        *("index.json", "tokenizer.json", "tokenizer_config.json"),
        *("train_00000.bin", "train_00000.docs.bin", "val_00000.bin", "val_00000.docs.bin"),
    ]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_workers_change_nothing(tmp_path, mixed, small_units, tokenizer, quiet):
    options = {"tokenizer": tokenizer, "vocab_size": 400, "shard_tokens": 50_000, "log": quiet}
    one = prepare(mixed, tmp_path / "one", workers=1, **options)
    two = prepare(mixed, tmp_path / "two", workers=2, **options)
    assert contents(one) == contents(two)
    assert len(contents(one)) > 6
    assert len(sources.open_source(str(mixed)).units) > 10


def test_units_change_nothing(tmp_path, mixed, monkeypatch, quiet):
    one = prepare(mixed, tmp_path / "one", tokenizer="bytes", workers=1, log=quiet)
    monkeypatch.setattr(sources, "UNIT_BYTES", 5 * sources.WINDOW)
    two = prepare(mixed, tmp_path / "two", tokenizer="bytes", workers=1, log=quiet)
    assert contents(one) == contents(two)


def test_shards_and_document_starts(prepared, texts):
    index = read_index(prepared)
    assert index["dtype"] == "uint16"
    for split in ("train", "val"):
        tokens = np.concatenate([np.fromfile(prepared / s["name"], "<u2") for s in index["splits"][split]["shards"]])
        sizes = [shard["tokens"] for shard in index["splits"][split]["shards"]]
        assert len(sizes) > 1
        assert set(sizes[:-1]) == {5000}
        assert 0 < sizes[-1] <= 5000
        starts = []
        for i, shard in enumerate(index["splits"][split]["shards"]):
            here = np.fromfile((prepared / shard["name"]).with_suffix(".docs.bin"), "<u8")
            assert len(here) == shard["documents"]
            assert here.max(initial=0) < shard["tokens"]
            starts += (here + np.uint64(5000 * i)).tolist()
        assert starts == [0, *(np.flatnonzero(tokens == 256)[:-1] + 1).tolist()]
        assert len(starts) == index["splits"][split]["documents"]
    assert sum(split["tokens"] for split in index["splits"].values()) == sum(len(text.encode()) + 1 for text in texts)


def test_a_document_that_begins_with_a_shard(tmp_path, write_jsonl, quiet):
    corpus = write_jsonl(tmp_path / "c.jsonl", [f"{i:03d}" for i in range(20)])  # four tokens each
    out = prepare(corpus, tmp_path / "out", tokenizer="bytes", val_fraction=0, shard_tokens=8, workers=1, log=quiet)
    for i in range(10):
        assert np.fromfile(out / f"train_{i:05d}.docs.bin", "<u8").tolist() == [0, 4]
    assert not (out / "train_00010.bin").exists()


def test_validation_depends_on_the_text_alone(tmp_path, texts, write_jsonl, quiet):
    options = {"tokenizer": "bytes", "val_fraction": 0.2, "workers": 1, "log": quiet}
    one = prepare(write_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "one", **options)
    two = prepare(write_jsonl(tmp_path / "b.jsonl", texts[::-1] + texts[:50]), tmp_path / "two", **options)
    assert set(documents_of(one, "val")) == set(documents_of(two, "val"))
    assert not set(documents_of(two, "val")) & set(documents_of(two, "train"))
    assert 35 < len(documents_of(one, "val")) < 85  # 60 +- 3.6 standard deviations of 6.9


def test_two_documents_are_one_each(tmp_path, write_jsonl, quiet):
    for fraction in (1e-9, 0.01, 0.5, 0.999999):
        for pair in (["a", "b"], ["c", "d"], ["e", "f"]):
            corpus = write_jsonl(tmp_path / "c.jsonl", pair)
            out = tmp_path / f"{fraction}{pair[0]}"
            prepare(corpus, out, tokenizer="bytes", val_fraction=fraction, workers=1, log=quiet)
            assert sorted(documents_of(out, "train") + documents_of(out, "val")) == pair


def test_hash_limit():
    hashes = [np.array([5, 2**63], np.uint64), np.array([], np.uint64), np.array([9, 2**64 - 1], np.uint64)]
    assert hash_limit(hashes, 0.25) == 2**62
    assert hash_limit(hashes, 0) == 0
    assert hash_limit(hashes[2:], 1e-19) == 10
    assert hash_limit(hashes[:1], 0.75) == 2**63
    assert hash_limit([np.array([7, 7], np.uint64)], 0.5) == 7
    assert hash_limit([np.array([2**63 + 1], np.uint64)], 0.5) == 2**63


def test_end_of_text_within_a_document_is_text(tmp_path, write_jsonl, quiet):
    corpus = write_jsonl(tmp_path / "c.jsonl", ["one <|endoftext|> two"] * 3)
    out = prepare(corpus, tmp_path / "out", vocab_size=300, val_fraction=0, workers=1, log=quiet)
    assert documents_of(out, "train") == ["one <|endoftext|> two"] * 3


def test_large_vocabulary_takes_uint32(tmp_path, texts, write_jsonl, quiet):
    vocab = {**byte_tokenizer().get_vocab(with_added_tokens=False), "</s>": 70_000}
    tok = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tok.pre_tokenizer, tok.decoder = byte_tokenizer().pre_tokenizer, byte_tokenizer().decoder
    tok.save(str(tmp_path / "tokenizer.json"))
    corpus = write_jsonl(tmp_path / "c.jsonl", texts)
    options = {"tokenizer": tmp_path / "tokenizer.json", "val_fraction": 0.1, "workers": 1, "log": quiet}
    out = prepare(corpus, tmp_path / "out", **options)
    assert read_index(out)["dtype"] == "uint32"
    assert TokenShards(out, "train").vocab_size == 70_001
    assert sorted(documents_of(out, "train") + documents_of(out, "val")) == sorted(texts)
    tok.save(str(tmp_path / "tokenizer.json"), pretty=False)
    prepare(corpus, tmp_path / "out", **options)
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"already prepared, but the tokenizer in .*tokenizer\.json changed"):
        prepare(corpus, tmp_path / "out", **options)


def test_stdlib(tmp_path, monkeypatch, quiet):
    base, files = stdlib_files()
    monkeypatch.setattr(sources, "stdlib_files", lambda: (base, files[:5]))
    out = prepare("stdlib", tmp_path / "out", vocab_size=600, workers=1, log=quiet)
    found = documents_of(out, "train") + documents_of(out, "val")
    assert (base / files[0]).read_text() in found
    assert 40 < len(found) < 150  # five files, and the topics


def test_hub_keeps_its_revision(tmp_path, texts, monkeypatch, quiet):
    datasets = pytest.importorskip("datasets")

    def rows(parts):
        for part in parts:
            yield from ({"text": text} for text in texts[part::3])

    def load_dataset(*_, **__):
        return datasets.IterableDataset.from_generator(rows, gen_kwargs={"parts": [0, 1, 2]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.dataset_info", lambda name, revision: namedtuple("Info", "sha")("one"))
    hub.load_hub.cache_clear()
    options = {"tokenizer": "bytes", "val_fraction": 0, "workers": 1, "log": quiet}
    out = prepare("hub:o/corpus", tmp_path / "out", **options)
    assert documents_of(out, "train") == texts[0::3] + texts[1::3] + texts[2::3]
    assert read_index(out)["inventory"] == {"revision": "one", "shards": 3}
    monkeypatch.delattr("huggingface_hub.dataset_info")  # a finished one asks nobody
    prepare("hub:o/corpus", tmp_path / "out", **options)
    hub.load_hub.cache_clear()


def test_again_is_already_prepared(tmp_path, texts, write_jsonl):
    corpus = write_jsonl(tmp_path / "c.jsonl", texts)
    lines = []
    prepare(corpus, tmp_path / "out", tokenizer="bytes", workers=1, log=lines.append)
    before = contents(tmp_path / "out")
    assert lines[-1].startswith(f"prepared {tmp_path / 'out'} in ")
    prepare(corpus, tmp_path / "out", tokenizer="bytes", workers=2, vocab_size=99, log=lines.append)
    assert lines[-1].startswith(f"already prepared: {tmp_path / 'out'}, train ")
    corpus.unlink()
    prepare(corpus, tmp_path / "out", tokenizer="bytes", log=lines.append)
    assert lines[-1].startswith("already prepared")
    assert contents(tmp_path / "out") == before


def test_again_with_something_else_names_it(tmp_path, texts, write_jsonl, quiet):
    corpus = write_jsonl(tmp_path / "c.jsonl", texts)
    out = prepare(corpus, tmp_path / "out", vocab_size=300, workers=1, log=quiet)
    for options, message in (
        ({"vocab_size": 400}, "--vocab-size was 300 and is now 400"),
        ({"vocab_size": 300, "shard_tokens": 7}, "--shard-tokens was 100000000 and is now 7"),
        ({"tokenizer": "bytes"}, "--tokenizer was 'bpe' and is now 'bytes', --vocab-size was 300 and is now None"),
    ):
        with pytest.raises(DataError, match=f"out is already prepared with other arguments: {message}; choose another"):
            prepare(corpus, out, workers=1, log=quiet, **options)
    write_jsonl(corpus, texts[1:])
    with pytest.raises(DataError, match=r"already prepared, but the files of .*c.jsonl changed: bytes was \d+ and is now \d+"):
        prepare(corpus, out, vocab_size=300, workers=1, log=quiet)
    (out / "train_00000.bin").unlink()
    write_jsonl(corpus, texts)
    with pytest.raises(DataError, match=r"train_00000.bin: missing"):
        prepare(corpus, out, vocab_size=300, workers=1, log=quiet)


def test_again_with_a_changed_text_of_the_same_size(tmp_path, texts, write_jsonl):
    """A copy, whose times are others, is the same text."""
    corpus, held_out, out = tmp_path / "c.jsonl", write_jsonl(tmp_path / "v.jsonl", texts[:5]), tmp_path / "out"
    write_jsonl(corpus, texts)
    lines: list[str] = []
    options = {"tokenizer": "bytes", "val_source": str(held_out), "workers": 1, "log": lines.append}
    prepare(corpus, out, **options)
    before, lines[:] = contents(out), []
    prepare(corpus, out, **options)
    assert [line.split(":")[0] for line in lines] == ["already prepared"]
    for path in (corpus, held_out):
        os.utime(path, ns=(10**18, 10**18))
    prepare(corpus, out, **options)
    for line in (f"{corpus} was written to since", f"{held_out} was written to since", "already prepared"):
        assert any(found.startswith(line) for found in lines)
    lines.clear()
    prepare(corpus, out, **options)  # the comparison is remembered
    assert [line.split(":")[0] for line in lines] == ["already prepared"]
    for path in (corpus, held_out):
        content = path.read_text()
        path.write_text(content.replace('.\\n"', '!\\n"', 1))
        with pytest.raises(DataError, match=rf"out is already prepared, but the text of {path} changed; choose another folder"):
            prepare(corpus, out, **options)
        path.write_text(content)
    assert {**contents(out), "index.json": before["index.json"]} == before
    index = json.loads((out / "index.json").read_text())
    (out / "index.json").write_text(json.dumps({**index, "sources": [{"written_sha256": ""}]}))
    with pytest.raises(DataError, match=r"index.json: damaged, it is not what data.prepare writes"):
        prepare(corpus, out, **options)
    del index["sources"]  # as of a former version
    (out / "index.json").write_text(json.dumps(index))
    prepare(corpus, out, **options)
    assert lines[-1].startswith("already prepared")


def test_again_with_another_end_of_text(tmp_path, texts, write_jsonl, quiet):
    corpus, folder = write_jsonl(tmp_path / "c.jsonl", texts), tmp_path / "tokenizer"
    folder.mkdir()
    tok = byte_tokenizer()
    tok.add_special_tokens(["<|im_end|>"])
    tok.save(str(folder / "tokenizer.json"))
    options = {"tokenizer": str(folder), "workers": 1, "log": quiet}
    prepare(corpus, tmp_path / "out", **options)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    message = r"prepared with the end of text '<\|endoftext\|>', but .*tokenizer now says '<\|im_end\|>'; choose another folder"
    with pytest.raises(DataError, match=message):
        prepare(corpus, tmp_path / "out", **options)
    prepare(corpus, tmp_path / "named", end_token="<|endoftext|>", **options)
    prepare(corpus, tmp_path / "named", end_token="<|endoftext|>", **options)


def test_a_prepared_folder_is_no_source(prepared, tmp_path, quiet):
    with pytest.raises(DataError, match=r"out is a prepared folder, not text: use it as data.dir, or name the text that it was"):
        prepare(str(prepared), tmp_path / "again", log=quiet)
    site = tmp_path / "site"
    site.mkdir()
    (site / "index.json").write_text('{"text": "one"}\n{"text": "two"}\n')
    prepare(str(site), tmp_path / "other", tokenizer="bytes", val_fraction=0, workers=1, log=quiet)


@pytest.fixture
def unfinished(tmp_path, texts, write_jsonl, small_units, quiet):
    """A preparation of two files, of which the second is damaged: (folder of the corpus, out)."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    write_jsonl(corpus / "a.jsonl", texts)
    (corpus / "b.jsonl").write_text("oops\n")
    with pytest.raises(DataError, match=r"b.jsonl: line 1 is not a JSON line"):
        prepare(corpus, tmp_path / "out", tokenizer="bytes", workers=1, log=quiet)
    return corpus, tmp_path / "out"


def test_unfinished_with_other_arguments_is_an_error(unfinished, quiet):
    corpus, out = unfinished
    message = r"out holds an unfinished preparation with other arguments: --val-fraction was 0.01 and is now 0.5; finish that"
    with pytest.raises(DataError, match=message):
        prepare(corpus, out, tokenizer="bytes", val_fraction=0.5, workers=1, log=quiet)
    with pytest.raises(DataError, match=r"no index.json; its preparation is not finished; run the same command again"):
        TokenShards(out, "train")


def test_nothing_encoded_yet_takes_other_arguments(tmp_path, texts, write_jsonl, quiet):
    corpus = write_jsonl(tmp_path / "c.jsonl", texts)
    with pytest.raises(DataError, match=r"no tokenizer at .*none.json"):
        prepare(corpus, tmp_path / "out", tokenizer="none.json", workers=1, log=quiet)
    prepare(corpus, tmp_path / "out", tokenizer="bytes", workers=1, log=quiet)


def test_unfinished_with_a_changed_source_starts_over(unfinished, texts, write_jsonl, tmp_path):
    corpus, out = unfinished
    write_jsonl(corpus / "b.jsonl", ["now a document"])
    write_jsonl(corpus / "a.jsonl", texts[::-1])
    lines = []
    prepare(corpus, out, tokenizer="bytes", workers=1, log=lines.append)
    assert lines[0] == "the source changed since this preparation began: starting over"
    assert not [line for line in lines if line.startswith("continuing")]
    assert contents(out) == contents(prepare(corpus, tmp_path / "fresh", tokenizer="bytes", workers=1, log=lines.append))


def test_units_of_a_former_version_are_not_taken(unfinished, write_jsonl):
    corpus, out = unfinished
    plan = json.loads((out / ".partial" / "plan.json").read_text())
    (out / ".partial" / "plan.json").write_text(json.dumps({**plan, "version": 1}))
    write_jsonl(corpus / "b.jsonl", ["now a document"])
    lines = []
    prepare(corpus, out, tokenizer="bytes", workers=1, log=lines.append)
    assert lines[0] == "an earlier version began this preparation: starting over"


def test_stopped_while_the_shards_were_written(tmp_path, texts, write_jsonl, monkeypatch, small_units, quiet):
    corpus = write_jsonl(tmp_path / "c.jsonl", texts)
    write, lines = output._write_json, []

    def no_index(path, value):
        if path.name == "index.json":
            raise KeyboardInterrupt
        write(path, value)

    monkeypatch.setattr(output, "_write_json", no_index)
    with pytest.raises(KeyboardInterrupt):
        prepare(corpus, tmp_path / "out", vocab_size=300, workers=1, log=quiet)
    monkeypatch.setattr(output, "_write_json", write)
    prepare(corpus, tmp_path / "out", vocab_size=300, workers=1, log=lines.append)
    assert any(line.startswith("continuing: ") for line in lines)
    assert not any(line.startswith("tokenizer: ") for line in lines)
    assert contents(tmp_path / "out") == contents(prepare(corpus, tmp_path / "fresh", vocab_size=300, workers=1, log=quiet))


def test_a_damaged_file_is_named_from_a_worker(tmp_path, unfinished, write_jsonl, texts, quiet):
    corpus, out = unfinished
    write_jsonl(corpus / "c.jsonl", texts)
    with pytest.raises(DataError, match=r"b.jsonl: line 1 is not a JSON line"):
        prepare(corpus, out, tokenizer="bytes", workers=2, log=quiet)


def test_command_line_errors_are_one_line(tmp_path, texts, write_jsonl, monkeypatch, capsys):
    monkeypatch.setattr("signal.signal", lambda *_: None)
    corpus, out = write_jsonl(tmp_path / "c.jsonl", texts), tmp_path / "out"
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "empty.txt").touch()
    Usage = namedtuple("Usage", "total used free")
    for arguments, message in (
        ([tmp_path / "none", out], f"source {tmp_path / 'none'}: no such file or folder, nor hub:NAME or stdlib"),
        ([tmp_path / "folder", out, "--tokenizer", "bytes"], f"source {tmp_path / 'folder'}: it holds no text"),
        ([corpus, corpus], f"{corpus}: not a folder"),
        ([corpus, ""], "OUT is empty"),
        (["", out], "SOURCE is empty"),
        ([corpus, out, "--tokenizer", ""], "--tokenizer is empty"),
        ([corpus, out, "--vocab-size", "5000000000"], "--vocab-size 5000000000 is too large: at most 16777216"),
        ([tmp_path, out], f"{out} lies inside the source {tmp_path}: choose a folder outside it"),
        ([corpus, out, "--val-fraction", "1"], "--val-fraction 1.0 is not in [0, 1)"),
        ([corpus, out, "--shard-tokens", "0"], "--shard-tokens 0 is not positive"),
        ([corpus, out, "--workers", "0"], "--workers 0 is not positive"),
        ([corpus, out, "--vocab-size", "12"], "--vocab-size 12 is too small for byte-level BPE: at least 257"),
    ):
        shutil.rmtree(out, ignore_errors=True)
        assert main([str(argument) for argument in arguments]) == 2
        assert capsys.readouterr().err == f"data.prepare: {message}\n"
    shutil.rmtree(out)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: Usage(10, 10, 1000))
        assert main([str(corpus), str(out), "--tokenizer", "bytes"]) == 2
        assert "of disk needed, 0.0 GB free" in capsys.readouterr().err
    with output.locked(out):
        assert main([str(corpus), str(out), "--tokenizer", "bytes"]) == 2
        assert capsys.readouterr().err == f"data.prepare: {out}: another preparation is running there\n"
    assert main([str(corpus), str(out), "--tokenizer", "bytes", "--workers", "1"]) == 0
    assert main([str(corpus), str(out), "--tokenizer", "bytes"]) == 0
    assert "already prepared" in capsys.readouterr().out


def test_progress_as_lines_and_as_a_bar(monkeypatch):
    lines = []
    monkeypatch.setattr(progress, "LINE_SECONDS", 0)
    with progress.progress({0: 100, 1: 100}, lines.append) as update:
        update(500)
        update(700, 0)
    assert [line.split(" tokens,")[0] for line in lines] == [
        "tokenizing: 0/2 units, 500",
        "tokenizing: 1/2 units, 1,200",
    ]

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    for sizes in ({0: 100, 1: 300}, {0: 0, 1: 0}):
        with progress.progress(sizes, lines.append) as update:
            update(1000, 1)
            update(0, 0)
    assert len(lines) == 2
    assert "tokenizing" in sys.stderr.getvalue()


def test_the_same_text_counts_as_often_as_it_occurs(tmp_path, write_jsonl, quiet):
    texts = ["a", "b", "a", "c", "a"]
    out = prepare(write_jsonl(tmp_path / "c.jsonl", texts), tmp_path / "o", tokenizer="bytes", workers=1, log=quiet)
    assert Counter(documents_of(out, "train") + documents_of(out, "val")) == Counter(texts)
