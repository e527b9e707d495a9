"""python -m data.verify FOLDER: hash every file of a prepared folder. Status 0 if all are whole, else 2."""

import argparse
import sys
from pathlib import Path

from data import DataError
from data.shards import check_sizes, check_tokenizer, read_index, verify_shards


def verify(folder: str | Path, log=print) -> None:
    """Check tokenizer, sizes and hashes of both splits, a line a file; DataError at the first that is wrong."""
    folder = Path(folder)
    index = read_index(folder)
    check_tokenizer(folder, index)
    log("ok  tokenizer.json")
    for split in index["splits"]:
        check_sizes(folder, index, split)
        for name, size in verify_shards(folder, index, split):
            log(f"ok  {name}  {size:,} bytes")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data.verify", description=verify.__doc__)
    parser.add_argument("folder", metavar="FOLDER")
    try:
        verify(parser.parse_args(arguments).folder)
    except (DataError, OSError) as error:
        print(f"data.verify: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
