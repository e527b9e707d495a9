"""Text into token shards, and token shards into batches whose order is a pure function of (seed, step).

text --prepare (preparation/)--> token shards --shards--> tokens --order, batches--> batches
"""


class DataError(ValueError):
    """Something that the user can put right: a wrong path, argument or file. Its message is one line that names it."""


def first_line(error: Exception) -> str:
    """What another library's error says, on one line: the first of it, and of a second paragraph.

    The first paragraph of huggingface_hub's errors is a status alone.
    """
    paragraphs = (str(error).strip() or type(error).__name__).split("\n\n")
    return " ".join(paragraph.strip().splitlines()[0] for paragraph in paragraphs[:2] if paragraph.strip())


def printable(text: str) -> str:
    """A line that any terminal takes: line ends in names of files, and bytes of names that are not UTF-8, are escaped."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
