import gzip
import json
import sys
from pathlib import Path

import pytest

from data import DataError
from data.preparation import hub, readers, sources
from data.preparation.readers import documents, sample
from data.preparation.sources import WINDOW, open_source


def read(name, text_key="text", **options):
    return [text for unit in open_source(str(name), **options).units for text in documents(unit, text_key)]


def write_parquet(path, texts, row_group_size=7, key="text"):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"id": list(range(len(texts))), key: texts})
    parquet.write_table(table, path, row_group_size=row_group_size)


@pytest.fixture
def small_units(monkeypatch):
    monkeypatch.setattr(sources, "UNIT_BYTES", 2 * WINDOW)


def test_folder_and_glob_in_order_of_names(tmp_path):
    for name in ("b.txt", "a/z.md", "a/b.txt", ".hidden", ".git/config", "empty.txt", "blank.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("" if name == "empty.txt" else " \n" if name == "blank.txt" else name)
    assert read(tmp_path) == ["a/b.txt", "a/z.md", "b.txt"]
    assert read(tmp_path / "**" / "*.txt") == ["a/b.txt", "b.txt"]
    assert read(tmp_path / "b.txt") == ["b.txt"]


def test_small_files_share_units(tmp_path, small_units):
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text(str(i) * 10_000)
    assert [len(unit) for unit in open_source(str(tmp_path)).units] == [4, 4, 2]
    assert [text[0] for text in read(tmp_path)] == list("0123456789")


@pytest.mark.parametrize("separator", ["\n\n", "\n", "", "\r\n\r\n"])
def test_large_text_is_split_whatever_the_units(tmp_path, texts, monkeypatch, separator):
    content = separator.join(text.strip() for text in texts * 20)
    (tmp_path / "large.txt").write_bytes(content.encode())
    assert len(content.encode()) > sources.LARGE_TEXT
    whole = read(tmp_path / "large.txt")
    monkeypatch.setattr(sources, "UNIT_BYTES", 3 * WINDOW)
    assert len(open_source(str(tmp_path / "large.txt")).units) > 5
    assert read(tmp_path / "large.txt") == whole
    assert "".join(whole) == content
    sizes = [len(text.encode()) for text in whole]
    assert max(sizes) <= 2 * WINDOW
    assert len(sizes) == -(-len(content.encode()) // WINDOW)
    assert all(text.endswith(separator) for text in whole[:-1])


def test_large_text_with_few_blank_lines(tmp_path):
    content = "x" * (WINDOW + 5) + "\n\n" + "é" * (12 * WINDOW) + "\n" + "y" * 10
    (tmp_path / "large.txt").write_text(content)
    whole = read(tmp_path / "large.txt")
    assert "".join(whole) == content
    assert max(len(text.encode()) for text in whole) <= 2 * WINDOW


def test_json_lines_in_byte_ranges(tmp_path, texts, small_units):
    lines = [json.dumps({"body": text, "n": i}) for i, text in enumerate(texts * 3)]
    (tmp_path / "c.jsonl").write_text("\n".join([*lines[:9], "", '{"body": null}', *lines[9:]]))
    assert len(open_source(str(tmp_path / "c.jsonl")).units) > 3
    assert read(tmp_path / "c.jsonl", "body") == texts * 3


@pytest.mark.parametrize("name", ["c.jsonl.gz", "c.json.gz"])
def test_gzip(tmp_path, texts, name):
    with gzip.open(tmp_path / name, "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    assert read(tmp_path) == texts
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=f"{name}: damaged gzip file"):
        read(tmp_path)
    (tmp_path / name).write_bytes(b"no gzip at all")
    with pytest.raises(DataError, match=f"{name}: damaged gzip file"):
        read(tmp_path)


def test_a_json_file_that_is_no_json_lines(tmp_path):
    """The remedy is for the first line alone: where that is a record, the file was meant."""
    advice = r"; a .json file is read as JSON lines, a record on each: a glob such as 'FOLDER/\*\*/\*.py' leaves it out$"
    for content, problem in (
        (b'{\n "name": "x"\n}\n', "is not a JSON line: .* at character 3"),
        (b'[{"text": "a"}]', "holds list, not a JSON object with the key 'text'"),
        (b'{"name": "x"}', r"has no 'text' \(it has: name\); name the text with --text-key"),
    ):
        for name, data in (("package.json", content), ("package.json.gz", gzip.compress(content))):
            (tmp_path / name).write_bytes(data)
            with pytest.raises(DataError, match=f"{name}: line 1 {problem}{advice}"):
                read(tmp_path / name)
        (tmp_path / "package.jsonl").write_bytes(content)
        with pytest.raises(DataError, match=f"line 1 {problem}$"):
            read(tmp_path / "package.jsonl")
    (tmp_path / "lines.json").write_text('{"text": "a"}\n{"txt": "b"}\n')
    with pytest.raises(DataError, match=r"line 2 has no 'text' .*--text-key$"):
        read(tmp_path / "lines.json")


def test_zstd_with_a_long_window(tmp_path):
    """As of dumps that `zstd --long=31` packed: the beginning of such a frame, with its window of 2 GiB."""
    pytest.importorskip("pyarrow")
    packed = bytes.fromhex("28b52ffd00a8") + bytes(99)  # magic, descriptor, window of 2 GiB
    (tmp_path / "dump.jsonl.zst").write_bytes(packed)
    message = r"dump.jsonl.zst: its zstd window is above 128 MiB \(zstd --long\), which is not read; compress it again: "
    with pytest.raises(DataError, match=message + r"zstd -dc --long=31 \S*dump.jsonl.zst \| zstd -o NEW.jsonl.zst$"):
        read(tmp_path)
    (tmp_path / "dump.jsonl.zst").write_bytes(b"no zstd")
    with pytest.raises(DataError, match=r"dump.jsonl.zst: damaged zstd file"):
        read(tmp_path)


def test_parquet_by_row_groups(tmp_path, texts, small_units):
    write_parquet(tmp_path / "c.parquet", [*texts[:5], None, *texts[5:]], row_group_size=50)
    assert sum(len(unit) for unit in open_source(str(tmp_path)).units) == 7
    assert len(open_source(str(tmp_path)).units) > 1
    assert read(tmp_path) == texts
    with pytest.raises(DataError, match=r"c.parquet has no 'body' \(it has: id, text\); name the text with --text-key"):
        read(tmp_path, "body")
    with pytest.raises(DataError, match=r"c.parquet: row 1 has int, not text, under 'id'"):
        read(tmp_path, "id")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match=r"c.parquet: not a Parquet file"):
        read(tmp_path)


def test_stdlib_listing():
    opened = open_source("stdlib")
    paths = [piece.path for unit in opened.units for piece in unit if piece.kind == "text"]
    relative = [path.split("/lib/python", 1)[-1] for path in paths]
    assert len(paths) > 300
    assert paths == [piece.path for unit in open_source("stdlib").units for piece in unit if piece.kind == "text"]
    assert not [p for p in relative if {"test", "tests", "idlelib", "lib2to3", "site-packages", "encodings"} & set(p.split("/"))]
    names = {Path(path).name for path in paths}
    assert {"argparse.py", "dataclasses.py", "socket.py"} <= names
    found = [text for unit in opened.units for text in documents(unit)]
    assert sum(map(len, found)) > 5_000_000
    assert any(text.startswith("Assignment statements\n***") or "Assignment statements" in text[:200] for text in found[-100:])


@pytest.fixture
def fake_hub(monkeypatch):
    datasets = pytest.importorskip("datasets")
    calls = []

    def rows(shards):
        for shard in shards:
            for i in range(3):
                yield {"text": f"document {shard}-{i}", "other": i}

    def load_dataset(name, config, *, split, revision, streaming):
        calls.append((name, config, split, revision, streaming))
        if name == "o/broken":
            raise ValueError("BuilderConfig 'x' not found.\nAvailable: y")
        return datasets.IterableDataset.from_generator(rows, gen_kwargs={"shards": [0, 1, 2, 3]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.dataset_info", lambda name, revision: type("Info", (), {"sha": revision or "c0ffee"}))
    hub.load_hub.cache_clear()
    yield calls
    hub.load_hub.cache_clear()


def test_hub(fake_hub):
    assert read("hub:o/corpus", hub_config="en", hub_split="val") == [f"document {s}-{i}" for s in range(4) for i in range(3)]
    assert fake_hub == [("o/corpus", "en", "val", "c0ffee", True)]
    opened = open_source("hub:o/corpus@v1")
    assert fake_hub[-1][3] == "v1"
    assert opened.inventory == {"revision": "v1", "shards": 4}
    assert list(documents(opened.units[2])) == ["document 2-0", "document 2-1", "document 2-2"]
    with pytest.raises(DataError, match=r"hub:o/corpus: row 1 of part 1 has no 'body' \(it has: text, other\)"):
        read("hub:o/corpus", "body")


def test_hub_errors(fake_hub, monkeypatch):
    with pytest.raises(DataError, match=r"hub:o/broken cannot be read.*BuilderConfig 'x' not found.$"):
        read("hub:o/broken")

    def offline(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.dataset_info", offline)
    with pytest.raises(DataError, match="hub:o/corpus cannot be read from the Hugging Face hub: no route"):
        read("hub:o/corpus")


def test_missing_packages_are_named(tmp_path, monkeypatch):
    (tmp_path / "c.parquet").touch()
    for package in ("pyarrow", "datasets"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=r"c.parquet: reading Parquet needs the package pyarrow: pip install pyarrow"):
        open_source(str(tmp_path))
    hub.load_hub.cache_clear()
    with pytest.raises(DataError, match="hub:o/corpus needs the package datasets: pip install datasets"):
        hub.load_hub("o/corpus", None, "train", "v1")


def test_errors_name_the_place(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: no such file or folder, nor hub:NAME or stdlib"):
        open_source(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"\*\.txt: it holds no file"):
        open_source(str(tmp_path / "*.txt"))
    (tmp_path / "a.txt").write_bytes(b"latin \xe9")
    with pytest.raises(DataError, match=r"a.txt: not UTF-8 text at byte 6"):
        read(tmp_path / "a.txt")
    (tmp_path / "big.txt").write_bytes(b"a line\n" * 40_000 + b"\xff")
    with pytest.raises(DataError, match=r"big.txt: not UTF-8 text at byte 280000"):
        read(tmp_path / "big.txt")
    (tmp_path / "a.txt.zst").write_bytes(b"")
    with pytest.raises(DataError, match=r"a.txt.zst: of compressed files only .*unpack it"):
        open_source(str(tmp_path / "a.txt.zst"))
    for line, message in (
        ("{", "line 2 is not a JSON line: Expecting property name enclosed in double quotes at character 3"),
        ("[1]", "line 2 holds list, not a JSON object with the key 'text'"),
        ('{"a": 1, "b": 2}', r"line 2 has no 'text' \(it has: a, b\); name the text with --text-key"),
        ('{"text": 7}', "line 2 has int, not text, under 'text'"),
    ):
        (tmp_path / "c.jsonl").write_text('{"text": "x"}\n' + line + "\n")
        with pytest.raises(DataError, match=f"c.jsonl: {message}"):
            read(tmp_path / "c.jsonl")


def test_lone_surrogates_become_characters(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"text": "a\\ud800b \\ud83d\\ude42"}\n')
    assert read(tmp_path) == ["a\ufffdb 🙂"]


def test_sample_is_bounded_and_spread(tmp_path):
    for i in range(100):
        (tmp_path / f"{i:02d}.txt").write_text(f"{i:02d}" * 5000)
    source = open_source(str(tmp_path))
    assert sum(map(len, sample(source.units, limit=20_000))) == 20_000
    units = [(piece,) for unit in source.units for piece in unit]
    texts = list(sample(units, limit=32_000))
    assert [len(text) for text in texts] == [1000] * readers.SAMPLE_UNITS
    assert [int(text[:2]) for text in texts] == [i * 100 // 32 for i in range(32)]


def test_state_sees_a_changed_file(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    before = open_source(str(tmp_path))
    (tmp_path / "a.txt").write_text("two")
    after = open_source(str(tmp_path))
    assert before.inventory == after.inventory
    assert before.state != after.state
    (tmp_path / "a.txt").write_text("three")
    assert open_source(str(tmp_path)).inventory != before.inventory
