"""The state dict of an earlier version of `Celo2` loads, and the steps after it are those of that version.

`written_by_b0333a6` was written by that commit, which kept momentum and second moment in the shape of the stack: weights and
state after three steps of a random rule on matrices with and without layouts, vectors and a scalar, and the weights after two
more.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from celo2 import Celo2, Rule

WRITTEN = Path(__file__).parent / "written_by_b0333a6"


def test_state_in_the_shape_of_the_stack():
    tensors, groups = load_file(WRITTEN / "optimizer.safetensors"), json.loads((WRITTEN / "groups.json").read_text())
    rule = Rule({name.removeprefix("rule."): t for name, t in tensors.items() if name.startswith("rule.")})
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("state."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = tensor
    assert state[1]["momentum"].shape == (3, 3, 6, 8) and groups[1]["matrices"][0] == [8, 3, 6]

    params = [nn.Parameter(tensors[f"before.{i}"].clone()) for i in range(len(groups))]
    own = [{"params": [p], "update": g["update"], "matrices": g["matrices"]} for p, g in zip(params, groups, strict=True)]
    optimizer = Celo2(own, lr=9.0, rule=rule)
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    for step in (3, 4):
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
        optimizer.step()
    for i, p in enumerate(params):
        # The order of sums may change: worst measured 0.
        torch.testing.assert_close(p.detach(), tensors[f"after.{i}"], rtol=0, atol=1e-5)
    assert state[1]["momentum"].shape == (3, 3, 6, 8)  # what was given is as it was
    assert optimizer.state[params[1]]["momentum"].shape == (3, 8, 18)


def test_state_of_another_shape_is_still_refused():
    p = nn.Parameter(torch.zeros(8, 18))
    optimizer = Celo2([{"params": [p], "matrices": ((8, 3, 6), (1, 2, 0), (3, 6, 8))}], lr=0.1)
    p.grad = torch.ones(8, 18)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0] = {**saved["state"][0], "second_moment": torch.zeros(6, 3, 8)}
    with pytest.raises(ValueError, match=r"second_moment has shape \(6, 3, 8\), expected \(8, 18\)"):
        optimizer.load_state_dict(saved)
