"""Turns text into token shards, and token shards into batches whose order is a pure function of (seed, step).

text --prepare (preparation/)--> token shards --shards--> tokens --order, batches--> batches
"""


class DataError(ValueError):
    """An error that the user can correct: a wrong path, argument or file. The message is one line that names it."""


def first_line(error: Exception) -> str:
    """Return an error of another library on one line: the first lines of its first and second paragraph.

    The second paragraph is needed for huggingface_hub, whose errors begin with a status only.
    """
    paragraphs = (str(error).strip() or type(error).__name__).split("\n\n")
    return " ".join(paragraph.strip().splitlines()[0] for paragraph in paragraphs[:2] if paragraph.strip())


def printable(text: str) -> str:
    """Return a line that is safe for any terminal: characters that are not printable, such as line ends, are escaped."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
