"""Every kind of parameter that `Celo2` takes, and what the tests of the optimizer do with it."""

from pathlib import Path

import torch
from torch import nn

from celo2 import Celo2, Rule
from celo2.blocked import PLAIN, Passes
from celo2.rule import weight_shapes
from celo2.stack import Stack
from celo2.step import Context, Item, direction_of

ROOT = Path(__file__).resolve().parents[2]
FUSED = ((8, 3, 6), (1, 2, 0), (3, 6, 8))  # a (8, 18) weight, inputs first, that holds three (6, 8) matrices
FLAT = ((6, 3, 2, 2), (0, 1, 2, 3), (1, 6, 12))  # a convolution as one matrix

# Every kind of parameter: (shape, options of its group).
KINDS = {
    "wide": ((6, 10), {}),
    "tall": ((10, 6), {}),
    "square": ((7, 7), {"orthogonalize": False}),
    "one row": ((1, 9), {}),
    "three axes": ((3, 8, 6), {}),
    "three axes, factored over the batch": ((9, 8, 6), {}),
    "four axes": ((2, 3, 8, 4), {}),
    "fused": ((8, 18), {"matrices": FUSED}),
    "convolution": ((6, 3, 2, 2), {"matrices": FLAT}),
    "vector by rule": ((11,), {"update": "celo2"}),
    "scalar by rule": ((), {"update": "celo2"}),
    "vector": ((11,), {}),
    "scalar": ((), {}),
    "matrix by adamw": ((6, 10), {"update": "adamw", "betas": (0.8, 0.7), "eps": 1e-6}),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STATE_DTYPES = [torch.float32, torch.bfloat16]


def directions_(rule: Rule, stacks: list[Stack], out: torch.Tensor, passes: Passes = PLAIN) -> None:
    """Steps 0 to 7 on stacks of matrices of one shape, as the driver does them, into `out` (N, R, C)."""
    out.copy_(direction_of([Item(stack, {}, False) for stack in stacks], Context(rule, passes, torch.float32)))


def random_rule(seed: int = 0, hidden: int = 5) -> Rule:
    """Every channel, bias and hidden unit matters; neither the size nor the decays are the defaults."""
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in weight_shapes(hidden).items()}
    return Rule(weights, momentum_decays=(0.8, 0.95, 0.99), second_moment_decay=0.9, factored_decays=(0.7, 0.95, 0.99))


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_params(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(randn(*shape, seed=seed + i).to(dtype)) for i, (name, (shape, _)) in enumerate(KINDS.items())}


def make_groups(params: dict[str, nn.Parameter], **options) -> list[dict]:
    return [{"params": [params[name]], **own, **options} for name, (_, own) in KINDS.items()]


def set_gradients(params: list[torch.Tensor], step: int) -> None:
    for i, p in enumerate(params):
        p.grad = randn(*p.shape, seed=1000 * step + i).to(p.dtype)


def train(optimizer: torch.optim.Optimizer, steps: range) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in steps:
        set_gradients(params, step)
        optimizer.step()


def run_one(w: torch.Tensor, steps: int = 3, lr: float = 0.1, **options) -> torch.Tensor:
    """The weight after `steps` steps of an optimizer of its own."""
    p = nn.Parameter(w.detach().clone())
    train(Celo2([{"params": [p], **options}], lr=lr, rule=random_rule()), range(steps))
    return p.detach()


def copy_of_state(optimizer: Celo2) -> list[dict[str, torch.Tensor]]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [{name: value.clone() for name, value in optimizer.state.get(p, {}).items()} for p in params]


def assert_same_state(state: list[dict[str, torch.Tensor]], expected: list[dict[str, torch.Tensor]]) -> None:
    assert len(state) == len(expected)
    for one, other in zip(state, expected, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert value.dtype == other[name].dtype
            assert torch.equal(value, other[name]), name


def assert_same_groups(groups: list[dict], expected: list[dict]) -> None:
    """Equal but for the parameters, and betas and layouts as tuples, not as the lists that JSON gives."""
    assert len(groups) == len(expected)
    for one, other in zip(groups, expected, strict=True):
        assert {k: repr(v) for k, v in one.items() if k != "params"} == {k: repr(v) for k, v in other.items() if k != "params"}
