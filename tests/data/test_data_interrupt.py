"""Preparation in a process of its own, stopped from outside in the middle."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = (
    "import sys, data.preparation.sources as s; s.UNIT_BYTES = 16384; from data.prepare import main; sys.exit(main(sys.argv[1:]))"
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, make_texts, write_jsonl):
    """4 MB in 250 units."""
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "c.jsonl", make_texts(600, 8) * 20)


def start(corpus: Path, out: Path, workers: int) -> subprocess.Popen:
    command = [
        sys.executable,
        "-c",
        SCRIPT,
        corpus,
        out,
        "--tokenizer",
        "bpe",
        "--vocab-size",
        "300",
        "--workers",
        workers,
    ]
    return subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(corpus: Path, out: Path, workers: int) -> str:
    process = start(corpus, out, workers)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return output


def wait_for_units(process: subprocess.Popen, out: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(list(out.glob(".partial/*.tokens"))) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def children(process: subprocess.Popen) -> list[int]:
    """Worker processes, where the system tells."""
    try:
        found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        return [int(pid) for pid in found if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    except FileNotFoundError:
        return []


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until_ended(pids: list[int]) -> None:
    deadline = time.monotonic() + 20
    while not all(ended(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert "continuing" not in finish(corpus, out, 2)
    return contents(out)


def test_killed_twice_and_continued(corpus, tmp_path, undisturbed):
    out, kept = tmp_path / "out", 0
    for workers in (2, 1):
        process = start(corpus, out, workers)
        wait_for_units(process, out, kept + 5)
        workers_of_it = children(process)
        process.kill()
        process.communicate()
        wait_until_ended(workers_of_it)
        kept = len(list(out.glob(".partial/*.tokens")))
        assert not (out / "index.json").exists()
    units = len(list(out.glob(".partial/*.tokens")))
    assert 10 <= units < 240
    assert f"continuing: {units} of " in finish(corpus, out, 2)
    assert contents(out) == undisturbed


@pytest.mark.parametrize(
    ("number", "workers", "status"), [(signal.SIGTERM, 2, 143), (signal.SIGINT, 2, 130), (signal.SIGTERM, 1, 143)]
)
def test_stopped_by_a_signal(corpus, tmp_path, undisturbed, number, workers, status):
    out = tmp_path / "out"
    process = start(corpus, out, workers)
    wait_for_units(process, out, 5)
    workers_of_it = children(process)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does: to the workers as well
    else:
        process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert errors == f"data.prepare: stopped by {number.name}; the same command continues from here\n"
    assert process.returncode == status
    wait_until_ended(workers_of_it)
    assert not (out / "index.json").exists()
    assert "continuing" in finish(corpus, out, workers)
    assert contents(out) == undisturbed


def test_a_killed_worker_is_an_error_not_a_wait(corpus, tmp_path):
    out = tmp_path / "out"
    process = start(corpus, out, 2)
    wait_for_units(process, out, 5)
    workers = children(process)
    if not workers:
        process.kill()
        process.communicate()
        pytest.skip("this system does not list a process's children")
    os.kill(workers[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=30)
    assert errors == "data.prepare: a worker process died (out of memory?); run the same command again, with fewer --workers\n"
    assert process.returncode == 2
    wait_until_ended(workers)
