"""What meta-training does not continue: other data, other rules, fewer iterations, a damaged state. One line says so."""

import json
import math

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from test_celo2_metatrain import small
from test_celo2_metatrain_cli import TINY

from celo2 import load_rule, save_rule
from celo2.metatrain.__main__ import main
from celo2.metatrain.config import ConfigError, loaded
from celo2.metatrain.outer import FORMAT
from celo2.metatrain.tasks import load_data
from celo2.metatrain.train import PESTraining


@pytest.fixture
def command(tmp_path):
    """Arguments of a run with a text and an expert in files of the user's."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    (tmp_path / "code.txt").write_text("straight on " * 40)
    save_rule(load_rule("hand-nesterov"), tmp_path / "expert.safetensors")
    words = [f"tasks.sources=[digits,text:{tmp_path}/code.txt]", f"expert.rule={tmp_path}/expert.safetensors"]
    return [str(tmp_path / "tiny.yaml"), f"run.dir={tmp_path / 'run'}", "outer.iterations=4", *words]


def rewritten(path, change, **arrays):
    """Replace the metadata of a state by what `change` makes of it, and arrays by others."""
    with safe_open(path, "numpy") as file:
        meta = json.loads(file.metadata()[FORMAT])
    save_file(load_file(path) | arrays, path, {FORMAT: json.dumps(change(meta))})


def error_of(command, capsys, *overrides):
    """The one line of a command that is refused and leaves the configuration as it is."""
    config = next(word for word in command if word.startswith("run.dir=")).removeprefix("run.dir=") + "/config.yaml"
    with open(config) as file:
        before = file.read()
    capsys.readouterr()
    loaded.cache_clear()
    assert main([*command, *overrides]) == 2
    with open(config) as file:
        assert file.read() == before
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_other_data_and_another_expert_are_noticed(command, tmp_path, capsys):
    assert main(command) == 0
    state = tmp_path / "run" / "state.safetensors"
    start = f"error: {state} was written with"
    (tmp_path / "code.txt").write_text("straight on " * 39 + "another one ")
    line = error_of(command, capsys)
    assert line == f"{start} other data of code in tasks.sources: use that data again, or begin in another run.dir"
    (tmp_path / "code.txt").write_text("straight on " * 40)
    expert = tmp_path / "expert.safetensors"
    save_rule(load_rule("celo2-lm"), expert)
    line = error_of(command, capsys)
    assert line == f"{start} another rule in expert.rule, '{expert}': use that rule again, or begin in another run.dir"
    rewritten(state, lambda meta: {key: x for key, x in meta.items() if key not in ("data", "expert", "start")})
    assert main([*command, "outer.iterations=8"]) == 0  # a state of an earlier version, which knew of neither


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("estimator.sigma=0.5", "estimator.sigma 0.01, now it is 0.5: write estimator.sigma=0.01 again"),
        ("inner.schedule=cosine", "inner.schedule 'constant', now it is 'cosine': write inner.schedule=constant again"),
        ("inner.grad_clip=1", "inner.grad_clip None, now it is 1.0: write inner.grad_clip=null again"),
        ("outer.betas=[0, 0]", "outer.betas [0.9, 0.999], now it is [0.0, 0.0]: write outer.betas=[0.9, 0.999] again"),
    ],
)
def test_another_configuration_names_the_remedy(override, message, command, tmp_path, capsys):
    assert main(command) == 0
    state = tmp_path / "run" / "state.safetensors"
    assert error_of(command, capsys, override) == f"error: {state} was written with {message}, or begin in another run.dir"
    line = error_of(command, capsys, "outer.iterations=3")
    assert line == f"error: outer.iterations is 3, expected at least 4, which {state} has done"


@pytest.mark.parametrize(
    "change",
    [
        lambda meta: {key: x for key, x in meta.items() if key != "iteration"},
        lambda meta: {key: x for key, x in meta.items() if key != "config"},
        lambda meta: meta | {"iteration": -1},
        lambda meta: meta | {"iteration": "4"},
        lambda meta: meta | {"iteration": True},
        lambda meta: meta | {"seconds": None},
        lambda meta: meta | {"config": {"run": {}, "tasks": 3}},
        lambda meta: meta | {"config": []},
        lambda meta: meta | {"data": 3},
        lambda meta: [meta],
        lambda meta: 4,
    ],
)
def test_damaged_metadata(change, tmp_path):
    training = PESTraining(small(), *load_data(["digits"]))
    path = tmp_path / "state.safetensors"
    training.save(path)
    training.load(path)
    rewritten(path, change)
    with pytest.raises(ConfigError, match=r"state\.safetensors: not a meta-training state \("):
        training.load(path)


@pytest.mark.parametrize("key", ["theta", "average", "xi"])
def test_a_state_that_is_not_finite(key, tmp_path):
    training = PESTraining(small(), *load_data(["digits"]))
    path = tmp_path / "state.safetensors"
    training.save(path)
    before = training.current().copy()
    rewritten(path, lambda meta: meta, **{key: np.full_like(training.tensors()[key], math.nan)})
    with pytest.raises(ConfigError) as caught:
        training.load(path)
    assert str(caught.value) == f"{path}: {key} is not finite, as after a search that diverged: begin in another run.dir"
    np.testing.assert_array_equal(training.current(), before)


def test_a_search_that_diverges_says_so(monkeypatch):
    training = PESTraining(small(), *load_data(["digits"]))
    monkeypatch.setattr(training, "search", lambda: training.theta.data.fill_(math.nan))
    with pytest.raises(ConfigError) as caught:
        training.step()
    remedy = "take a smaller outer.lr, an estimator.loss_clip or an outer.grad_clip, in another run.dir"
    assert str(caught.value) == f"θ is not finite after iteration 1: {remedy}"
