"""The rule of `Celo2`: another one set between steps, state of another one, and groups that were made for another variant."""

import copy
import dataclasses
import re
import warnings
from pathlib import PurePosixPath

import pytest
import torch
from optimizer_kinds import assert_same_state, copy_of_state, randn, train
from torch import nn

from celo2 import Celo2, RuleError, load_rule, param_groups, save_rule


def optimizer_of(rule, *shapes: tuple[int, ...]) -> Celo2:
    return Celo2([nn.Parameter(randn(*shape, seed=i)) for i, shape in enumerate(shapes or [(6, 8), (5,)])], lr=0.1, rule=rule)


def weights(optimizer: Celo2) -> list[torch.Tensor]:
    return [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("other", ["hand-nesterov", "hand-agreement"])
def test_a_rule_that_is_set_between_steps_is_the_rule_of_the_next(other, steps):
    """Step sizes included; as with an optimizer of that rule that was given the same weights and state."""
    swapped, expected = optimizer_of("celo2-lm"), optimizer_of(other)
    train(swapped, range(steps))
    for own, p in zip(swapped.param_groups[0]["params"], expected.param_groups[0]["params"], strict=True):
        p.data.copy_(own)
        expected.state[p] = copy.deepcopy(swapped.state.get(own, {}))
    swapped.rule = other
    assert swapped.rule == load_rule(other)
    twin = copy.deepcopy(swapped)
    for optimizer in (swapped, twin, expected):
        train(optimizer, range(steps, steps + 2))
        assert all(map(torch.equal, weights(optimizer), weights(swapped)))
        assert_same_state(copy_of_state(optimizer), copy_of_state(swapped))


def test_a_rule_of_the_other_variant_is_refused():
    for groups in ([{"params": [nn.Parameter(randn(6, 8))]}], param_groups(model(), 1e-3, 1e-2)):
        optimizer = Celo2(groups, lr=0.1, rule="celo2")
        with pytest.raises(RuleError, match="celo2-base"):
            optimizer.rule = "celo2-base"
        assert optimizer.rule == load_rule("celo2")


def test_an_optimizer_that_an_earlier_version_pickled_goes_on():
    optimizer, twin = optimizer_of("celo2-lm"), optimizer_of("celo2-lm")
    train(optimizer, range(2))
    train(twin, range(2))
    state = optimizer.__getstate__()
    state["rule"] = state.pop("_rule")  # as it was
    state |= {"_planned": ([], {})}
    del state["_plan_key"], state["_entries"]
    old = Celo2.__new__(Celo2)
    old.__setstate__(state)
    assert old.rule == load_rule("celo2-lm")
    train(copy.deepcopy(old), range(2, 3))
    train(old, range(2, 4))
    train(twin, range(2, 4))
    assert all(map(torch.equal, weights(old), weights(twin)))


def test_any_path_of_a_rule_and_the_kinds_of_weights(tmp_path):
    save_rule(load_rule("celo2-lm"), tmp_path / "r.safetensors")
    assert load_rule(PurePosixPath(tmp_path / "r.safetensors")) == load_rule("celo2-lm")
    load_rule(load_rule("celo2").to(torch.device("meta")))
    rule = load_rule("celo2")
    double = dataclasses.replace(rule, weights={name: weight.double() for name, weight in rule.weights.items()})
    with pytest.raises(RuleError, match=r"expected torch.float32: take weight.float\(\)"):
        load_rule(double)


def test_groups_hold_nothing_but_what_optimizers_read():
    """No key of param_groups stops a checkpoint of another optimizer; a key that a user adds stays."""
    assert all("variant" not in group for group in param_groups(model(), 1e-3, 1e-2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = Celo2([{"params": [nn.Parameter(randn(6, 8))], "variant": "large"}], lr=1e-3)
    assert optimizer.param_groups[0]["variant"] == "large"


def test_errors_about_groups_see_through_wrappers():
    saved = Celo2(param_groups(nn.ModuleDict({"module": model()}), 1e-3, 1e-2, 0.1), lr=1e-3).state_dict()
    other = Celo2(param_groups(model(), 1e-3, 1e-2, 0.0), lr=1e-3)
    with pytest.raises(ValueError, match="the parameters are the same, but other options divide them"):
        other.load_state_dict(saved)


def test_a_rule_that_needs_other_state_is_refused_until_the_state_begins_anew():
    optimizer = optimizer_of("hand-agreement")
    train(optimizer, range(2))
    before = weights(optimizer)
    optimizer.rule = "hand-whitened"
    with pytest.raises(ValueError, match=r"or the rule was changed after a step; optimizer\.state\.pop\(parameter\) resets"):
        train(optimizer, range(2, 3))
    assert all(map(torch.equal, weights(optimizer), before))
    optimizer.state.clear()
    train(optimizer, range(2, 3))
    assert "left_whitener" in optimizer.state[optimizer.param_groups[0]["params"][0]]


@pytest.mark.parametrize(("of", "to"), [("celo2-lm", "celo2-whitened"), ("hand-whitened", "celo2-lm")])
def test_state_of_another_rule_that_does_not_fit_says_what_to_do(of, to):
    saved, optimizer = optimizer_of(of), optimizer_of(to)
    train(saved, range(1))
    text = "since this optimizer has another rule or update for it; build it with the rule and groups of the saved optimizer, or"
    with pytest.raises(ValueError, match=rf"parameter group 0, .*{text} clear the saved 'state' to start with a new state"):
        optimizer.load_state_dict(saved.state_dict())
    state_dict = saved.state_dict()
    state_dict["state"].clear()  # the remedy
    optimizer.load_state_dict(state_dict)
    train(optimizer, range(1))


def moved(make, steps: int = 300, lr: float = 1e-3) -> float:
    """RMS distance, in learning rates, after one gradient and `steps` gradients of zeros."""
    p = nn.Parameter(0.1 * randn(32, 32))
    before, optimizer = p.detach().clone(), make([p], lr)
    for step in range(1 + steps):
        p.grad = 1e-3 * randn(32, 32, seed=1) if step == 0 else torch.zeros_like(p)
        optimizer.step()
    return ((p - before).square().mean().sqrt() / lr).item()


def test_gradients_of_zeros_are_full_steps():
    """Directions have RMS 1, however small the momentum; AdamW's steps end with its momentum. As docs/optimizer.md says."""
    of_rules = {rule: moved(lambda params, lr, rule=rule: Celo2(params, lr, rule=rule)) for rule in ("celo2", "hand-nesterov")}
    adamw = moved(lambda params, lr: torch.optim.AdamW(params, lr, betas=(0.9, 0.95), weight_decay=0.0))
    print(f"\nmoved, in lr: {', '.join(f'{name} {distance:.1f}' for name, distance in of_rules.items())}, AdamW {adamw:.1f}")
    assert 285 < of_rules["celo2"] < 301 and 299 < of_rules["hand-nesterov"] < 301 and 6.5 < adamw < 7.1


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize("rule", ["celo2", "celo2-base"])
@pytest.mark.parametrize("variant", ["celo2", "celo2-base"])
def test_groups_that_were_made_for_another_variant_are_said(variant, rule):
    text = rf"those of param_groups\(\.\.\., variant='{variant}'\), but the rule is a {rule} rule: .* variant='{rule}'$"
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        optimizer = Celo2(param_groups(model(), 1e-3, 1e-2, variant=variant), lr=1e-3, rule=rule)
        by_hand = [{"params": list(model().parameters()), "update": "celo2"}]  # whatever their variant, it was chosen
        Celo2(by_hand, lr=1e-3, rule=rule)
    said = [str(warning.message) for warning in found if "variant" in str(warning.message)]
    assert bool(said) == (variant != rule) and all(re.search(text, message) for message in said)
    assert not any("variant" in group for group in optimizer.param_groups)
