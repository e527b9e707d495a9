"""A step that the device refuses: `found_inf`, as torch's fused optimizers have it."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from celo2 import Celo2, load_rule

SHAPES = [(8, 12), (12, 8), (8, 12), (260, 300), (2, 5, 6), (7,)]  # of one shape, of more than a block, stacked, a vector


def make(rule, dtype, state_dtype):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    return params, Celo2([{"params": params, "weight_decay": 0.1}], lr=1e-3, rule=rule, state_dtype=state_dtype)


def everything(params, optimizer):
    return [p.detach().clone() for p in params] + [v.clone() for p in params for v in optimizer.state[p].values()]


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("rule", "dtype", "state_dtype"),
    [
        ("celo2", torch.float32, torch.float32),
        ("celo2", torch.bfloat16, torch.bfloat16),
        ("celo2-lm", torch.float64, torch.float32),  # normalizes gradients
        ("celo2-base", torch.float32, torch.bfloat16),  # takes vectors
        (replace(load_rule("celo2-base"), step_exponents=(0.7, -0.4, 0.5)), torch.float32, torch.float32),
        (replace(load_rule("celo2-lm"), step_exponents=(0.7, -0.4, 0.5)), torch.float32, torch.float32),
        (replace(load_rule("celo2-lm"), whitening=0.3), torch.float32, torch.float32),
    ],
)
def test_a_refused_step_changes_no_bit_and_a_healthy_one_is_as_without_the_gate(rule, dtype, state_dtype):
    params, optimizer = make(rule, dtype, state_dtype)
    expected, plain = make(rule, dtype, state_dtype)
    for step in range(3):
        for p, q in zip(params, expected, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        plain.step()
        optimizer.found_inf = torch.tensor(0.0)
        optimizer.step()
        before = everything(params, optimizer)
        assert equal(before, everything(expected, plain))
        for bad in (torch.nan, torch.inf, 1e30)[step:]:
            for p in params:
                p.grad.view(-1)[step] = bad
            optimizer.found_inf = torch.tensor(1.0)
            optimizer.step()
            assert equal(before, everything(params, optimizer)), bad
