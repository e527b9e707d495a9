"""Optimizers compared on loss curves: equal searches, several seeds, a report that claims no more than it can.

contestants.py   what is compared: names, dotted paths, where their learning-rate grids begin
search.py        the learning-rate search, as pure functions of what was tried
trials.py        trials as ordinary runs in folders of their own, started, watched and reused
curves.py        a run read from its folder: where it stands, its curves, state bytes; interpolation and crossings
statistics.py    Student's t: intervals, paired and unpaired tests, Holm's correction
summary.py       all numbers and sentences of the report, as one JSON object
report.py        the page and results.json; picture.py the same as PNG
page.*           the page: a Jinja template, its style, and its script
vendor/          uPlot 1.6.32 (MIT), which draws the page's charts
__main__.py      python -m launch.compare
"""
