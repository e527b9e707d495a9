"""What is measured of this project, each subject a module: `python -m launch.benchmark SUBJECT` (docs/benchmarks.md).

measure.py holds what they share: contestants in turns, peak memory, the rates of the machine, a table.
"""
