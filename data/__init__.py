"""Text into token shards, and token shards into batches whose order is a pure function of (seed, step).

text --prepare (preparation/)--> token shards --shards--> tokens --order, batches--> batches
"""

from data.errors import DataError

__all__ = ["DataError"]
