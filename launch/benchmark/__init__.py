"""What is measured of this project: `python -m launch.benchmark SUBJECT` (docs/benchmarks.md).

Each subject is a module. The first line of its docstring says what it measures, ROUNDS how often by default (None: once), COLUMNS
how its rows are shown. `measure(args, device)` returns a note and the rows; `add_options`, where there is one, adds what it takes
on the command line. measure.py holds what they share: contestants in turns, peak memory, the rates of the machine, a table.
"""
