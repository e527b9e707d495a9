"""What a comparison says of runs whose settings were changed on their way, and of trials with another rule or other weights."""

import json
import shutil

import pytest
import yaml
from test_launch_compare_ladder import ladder, write  # noqa: F401

from celo2.rule_files import load_rule, save_rule
from launch.compare import __main__ as compare
from launch.compare.curves import read_run
from launch.compare.summary import caveats
from launch.compare.trials import Pool
from launch.run.agreement import rule_hash


def test_the_configuration_of_a_finished_run_is_that_of_its_steps(run):
    assert run("log.sample_tokens=0")[0] == 0
    config = run.tmp_path / "run" / "config.yaml"
    before = config.read_text()
    assert run("log.sample_tokens=0", "optimizer.lr=1e-3")[0] == 0 and config.read_text() == before
    assert not read_run(run.tmp_path / "run").changes
    assert run("log.sample_tokens=0", "optimizer.lr=1e-3", "train.steps=8")[0] == 0 and "lr: 0.001" in config.read_text()


def test_a_change_on_the_way_is_said(run):
    assert run("log.sample_tokens=0", "log.every=2")[0] == 0
    assert run("optimizer.lr=1e-3", "train.steps=8")[0] == 0
    found = read_run(run.tmp_path / "run")
    said = f"{found.folder} was changed on its way: optimizer.lr 0.005 -> 0.001 after step 6, train.steps 6 -> 8 after step 6."
    assert said in caveats([found], found.tokens)


def test_trials_of_another_rule_are_not_taken(ladder, tmp_path):  # noqa: F811
    """A rule's file was replaced: trials of the former one are refused, and of runs each rule is a contestant of its own."""
    mine = tmp_path / "mine.safetensors"
    words = ["--optimizers", f"celo2{{rule: {mine}}}", "--lrs", "1e-3", "--seeds", "2"]
    trials = tmp_path / "out" / "trials"

    def start(rule):
        save_rule(load_rule(rule), mine)
        return ladder(*words)

    assert start("celo2")[0] == 0
    runs = sorted(run for run in trials.glob("*/*") if run.name in ("lr_0.001_seed_1", "lr_0.001_seed_2"))
    for run in runs:
        save_rule(load_rule(mine), run / "rule.safetensors")  # as train.py does
    assert start("celo2")[0] == 0
    status, _, err = start("celo2-lm")
    assert status == 2 and err.count("\n") == 1
    said = f"{runs[0]} holds a run with another rule than {mine} now is: choose another --out, or bring back that rule, of"
    assert err == f"error: {said} which the folder has a copy (rule.safetensors)\n"
    save_rule(load_rule("celo2-lm"), runs[1] / "rule.safetensors")
    assert compare.main(["--runs", *map(str, runs), "--out", str(tmp_path / "runs")]) == 0
    labels = [row["label"] for row in json.loads((tmp_path / "runs" / "results.json").read_text())["optimizers"]]
    assert labels == [f"celo2 (rule content {rule_hash(load_rule(name))[:12]})" for name in ("celo2", "celo2-lm")]


def test_trials_from_other_weights_are_not_taken(ladder, run, tmp_path, monkeypatch):  # noqa: F811
    """`model.init` names a run that goes on: between two starts, and while the trials run."""
    words = ["--optimizers", "adamw", "--lrs", "1e-3", "--seeds", "1", f"model.init={tmp_path / 'run'}"]
    assert run("train.steps=3")[0] == 0
    assert ladder(*words)[0] == ladder(*words)[0] == 0
    path = tmp_path / "out" / "comparison.json"
    noted = json.loads(path.read_text())
    path.write_text(json.dumps({"data": noted["data"]}) + "\n")  # as an earlier version
    assert ladder(*words)[0] == 0 and json.loads(path.read_text()) == noted

    def go_on():
        assert run("train.steps=6")[0] == 0
        return []

    said = f"{tmp_path / 'out'} holds a comparison that began with other weights than model.init={tmp_path / 'run'} now has"
    monkeypatch.setattr(Pool, "run", lambda *_: go_on() or write(*_))
    for _ in range(2):
        status, _, err = ladder(*words)
        assert status == 2 and said in err and err.count("\n") == 1
    monkeypatch.setattr(Pool, "run", write)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    assert ladder(*words)[0] == 0  # all trials are finished
    (tmp_path / "elsewhere").rename(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000006")
    (tmp_path / "run" / "checkpoints" / "step_00000003" / "model.safetensors").write_bytes(b"")
    status, _, err = ladder(*words)
    assert status == 2 and "holds no whole checkpoint" in err and err.count("\n") == 1


def test_trials_of_an_earlier_version_with_options_that_scion_has_no_use_for(ladder, tmp_path):  # noqa: F811
    words = ["--optimizers", "scion", "--lrs", "1e-3", "--seeds", "1"]

    def rewrite(**options):
        for path in (tmp_path / "out" / "trials").glob("*/*/config.yaml"):
            tree = yaml.safe_load(path.read_text())
            tree["optimizer"] |= options
            path.write_text(yaml.safe_dump(tree))

    assert ladder(*words)[0] == 0
    rewrite(weight_decay=0.2, base_width=32)
    assert ladder(*words)[0] == 0
    rewrite(ema_nesterov=0.5)
    status, _, err = ladder(*words)
    assert status == 2 and "holds a run with optimizer.ema_nesterov=0.5" in err


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            ["lr", "weight_decay", "train.grad_clip"],
            "in steps of a factor 2 (lr, train.grad_clip) or 4 (weight_decay), then finer",
        ),
        (["weight_decay"], "in steps of a factor 4 (weight_decay), then finer"),
        (
            ["weight_decay", "schedule.final"],
            "in steps of a factor 4 (weight_decay), then finer; schedule.final over fixed values",
        ),
        (["schedule.final"], "schedule.final over fixed values"),
    ],
)
def test_the_report_says_how_keys_were_searched_and_what_lr_was(ladder, tmp_path, keys, said):  # noqa: F811
    words = ["--optimizers", "adamw{lr: 8e-3}", "muon", "--trials", "3", "--seeds", "1", "--search", *keys]
    assert ladder(*words)[0] == 0
    method = json.loads((tmp_path / "out" / "results.json").read_text())["method"]
    assert any(f"by coordinate descent with 3 trials, {said}. While any" in text for text in method), method
    assert ("The learning rate was not searched: 0.008 (adamw), 0.001 (muon)." in method) == ("lr" not in keys)


def test_settings_that_were_given_are_called_so(ladder, tmp_path):  # noqa: F811
    for words, what in (
        (["--lrs", "1e-3"], "learning rate was"),
        (["--search", "weight_decay", "--trials", "1"], "settings were"),
    ):
        assert ladder(*words, "--seeds", "1", "--out", str(tmp_path / what))[0] == 0
        method = json.loads((tmp_path / what / "results.json").read_text())["method"]
        assert f"The {what} given, not searched for. The runs have seed 1." in method
