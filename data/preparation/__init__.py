"""The parts of `python -m data.prepare`. Five words, each with one meaning:

document    one text; its tokens end with the end-of-text token.
piece       what a reader reads in one go: a small file, a byte range of a large one, a row group, one part of a hub data set.
unit        consecutive pieces with about 16 MiB of text. One process encodes a unit; an interrupted unit is done again.
window      16 KiB of a large text file, which has no documents of its own: one document begins in each window.
shard       a file of token ids, NAME.bin, and the starts of its documents, NAME.docs.bin: what data.shards reads.

listing, hub, stdlib -> sources (units) -> readers (documents) -> encode, workers (tokens of a unit) -> split, assemble (shards);
output keeps the state of an output folder, progress shows how far it is.
"""
