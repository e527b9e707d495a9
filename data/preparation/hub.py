"""Data sets of the Hugging Face hub, streamed: nothing is downloaded ahead. Needs the package datasets."""

import functools
from collections.abc import Iterator

from data.errors import DataError


def hub_revision(name: str, revision: str | None) -> str:
    """The commit that a data set's name stands for now, so that one preparation reads one state throughout."""
    try:
        import huggingface_hub
    except ImportError:
        raise DataError(f"hub:{name} needs the package datasets: pip install datasets") from None
    try:
        return huggingface_hub.dataset_info(name, revision=revision).sha
    except Exception as error:  # the hub's client, HTTP and the socket each have their own
        raise _not_had(name, error) from None


@functools.lru_cache(maxsize=1)
def load_hub(name: str, config: str | None, split: str, revision: str):
    """The `datasets.IterableDataset` of one split."""
    try:
        import datasets
    except ImportError:
        raise DataError(f"hub:{name} needs the package datasets: pip install datasets") from None
    try:
        return datasets.load_dataset(name, config, split=split, revision=revision, streaming=True)
    except Exception as error:  # as above, and wrong configurations and splits as ValueError
        raise _not_had(name, error) from None


def hub_rows(name: str, config: str | None, split: str, revision: str, shards: int, index: int, key: str) -> Iterator:
    """The rows of one of the `shards` shards of a split, with the column `key` alone where the columns are known."""
    rows = load_hub(name, config, split, revision).shard(shards, index)
    if key in (rows.column_names or ()):
        rows = rows.select_columns([key])
    try:
        yield from rows
    except Exception as error:  # as above, and whatever the files hold
        raise _not_had(name, error) from None


def _not_had(name: str, error: Exception) -> DataError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return DataError(f"hub:{name} could not be had from the Hugging Face hub: {reason}")
