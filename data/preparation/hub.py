"""Streams data sets of the Hugging Face hub, without downloading them first. Needs the package datasets."""

import functools
from collections.abc import Iterator

from data import DataError, first_line


def hub_revision(name: str, revision: str | None) -> str:
    """Return the current commit of a data set, so that a preparation reads the same version until its end."""
    try:
        import huggingface_hub

        return huggingface_hub.dataset_info(name, revision=revision).sha or ""
    except Exception as error:  # the hub's client, HTTP and the socket raise errors of their own
        raise _unreadable(name, error) from None


@functools.lru_cache(maxsize=1)
def load_hub(name: str, config: str | None, split: str, revision: str):
    """Return the `datasets.IterableDataset` of one split."""
    try:
        import datasets

        return datasets.load_dataset(name, config, split=split, revision=revision, streaming=True)
    except Exception as error:  # as above, and ValueError for a wrong configuration or split
        raise _unreadable(name, error) from None


def hub_rows(name: str, config: str | None, split: str, revision: str, parts: int, index: int, key: str) -> Iterator[dict]:
    """Yield the rows of part `index` of the `parts` parts of a split; only the column `key`, if the columns are known."""
    rows = load_hub(name, config, split, revision).shard(parts, index)
    if key in (rows.column_names or ()):
        rows = rows.select_columns([key])
    try:
        yield from rows
    except Exception as error:  # as above, and errors in the files
        raise _unreadable(name, error) from None


def _unreadable(name: str, error: Exception) -> DataError:
    if isinstance(error, ImportError) and error.name in ("datasets", "huggingface_hub"):
        return DataError(f"hub:{name} needs the package datasets: pip install datasets")
    return DataError(f"hub:{name} cannot be read from the Hugging Face hub: {first_line(error)}")
