"""Optimizers compared on loss curves: equal searches, several seeds, a report that claims no more than it can.

contestants.py   what is compared: names, dotted paths, where their learning-rate grids begin
keys.py          what can be searched for (--search), and what a setting means; the search itself: celo2/training/search.py
comparison.py    which training runs a comparison asks for, in which order
trials.py        trials as ordinary runs in folders of their own, started, watched and reused
curves.py        a run read from its folder: where it stands, its curves, state bytes; interpolation and crossings
ladder.py        model sizes and budgets (--sizes); speedup.py: data speedups and their trend
target.py        tokens to a loss and a test (--target-loss); planning.py: how many seeds; sensitivity.py: what a search says
                 (intervals, tests and power: celo2/training/statistics.py)
summary.py       all numbers and sentences of the report, as one JSON object
report.py        the page and results.json; picture.py the same as PNG
sections.*       the page's sections on tuning, target and ladder, with charts.py
page.*           the page: a Jinja template, its style, and its script
vendor/          uPlot 1.6.32 (MIT), which draws the page's charts
__main__.py      python -m launch.compare
"""
