"""The parts of `python -m data.prepare`: what a source holds, reading it, encoding it in parallel, writing the shards.

sources, hub, stdlib (units of work) -> readers (documents) -> workers, encode (tokens of a unit) -> assemble (shards)
"""
