"""Files that are left out, cut or damaged: each is said, and none stops the others silently."""

import errno
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data import DataError
from data.files import replacing
from data.preparation import listing
from data.preparation.listing import local_files
from data.preparation.readers import documents
from data.preparation.sources import open_source
from data.prepare import main, prepare

ROOT = Path(__file__).parents[2]


def read(name, text_key="text"):
    return [text for unit in open_source(str(name)).units for text in documents(unit, text_key)]


def test_linked_folders_are_followed_once(tmp_path):
    corpus, other = tmp_path / "corpus", tmp_path / "other"
    for folder in (corpus / "a", other / "deep"):
        folder.mkdir(parents=True)
    (corpus / "a" / "1.txt").write_text("one")
    (other / "deep" / "2.txt").write_text("two")
    (corpus / "0.txt").symlink_to("a/1.txt")  # the file itself is read, the link is not
    (corpus / "hard.txt").hardlink_to(other / "deep" / "2.txt")
    (corpus / "a" / "loop").symlink_to("..")
    (corpus / "a" / "other").symlink_to(other)
    (corpus / "again").symlink_to(other)
    (corpus / "broken.txt").symlink_to("/gone")
    (corpus / "itself.txt").symlink_to("itself.txt")
    found = local_files(str(corpus))
    assert found.names == ["a/1.txt", "hard.txt"]
    assert found.left_out == {
        "broken link": ["broken.txt", "itself.txt"],
        "further links to a file that is read": ["0.txt", "again/deep/2.txt"],
        "further links to a folder that is read": ["a/loop", "a/other"],
    }
    (corpus / "hard.txt").unlink()
    assert sorted(read(corpus)) == ["one", "two"]


def test_what_is_left_out_is_said_with_a_count(tmp_path):
    for name in ("a.TXT", "b.md", "README", "c.pdf", "d.PDF", "e.csv", ".hidden", ".git/config"):
        (tmp_path / "c" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "c" / name).write_text(name)
    (tmp_path / "c" / "image.xyz").write_bytes(b"GIF\0\0")
    os.mkfifo(tmp_path / "c" / "pipe.txt")
    lines: list[str] = []
    prepare(tmp_path / "c", tmp_path / "out", tokenizer="bytes", workers=1, log=lines.append)
    left = (
        "left out: 1 .csv (e.csv); 2 .pdf (c.pdf, d.PDF); 1 binary (image.xyz); 2 hidden (.git, .hidden); "
        "1 not a regular file (pipe.txt)"
    )
    assert lines[1:3] == ["files: 1 without a suffix, 1 .md, 1 .txt (read as plain text: those without a suffix, .md)", left]
    assert lines[-1].endswith(left)
    prepare(tmp_path / "c", tmp_path / "out", tokenizer="bytes", log=lines.append)
    assert lines[-1].startswith("already prepared") and lines[-1].endswith(left)


def test_a_glob_says_which_folders_it_does_not_enter(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a.txt", "sub/b.txt"):
        (tmp_path / name).write_text(name)
    found = local_files(str(tmp_path / "*"))
    assert (found.names, found.left_out_line()) == (["a.txt"], "1 folders: a glob takes files, ** those below too (sub)")
    assert local_files(str(tmp_path / "**")).names == ["a.txt", "sub/b.txt"]


def test_unreadable_files_are_said(tmp_path, monkeypatch):
    """Root may read everything, so that the refusal is simulated."""
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)

    def refuse(path, *arguments, **options):
        if Path(path).name == "b.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return open(path, *arguments, **options)

    monkeypatch.setattr(listing, "open", refuse, raising=False)
    assert local_files(str(tmp_path)).left_out == {"unreadable": ["b.txt"]}
    with pytest.raises(DataError, match=r"b.txt: it cannot be read: see its permissions"):
        local_files(str(tmp_path / "b.txt"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pdf", b"%PDF", r"source .*a.pdf: .pdf is not read; convert it to text, JSON lines or Parquet"),
        ("a.csv", b"a,b", r"source .*a.csv: .csv is not read; convert it"),
        ("a.dat", b"\0\1", r"source .*a.dat: binary, not UTF-8 text"),
        ("a.txt", "é".encode("utf-16"), r"a.txt: UTF-16 or UTF-32 instead of UTF-8 text; convert it: iconv"),
        ("a.txt", "text".encode("utf-16-le"), r"a.txt: UTF-16"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16"), r"a.jsonl: UTF-16"),
        ("a.txt", b"ok\n\xff", r"a.txt: not UTF-8 text at byte 3"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', r"a.jsonl: line 2 \(byte 24 of the file\) is not UTF-8 text"),
        ("a.jsonl", b'\n{"text": ["a"]}', r"a.jsonl: line 2 has list, not text, under 'text'"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "a"}', r"a.jsonl: line 2 has no 'text' \(it has: body\)"),
        ("a.jsonl", b'{"text": "a", "text": "b"}', r"a.jsonl: line 1 has 'text' more than once"),
        ("a.jsonl", b'{"text": "a", "m": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", r"a.jsonl: line 1 is nested too deeply"),
        ("a.jsonl", b'{"text": "a", "m": ' + b"1" * 5000 + b"}", r"a.jsonl: line 1 is not a JSON line: Exceeds"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n{"text": 1}', mtime=0), r"a.jsonl.gz: line 2 has int, not text"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n', mtime=0) + b"rest", r"a.jsonl.gz: damaged gzip file"),
    ],
)
def test_the_place_of_what_is_wrong_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_the_line_is_counted_from_the_file_s_beginning(tmp_path, monkeypatch):
    from data.preparation import sources

    monkeypatch.setattr(sources, "UNIT_BYTES", sources.WINDOW)
    (tmp_path / "a.jsonl").write_text('{"text": "0123456789"}\n' * 3000 + "[]\n")
    assert len(open_source(str(tmp_path / "a.jsonl")).units) > 3
    with pytest.raises(DataError, match=r"a.jsonl: line 3001 holds list"):
        read(tmp_path / "a.jsonl")


def test_a_parquet_row_is_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    binary = pyarrow.array([b"ok"] * 20 + [b"\xff"], pyarrow.binary())
    parquet.write_table(pyarrow.table({"text": binary.view(pyarrow.string())}), tmp_path / "a.parquet", row_group_size=8)
    with pytest.raises(DataError, match=r"a.parquet: row 21 is not UTF-8 text"):
        read(tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"text": binary}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet: row 1 has bytes, not text"):
        read(tmp_path / "a.parquet")


def test_zstd(tmp_path, texts):
    codec = pytest.importorskip("pyarrow").Codec("zstd")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    frames = (
        codec.compress(lines[: lines.index(b"\n") + 1], asbytes=True),
        codec.compress(lines[lines.index(b"\n") + 1 :], asbytes=True),
    )
    (tmp_path / "c.JSONL.zst").write_bytes(b"".join(frames))
    assert read(tmp_path) == texts
    (tmp_path / "c.JSONL.zst").write_bytes(b"".join(frames)[:-9])
    with pytest.raises(DataError, match=r"c.JSONL.zst: damaged zstd file"):
        read(tmp_path)
    (tmp_path / "c.JSONL.zst").write_bytes(codec.compress(b'{"text": "a"}\n{', asbytes=True))
    with pytest.raises(DataError, match=r"c.JSONL.zst: line 2 is not a JSON line"):
        read(tmp_path)


def test_byte_order_marks_are_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\0")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "two"}\n')
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'\xef\xbb\xbf{"text": "three"}\n', mtime=0))
    (tmp_path / "d.txt").write_bytes(b"\xef\xbb\xbf" + b"x\n" * 200_000)
    assert read(tmp_path)[:3] == ["one\r\n\0", "two", "three"]
    assert "".join(read(tmp_path / "d.txt")) == "x\n" * 200_000


def test_empty_documents_and_cuts_are_counted(tmp_path, write_jsonl):
    (tmp_path / "c").mkdir()
    write_jsonl(tmp_path / "c" / "a.jsonl", ["one", "", " \n", "two"])
    (tmp_path / "c" / "empty.txt").touch()
    (tmp_path / "c" / "long.txt").write_text("a line of a book\n" * 20_000)
    lines: list[str] = []
    prepare(tmp_path / "c", tmp_path / "out", tokenizer="bytes", workers=1, log=lines.append)
    assert (
        "1 text file(s) above 256 KiB (long.txt) are cut into 21 documents, each with an end of text: "
        "at the first blank line after every 16 KiB"
    ) in lines
    assert "left out: 3 documents that are empty or white space" in lines


def test_the_output_folder_is_not_a_source_and_nothing_there_is_overwritten(tmp_path, texts, write_jsonl, quiet):
    write_jsonl(tmp_path / "c.jsonl", texts)
    options = {"tokenizer": "bytes", "workers": 1, "log": quiet}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"notes.txt lies inside .*out: choose a folder outside the source"):
        prepare(tmp_path / "**", tmp_path / "out", **options)
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer.json exists and belongs to no preparation"):
        prepare(tmp_path / "c.jsonl", tmp_path / "out", **options)
    (tmp_path / "out" / "tokenizer.json").unlink()
    prepare(tmp_path / "c.jsonl", tmp_path / "out", **options)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_names_that_no_terminal_can_show(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("signal.signal", lambda *_: None)
    corpus = os.fsencode(tmp_path) + b"/c\n\xff"
    os.mkdir(corpus)
    for name in (b"a\xe9.txt", b"b\n.pdf"):
        Path(os.fsdecode(corpus + b"/" + name)).write_text("text of some length")
    assert main([os.fsdecode(corpus), str(tmp_path / "out"), "--tokenizer", "bytes", "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert "left out: 1 .pdf (b\\n.pdf)" in out and all(line.isprintable() for line in out.splitlines())
    Path(os.fsdecode(corpus + b"/a\xe9.txt")).write_bytes(b"\xff")
    assert main([os.fsdecode(corpus), str(tmp_path / "other"), "--tokenizer", "bytes", "--workers", "1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("locale", [{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONUTF8": "1"}])
def test_a_terminal_in_ascii(tmp_path, locale):
    (tmp_path / "é.txt").write_text("some text")
    command = [sys.executable, "-m", "data.prepare", str(tmp_path / "é.txt"), str(tmp_path / "out"), "--tokenizer", "bytes"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", **locale}
    done = subprocess.run([*command, "--workers", "1"], cwd=ROOT, env=environment, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_full_disk_names_the_file(tmp_path):
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'file'}'"), replacing(tmp_path / "file"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())
