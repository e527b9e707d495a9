"""Parameters that are unfrozen later: the recipe of docs/optimizer.md, and the errors without it."""

import copy
import re
from pathlib import Path

import pytest
import torch
from routed_models import gpt2, update_of
from torch import nn

import celo2
from celo2 import Celo2, param_groups

TEXT = (Path(celo2.__file__).parent.parent / "docs" / "optimizer.md").read_text(encoding="utf-8")
RECIPE = re.search(r"## Unfreezing\n.*?```python\n(.*?)```", TEXT, re.DOTALL)


def frozen() -> nn.Module:
    model = gpt2()
    model.transformer.h[0].requires_grad_(False)
    return model


def add_unfrozen(model: nn.Module, optimizer: Celo2) -> None:
    assert RECIPE is not None
    exec(RECIPE[1], {"model": model, "optimizer": optimizer, "param_groups": param_groups})


def step(optimizer: Celo2, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()


def test_the_recipe_routes_what_was_unfrozen_as_in_the_whole_model():
    model = frozen()
    optimizer = Celo2(param_groups(model, 5e-4, 1e-3, 0.1), lr=5e-4)
    step(optimizer, 0)
    before = model.transformer.h[0].mlp.c_fc.weight.detach().clone()
    model.transformer.h[0].requires_grad_(True)
    add_unfrozen(model, optimizer)
    whole = param_groups(model, 5e-4, 1e-3, 0.1)
    for key in ("update", "lr", "weight_decay", "matrices"):
        found, expected = (
            {name: group[key] for group in groups for name in group["param_names"]} for groups in (optimizer.param_groups, whole)
        )
        assert found == expected, key
    step(optimizer, 1)
    assert (model.transformer.h[0].mlp.c_fc.weight != before).any()
    count = len(optimizer.param_groups)
    add_unfrozen(model, optimizer)  # nothing is left to add
    assert len(optimizer.param_groups) == count


def test_state_with_added_groups_loads_after_the_same_additions():
    model = frozen()
    optimizer = Celo2(param_groups(model, 5e-4, 1e-3, 0.1), lr=5e-4)
    model.transformer.h[0].requires_grad_(True)
    add_unfrozen(model, optimizer)
    step(optimizer, 0)
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    other = frozen()
    other.load_state_dict(weights)
    resumed = Celo2(param_groups(other, 5e-4, 1e-3, 0.1), lr=5e-4)
    remedy = "; if groups were added to the saved optimizer, add them here before loading$"
    with pytest.raises(ValueError, match=rf"the saved state has {len(saved['param_groups'])} parameter groups, .*{remedy}"):
        resumed.load_state_dict(saved)
    with pytest.raises(ValueError, match=f"; the parameters are the same, .*{remedy}"):
        Celo2(param_groups(gpt2(), 5e-4, 1e-3, 0.1), lr=5e-4).load_state_dict(saved)
    other.transformer.h[0].requires_grad_(True)
    add_unfrozen(other, resumed)
    resumed.load_state_dict(saved)
    for one in (optimizer, resumed):
        step(one, 1)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_the_whole_model_again_is_an_error_that_says_what_to_leave_out():
    model = frozen()
    optimizer = Celo2(param_groups(model, 5e-4, 1e-3, 0.1), lr=5e-4)
    model.transformer.h[0].requires_grad_(True)
    count = len(optimizer.param_groups)
    remedy = r"; leave out those that the optimizer has \(docs/optimizer.md, Unfreezing\)$"
    with pytest.raises(ValueError, match=f"parameter group {count}: some parameters .*{remedy}"):
        optimizer.add_param_group(param_groups(model, 5e-4, 1e-3, 0.1)[0])
    assert len(optimizer.param_groups) == count


def test_a_part_of_a_model_is_routed_as_a_whole_model():
    """As docs/routing.md says: the last layer of a block alone is an output layer."""
    block = gpt2().transformer.h[0]
    assert update_of(param_groups(block, 1, 1))["mlp.c_proj.weight"] == "adamw"
    assert update_of(param_groups(gpt2(), 1, 1))["transformer.h.0.mlp.c_proj.weight"] == "celo2"
