"""Text into token shards, and token shards into batches whose order is a pure function of (seed, step).

text --prepare (preparation/)--> token shards --shards--> tokens --order, batches--> batches
"""


class DataError(ValueError):
    """Something that the user can put right: a wrong path, argument or file. Its message is one line that names it."""


def first_line(error: Exception) -> str:
    """What another library's error says, on one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
