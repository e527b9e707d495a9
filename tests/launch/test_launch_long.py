"""Long projects: batch sizes that grow, a length in tokens, decays that branch off a trunk, more steps than there were."""

import json

import pytest
import yaml
from bad_gradients import Poison
from stopping import StopIn

from celo2.training.configuration import Written
from configs.load import ConfigError, build, load_config
from configs.schema import Schedule
from data.batches import Batches
from data.shards import TokenShards
from launch.monitoring.signals import STOPPED
from launch.run.check import check
from launch.run.schedule import lr_factor

RAMP = ["train.steps=10", "train.ramp={3: 16, 7: 24}", "checkpoint.every=0", "eval.every=0"]
RAMP += ["log.sample_tokens=0", "train.micro_batch_size=3"]
SIZES = [8] * 3 + [16] * 4 + [24] * 3


def training(records):
    return {r["step"]: r for r in records if "loss" in r}


def losses(records):
    return {step: r["loss"] for step, r in training(records).items()}


def rates(records):
    return [r["lr"] for r in training(records).values()]


def events(folder, name):
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [event for event in lines if event["event"] == name]


def resolved(folder):
    return yaml.safe_load((folder / "config.yaml").read_text())


def test_a_ramp_resumes_rolls_back_and_counts(run, prepared):
    shards = TokenShards(prepared, "train")
    status, whole, _ = run(*RAMP, folder="whole")
    assert status == 0 and "24 x 32 tokens a step at the end (train.ramp: 8, 16 from step 3 on, 24 from step 7 on)" in run.out
    taken, position = [], 0
    for step, size in enumerate(SIZES):  # a constant batch that begins there is the reference
        taken.append(Batches(shards, 32, size, 1, step, position).n_targets(step))
        position += size
    tokens = [r["tokens"] for r in training(whole).values()]
    assert tokens == [sum(taken[: step + 1]) for step in range(10)]

    status, _, _ = run(*RAMP, hooks=StopIn(5), folder="parts")
    assert status == STOPPED
    _, parts, _ = run(*RAMP, folder="parts")
    assert losses(parts) == losses(whole) and [r["tokens"] for r in training(parts).values()] == tokens
    # Another number of sequences from here on is refused; a ramp that differs in the past alone is none.
    status, _, err = run(*RAMP, "train.steps=12", "train.ramp={3: 16, 7: 24, 11: 32}", folder="parts")
    assert status == 2 and "train.ramp is 8, 16 from step 3 on, 24 from step 7 on in the checkpoint" in err
    assert "Restore train.batch_size=8 'train.ramp={3: 16, 7: 24}' or train.on_batch_change=allow" in err
    options = [*RAMP, "train.steps=12", "train.ramp=null", "train.batch_size=24"]
    status, plain, _ = run(*options, folder="parts")
    assert status == 0 and training(plain)[12]["tokens"] == tokens[-1] + 2 * 24 * 32

    # Two bad steps, 7 and 8, of 16 and 24 sequences: back to step 5, past these and step 6, and on with the sizes of their steps.
    bad = ["train.on_spike=rollback", "train.max_bad_steps=2", "train.spike=0", "checkpoint.every=5"]
    run(*RAMP, *bad, hooks=Poison({7, 8}), folder="back")
    (rolled,) = events(run.tmp_path / "back", "rollback")
    assert (rolled["step"], rolled["sequences_left_out"]) == (5, 16 + 16 + 24)
    state = json.loads((run.tmp_path / "back/checkpoints/step_00000010/state.json").read_text())
    assert state["sequences"] == sum(SIZES) + 16 + 16 + 24


def test_a_ramp_that_cannot_be_is_refused(run, prepared):
    for option, message in (
        ("train.ramp={0: 16}", "train.ramp has the key 0, expected a step from which on a batch size holds, 1 or above"),
        ("train.ramp={2.5: 16}", "train.ramp has the key 2.5"),
        ("train.ramp={4: 0}", "train.ramp.4 is 0, expected a number of sequences, 1 or above"),
        ("train.ramp={2: 99999999999}", "train.ramp.2 is 99999999999, expected at most 16777216 sequences"),
        ("train.batch_size=9999999999", "train.batch_size is 9999999999, expected at least 1 and at most 16777216"),
        ("train.ramp=16", "expected a mapping"),
        ("train.tokens=0", "train.tokens is 0, expected at least 1"),
    ):
        status, _, err = run(option)
        assert status == 2 and message in err and err.count("\n") == 1, option


def test_changes_that_the_run_does_not_reach_are_noted():
    config = build({"train": {"steps": 9, "ramp": {3: 16, 9: 24}}, "data": {"mix": [{"dir": "a", "weight": {0: 1, 20: 2}}]}})
    notes = check(config, Written(set(), set()), 1)
    assert notes == [
        "train.ramp changes at step 9, which the run with train.steps=9 does not reach",
        "data.mix[0].weight changes at step 20, which the run with train.steps=9 does not reach",
    ]


def test_tokens_instead_of_steps(run, prepared, tmp_path):
    status, records, _ = run("train.tokens=2000", "train.ramp={3: 16}", "log.sample_tokens=0")  # 256 x 3 + 512 x 3
    assert status == 0 and training(records).keys() == {1, 2, 3, 4, 5, 6}
    assert resolved(run.tmp_path / "run")["train"]["steps"] == 6
    file = tmp_path / "own.yaml"
    file.write_text("model: {context: 32}\ntrain: {tokens: 1_000, batch_size: 8}\n")
    assert load_config(file).train.steps == 4
    assert load_config(file, ["train.tokens=1025"]).train.steps == 5
    assert load_config(file, ["train.steps=7"]).train.steps == 7  # the command line decides
    assert load_config(file, ["model.context=null", "model.size=gpt3-tiny"]).train.steps == 1
    own = load_config(tmp_path / "run" / "config.yaml", ["train.tokens=1e4"])
    assert own.train.steps == 3 + -(-(10_000 - 3 * 256) // 512)
    with pytest.raises(ConfigError, match=r"train.steps is 7, but train.tokens=1000 are 4 steps: give one of them"):
        load_config(file, ["train.steps=7", "train.tokens=1000"])
    with pytest.raises(ConfigError, match=r"train.tokens needs model.context"):
        load_config(file, ["model.context=null"])


TRUNK = ["schedule.kind=constant", "schedule.warmup=0.2", "train.steps=10", "checkpoint.every=2", "checkpoint.keep=9"]
TRUNK += ["eval.every=0", "log.sample_tokens=0"]


def test_decays_from_one_trunk(run):
    _, trunk, _ = run(*TRUNK, folder="trunk")
    checkpoint = f"checkpoint.resume={run.tmp_path}/trunk/checkpoints/step_00000006"
    decay = [*TRUNK, checkpoint, "schedule.cooldown=5", "schedule.final=0"]
    status, whole, _ = run(*decay, folder="whole")
    assert status == 0 and "the learning rate is now" not in run.out
    assert rates(whole)[:6] == rates(trunk)[:6] and rates(whole)[6:] == pytest.approx([5e-3 * f for f in (0.8, 0.6, 0.4, 0.2, 0)])
    settings = resolved(run.tmp_path / "whole")
    assert settings["train"]["steps"] == 11 and settings["schedule"]["start"] == 6

    # Stopped, and continued by the same command, by its own config.yaml and by `auto`: one branch, the same numbers.
    assert run(*decay, folder="parts", hooks=StopIn(8))[0] == STOPPED
    assert run(*decay, folder="parts", hooks=StopIn(9))[0] == STOPPED
    own = [f"schedule.{key}={value}" for key, value in resolved(run.tmp_path / "parts")["schedule"].items() if key != "decay"]
    assert run(*decay, *own, "train.steps=11", folder="parts", hooks=StopIn(10))[0] == STOPPED
    status, parts, _ = run(*[option for option in decay if option != checkpoint], folder="parts")
    assert status == 0 and losses(parts) == losses(whole)
    assert not (run.tmp_path / "parts" / "set_aside").exists()

    status, _, err = run(*TRUNK, "schedule.cooldown=5", folder="trunk")
    assert status == 2 and "schedule.cooldown=5 begins at a checkpoint: name one" in err
    late = f"checkpoint.resume={run.tmp_path}/whole/checkpoints/step_00000008"
    status, _, err = run(*TRUNK, late, "schedule.cooldown=5", folder="late")
    assert status == 2 and "the checkpoint of step 8 is 0.6 of its peak" in err
    status, _, err = run(*decay, "--plan", folder="planned")
    assert status == 0 and "tokens      11 steps" in run.out and not (run.tmp_path / "planned").exists()


def test_more_steps_than_there_were(run):
    """The schedule over all steps is another one, which is said; or it begins anew where the run ended."""
    options = [*TRUNK, "schedule.kind=cosine", "schedule.final=0.1"]
    run(*options)
    status, records, _ = run(*options, "train.steps=20")
    assert status == 0
    assert rates(records)[10:] == [5e-3 * lr_factor(Schedule("cosine", 0.2, 0.1), step, 20) for step in range(10, 20)]
    note = (
        f"the learning rate is now {rates(records)[10]:.3g}: cosine over 20 steps. With the schedule of the checkpoint, cosine "
    )
    assert f"{note}which ended at step 10, it would be 0.0005 (schedule.start=10 starts the new schedule at this step)" in run.out
    status, records, _ = run(*options, "train.steps=30", "schedule.start=20")
    expected = [5e-3 * lr_factor(Schedule("cosine", 0.2, 0.1), step, 10) for step in range(10)]
    assert status == 0 and rates(records)[20:] == expected
    status, _, err = run(*options, "train.steps=40", "schedule.start=31")
    assert status == 2 and "schedule.start is 31, but the run resumes after step 30" in err
    status, _, err = run(*options, "schedule.start=2", folder="new")
    assert status == 2 and "schedule.start is 2, but the run begins at step 0" in err
