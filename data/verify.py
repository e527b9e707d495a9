"""python -m data.verify FOLDER: Read its tokenizer, hash all its files. Status 0 if they are undamaged, else 2."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from data import DataError
from data.shards import check_files, read_index, verify_shards
from data.tokenizer import load_declared, load_tokenizer


def verify(folder: str | Path, log: Callable[[str], None] = print) -> None:
    """Check the tokenizer, and the sizes and hashes of all files of both splits. Logs a line for each file.

    Raises:
        DataError: for the first damaged file, with its name.
    """
    folder = Path(folder)
    index = read_index(folder)
    check_files(folder, index, *index["splits"])
    if index["end_of_text_id"] >= index["vocab_size"]:
        raise DataError(f"{folder / 'index.json'}: damaged, its end of text is not in its vocabulary")
    tok, end = load_tokenizer(folder), load_declared(folder).get("eos_token")
    if end is not None and tok.token_to_id(end) != index["end_of_text_id"]:
        raise DataError(f"{folder / 'tokenizer_config.json'}: its eos_token {end!r} is not the end of text of these shards")
    log("ok  tokenizer.json")
    for split in index["splits"]:
        for name, size in verify_shards(folder, index, split):
            log(f"ok  {name}  {size:,} bytes")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0, or 2 after an error."""
    parser = argparse.ArgumentParser(prog="python -m data.verify", description=__doc__.split(": ", 1)[1])
    parser.add_argument("folder", metavar="FOLDER")
    try:
        verify(parser.parse_args(arguments).folder)
    except (DataError, OSError) as error:
        print(f"data.verify: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
