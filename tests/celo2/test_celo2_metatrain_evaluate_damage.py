"""What must not spoil an evaluation: files that change, files of somebody else, runs that diverge, stops, nothing to do."""

import errno
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from celo2 import load_rule, save_rule
from celo2.metatrain import evaluate
from celo2.metatrain.evaluate import Row, read_records
from celo2.metatrain.evaluation import picture
from celo2.metatrain.evaluation.suite import content_of
from celo2.training.configuration import ConfigError

LINE = json.dumps({"task": "gpt", "loss": 2.5, "curve": [3.0, 2.5]})


@pytest.fixture
def words(tmp_path):
    """Arguments of an evaluation that takes a second."""
    (tmp_path / "text.txt").write_bytes(bytes(np.random.default_rng(0).integers(97, 105, 12_000, np.uint8)))
    words = ["--tasks", "gpt-tiny", "--text", str(tmp_path / "text.txt"), "--steps", "2", "--trials", "1", "--seeds", "2"]
    return [*words, "--out", str(tmp_path / "runs.jsonl")]


def test_a_rule_file_that_changes_meanwhile_changes_nothing(words, tmp_path, monkeypatch, capsys):
    """Every run is trained with the rule whose digest its line has."""
    path = tmp_path / "mine.safetensors"
    save_rule(load_rule("celo2"), path)
    expected, trained, train = content_of(load_rule("celo2")), [], evaluate.train

    def spy(task, data, optimizer, **how):
        trained.append(content_of(optimizer))
        save_rule(load_rule("hand-nesterov"), path)
        return train(task, data, optimizer, **how)

    monkeypatch.setattr(evaluate, "train", spy)
    assert evaluate.main([str(path), "--baselines", "", *words]) == 0
    records = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert trained == [record["rule_sha256"] for record in records] == [expected] * 2
    capsys.readouterr()


@pytest.mark.parametrize(
    ("content", "after"),
    [
        (LINE, f"{LINE}\n"),  # its newline alone is missing
        (f"{LINE}\n{LINE}", f"{LINE}\n{LINE}\n"),
        (f"{LINE}\n{LINE[:-9]}", f"{LINE}\n"),  # as a kill leaves it
        (LINE[:-9], ""),
        (LINE[:4], ""),
        (f'{LINE}\n{{"loss": 2', f"{LINE}\n"),
    ],
)
def test_a_last_line_without_its_newline(content, after, tmp_path):
    """A whole one is kept, a torn one is cut off."""
    path = tmp_path / "runs.jsonl"
    path.write_text(content)
    records = read_records(path)
    assert path.read_text() == after and len(records) == after.count("\n")
    assert all(record["loss"] == 2.5 for record in records)


@pytest.mark.parametrize(
    "content",
    ['{"a": 1}', '{"a": 1', "[1, 2]", f'{LINE}\n{{"a": 1}}', f"{LINE}\nnotes", f'{{"a": 1}}\n{LINE[:-9]}', "[" * 100_000],
)
def test_a_file_of_somebody_else_stays_as_it_is(content, tmp_path):
    path = tmp_path / "precious.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"precious\.json: not a file of training runs"):
        read_records(path)
    assert path.read_text() == content


def test_the_picture_leaves_out_what_diverged(words, tmp_path, monkeypatch, capsys):
    """A run that diverges after twenty losses, or in validation, has a curve as long as the others'."""
    row = Row("gpt", "muon", {}, (), {3: 2.0, 4: math.inf, 5: math.nan}, {3: [1.0], 4: [2.0], 5: [3.0]})
    assert row.whole_curves() == {3: [1.0]}
    losses, drawn = iter([2.0, 2.0, math.inf, 2.0]), []
    monkeypatch.setattr(evaluate, "train", lambda *_, **__: {"loss": next(losses), "curve": [3.0] * 20})
    monkeypatch.setattr(evaluate, "draw", lambda tasks, steps, path: drawn.append(tasks))
    assert evaluate.main(["--baselines", "adamw,muon", "--picture", str(tmp_path / "gain.png"), *words]) == 0
    (found,) = drawn[0].values()
    assert len(picture.gains(found["muon"], found["adamw"])) == 1 and set(found["muon"]) == {2}
    capsys.readouterr()


def test_an_interrupted_evaluation_says_how_it_goes_on(words, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "train", interrupted)
    assert evaluate.main(words) == 130
    assert capsys.readouterr().err == "interrupted; run the same command again to add the missing runs\n"


def test_a_full_disk_is_one_line(words, monkeypatch, capsys):
    opened = Path.open

    def full(path, mode="r", **options):
        if mode == "a":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return opened(path, mode, **options)

    monkeypatch.setattr(Path, "open", full)
    assert evaluate.main(words) == 2
    message = "No space left on device: fix this and run the same command again; it adds the missing runs"
    assert capsys.readouterr().err == f"error: --out {words[-1]}: {message}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--baselines", ""], "nothing to evaluate: name a RULE, or some --baselines"),
        (["--tasks", ""], "--tasks is empty, expected some of gpt-tiny, gpt, gpt-wide, rnn, vit, conv, autoencoder"),
        (
            ["--baselines", "muon", "--picture", "gain.png"],
            "--picture gain.png: expected two optimizers or more: it draws the gain over the first one",
        ),
        (
            ["--baselines", "muon,foo"],
            "--baselines foo: expected adamw, muon, hand-momentum, hand-nesterov, hand-agreement, hand-whitened, "
            "adam-orthogonalized, or a rule (no rule 'foo': neither ",
        ),
        (["x" * 300], f"rule '{'x' * 300}': File name too long"),
        (["--tasks", "vit", "--images", "{folder}/four.npz"], "four.npz: 4, expected at least 10, to keep some for validation"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(arguments, message, words, tmp_path, capsys):
    np.savez(tmp_path / "four.npz", a_images=np.random.default_rng(0).random((4, 8, 8)), a_labels=np.arange(4))
    arguments = [word.replace("{folder}", str(tmp_path)) for word in arguments]
    assert evaluate.main([*words, *arguments]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0]
