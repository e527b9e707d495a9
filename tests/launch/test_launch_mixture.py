"""Training on `data.mix`: what is said, what is counted, and how it goes on."""

import json

import pytest
import torch
from bad_gradients import Poison
from safetensors.torch import load_file
from stopping import StopIn

from configs.load import ConfigError, load_config, to_yaml
from data.prepare import prepare
from launch.run.mixture import how_to_end
from launch.run.ranks import facts_of, first_difference
from launch.run.setup import open_data

SMALL = ["train.steps=6", "eval.every=3", "log.sample_tokens=0", "train.batch_size=8", "checkpoint.every=2", "checkpoint.keep=9"]


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A second source with the same tokenizer."""
    folder = tmp_path_factory.mktemp("second")
    (folder / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"{n} green bottles {'hang on ' * n}"}) + "\n" for n in range(60))
    )
    options = {"tokenizer": "bytes", "val_fraction": 0.2, "workers": 1, "log": lambda line: None}
    return prepare(str(folder / "text.jsonl"), folder / "bottles", **options)


def mix(*sources) -> list[str]:
    return ["data.dir=null", f"data.mix=[{', '.join(f'{{dir: {folder}, weight: {weight}}}' for folder, weight in sources)}]"]


def losses(records):
    return [(record["step"], record.get("loss"), record.get("val_loss")) for record in records]


def test_said_counted_and_continued_bit_for_bit(run, prepared, other):
    sources = mix((prepared, "{0: 0.75, 4: 0.5}"), (other, "{0: 0.25, 4: 0.5}"))
    status, whole, _ = run(*SMALL, *sources, folder="whole")
    assert status == 0
    assert "data.mix: bytes has " in run.out and "tokens and 0.75, 0.5 from step 4 on of the sequences: " in run.out
    assert "data.mix: sequences taken until step 6: bytes 32 (" in run.out and "bottles 16 (" in run.out
    last = next(record for record in whole if record["step"] == 6 and "loss" in record)
    assert 0 < last["epochs/bottles"] < 1 and 0 < last["epochs/bytes"] < 1
    # Stopped after step 2; the rest in micro-batches of 2.
    run(*SMALL, *sources, folder="parts", hooks=StopIn(2))
    _, parts, _ = run(*SMALL, *sources, folder="parts")
    assert losses(parts) == losses(whole)
    states = [json.loads((run.tmp_path / f / "checkpoints/step_00000006/state.json").read_text()) for f in ("whole", "parts")]
    assert states[0]["sources"] == states[1]["sources"] and sum(states[0]["sources"].values()) == 48
    # Other weights go on, and it is noted; other sources do not.
    status, _, _ = run(*SMALL, "train.steps=7", *mix((prepared, 1), (other, 3)), folder="parts")
    assert status == 0 and "data.mix " in run.out and "sequences taken until step 7: bytes 34 (" in run.out
    _, _, err = run(*SMALL, "train.steps=8", *mix((prepared, 1)), folder="parts")
    assert err.count("\n") == 1 and "the data set of data.mix is " in err and f"({prepared}, {other}) in the checkpoint" in err
    # What the message says ends the source.
    ended = f"{{dir: {other}, weight: {{0: 3, 7: 0}}}}"
    assert f"(a source ends at a step by its weight: {ended}); or " in err
    assert run(*SMALL, "train.steps=8", *mix((prepared, 1), (other, "{0: 3, 7: 0}")), folder="parts")[0] == 0
    assert "sequences taken until step 8: bytes 42 (" in run.out and "bottles 22 (" in run.out
    status, _, err = run(*SMALL, "train.steps=8", folder="parts")
    assert (
        status == 2
        and "the data set of data.dir is " in err
        and f"data.mix=the sources {prepared}, {other} of the data set " in err
    )


def test_how_a_source_that_is_left_out_ends():
    a, b = {"dir": "a", "weight": 1}, {"dir": "b", "weight": {"0": 0.5, "20": 2, "100": 1}}
    end = " (a source ends at a step by its weight: {dir: b, weight: {0: 0.5, 20: 2, 50: 0}})"
    assert how_to_end({"mix": [a, b]}, {"mix": [a]}, 50) == how_to_end({"mix": [a, b]}, {"dir": "a", "mix": None}, 50) == end
    assert (
        how_to_end({"mix": [b, a]}, {"mix": [b]}, 0) == " (a source ends at a step by its weight: {dir: a, weight: {0: 1, 1: 0}})"
    )
    for now in ({"mix": [a, b]}, {"mix": [a, {"dir": "c", "weight": 1}]}, {"dir": "c"}, {"dir": None}):
        assert how_to_end({"mix": [a, b]}, now, 50) == ""
    assert how_to_end({"dir": "a"}, {"mix": [b]}, 50) == ""


def test_a_mixture_after_a_rollback(run, prepared, other):
    """The run that rolled back equals, bit for bit, one that was never disturbed and begins at the checkpoint it went back to."""
    sources = mix((prepared, "{0: 0.75, 5: 0.25}"), (other, "{0: 0.25, 5: 0.75}"))
    options = [*SMALL, *sources, "eval.every=0", "train.steps=8", "checkpoint.every=4"]
    bad = ["train.on_spike=rollback", "train.max_bad_steps=2"]
    status, back, _ = run(*options, *bad, folder="back", hooks=Poison([6, 7]))
    assert status == 0 and "rolled back to step 4; the 24 sequences since then are left out" in run.out
    checkpoints = run.tmp_path / "back" / "checkpoints"
    status, on, _ = run(*options, f"checkpoint.resume={checkpoints / 'step_00000004'}", folder="on")
    assert status == 0 and losses(on) == losses(back)
    folders = [checkpoints, run.tmp_path / "on" / "checkpoints"]
    weights = [load_file(folder / "step_00000008/model.safetensors") for folder in folders]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    counts = [json.loads((folder / "step_00000008/state.json").read_text())["sources"] for folder in folders]
    # 5 steps by the first weights, and 2 + 4 by the others: those that were left out (5, 6, 7) count, and step 5 comes twice.
    assert counts[0] == counts[1] and sum(counts[0].values()) == (8 + 3) * 8
    last = [next(r for r in records if r["step"] == 8 and "loss" in r) for records in (on, back)]
    assert last[0]["epochs/bottles"] == last[1]["epochs/bottles"] > 0


def test_ranks_compare_sources_and_weights(prepared, other, tmp_path):
    def facts(*sources):
        (tmp_path / "c.yaml").write_text("")
        config = load_config(tmp_path / "c.yaml", mix(*sources))
        return [fact for fact in facts_of(config, config, open_data(config)[0], None, tmp_path) if "data" in fact.name]

    one = facts((prepared, 7), (other, 3))
    assert first_difference(["a", "b"], [one, facts((prepared, 0.7), (other, 0.3))]) is None
    assert "the weights of data.mix is 7/10 : 3/10 from step 0 on rank 0" in first_difference(
        ["a", "b"], [one, facts((prepared, 7), (other, 4))]
    )
    assert "the order of the sources of data.mix is " in first_difference(["a", "b"], [one, facts((other, 3), (prepared, 7))])
    assert "the data set of data.mix is " in first_difference(["a", "b"], [one, facts((prepared, 7))])


def test_plan(run, prepared, other, capsys):
    assert run("--plan", *SMALL, *mix((prepared, 1), (other, 1)))[0] == 0
    assert f"{prepared}, {other}" in run.out and "note: data.mix: bottles has " in run.out


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("[]", "data.mix is empty"),
        ("[{dir: a}]", "data.mix[0].weight is missing: a source is {dir: FOLDER, weight: 0.7}"),
        ("[{weight: 1}]", "data.mix[0].dir is None, expected the path of a prepared folder"),
        (
            "[{dir: a, weight: 1}, {dir: b, weight: 0}]",
            "data.mix[1].weight is 0: leave the source out, or say from which step on it counts, {0: 0, 9000: 0.3}; in a run "
            "that resumes, a source ends at a step with {0: 0.3, 9000: 0}",
        ),
        ("[{dir: a, weight: -1}]", "data.mix[0].weight is -1, expected a number, 0 or above"),
        ("[{dir: a, weight: much}]", "data.mix[0].weight is 'much', expected a number"),
        ("[{dir: a, weight: .nan}]", "data.mix[0].weight is nan, expected a number"),
        ("[{dir: a, weight: true}]", "data.mix[0].weight is True, expected a number"),
        ("[{dir: a, wieght: 1}]", "data.mix[0] has the unknown key 'wieght'"),
        ("[{dir: a, weight: {5: 1}}]", "data.mix[0].weight does not say what holds from step 0 on"),
        ("[{dir: a, weight: {0: 1, x: 1}}]", "data.mix[0].weight has the key 'x', expected the step"),
        ("[{dir: a, weight: {0: 1, 1.5: 1}}]", "data.mix[0].weight has the key 1.5, expected the step"),
        ("[{dir: a, weight: {0: 1, 1e3: 1, '1000': 2}}]", "data.mix[0].weight has the key 1000 twice"),
        ("[{dir: a, weight: {0: 0, 9: 0}}]", "data.mix[0].weight is 0 at every step"),
        ("[{dir: a, weight: {0: 1, 5: 0}}]", "data.mix: from step 5 on no source has a weight above 0"),
        ("[a, b]", "data.mix[0] is 'a', expected a mapping"),
        ("a", "data.mix is 'a', expected a list"),
    ],
)
def test_refused(tmp_path, written, message):
    path = tmp_path / "c.yaml"
    path.write_text(f"data:\n  mix: {written}\n")
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_both_are_refused_and_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    path = tmp_path / "c.yaml"
    path.write_text("data:\n  mix:\n    - {dir: ~/a, weight: 2}\n    - {dir: b, weight: {9e3: 0.5, 0: 0}}\n")
    config = load_config(path)
    assert isinstance(list(config.data.mix[1]["weight"])[1], int)
    assert config.data.mix == [{"dir": "/home/me/a", "weight": 2}, {"dir": "b", "weight": {0: 0, 9000: 0.5}}]
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config
    with pytest.raises(ConfigError, match=r"data.dir and data.mix are both given: leave one out \(data.dir=null\)"):
        load_config(path, ["data.dir=a", "data.mix=[{dir: b, weight: 1}]"])
    with pytest.raises(ConfigError, match=r"data.dir and data.mix are both given: leave one out \(data.mix=null\)"):
        load_config(path, ["data.dir=a"])
    assert load_config(path, ["data.dir=a", "data.mix=null"]).data.dir == "a"
