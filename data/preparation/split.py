"""Chooses the documents for validation: by a hash of their text, by position, or from a separate source.

By hash, a text goes to the same split at any place, and equal texts go to the same split. But with few documents, or documents of
very different lengths, one split could get nearly nothing, or validation many times its share. Then the last part of the text is
for validation, and the document in which this part begins is cut in two.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from data.preparation.encode import DOCUMENT, Encoder, text_hash
from data.preparation.readers import documents
from data.preparation.sources import Unit

# The split is by hash if training and validation then get tokens within these multiples of their intended shares.
LEAST_TRAINING = 1 / 2
LEAST_VALIDATION, MOST_VALIDATION = 1 / 10, 3
CUT_SEARCH = 2000  # characters after the intended cut in which a line end or white space is searched
Part = tuple[np.ndarray, int]  # tokens (n,) of a part of a document, the end of text included; bytes of its text
Cut = tuple[Part | None, Part | None]  # the parts of one document for training and for validation


@dataclass(frozen=True)
class Split:
    """A rule that assigns documents to splits.

    All documents of units from `first_val` on are for validation. Of the other documents, those with a hash below `limit` are.
    But if `cut` = (unit, document in it) is given, it is those after that document, and the document itself is cut after
    `fraction` of its characters.
    """

    first_val: int
    limit: int = 0
    cut: tuple[int, int] | None = None
    fraction: float = 0.0

    def name(self, unit: int, document: int, text_hash: int) -> str:
        """Return "train" or "val"."""
        below = text_hash < self.limit if self.cut is None else (unit, document) > self.cut
        return "val" if unit >= self.first_val or below else "train"


def read_documents(unit: Path, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Return the records (n,) DOCUMENT of a unit's documents that are not empty, and the ends of their tokens (n,)."""
    found = np.fromfile(unit.with_suffix(".docs"), DOCUMENT)
    found = found[found["bytes"] > 0]
    end = unit.with_suffix(".tokens").stat().st_size // dtype.itemsize
    return found, np.append(found["start"][1:], np.uint64(end))[: len(found)]


def texts_hash(hashes: Iterable[np.ndarray]) -> str:
    """Return the sha256 over the hashes (n,) uint64 of a source's documents, in order. It is independent of the units."""
    digest = hashlib.sha256()
    for part in hashes:
        digest.update(part.astype("<u8").tobytes())
    return digest.hexdigest()


def hashes_of_units(units: list[Path], dtype: np.dtype) -> Iterator[np.ndarray]:
    """Yield the hashes (n,) of the documents of each encoded unit."""
    return (read_documents(unit, dtype)[0]["hash"] for unit in units)


def hashes_of_source(units: list[Unit], text_key: str) -> Iterator[np.ndarray]:
    """Yield the same by reading the source itself. Raises DataError as readers.documents."""
    return (np.array([text_hash(text.encode()) for text in documents(unit, text_key)], np.uint64) for unit in units)


def hash_limit(hashes: Iterable[np.ndarray], fraction: float) -> int:
    """Return the limit below which the 64-bit hash of a document makes it validation: about `fraction` of the documents.

    If a split would be empty, the smallest hash goes to validation, or the largest to training, provided that there
    are two different documents and fraction > 0. A single document is for training.
    """
    limit = int(fraction * 2**64)
    count, below, smallest, largest = 0, 0, 2**64, -1
    for part in hashes:
        if len(part):
            count += len(part)
            below += int((part < np.uint64(limit)).sum())
            smallest, largest = min(smallest, int(part.min())), max(largest, int(part.max()))
    if below == count:
        return max(largest, 0)
    if below == 0 and limit and smallest < largest:
        return smallest + 1
    return limit


def choose_split(units: list[Path], dtype: np.dtype, first_val: int, fraction: float) -> Split:
    """Return the split by hash if both splits get enough tokens, and validation not too many; else the split by position."""
    training = units[:first_val]
    if not fraction:
        return Split(first_val)
    limit = hash_limit(hashes_of_units(training, dtype), fraction)
    total = validation = 0
    for unit in training:
        found, stops = read_documents(unit, dtype)
        lengths = stops - found["start"]
        total += int(lengths.sum())
        validation += int(lengths[found["hash"] < np.uint64(limit)].sum())
    enough_training = total - validation >= LEAST_TRAINING * (1 - fraction) * total
    share = fraction * total
    if enough_training and 0 < LEAST_VALIDATION * share <= validation <= MOST_VALIDATION * share:
        return Split(first_val, limit)
    return _by_position(training, dtype, first_val, total * (1 - fraction))


def _by_position(units: list[Path], dtype: np.dtype, first_val: int, position: float) -> Split:
    """Return the split whose training part ends at the token `position`, counted over all units."""
    for i, unit in enumerate(units):
        found, stops = read_documents(unit, dtype)
        end = int(stops[-1]) if len(stops) else 0
        if position < end:
            j = int(np.searchsorted(stops, position, "right"))
            start, stop = int(found["start"][j]), int(stops[j])
            return Split(first_val, cut=(i, j), fraction=(position - start) / (stop - start))
        position -= end
    return Split(first_val)


def cut_document(split: Split, units: list[Unit], text_key: str, encode: Encoder) -> Cut | None:
    """Return the two parts of the document that `split` cuts, each encoded separately; None if it cuts none."""
    if split.cut is None:
        return None
    unit, document = split.cut
    text = next(islice(documents(units[unit], text_key), document, None))
    at = _cut_after(text, split.fraction) if len(text) > 1 and split.fraction > 0 else len(text) * (split.cut == (0, 0))
    parts = [text[:at], text[at:]]
    end = np.frombuffer(encode.end, encode.dtype)
    encoded = [np.append(ids, end) for ids in encode(parts)]
    first, second = ((ids, len(part.encode())) if part else None for ids, part in zip(encoded, parts, strict=True))
    return first, second


def _cut_after(text: str, fraction: float) -> int:
    """Return the number of characters before the cut: at the end of a line or word if one is near; at least one on each side."""
    at = min(max(round(fraction * len(text)), 1), len(text) - 1)
    searches: tuple[Callable[[str], bool], ...] = (lambda char: char == "\n", str.isspace)
    near = text[at - 1 : min(at + CUT_SEARCH, len(text) - 1)]
    for matches in searches:
        for i, char in enumerate(near):
            if matches(char):
                return at + i
    return at


def text_notes(units: list[Path], encode: Encoder, split: Split, fraction: float) -> list[str]:
    """Return notes for the user on the encoded documents, a line each."""
    empty = unknown = tokens = repeated = 0
    held = [np.fromfile(unit.with_suffix(".docs"), DOCUMENT) for unit in units[split.first_val :]]
    validation = np.unique(np.concatenate([part["hash"] for part in held])) if held else np.zeros(0, np.uint64)
    for i, unit in enumerate(units):
        found, stops = read_documents(unit, encode.dtype)
        empty += unit.with_suffix(".docs").stat().st_size // DOCUMENT.itemsize - len(found)
        unknown += int(found["unknown"].sum())
        tokens += int(stops[-1]) if len(stops) else 0
        if i < split.first_val and len(validation):
            repeated += int(np.isin(found["hash"], validation).sum())
    notes = []
    if empty:
        notes.append(f"left out: {empty:,} documents that are empty or white space")
    if unknown and encode.leaves_out:
        reason = "it has no token for the unknown" if encode.unknown is None else "its token for the unknown is the end of text"
        notes.append(f"left out: {unknown:,} characters that the tokenizer does not know, since {reason}")
    elif unknown:
        notes.append(f"{unknown:,} of {tokens:,} tokens stand for characters that the tokenizer does not know")
    if repeated:
        notes.append(f"{repeated:,} training documents are in the validation source too")
    if not fraction and split.first_val == len(units):
        notes.append("there is no validation split, which training needs: --val-source or --val-fraction gives one")
    if split.cut is not None:
        notes.append(
            f"validation is the last {fraction:.3g} of the text, by position, with an end of text at the cut: "
            "the documents are too few or too unequal to choose some by a hash"
        )
    return notes
