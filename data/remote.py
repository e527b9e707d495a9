"""Copies prepared folders behind a URL (s3://, gs://, hf://, https://, ...: anything that fsspec supports) into a bounded cache.

Batches are drawn from the whole data set, so the first steps already need nearly every shard. Therefore a folder is copied as a
whole, by one process of a machine while the others wait. Every file is compared with its hash in the index. After that, the copy
is used as a local folder. Its name in the cache contains the hash of the URL and the fingerprint of the data, so that other data
is another copy. A process that uses a copy holds a shared lock on it. When another copy needs the space, copies that no process
uses are removed, the least recently used first.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from data import DataError, first_line
from data.files import replacing
from data.shards import FORMAT, check_files, files_of, fingerprint, read_index
from data.special_tokens import CONFIG

CHUNK = 1 << 23  # bytes of one read
THREADS = 8
ATTEMPTS, PAUSE = 3, 1.0  # attempts to read a file; seconds between the first two attempts, doubled each time
LINE_SECONDS = 10  # s between two lines on progress
_held: dict[str, tuple[Path, int]] = {}  # URL -> the copy that this process uses, and the file descriptor with its lock


def is_remote(folder: str | Path) -> bool:
    """Return whether `folder` is a URL."""
    return "://" in str(folder)


def local_folder(folder: str, cache: Path, cache_bytes: float, log: Callable[[str], None] = print) -> str:
    """Return `folder` itself or, for a URL, its copy in `cache`, which is made if necessary.

    If the URL cannot be reached, an existing copy is used.

    Raises:
        DataError: there is no such folder, a file is cut short or does not match the index, or there is too little space.
    """
    if not is_remote(folder):
        return folder
    url = folder.rstrip("/")
    if url in _held:
        return str(_held[url][0])
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"data.cache_dir: {cache} cannot hold copies ({error.strerror}): name another folder") from None
    name = hashlib.sha256(url.encode()).hexdigest()[:16]
    try:
        system, path = _open(url)
        index = _index(url, system.cat_file(f"{path}/index.json"), cache / f"{name}.json")
    except Exception as error:  # each file system of fsspec raises errors of its own
        if isinstance(error, DataError):
            raise
        copies = sorted(cache.glob(f"{name}-*/index.json"), key=os.path.getmtime)
        if isinstance(error, FileNotFoundError) or not copies:
            raise DataError(f"{url}/index.json cannot be read: {first_line(error)}") from None
        log(f"note: {url} cannot be reached ({first_line(error)}): its copy in {copies[-1].parent} is used")
        return str(_use(url, copies[-1].parent, lambda: None))
    copy = cache / f"{name}-{fingerprint(index)[:16]}"
    return str(_use(url, copy, lambda: _download(url, system, path, index, copy, cache_bytes, log)))


def gb(size: int) -> str:
    """Return a number of bytes as a text in GB."""
    return f"{size / 1e9:,.3g} GB"


def _open(url: str) -> tuple[Any, str]:
    try:
        import fsspec

        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise DataError(f"{url}: {first_line(error)}") from None


def _index(url: str, content: bytes, aside: Path) -> dict:
    """Return the index in `content`, checked like that of a local folder."""
    probe = aside.with_suffix(f".{os.getpid()}")
    probe.mkdir(exist_ok=True)
    try:
        (probe / "index.json").write_bytes(content)
        index = read_index(probe)
    except DataError as error:
        raise DataError(str(error).replace(str(probe), url)) from None
    finally:
        shutil.rmtree(probe, ignore_errors=True)
    if index["format"] != FORMAT:
        raise DataError(f"{url}: its index points at files elsewhere; a remote folder is one that data.prepare wrote")
    return index


def _use(url: str, copy: Path, make: Callable[[], None]) -> Path:
    """Return `copy` once it is whole, with a shared lock until this process ends. Only one process calls `make`."""
    lock = os.open(f"{copy}.lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        while True:
            fcntl.flock(lock, fcntl.LOCK_SH)
            if not (copy / "index.json").exists():
                with suppress(BlockingIOError):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of two processes, one fails and retries
                    if not (copy / "index.json").exists():
                        make()
                    fcntl.flock(lock, fcntl.LOCK_SH)
            if (copy / "index.json").exists():
                os.utime(copy / "index.json")
                _held[url] = copy, lock
                return copy
            fcntl.flock(lock, fcntl.LOCK_UN)
            time.sleep(0.1)
    except BaseException:
        os.close(lock)
        raise


def _download(url: str, system: Any, path: str, index: dict, copy: Path, cache_bytes: float, log: Callable[[str], None]) -> None:
    """Copy the folder, index.json last. Files that an earlier start has finished are kept."""
    copy.mkdir(exist_ok=True)
    for leftover in copy.glob("*.tmp"):
        leftover.unlink()
    wanted = [(file.path.name, file.size, file.sha256) for split in index["splits"] for file in files_of(copy, index, split)]
    missing = [item for item in wanted if not (copy / item[0]).exists()]
    total = sum(size for _, size, _ in wanted)
    _make_room(url, copy, total, cache_bytes)
    log(f"copying {url}, {gb(total)} in {len(wanted)} files, into {copy}")
    begun = last = time.monotonic()
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            fetched = [
                pool.submit(_fetch, f"{url}/{name}", system, f"{path}/{name}", copy / name, size, sha256)
                for name, size, sha256 in missing
            ]
            done = 0
            for future in fetched:
                done += future.result()
                if time.monotonic() - last >= LINE_SECONDS:
                    last = time.monotonic()
                    log(f"copied {gb(done)}, {done / (last - begun) / 1e6:,.0f} MB/s")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    _fetch(f"{url}/tokenizer.json", system, f"{path}/tokenizer.json", copy / "tokenizer.json")
    with suppress(DataError):  # folders of earlier versions have none
        _fetch(f"{url}/{CONFIG}", system, f"{path}/{CONFIG}", copy / CONFIG)
    try:
        check_files(copy, index, *index["splits"])
    except DataError as error:
        (copy / "tokenizer.json").unlink(missing_ok=True)
        raise DataError(str(error).replace(str(copy), url)) from None
    with replacing(copy / "index.json") as file:
        file.write(json.dumps(index, indent=1).encode())


def _fetch(url: str, system: Any, path: str, target: Path, size: int | None = None, sha256: str | None = None) -> int:
    """Copy one file, whole or not at all. Returns its size in bytes."""
    for attempt in range(ATTEMPTS):
        problem, digest, found = "", hashlib.sha256(), 0
        try:
            with replacing(target) as file:
                for chunk in _chunks(system, path):
                    digest.update(chunk)
                    found += len(chunk)
                    file.write(chunk)
                if size is not None and found != size:
                    problem = f"{found:,} bytes instead of {size:,}: cut short, or another file than its index describes"
                elif sha256 is not None and digest.hexdigest() != sha256:
                    problem = (
                        f"its sha256 is {digest.hexdigest()[:12]}..., not {sha256[:12]}... as in the index: changed or damaged"
                    )
                if problem:
                    raise DataError(problem)
            return found
        except DataError:
            pass
        except FileNotFoundError:
            raise DataError(f"{url}: missing") from None
        except Exception as error:  # each file system of fsspec raises errors of its own
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise DataError(f"{target}: no space left on the disk of the cache") from None
            problem = f"cannot be read: {first_line(error)}"
        if attempt < ATTEMPTS - 1:
            time.sleep(PAUSE * 2**attempt)
    raise DataError(f"{url}: {problem} (tried {ATTEMPTS} times)")


def _chunks(system: Any, path: str) -> Iterator[bytes]:
    with system.open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def _make_room(url: str, copy: Path, needed: int, cache_bytes: float) -> None:
    """Remove unused copies, the least recently used first, until `needed` bytes fit. Raises DataError if they do not fit."""
    cache, gigabytes = copy.parent, f"data.cache_gb={cache_bytes / 1e9:g}"
    if needed > cache_bytes:
        raise DataError(f"{url} has {gb(needed)}, more than {gigabytes}: raise it; every step takes from the whole data set")
    others = {path: sum(file.stat().st_size for file in path.iterdir()) for path in cache.glob("*-*/") if path != copy}
    for path in sorted(others, key=_last_used):
        if sum(others.values()) + needed <= cache_bytes:
            break
        lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (path / "index.json").unlink(missing_ok=True)  # first, so that a half-removed copy does not count as whole
            shutil.rmtree(path, ignore_errors=True)
            del others[path]
        except BlockingIOError:  # in use
            pass
        finally:
            os.close(lock)
    if sum(others.values()) + needed > cache_bytes:
        held = f"running processes use {gb(sum(others.values()))} of {gigabytes} in {cache}"
        raise DataError(f"{url} has {gb(needed)}, and {held}: raise it")


def _last_used(copy: Path) -> float:
    index = copy / "index.json"
    return index.stat().st_mtime if index.exists() else 0.0
