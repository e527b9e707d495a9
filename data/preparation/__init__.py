"""The parts of `python -m data.prepare`. The code uses five words:

document    one text; its tokens end with the end-of-text token.
piece       the input of one call of a reader: a small file, a byte range of a large one, a row group, a part of a hub data set.
unit        consecutive pieces with about 16 MiB of text. One process encodes a unit; an interrupted unit is repeated.
window      16 KiB of a large text file. Such a file has no documents of its own, so one document begins in each window.
shard       a file of token ids, NAME.bin, and the starts of its documents, NAME.docs.bin. data.shards reads shards.

listing, hub, stdlib -> sources (units) -> readers (documents) -> encode, workers (tokens of a unit) -> split, assemble (shards);
output manages the state of an output folder, progress shows how much is done.
"""
