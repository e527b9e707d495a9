"""Runs work in other processes. Their output does not depend on the number of processes or their order.

Workers ignore SIGINT and SIGTERM. They end at once when the process that started them ends, even if that is killed.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from data import DataError
from data.preparation.encode import Encoder, encode_unit
from data.preparation.readers import sample, texts
from data.preparation.sources import Unit
from data.tokenizer import save_tokenizer, train_bpe

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_worker: dict[str, Any] = {}  # state of a worker process: the token counter, the barrier of all workers, and its Encoder


def save_bpe(folder: Path, units: list[Unit], text_key: str, vocab_size: int, end: str, workers: int) -> None:
    """Train a tokenizer on a sample of the units and save it in `folder`.

    Unless workers is 1, another process does it, so that this one can be stopped: the trainer does not react to signals.
    """
    if workers == 1:
        _save_bpe(folder, units, text_key, vocab_size, end)
        return
    with _processes(1, 0) as (pool, _):
        pool.submit(_save_bpe, folder, units, text_key, vocab_size, end).result()


def encode_units(
    units: dict[int, Unit],
    folder: Path,
    tokenizer: Path,
    end: int,
    text_key: str,
    workers: int,
    update: Callable[..., None],
) -> None:
    """Encode each unit i to folder/00000i.tokens and .docs. `end`: id of the end of text. `update`: as in `progress`.

    With one worker, this process does the work; else workers are spawned. Raises DataError of a reader, or if a worker dies.
    """
    workers = min(workers, len(units))
    if workers <= 1:
        encode = Encoder(Tokenizer.from_file(str(tokenizer)), end)
        for i, unit in units.items():
            encode_unit(texts(unit, text_key), unit_path(folder, i), encode, update)
            update(0, i)
        return
    waiting = iter(units.items())
    running: dict[Future, int] = {}
    finished = counted = 0
    with _processes(workers, max(1, cores() // workers)) as (pool, counter):
        while finished < len(units):
            for i, unit in islice(waiting, 4 * workers - len(running)):
                running[pool.submit(_encode, unit, unit_path(folder, i), tokenizer, end, text_key)] = i
            done, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            total = counter.value
            update(total - counted)
            counted = total
            finished += len(done)
            for future in done:
                future.result()
                update(0, running.pop(future))


def unit_path(folder: Path, i: int) -> Path:
    """Return the path of the files of unit i, without the suffix."""
    return folder / f"{i:06d}"


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _processes(count: int, threads: int) -> Iterator[tuple[ProcessPoolExecutor, Any]]:
    """Yield a pool of `count` processes with `threads` threads each (0: one per core), and the counter of their tokens."""
    context = multiprocessing.get_context("spawn")
    lifeline, held = context.Pipe()
    counter = context.Value("q", 0)
    try:
        with ProcessPoolExecutor(count, context, _start_worker, (held, counter, threads, context.Barrier(count))) as pool:
            try:
                # One task for each process makes the pool start it. Signals are blocked until all have started: a signal would
                # kill a worker that does not ignore it yet, and a worker that starts while this process ends prints an error.
                blocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
                try:
                    wait([pool.submit(_meet) for _ in range(count)])
                finally:
                    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
                yield pool, counter
            except BaseException:
                lifeline.close()  # every worker ends at once
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    except BrokenProcessPool:
        advice = "run the same command again, with fewer --workers"
        raise DataError(f"a worker process died (out of memory?); {advice}") from None


def _start_worker(held: Connection, counter: Any, threads: int, barrier: Barrier) -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(held,), daemon=True).start()
    if threads:
        os.environ["RAYON_NUM_THREADS"] = str(threads)  # of the package tokenizers
    _worker.update(counter=counter, barrier=barrier)


def _meet() -> None:
    _worker["barrier"].wait()


def _end_with_parent(held: Connection) -> None:
    try:
        held.recv()
    except (EOFError, OSError):
        os._exit(1)


def _save_bpe(folder: Path, units: list[Unit], text_key: str, vocab_size: int, end: str) -> None:
    save_tokenizer(train_bpe(sample(units, text_key), vocab_size, end), folder, end)


def _encode(unit: Unit, target: Path, tokenizer: Path, end: int, text_key: str) -> None:
    if "encode" not in _worker:
        _worker["encode"] = Encoder(Tokenizer.from_file(str(tokenizer)), end)
    encode_unit(texts(unit, text_key), target, _worker["encode"], _count)


def _count(tokens: int) -> None:
    with _worker["counter"].get_lock():
        _worker["counter"].value += tokens
