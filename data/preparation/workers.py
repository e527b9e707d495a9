"""Work in other processes: what they write depends neither on how many there are nor on their order.

They end at once when the process that started them does, even if that is killed, and are deaf to signals themselves.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Tokenizer

from data.errors import DataError
from data.preparation.encode import Encoding, encode_unit
from data.preparation.readers import documents, sample
from data.preparation.sources import Unit
from data.tokenizer import train_bpe

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_worker = {}  # of a worker process: its counter of tokens, the barrier where all meet, and its Encoding


def save_bpe(path: Path, units: list[Unit], text_key: str, vocab_size: int, workers: int) -> None:
    """Train a tokenizer on a sample of the units and save it, whole or not at all.

    In a process of its own, unless workers is 1: the training hears no signals.
    """
    if workers == 1:
        _save_bpe(path, units, text_key, vocab_size)
        return
    with _processes(1, 0) as (pool, _):
        pool.submit(_save_bpe, path, units, text_key, vocab_size).result()


def encode_units(
    units: dict[int, Unit],
    folder: Path,
    tokenizer: Path,
    text_key: str,
    workers: int,
    update: Callable[[int, int], None],
) -> None:
    """Encode each unit i to folder/00000i.tokens and .docs; update(i, n): unit i, or none if -1, is done, and n tokens.

    One worker is this process itself; more are spawned. DataError: of a reader, or when a worker dies.
    """
    workers = min(workers, len(units))
    if workers <= 1:
        encoding = Encoding(Tokenizer.from_file(str(tokenizer)))
        for i, unit in units.items():
            encode_unit(documents(unit, text_key), unit_path(folder, i), encoding, lambda tokens: update(-1, tokens))
            update(i, 0)
        return
    waiting, running, seen = list(reversed(units.items())), {}, 0
    with _processes(workers, max(1, cores() // workers)) as (pool, counter):
        while waiting or running:
            while waiting and len(running) < 4 * workers:
                i, unit = waiting.pop()
                running[pool.submit(_encode, unit, unit_path(folder, i), tokenizer, text_key)] = i
            done, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            now = counter.value
            update(-1, now - seen)
            seen = now
            for future in done:
                future.result()
                update(running.pop(future), 0)


def unit_path(folder: Path, i: int) -> Path:
    """Where unit i goes, without the suffix."""
    return folder / f"{i:06d}"


def is_encoded(folder: Path, i: int) -> bool:
    """Whether unit i is there, whole."""
    return unit_path(folder, i).with_suffix(".tokens").exists()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _processes(count: int, threads: int) -> Iterator[tuple[ProcessPoolExecutor, object]]:
    """`count` processes of `threads` threads each (0: one a core), and the counter of their tokens."""
    context = multiprocessing.get_context("spawn")
    lifeline, held = context.Pipe()
    counter = context.Value("q", 0)
    try:
        with ProcessPoolExecutor(count, context, _start_worker, (held, counter, threads, context.Barrier(count))) as pool:
            try:
                # One task for each process starts it. A signal waits until all are there: it would end one that does not
                # ignore it yet, and one that starts while this process ends complains of what it cannot find any more.
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


def _start_worker(held, counter, threads: int, barrier) -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(held,), daemon=True).start()
    if threads:
        os.environ["RAYON_NUM_THREADS"] = str(threads)  # of the package tokenizers
    _worker.update(counter=counter, barrier=barrier)


def _meet() -> None:
    _worker["barrier"].wait()


def _end_with_parent(held) -> None:
    try:
        held.recv()
    except (EOFError, OSError):
        os._exit(1)


def _save_bpe(path: Path, units: list[Unit], text_key: str, vocab_size: int) -> None:
    aside = path.with_name(path.name + ".tmp")
    train_bpe(sample(units, text_key), vocab_size).save(str(aside))
    os.replace(aside, path)


def _encode(unit: Unit, target: Path, tokenizer: Path, text_key: str) -> None:
    if "encoding" not in _worker:
        _worker["encoding"] = Encoding(Tokenizer.from_file(str(tokenizer)))
    encode_unit(documents(unit, text_key), target, _worker["encoding"], _count)


def _count(tokens: int) -> None:
    with _worker["counter"].get_lock():
        _worker["counter"].value += tokens
