"""Benchmarks of this project: `python -m launch.benchmark SUBJECT` (docs/benchmarks.md).

Each subject is a module. The first line of its docstring says what it measures, ROUNDS how often by default (None: once), COLUMNS
how the table shows its rows. `measure(args, device)` returns a note and the rows; `add_options`, if there is one, adds its
command-line options. measure.py holds what they share: contestants in turns, peak memory, the rates of the machine, a table.
"""
