"""Prepared folders behind URLs, with fsspec's file systems of memory and of local files."""

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import fsspec
import pytest

from data import DataError, remote
from data.remote import local_folder
from data.shards import TokenShards, read_index
from data.verify import verify

URL = "memory://bucket/prepared"
GIGABYTE = 1e9


@pytest.fixture(autouse=True)
def held(monkeypatch):
    """Each test is a process of its own, which holds nothing; and no pauses."""
    mine: dict = {}
    monkeypatch.setattr(remote, "_held", mine)
    monkeypatch.setattr(remote, "PAUSE", 0)
    yield mine
    for _, lock in mine.values():
        os.close(lock)


@pytest.fixture
def bucket(prepared):
    """The prepared folder in memory: read and write by name."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    for path in prepared.iterdir():
        system.pipe_file(f"/bucket/prepared/{path.name}", path.read_bytes())
    return system


def copied(tmp_path, url=URL, limit=GIGABYTE, lines=None) -> Path:
    return Path(local_folder(url, tmp_path / "cache", limit, [].append if lines is None else lines.append))


def refused(tmp_path, **options) -> str:
    with pytest.raises(DataError) as error:
        copied(tmp_path, **options)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "cache").glob("*/*.tmp"))
    return str(error.value)


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_a_copy_is_the_folder(prepared, bucket, tmp_path, scheme):
    lines: list[str] = []
    folder = copied(tmp_path, URL + "/" if scheme == "memory" else f"file://{prepared}", lines=lines)
    assert lines[0].startswith("copying ") and len(lines) == 1
    verify(folder, lambda line: None)
    ours, theirs = (TokenShards(path, "train") for path in (folder, prepared))
    assert ours.fingerprint == theirs.fingerprint and (ours.read(0, 20_000) == theirs.read(0, 20_000)).all()
    assert copied(tmp_path, lines=lines) == folder or scheme == "file"
    assert local_folder(str(prepared), tmp_path / "none", 1) == str(prepared) and not (tmp_path / "none").exists()


def test_found_again_without_and_with_a_network(bucket, tmp_path, held, monkeypatch):
    folder, lines = copied(tmp_path), []
    held.clear()
    assert copied(tmp_path, lines=lines) == folder and not lines

    def fail(*_, **__):
        raise ConnectionError("Name or service not known\nmore")

    monkeypatch.setattr(type(bucket), "cat_file", fail)
    held.clear()
    assert copied(tmp_path, lines=lines) == folder
    assert lines == [f"note: {URL} cannot be reached (Name or service not known): its copy in {folder} is used"]
    assert refused(tmp_path, url="memory://other") == "memory://other/index.json cannot be read: Name or service not known"


def test_damage_on_the_way_is_named(bucket, tmp_path, monkeypatch):
    name = "/bucket/prepared/train_00001.bin"
    whole = bucket.cat_file(name)
    bucket.pipe_file(name, whole[:-10])
    cut = "9,990 bytes instead of 10,000: cut short, or another file than its index describes (tried 3 times)"
    assert refused(tmp_path) == f"{URL}/train_00001.bin: {cut}"
    bucket.pipe_file(name, whole[:-1] + bytes([whole[-1] ^ 1]))
    assert f"{URL}/train_00001.bin: its sha256 is " in refused(tmp_path)
    bucket.rm_file(name)
    assert refused(tmp_path) == f"{URL}/train_00001.bin: missing"
    bucket.pipe_file(name, whole)
    # A connection that breaks once is tried again; what was copied before is kept.
    opened: list[str] = []

    original = type(bucket).open

    def flaky(self, path, *args, **options):
        opened.append(path)
        if opened.count(path) == 1 and path.endswith("train_00001.bin"):
            raise TimeoutError("read timed out")
        return original(self, path, *args, **options)

    monkeypatch.setattr(type(bucket), "open", flaky)
    verify(copied(tmp_path), lambda line: None)
    assert [path.rpartition("/")[2] for path in opened].count("train_00001.bin") == 2
    assert not any(path.endswith("train_00000.bin") for path in opened)


def test_a_remote_folder_that_changed_is_another_copy(bucket, tmp_path, held):
    first = copied(tmp_path)
    index = json.loads(bucket.cat_file("/bucket/prepared/index.json"))
    last = index["splits"]["train"]["shards"].pop()
    index["splits"]["train"]["tokens"] -= last["tokens"]
    bucket.pipe_file("/bucket/prepared/index.json", json.dumps(index).encode())
    held.clear()
    second = copied(tmp_path)
    assert second != first and len(read_index(second)["splits"]["train"]["shards"]) == len(index["splits"]["train"]["shards"])
    TokenShards(first, "train").read(0, 10)


def test_what_no_process_uses_goes_first(prepared, bucket, tmp_path, held):
    size = sum(path.stat().st_size for path in prepared.iterdir())
    for name in "abc":
        for path in prepared.iterdir():
            bucket.pipe_file(f"/{name}/{path.name}", path.read_bytes())
    first, second = copied(tmp_path, "memory://a"), copied(tmp_path, "memory://b")
    _, lock = held.pop("memory://a")
    os.close(lock)
    third = copied(tmp_path, "memory://c", limit=2.5 * size)  # b is in use
    assert not first.exists() and second.exists() and third.exists()
    held.pop("memory://nothing", None)
    message = refused(tmp_path, url="memory://a", limit=2.5 * size)
    parts = r"memory://a has [0-9.e-]*[1-9][0-9.e-]* GB, and running processes use [0-9.e-]*[1-9][0-9.e-]* GB of data.cache_gb="
    assert re.match(parts, message)
    assert "more than data.cache_gb=1e-09: raise it; every step takes from the whole data set" in refused(
        tmp_path, url="memory://a", limit=1
    )
    TokenShards(third, "train").read(0, 10)


def test_bad_urls_are_one_line(bucket, prepared, tmp_path):
    assert refused(tmp_path, url="nope://a") == "nope://a: Protocol not known: nope"
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"data.cache_dir: .*file cannot hold copies \(File exists\): name another folder"):
        local_folder(URL, tmp_path / "file", GIGABYTE)
    assert refused(tmp_path, url="memory://nowhere").startswith("memory://nowhere/index.json cannot be read: ")
    bucket.pipe_file("/bad/index.json", b"{")
    assert refused(tmp_path, url="memory://bad") == "memory://bad/index.json: not an index of token shards"
    bucket.pipe_file("/bucket/prepared/tokenizer.json", b'{"another": 1}')
    assert f"{URL}/tokenizer.json: not the tokenizer of these shards" in refused(tmp_path)
    index = json.loads((prepared / "index.json").read_text()) | {"format": "token-files", "files": "."}
    for split in index["splits"].values():
        for shard in split["shards"]:
            shard |= {"offset": 0, "mtime_ns": 0}
    bucket.pipe_file("/bucket/prepared/index.json", json.dumps(index).encode())
    assert refused(tmp_path) == f"{URL}: its index points at files elsewhere; a remote folder is one that data.prepare wrote"


def test_threads_of_one_copy_wait_for_each_other(bucket, tmp_path, monkeypatch):
    """Locks belong to descriptors, so that threads stand for processes here."""
    made: list[Path] = []
    copy = tmp_path / "copy"

    def make():
        copy.mkdir()
        made.append(copy)
        threading.Event().wait(0.3)
        (copy / "index.json").write_text("{}")

    threads = [threading.Thread(target=remote._use, args=(f"memory://{i}", copy, make)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert made == [copy] and len(remote._held) == 6


def test_processes_share_a_copy(prepared, tmp_path):
    copy = f"local_folder('file://{prepared}', Path({str(tmp_path / 'cache')!r}), 1e9)"
    code = f"from pathlib import Path; from data.remote import local_folder; print({copy})"
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0].splitlines() for process in processes]
    assert len({lines[-1] for lines in outputs}) == 1
    assert sum(line.startswith("copying") for lines in outputs for line in lines) == 1
    verify(outputs[0][-1], lambda line: None)
