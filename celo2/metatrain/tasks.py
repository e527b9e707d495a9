"""The data of the inner problems: small greyscale images of several data sets in one array, and texts in another.

A source is `digits` (1,797 images that come with scikit-learn), `hub:NAME` (an image data set of the Hugging Face hub, resized
to 8 × 8 greyscale), or `FILE.npz` with arrays `NAME_images` (N, 8, 8) and `NAME_labels` (N,), all of them or `FILE.npz:NAME`;
or `text:FILE`, a .txt, or a .jsonl or .jsonl.gz whose lines have "text". A text is its ASCII bytes; all others become 0.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from celo2.training.configuration import ConfigError

SIDE, CLASSES = 8, 10
VOCABULARY = 128  # different bytes
TEXT = "text:"
HUB_IDS = {
    "mnist": ("ylecun/mnist", None),
    "fashion_mnist": ("zalando-datasets/fashion_mnist", None),
    "cifar10": ("uoft-cs/cifar10", None),
    "svhn": ("ufldl-stanford/svhn", "cropped_digits"),
}


@dataclass(frozen=True)
class Data:
    """The examples of all tasks of one kind, task after task.

    Attributes:
        kind: "images" or "text".
        arrays: pixels float32 (N, 64), each data set with mean 0 and standard deviation 1 over all of its pixels, and labels
            int64 (N,), 0 to 9; or tokens uint8 (n,), below VOCABULARY.
        starts, counts: first example and number of examples of each task. An example of a text is a window of inputs and
            their targets, named by its first byte.
        names: one per task.
    """

    kind: str
    arrays: tuple[np.ndarray, ...]
    starts: np.ndarray
    counts: np.ndarray
    names: tuple[str, ...]

    def digests(self) -> dict[str, str]:
        """A digest of all data of each task, by name."""
        ends, found = [*self.starts[1:], len(self.arrays[0])], {}
        for name, start, end in zip(self.names, self.starts, ends, strict=True):
            content = b"".join(x[start:end].tobytes() for x in self.arrays)
            found[name] = hashlib.sha256(content).hexdigest()[:16]
        return found


def load_data(sources: Sequence[str], context: int = 32) -> list[Data]:
    """The images of `sources`, if any, then the texts, if any; `context`: the longest sequence that the tasks use.

    Raises:
        ConfigError: as `load_images` and `load_texts`.
    """
    texts = [source for source in sources if source.startswith(TEXT)]
    images = [source for source in sources if not source.startswith(TEXT)]
    return ([load_images(images)] if images else []) + ([load_texts(texts, context)] if texts else [])


def load_images(sources: Sequence[str]) -> Data:
    """The data sets of `sources`, in their order.

    Raises:
        ConfigError: a source that is unknown, cannot be read, or is not 8 × 8 images of finite pixels with ten classes.
    """
    sets = [found for source in sources for found in read_source(source)]
    pixels, labels = [], []
    for name, x, y in sets:
        if x.ndim != 3 or x.shape[1:] != (SIDE, SIDE) or y.shape != x.shape[:1] or len(x) == 0:
            raise ConfigError(f"task {name}: images {x.shape} and labels {y.shape}, expected (N, 8, 8) and (N,)")
        if not (is_real(x) and np.isfinite(x).all()):
            raise ConfigError(f"task {name}: images of {x.dtype}, expected pixels that are finite numbers")
        if not (is_real(y) and (y == np.floor(y)).all()):
            raise ConfigError(f"task {name}: labels of {y.dtype}, expected whole numbers")
        if y.min() < 0 or y.max() >= CLASSES:
            raise ConfigError(f"task {name}: labels from {y.min()} to {y.max()}, expected 0 to {CLASSES - 1}")
        x = x.reshape(len(x), -1).astype(np.float64)
        if not x.std() > 0:
            raise ConfigError(f"task {name}: every pixel has the same value")
        pixels.append(((x - x.mean()) / x.std()).astype(np.float32))
        labels.append(y.astype(np.int64))
    counts = np.array([len(x) for x in pixels])
    arrays, names = (np.concatenate(pixels), np.concatenate(labels)), tuple(name for name, _, _ in sets)
    return Data("images", arrays, np.cumsum(counts) - counts, counts, names)


def is_real(x: np.ndarray) -> bool:
    """Whether an array holds real numbers."""
    return x.dtype.kind in "biuf"


def load_texts(sources: Sequence[str], context: int = 32) -> Data:
    """The texts of the sources `text:FILE`, in their order, for windows of at most `context` inputs.

    Raises:
        ConfigError: a file is of another kind, cannot be read, or is shorter than a window.
    """
    texts = [read_tokens(source, context + 1) for source in sources]
    sizes = np.array([len(tokens) for tokens in texts])
    names = tuple(Path(source.removeprefix(TEXT)).name.partition(".")[0] for source in sources)
    return Data("text", (np.concatenate(texts),), np.cumsum(sizes) - sizes, sizes - context, names)


def read_tokens(source: str, least: int) -> np.ndarray:
    """The tokens (n,) of a source `text:FILE`, which must be at least `least`."""
    path = Path(source.removeprefix(TEXT))
    if not (path.suffix == ".txt" or path.name.removesuffix(".gz").endswith(".jsonl")):
        raise ConfigError(f"task '{source}': expected text:FILE with FILE a .txt, .jsonl or .jsonl.gz")
    tokens = np.frombuffer(read_text(path, least), np.uint8)
    return np.where(tokens < VOCABULARY, tokens, 0).astype(np.uint8)


def read_text(path: Path, least: int) -> bytes:
    """The bytes of a text file, or of the `text` of every line of a .jsonl or .jsonl.gz, for tasks and for the evaluation.

    `data.preparation` has a reader of its own, which streams and resumes: `data` and `celo2` do not import each other.

    Raises:
        ConfigError: it cannot be read, or is shorter than `least` bytes.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if path.name.removesuffix(".gz").endswith(".jsonl"):
            raw = "\n\n".join(json.loads(line)["text"] for line in raw.splitlines()).encode()
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"text {path}: cannot be read ({type(error).__name__}: {error})") from None
    if len(raw) < least:
        raise ConfigError(f"text {path}: {len(raw)} bytes, expected at least {least}")
    return raw


def read_source(source: str) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """(name, images (N, 8, 8), labels (N,)) of every data set in a source."""
    if source == "digits":
        return [read_digits()]
    if source.startswith("hub:"):
        return [read_hub(source.removeprefix("hub:"))]
    path, separator, name = source.rpartition(":") if not source.endswith(".npz") else (source, "", "")
    if path.endswith(".npz"):
        return read_npz(Path(path), name if separator else None)
    raise ConfigError(f"task '{source}': expected digits, hub:NAME, FILE.npz, FILE.npz:NAME or text:FILE")


def read_digits() -> tuple[str, np.ndarray, np.ndarray]:
    """The handwritten digits that come with scikit-learn; nothing is downloaded."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError("task 'digits' needs scikit-learn: pip install scikit-learn") from None
    digits = load_digits()
    return "digits", digits.images, digits.target


def read_npz(path: Path, name: str | None) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """One data set of an .npz file, or all of them in alphabetical order."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = sorted(key.removesuffix("_images") for key in arrays if key.endswith("_images"))
            if name is not None and name not in names:
                raise ConfigError(f"task {path}:{name}: no such data set; the file holds {', '.join(names) or 'none'}")
            if not names:
                raise ConfigError(f"task {path}: no array NAME_images in the file")
            return [(n, arrays[f"{n}_images"], arrays[f"{n}_labels"]) for n in ([name] if name else names)]
    except ConfigError:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise many types for a damaged file, and for one of another kind
        says = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"task {path}: cannot be read ({says})") from None


def read_hub(name: str) -> tuple[str, np.ndarray, np.ndarray]:
    """The training split of an image data set of the hub, as 8 × 8 greyscale averaged over the area of each pixel."""
    if name not in HUB_IDS:
        raise ConfigError(f"task 'hub:{name}': expected one of {', '.join(HUB_IDS)}")
    try:
        from datasets import load_dataset
        from PIL.Image import Resampling
    except ImportError as error:
        raise ConfigError(f"task 'hub:{name}' needs the package {error.name}: pip install datasets pillow") from None
    try:
        split = load_dataset(*HUB_IDS[name], split="train")
    except Exception as error:  # datasets raises many types, of several packages, for no network and no such data set
        says = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"task 'hub:{name}': cannot be loaded ({says}); without a network, give an .npz file") from None
    image_key, label_key = ("img", "label") if "img" in split.column_names else ("image", "label")
    images = [np.asarray(image.convert("L").resize((SIDE, SIDE), Resampling.BOX)) for image in split[image_key]]
    return name, np.stack(images), np.asarray(split[label_key])
