"""optimizer.base_width: rates that were found at one width, on a model of another."""

import pytest
import torch

from configs.load import ConfigError
from configs.schema import Optimizer
from launch.monitoring.step_statistics import hidden_names
from launch.optimizers.build import build_optimizer, optimizer_groups
from launch.optimizers.width import at_width, at_width_of
from models import build_model


def model_of(width):
    return build_model(layers=1, width=width, heads=4, context=8, vocab_size=64)


def test_the_rule():
    """lr ∝ width^−1/2 and decay ∝ 1/width where updates are orthogonalized, else lr ∝ 1/width; all else stays."""
    values = {"lr": 1e-3, "weight_decay": 0.1, "adamw_lr": 1e-2, "beta2": 0.95}
    assert at_width(values, 64, 64, Optimizer("adamw")) == values
    assert at_width(values, 64, 256, Optimizer("celo2")) == pytest.approx(values | {"lr": 5e-4, "weight_decay": 0.025})
    assert at_width(values, 64, 256, Optimizer("adamw")) == pytest.approx(values | {"lr": 2.5e-4})
    without = Optimizer("celo2", arguments={"orthogonalize": False})
    assert at_width(values, 64, 256, without) == pytest.approx(values | {"lr": 2.5e-4})


@pytest.mark.parametrize(
    ("name", "width", "lr", "adamw_lr", "decay"),
    [
        ("celo2", 16, 2e-2, 3e-2, 0.4),
        ("muon", 64, 1e-2, 3e-2, 0.1),
        ("muon", 256, 5e-3, 3e-2, 0.025),
        ("adamw", 128, 5e-3, 3e-2, 0.1),
        ("celo2-base", 128, 5e-3, None, 0.1),
        ("lion", 128, 5e-3, None, 0.1),
        ("normuon", 256, 5e-3, 3e-2, 0.025),
        ("scion", 256, 1e-2, 3e-2, 0.1),
        ("torch.optim.NAdam", 128, 5e-3, 3e-2, 0.1),
    ],
)
def test_each_optimizer_gets_the_rates_of_its_model(name, width, lr, adamw_lr, decay):
    """The section found with width 64; optimizers without an adamw_lr get none."""
    found = Optimizer(name, lr=1e-2, adamw_lr=None if adamw_lr is None else 3e-2, base_width=64)
    scaled = at_width_of(model_of(width), found)
    assert (scaled.lr, scaled.weight_decay) == pytest.approx((lr, decay))
    assert scaled.adamw_lr == (adamw_lr if adamw_lr is None else pytest.approx(adamw_lr)) and scaled.base_width is None


def test_a_rate_that_was_left_out_is_lr_before_it_is_scaled():
    scaled = at_width_of(model_of(256), Optimizer("celo2", lr=1e-2, base_width=64))
    assert scaled.lr == pytest.approx(5e-3) and scaled.adamw_lr == pytest.approx(1e-2)


def test_without_it_nothing_changes():
    section = Optimizer("celo2", lr=1e-2, adamw_lr=3e-2)
    assert at_width_of(model_of(16), section) is section
    assert at_width_of(model_of(64), Optimizer("celo2", lr=1e-2, adamw_lr=3e-2, base_width=64)) == section


def test_groups_have_them():
    model = model_of(16)
    section = at_width_of(model, Optimizer("muon", lr=1e-2, adamw_lr=3e-2, base_width=64))
    groups = build_optimizer(section, optimizer_groups(section, model)).param_groups
    hidden = {id(model.get_parameter(name)) for name in hidden_names(model)}
    for group in groups:
        rate = 2e-2 if any(id(p) in hidden for p in group["params"]) else 3e-2
        assert group["lr"] == group["initial_lr"] == pytest.approx(rate)
        assert group["weight_decay"] in (0.0, pytest.approx(0.4))


def test_a_model_without_a_width():
    class Config:
        pass

    class Model(torch.nn.Module):
        config = Config()

    with pytest.raises(ConfigError, match=r"optimizer\.base_width: the model's configuration has no hidden_size"):
        at_width_of(Model(), Optimizer(base_width=64))


@pytest.mark.parametrize("name", ["celo2", "muon"])
def test_a_run_with_it_is_the_run_with_its_rates(run, name):
    """From the command line: twice the lr of width 128 and four times its decay on width 32, bit for bit."""
    shape = [f"optimizer.name={name}", "model.width=32", "model.heads=2", "train.steps=6", "eval.every=0"]
    by_hand = ["optimizer.lr=4e-3", "optimizer.weight_decay=0.4", "optimizer.adamw_lr=1e-2"]
    scaled = ["optimizer.lr=2e-3", "optimizer.weight_decay=0.1", "optimizer.adamw_lr=1e-2", "optimizer.base_width=128"]
    status, mine, _ = run(*shape, *scaled, folder="scaled")
    assert status == 0
    assert "at the width of this model lr 0.002 becomes 0.004" in run.out
    expected = run(*shape, *by_hand, folder="by_hand")[1]
    kept = ("loss", "lr", "adamw_lr", "update_rms")
    assert [{key: r[key] for key in kept} for r in mine if "loss" in r] == [
        {key: r[key] for key in kept} for r in expected if "loss" in r
    ]


def test_the_plan_says_the_rates(run):
    words = ["model.width=32", "model.heads=2", "optimizer.lr=2e-3", "optimizer.adamw_lr=1e-2", "optimizer.base_width=128"]
    assert run(*words, "--plan")[0] == 0
    said = "note: optimizer.base_width=128: at the width of this model lr 0.002 becomes 0.004, weight_decay 0.1 becomes 0.4\n"
    assert said in run.out and "celo2   0.004" in run.out
    assert run(*words[:-1], "--plan")[0] == 0
    assert "base_width" not in run.out


@pytest.mark.parametrize("value", ["0", "-3", "wide"])
def test_a_width_that_is_none(run, value):
    status, _, err = run(f"optimizer.base_width={value}")
    assert status == 2 and "optimizer.base_width" in err and err.count("\n") == 1
