"""Metrics and schedule, which every kind of training shares. The loader's tests are in tests/configs."""

import json
import math

import pytest

from celo2.training.metrics import read_metrics, rewind
from celo2.training.schedule import cosine


def test_metrics_of_a_killed_run_are_read_and_rewound(tmp_path):
    """The last line is cut short: it is left out, and the rewritten file is whole."""
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text("".join(json.dumps({"step": i}) + "\n" for i in range(5)) + '{"step": 5, "lo')
    assert [record["step"] for record in read_metrics(path)] == [0, 1, 2, 3, 4]
    rewind(path, lambda record: record["step"] <= 2)
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n{"step": 2}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_no_record_is_left_out(tmp_path):
    """A file from somebody else, or from a damaged disk: lines that are not what a training writes change nothing."""
    path, nested = tmp_path / "metrics.jsonl", "[" * 100_000
    wrong = [
        "5",
        "null",
        "[]",
        '"x"',
        "{}",
        "NaN",
        nested,
        "9" * 5000,
        '{"step": "1"}',
        '{"step": null}',
        '{"step": -1}',
        "{",
        "",
    ]
    odd = '{"step": 2, "loss": NaN, "val_loss": 1e999, "lr": ' + "9" * 400 + ', "x": "<script>", "y": [1], "tokens": 7}'
    path.write_bytes("\n".join([*wrong, '{"step": 1, "loss": 2.5}', odd, *wrong]).encode() + b'\n{"a": "\xff"}\n')
    expected = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": None, "val_loss": None, "lr": None, "tokens": 7}]
    assert read_metrics(path) == expected
    rewind(path, lambda record: True)
    assert read_metrics(path) == expected and path.read_text().count("\n") == 2


def test_cosine_goes_from_one_to_final():
    assert [cosine(p, 0.1) for p in (0, 0.5, 1)] == pytest.approx([1, 0.55, 0.1])
    assert cosine(0.25, 0) == pytest.approx((1 + math.sqrt(0.5)) / 2)
