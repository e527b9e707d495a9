"""`Celo2` as a `torch.optim.Optimizer`: groups, schedulers, saving and resuming, precisions, strides, errors, memory, AdamW."""

import copy
import io
import json
import os
import pickle
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from celo2 import Celo2, Rule, load_rule, param_groups, save_rule
from celo2 import sharded as sharded_module
from celo2.weights import weight_shapes
from celo2.work import form_of

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
    return [{name: value.clone() for name, value in optimizer.state[p].items()} for p in params]


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


# --- groups -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_moves_and_only_by_its_own_group(kind):
    """All kinds in one optimizer, each in its group with its own lr and decay, take the steps that each takes alone."""
    params = make_params()
    groups = make_groups(params)
    for i, group in enumerate(groups):
        group |= {"lr": 0.01 * (i + 1), "weight_decay": 0.1 * i}
    together = Celo2(groups, lr=99.0, rule=random_rule(), weight_decay=99.0)
    index = list(KINDS).index(kind)
    alone = nn.Parameter(params[kind].detach().clone())
    options = {**KINDS[kind][1], "lr": 0.01 * (index + 1), "weight_decay": 0.1 * index}
    by_itself = Celo2([{"params": [alone], **options}], lr=98.0, rule=random_rule())
    for step in range(3):
        set_gradients([p for group in groups for p in group["params"]], step)
        alone.grad = params[kind].grad.clone()
        before = alone.detach().clone()
        together.step()
        by_itself.step()
        assert torch.equal(params[kind], alone)
        assert not torch.equal(alone, before)


def test_default_routing_is_by_axes():
    shapes = [(4, 6), (2, 4, 6), (2, 2, 4, 6), (6,), ()]
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = Celo2(params, lr=0.1)
    by_rule = ["momentum" in optimizer.state[p] for p in params]
    assert by_rule == [True, True, True, False, False]
    assert ["exp_avg" in optimizer.state[p] for p in params] == [not rule for rule in by_rule]
    base = Celo2(params, lr=0.1, rule="celo2-base")
    assert all("momentum" in base.state[p] for p in params)
    explicit = Celo2([{"params": params, "update": "adamw"}], lr=0.1, rule="celo2-base")
    assert all("exp_avg" in explicit.state[p] for p in params)


@pytest.mark.parametrize("kind", KINDS)
def test_decay_is_decoupled(kind):
    """Decay shrinks the weight by lr λ W, leaves the direction alone, and does not enter the state."""
    shape, options = KINDS[kind]
    start = randn(*shape)
    plain, decayed = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers = [
        Celo2([{"params": [p], **options}], lr=0.2, rule=random_rule(), weight_decay=decay)
        for p, decay in ((plain, 0.0), (decayed, 0.3))
    ]
    for optimizer in optimizers:
        train(optimizer, range(1))
    # One rounding of numbers up to 3 in float32: worst measured 2.6e-7.
    torch.testing.assert_close(plain - decayed, 0.2 * 0.3 * start, rtol=0, atol=2e-6)
    assert_same_state(copy_of_state(optimizers[0]), copy_of_state(optimizers[1]))


def test_lr_zero_changes_no_weight_but_advances_the_state():
    params = make_params()
    before = {name: p.detach().clone() for name, p in params.items()}
    optimizer = Celo2(make_groups(params), lr=0.0, rule=random_rule(), weight_decay=0.5)
    state = copy_of_state(optimizer)
    train(optimizer, range(2))
    assert all(torch.equal(p, before[name]) for name, p in params.items())
    for old, new in zip(state, copy_of_state(optimizer), strict=True):
        assert all(not torch.equal(old[name], new[name]) for name in old)


def test_orthogonalize_by_group():
    start = randn(6, 10)
    ortho, plain, off = (nn.Parameter(start.clone()) for _ in range(3))
    both = Celo2([{"params": [ortho]}, {"params": [plain], "orthogonalize": False}], lr=0.1, rule=random_rule())
    other = Celo2([off], lr=0.1, rule=random_rule(), orthogonalize=False)
    ortho.grad = plain.grad = off.grad = randn(6, 10, seed=1)
    both.step()
    other.step()
    assert torch.equal(plain, off)
    assert not torch.allclose(plain, ortho, atol=1e-2)


def test_named_parameters():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = Celo2(model.named_parameters(), lr=0.1)
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == optimizer.param_groups[0]["param_names"]


def test_rule_by_name_path_or_object(tmp_path):
    rule = random_rule()
    save_rule(rule, tmp_path / "rule.safetensors")
    results = []
    for source in (rule, tmp_path / "rule.safetensors", str(tmp_path / "rule.safetensors")):
        p = nn.Parameter(randn(5, 7))
        train(Celo2([p], lr=0.1, rule=source), range(2))
        results.append(p.detach())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert Celo2([nn.Parameter(randn(5, 7))], lr=0.1).rule.description == load_rule("celo2").description


# --- step -------------------------------------------------------------------------------------------------------------------


def test_closure_is_called_once_with_gradients_enabled():
    p = nn.Parameter(randn(4, 6))
    optimizer = Celo2([p], lr=0.1)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    before = p.detach().clone()
    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True]
    assert loss.item() == pytest.approx(before.square().sum().item())
    assert not torch.equal(p, before)
    assert optimizer.step() is None


def test_step_hooks_are_called():
    p = nn.Parameter(randn(4, 6))
    optimizer = Celo2([p], lr=0.1)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(p.detach().clone()))
    optimizer.register_step_post_hook(lambda *_: seen.append(p.detach().clone()))
    train(optimizer, range(1))
    assert len(seen) == 2
    assert not torch.equal(*seen)


def test_step_does_not_change_gradients():
    params = make_params()
    optimizer = Celo2(make_groups(params), lr=0.1, rule=random_rule(), weight_decay=0.1)
    set_gradients(list(params.values()), 0)
    before = [p.grad.clone() for p in params.values()]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(params.values(), before, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_parameter_without_gradient_is_skipped(kind):
    params = make_params()
    optimizer = Celo2(make_groups(params), lr=0.1, rule=random_rule(), weight_decay=0.1)
    train(optimizer, range(1))
    index = list(KINDS).index(kind)
    before, state = params[kind].detach().clone(), copy_of_state(optimizer)[index]
    others = {name: p.detach().clone() for name, p in params.items() if name != kind}
    set_gradients(list(params.values()), 1)
    params[kind].grad = None
    optimizer.step()
    assert torch.equal(params[kind], before)
    assert_same_state([copy_of_state(optimizer)[index]], [state])
    assert all(not torch.equal(params[name], other) for name, other in others.items())


def test_one_of_a_batch_without_gradient_is_skipped():
    """Matrices of one shape are updated together; one that has no gradient must not take part."""
    params = [nn.Parameter(randn(5, 7, seed=i)) for i in range(3)]
    optimizer = Celo2(params, lr=0.1, rule=random_rule(), weight_decay=0.1)
    set_gradients(params, 0)
    params[1].grad = None
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert [torch.equal(p, b) for p, b in zip(params, before, strict=True)] == [False, True, False]
    assert all(not value.any() for value in optimizer.state[params[1]].values())


@pytest.mark.parametrize("update", ["celo2", "adamw"])
@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 3), (0, 4, 3)])
def test_empty_parameter_is_skipped(shape, update):
    empty, full = nn.Parameter(torch.empty(shape)), nn.Parameter(randn(5, 7))
    optimizer = Celo2([{"params": [empty, full], "update": update}], lr=0.1, rule=random_rule(), weight_decay=0.1)
    expected, state = run_one(full, update=update, weight_decay=0.1), copy_of_state(optimizer)[0]
    for step in range(3):
        full.grad, empty.grad = randn(5, 7, seed=1000 * step), torch.empty(shape)
        optimizer.step()
    assert torch.equal(full, expected)
    assert_same_state([copy_of_state(optimizer)[0]], [state])


def test_zero_gradient_from_the_start():
    """All accumulators are zero: no division by zero, and only the decay acts where the direction is zero."""
    params = make_params()
    optimizer = Celo2(make_groups(params), lr=0.1, weight_decay=0.5, rule="hand-momentum")
    expected = {name: p.detach() * (1 - 0.1 * 0.5) for name, p in params.items()}
    for p in params.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in params.items():
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_same_seed_same_bits(state_dtype):
    results = []
    for _ in range(2):
        params = make_params()
        optimizer = Celo2(make_groups(params), lr=0.05, rule=random_rule(), weight_decay=0.1, state_dtype=state_dtype)
        train(optimizer, range(3))
        results.append((params, copy_of_state(optimizer)))
    (first, first_state), (second, second_state) = results
    assert all(torch.equal(first[name], second[name]) for name in KINDS)
    assert_same_state(first_state, second_state)


@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
@pytest.mark.parametrize("batch_elements", [1, 200, 1 << 24])
def test_matrices_of_one_shape_together_equal_each_alone(batch_elements, state_dtype, monkeypatch):
    """Matrices, batches of matrices and layouts that meet in the shape (6, 8), in three precisions, batched at several sizes."""
    monkeypatch.setitem(sharded_module.BATCH_ELEMENTS, "cpu", batch_elements)
    shapes = [(6, 8), (6, 8), (2, 6, 8), (6, 8), (2, 2, 6, 8), (6, 8)]
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.float16, torch.float32, torch.float32]
    weights = [randn(*shape, seed=i).to(dtype) for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))]
    params = [nn.Parameter(w.clone()) for w in weights]
    fused = nn.Parameter(randn(8, 18))
    twin = nn.Parameter(fused.detach().clone())
    groups = [{"params": params, "weight_decay": 0.1}, {"params": [fused, twin], "matrices": FUSED}]
    state = {"rule": random_rule(), "state_dtype": state_dtype}
    together = Celo2(groups, lr=0.1, **state)
    alone = [nn.Parameter(w.clone()) for w in [*weights, fused.detach()]]
    options = [{"weight_decay": 0.1}] * len(params) + [{"matrices": FUSED}]
    separate = [Celo2([{"params": [p], **o}], lr=0.1, **state) for p, o in zip(alone, options, strict=True)]
    for step in range(4):
        set_gradients([*params, fused], step)
        twin.grad = fused.grad.clone()
        together.step()
        for p, q, optimizer in zip(alone, [*params, fused], separate, strict=True):
            p.grad = q.grad
            optimizer.step()
    for p, q in zip(alone, [*params, fused], strict=True):
        # The order of sums may depend on the batch: worst measured 0. Low precisions may round to a neighbour.
        tolerance = 1e-5 if p.dtype == torch.float32 else 4 * torch.finfo(p.dtype).eps
        torch.testing.assert_close(q, p, rtol=0, atol=tolerance)
    torch.testing.assert_close(fused, twin, rtol=0, atol=1e-5)


# --- precision --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_is_the_float32_step_rounded_once(kind, dtype):
    """From the same weight and state, the step of a bfloat16 or float16 parameter is the float32 one, rounded; so is AdamW's."""
    shape, options = KINDS[kind]
    p, q = nn.Parameter(randn(*shape).to(dtype)), nn.Parameter(torch.empty(shape))
    low = Celo2([{"params": [p], **options}], lr=0.1, rule=random_rule(), weight_decay=0.1)
    full = Celo2([{"params": [q], **options}], lr=0.1, rule=random_rule(), weight_decay=0.1)
    for step in range(3):
        set_gradients([p], step)
        q.data.copy_(p.data)
        q.grad = p.grad.float()
        low.step()
        full.step()
        assert torch.equal(p, q.to(dtype))
    assert_same_state(copy_of_state(low), copy_of_state(full))


@pytest.mark.parametrize("kind", KINDS)
def test_float64_parameter(kind):
    """The rule works in float32 and moves a float64 weight in float64."""
    shape, options = KINDS[kind]
    start = randn(*shape)
    p = nn.Parameter(start.double())
    train(Celo2([{"params": [p], **options}], lr=1e-12, rule=random_rule()), range(1))
    moved = (start.double() - p.detach()) / 1e-12
    # lr 1e-12 is far below float32's spacing at 1. A float64 near 2 is rounded by 2.2e-16 / 1e-12: worst measured 3.8e-4.
    torch.testing.assert_close(moved.float(), start - run_one(start, 1, lr=1.0, **options), rtol=0, atol=2e-3)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_state_exists_at_construction_and_keeps_its_form(kind, dtype):
    shape, options = KINDS[kind]
    p = nn.Parameter(randn(*shape).to(dtype))
    optimizer = Celo2([{"params": [p], **options}], lr=0.1, rule=random_rule())
    form = {name: (value.shape, value.dtype) for name, value in optimizer.state[p].items()}
    values = copy_of_state(optimizer)[0]
    assert all(not value.any() for value in values.values())
    train(optimizer, range(2))
    assert form == {name: (value.shape, value.dtype) for name, value in optimizer.state[p].items()}
    if "momentum" in values:
        stacked = options["matrices"][2] if "matrices" in options else shape or (1,)
        assert form["momentum"] == ((3, *(shape or (1,))), torch.float32)  # as the parameter lies
        assert form["second_moment"] == (torch.Size(shape or (1,)), torch.float32)
        assert form.keys() - {"momentum", "second_moment"} == ({"row", "col"} if len(stacked) > 1 else {"diag"})
    else:
        wide = torch.promote_types(dtype, torch.float32)
        assert form["exp_avg"] == form["exp_avg_sq"] == (torch.Size(shape), wide)
    assert all(d == torch.float32 for name, (_, d) in form.items() if dtype != torch.float64 or "exp" not in name), form


def test_infinite_gradient_is_clipped_by_the_rule():
    p = nn.Parameter(randn(6, 8))
    optimizer = Celo2([p], lr=0.1, rule=random_rule())
    p.grad = randn(6, 8, seed=1)
    p.grad[0, 0] = torch.inf
    optimizer.step()
    assert p.isfinite().all()


# --- normalized gradients ---------------------------------------------------------------------------------------------------


def normalized_by_matrix(kind: str, g: torch.Tensor) -> torch.Tensor:
    """The gradient of `kind` with every matrix in it divided by its RMS, by hand."""
    if kind == "fused":
        q_k_v = g.view(8, 3, 6).float()  # inputs, matrix, outputs
        return (q_k_v / q_k_v.square().mean((0, 2), keepdim=True).sqrt()).view(g.shape)
    axes = (0, 1, 2, 3) if kind == "convolution" else tuple(range(-min(2, g.ndim), 0))
    return g.float() / (g.float().square().mean(axes, keepdim=True) if g.ndim else g.float().square()).sqrt()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [kind for kind, (shape, own) in KINDS.items() if own.get("update", "celo2") == "celo2"])
def test_normalized_gradients_are_gradients_normalized_before(kind, dtype):
    """Every path, from gradients of 1e-3; vectors that AdamW takes do not change at all."""
    shape, options = KINDS[kind]
    p, q = nn.Parameter(randn(*shape).to(dtype)), nn.Parameter(torch.empty(shape))
    rule, by_rule = random_rule(), len(shape) > 1 or "update" in options
    inside = Celo2([{"params": [p], **options}], lr=0.1, rule=replace(rule, normalize_gradient=True), weight_decay=0.1)
    before = Celo2([{"params": [q], **options}], lr=0.1, rule=rule, weight_decay=0.1)
    for step in range(3):
        p.grad = (1e-3 * randn(*shape, seed=step)).to(dtype)
        given = p.grad.clone()
        q.data.copy_(p.data)
        q.grad = normalized_by_matrix(kind, p.grad) if by_rule else p.grad.float()
        inside.step()
        before.step()
        assert torch.equal(p.grad, given)
        # Worst measured in float32 8.3e-7. Low precisions may round to a neighbour.
        tolerance = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
        torch.testing.assert_close(p.float(), q, rtol=tolerance, atol=tolerance)
    for one, other in zip(*(copy_of_state(optimizer)[0].values() for optimizer in (inside, before)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", ["celo2", "celo2-base"])
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_normalized_gradients_have_no_scale(scale, variant):
    rule = replace(random_rule(), normalize_gradient=True, variant=variant)
    kinds = [kind for kind, (_, own) in KINDS.items() if variant == "celo2-base" or own.get("update") != "adamw"]
    results = []
    for factor in (1.0, scale):
        params = make_params()
        optimizer = Celo2(make_groups(params), lr=0.1, rule=rule)
        for step in range(3):
            for i, p in enumerate(params.values()):
                p.grad = 1e-3 * factor * randn(*p.shape, seed=100 * step + i)
            optimizer.step()
        results.append({kind: params[kind].detach() for kind in kinds if "momentum" in optimizer.state[params[kind]]})
    # Three updates of RMS 1 times 0.1: worst measured 7.2e-7.
    for kind, moved in results[0].items():
        torch.testing.assert_close(results[1][kind], moved, rtol=0, atol=1e-5, msg=lambda m, k=kind: f"{k}: {m}")


def test_normalized_zero_gradients_stay_zero():
    params = make_params()
    rule = replace(load_rule("hand-momentum"), normalize_gradient=True)
    optimizer = Celo2(make_groups(params), lr=0.1, weight_decay=0.5, rule=rule)
    expected = {name: p.detach() * (1 - 0.1 * 0.5) for name, p in params.items()}
    for p in params.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in params.items():
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-6, atol=0)


# --- schedulers -------------------------------------------------------------------------------------------------------------

SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=2, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.7),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 8),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=6, eta_min=1e-3),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=[0.2, 0.1, 0.3], total_steps=10),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.2, step_size_up=2, cycle_momentum=False),
    "CyclicLR, momentum": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.2, step_size_up=2),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 5)], milestones=[3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


def three_groups() -> list[dict]:
    return [
        {"params": [nn.Parameter(randn(6, 8))], "lr": 0.1},
        {"params": [nn.Parameter(randn(3, 8, 6))], "lr": 0.02},
        {"params": [nn.Parameter(randn(7)), nn.Parameter(randn(4, 5))], "lr": 0.3, "update": "adamw"},
    ]


def advance(scheduler: lr_scheduler.LRScheduler) -> None:
    scheduler.step(1.0) if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else scheduler.step()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler(name):
    """Under a scheduler, Celo2 does what it does when the lr (and betas) that torch's AdamW gets are written into its groups."""
    scheduled = Celo2(three_groups(), lr=0.5, rule=random_rule(), weight_decay=0.1)
    by_hand = Celo2(three_groups(), lr=0.5, rule=random_rule(), weight_decay=0.1)
    twin_groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": group["lr"]} for group in by_hand.param_groups]
    twin = torch.optim.AdamW(twin_groups, betas=(0.9, 0.95))
    scheduler, twin_scheduler = SCHEDULERS[name](scheduled), SCHEDULERS[name](twin)
    rates = []
    for step in range(8):
        for group, source in zip(by_hand.param_groups, twin.param_groups, strict=True):
            group |= {"lr": source["lr"], "betas": source["betas"]}
        rates.append([group["lr"] for group in scheduled.param_groups])
        assert rates[-1] == [group["lr"] for group in by_hand.param_groups]
        train(scheduled, range(step, step + 1))
        train(by_hand, range(step, step + 1))
        twin.step()
        advance(scheduler)
        advance(twin_scheduler)
    assert len({rate[0] for rate in rates}) > 1
    for group, expected in zip(scheduled.param_groups, by_hand.param_groups, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(group["params"], expected["params"], strict=True))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_resume_under_a_scheduler(name):
    """What schedulers write into the groups is saved, loaded and accepted when the groups are given to a new optimizer."""
    one = Celo2(three_groups(), lr=0.5, rule=random_rule())
    other = Celo2(three_groups(), lr=0.7, rule=random_rule())
    scheduler, other_scheduler = SCHEDULERS[name](one), SCHEDULERS[name](other)
    for step in range(3):
        train(one, range(step, step + 1))
        advance(scheduler)
    for group, source in zip(other.param_groups, one.param_groups, strict=True):
        for p, q in zip(group["params"], source["params"], strict=True):
            p.data.copy_(q.data)
    other.load_state_dict(one.state_dict())
    other_scheduler.load_state_dict(copy.deepcopy(scheduler.state_dict()))
    for step in range(3, 6):
        for optimizer, s in ((one, scheduler), (other, other_scheduler)):
            train(optimizer, range(step, step + 1))
            advance(s)
    assert_same_groups(one.param_groups, other.param_groups)
    for group, source in zip(other.param_groups, one.param_groups, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(group["params"], source["params"], strict=True))
    again = Celo2(one.param_groups, lr=0.9, rule=random_rule())
    assert_same_groups(again.param_groups, one.param_groups)


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensor_lr(dtype, shape):
    """A scheduler fills the tensor in place; the steps follow it."""
    params, expected = make_params(), make_params()
    rate = torch.full(shape, 0.1, dtype=dtype)
    optimizer = Celo2(make_groups(params), lr=rate, rule=random_rule(), weight_decay=0.1)
    reference = Celo2(make_groups(expected), lr=0.1, rule=random_rule(), weight_decay=0.1)
    schedulers = [lr_scheduler.CosineAnnealingLR(o, T_max=5) for o in (optimizer, reference)]
    for step in range(4):
        train(optimizer, range(step, step + 1))
        train(reference, range(step, step + 1))
        for scheduler in schedulers:
            scheduler.step()
        for group, other in zip(optimizer.param_groups, reference.param_groups, strict=True):
            assert isinstance(group["lr"], torch.Tensor)
            assert group["lr"].item() == pytest.approx(other["lr"])
    for name in KINDS:
        # lr and 1 - lr λ rounded to float32: worst measured 4.8e-7.
        torch.testing.assert_close(params[name], expected[name], rtol=0, atol=5e-6)


# --- add_param_group --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_add_param_group_later(kind):
    shape, options = KINDS[kind]
    first, late = nn.Parameter(randn(6, 8)), nn.Parameter(randn(*shape, seed=5))
    expected = run_one(late, **options, weight_decay=0.2)
    optimizer = Celo2([first], lr=0.1, rule=random_rule())
    train(optimizer, range(2))
    optimizer.add_param_group({"params": late, **options, "weight_decay": 0.2})
    assert optimizer.state[late]
    assert optimizer.param_groups[1]["params"] == [late]
    assert optimizer.param_groups[0].keys() == optimizer.param_groups[1].keys()
    for step in range(3):
        set_gradients([late, first], step)
        optimizer.step()
    assert torch.equal(late, expected)


def test_add_param_group_after_loading_or_copying():
    """Groups that are added late have the keys of the others, however the optimizer came about."""
    optimizer = Celo2([nn.Parameter(randn(6, 8))], lr=0.1)
    optimizer.load_state_dict(optimizer.state_dict())
    for one in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        one.add_param_group({"params": [nn.Parameter(randn(3))]})
        assert one.param_groups[1].keys() == one.param_groups[0].keys()
        Celo2(one.param_groups, lr=0.1)  # its own groups are groups that it accepts


# --- errors -----------------------------------------------------------------------------------------------------------------

SHARED = nn.Parameter(torch.zeros(2, 3))  # a parameter that is already in group 0

BAD_GROUPS = {
    "misspelt weight_decay": ({"wieght_decay": 0.1}, ValueError, "unknown key 'wieght_decay'.*'weight_decay'"),
    "misspelt betas": ({"beta": (0.9, 0.9)}, ValueError, "unknown key 'beta'.*'betas'"),
    "misspelt orthogonalize": ({"ortogonalize": True}, ValueError, "unknown key 'ortogonalize'.*'orthogonalize'"),
    "unknown key": ({"nesterov": True}, ValueError, "unknown key 'nesterov'"),
    "key of another optimizer": ({"amsgrad": False}, ValueError, "unknown key 'amsgrad'"),
    "unknown update": ({"update": "muon"}, ValueError, "unknown update 'muon'.*celo2, adamw"),
    "negative lr": ({"lr": -0.1}, ValueError, "lr.*-0.1"),
    "NaN lr": ({"lr": float("nan")}, ValueError, "lr.*nan"),
    "negative tensor lr": ({"lr": torch.tensor(-0.1)}, ValueError, "lr"),
    "lr of two elements": ({"lr": torch.ones(2)}, ValueError, "lr.*one element"),
    "lr None": ({"lr": None}, (ValueError, TypeError), "lr.*None"),
    "lr a string": ({"lr": "0.1"}, (ValueError, TypeError), "lr.*0.1"),
    "negative decay": ({"weight_decay": -1.0}, ValueError, "weight_decay.*-1"),
    "NaN decay": ({"weight_decay": float("nan")}, ValueError, "weight_decay.*nan"),
    "decay a string": ({"weight_decay": "big"}, (ValueError, TypeError), "weight_decay.*big"),
    "negative eps": ({"eps": -1e-8}, ValueError, "eps"),
    "beta of 1": ({"betas": (0.9, 1.0)}, ValueError, "betas.*1.0"),
    "negative beta": ({"betas": (-0.1, 0.9)}, ValueError, "betas.*-0.1"),
    "NaN beta": ({"betas": (float("nan"), 0.9)}, ValueError, "betas.*nan"),
    "one beta": ({"betas": (0.9,)}, ValueError, "betas"),
    "betas a number": ({"betas": 0.9}, (ValueError, TypeError), "betas.*0.9"),
    "betas strings": ({"betas": ("high", 0.9)}, (ValueError, TypeError), "betas.*high"),
    "orthogonalize a string": ({"orthogonalize": "no"}, (ValueError, TypeError), "orthogonalize.*no"),
    "layout a string": ({"matrices": "c_attn"}, ValueError, "matrices.*c_attn"),
    "layout of two parts": ({"matrices": ((2, 3), (0, 1))}, ValueError, "matrices"),
    "layout, not a permutation": ({"matrices": ((2, 3), (0, 0), (1, 2, 3))}, ValueError, "matrices"),
    "layout, other products": ({"matrices": ((2, 3), (0, 1), (1, 2, 4))}, ValueError, "matrices"),
    "layout of two axes": ({"matrices": ((2, 3), (0, 1), (2, 3))}, ValueError, "matrices"),
    "layout, negative": ({"matrices": ((-2, -3), (0, 1), (1, 2, 3))}, ValueError, "matrices"),
    "layout, fractions": ({"matrices": ((2.5, 3), (0, 1), (1, 2, 3))}, ValueError, "matrices"),
    "layout does not fit": ({"matrices": ((2, 4), (0, 1), (1, 2, 4))}, ValueError, r"matrices.*\(2, 3\)"),
    "integer parameter": ({"params": [nn.Parameter(torch.zeros(2, 3, dtype=torch.int32), False)]}, TypeError, "int32"),
    "complex parameter": ({"params": [nn.Parameter(torch.zeros(2, 3, dtype=torch.complex64))]}, TypeError, "complex64"),
    "second parameter integer": ({"params": [nn.Parameter(torch.zeros(2)), torch.zeros(2).int()]}, TypeError, "int32"),
    "parameter in two groups": ({"params": [nn.Parameter(torch.zeros(2)), SHARED]}, ValueError, "more than one"),
    "parameter not a leaf": ({"params": [SHARED * 2]}, ValueError, "leaf"),
    "parameter not a tensor": ({"params": ["weight"]}, TypeError, "str"),
    "parameters a set": ({"params": {SHARED}}, TypeError, "set"),
    "named among unnamed": ({"params": [("weight", nn.Parameter(torch.zeros(2)))]}, ValueError, "names"),
}


def bad_group(name: str) -> tuple[dict, type[Exception] | tuple, str]:
    options, error, message = BAD_GROUPS[name]
    return {"params": [nn.Parameter(torch.zeros(2, 3))], **options}, error, rf"(?s)parameter group 1\b.*{message}"


@pytest.mark.parametrize("name", BAD_GROUPS)
def test_bad_group_is_an_error_that_names_the_group(name):
    group, error, message = bad_group(name)
    with pytest.raises(error, match=message):
        Celo2([{"params": [SHARED]}, group], lr=0.1)


@pytest.mark.parametrize("name", BAD_GROUPS)
def test_failed_add_param_group_leaves_the_optimizer_unchanged(name):
    group, error, message = bad_group(name)
    optimizer = Celo2([{"params": [SHARED]}], lr=0.1)
    groups, state = optimizer.state_dict()["param_groups"], copy_of_state(optimizer)
    with pytest.raises(error, match=message):
        optimizer.add_param_group(group)
    assert optimizer.state_dict()["param_groups"] == groups
    assert list(optimizer.state) == [SHARED]
    assert_same_state(copy_of_state(optimizer), state)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, 3))]})
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr"),
        ({"lr": 0.1, "weight_decay": -1.0}, "weight_decay"),
        ({"lr": 0.1, "betas": (2.0, 0.9)}, "betas"),
        ({"lr": 0.1, "eps": -1.0}, "eps"),
        ({"lr": 0.1, "state_dtype": torch.float16}, "state_dtype.*float16"),
        ({"lr": 0.1, "ns_dtype": torch.int32}, "ns_dtype.*int32"),
        ({"lr": 0.1, "rule": "celo3"}, "celo3"),
    ],
)
def test_bad_argument(options, message):
    with pytest.raises(ValueError, match=message):
        Celo2([nn.Parameter(torch.zeros(2, 3))], **options)


@pytest.mark.parametrize("update", ["celo2", "adamw"])
@pytest.mark.parametrize("kind", ["sparse", "complex"])
def test_bad_gradient_names_the_group(kind, update):
    good, bad = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(4, 5))
    optimizer = Celo2([{"params": [good]}, {"params": [bad], "update": update}], lr=0.1)
    bad.grad_dtype = None
    bad.grad = torch.ones(4, 5).to_sparse() if kind == "sparse" else torch.ones(4, 5, dtype=torch.complex64)
    with pytest.raises((RuntimeError, TypeError), match=rf"parameter group 1\b.*{kind} gradient.*\(4, 5\)"):
        optimizer.step()
    assert not bad.any()


def test_sparse_embedding_gradient():
    embedding = nn.Embedding(6, 4, sparse=True)
    optimizer = Celo2([{"params": embedding.parameters(), "update": "adamw"}], lr=0.1)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=r"parameter group 0.*sparse"):
        optimizer.step()


# --- saving, loading, copying -----------------------------------------------------------------------------------------------


def through_torch_save(state_dict: dict) -> dict:
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def through_json_groups(state_dict: dict) -> dict:
    saved = through_torch_save({"state": state_dict["state"]})
    return {"state": saved["state"], "param_groups": json.loads(json.dumps(state_dict["param_groups"]))}


@pytest.mark.parametrize("route", [through_torch_save, through_json_groups])
@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_resume_bit_for_bit(dtype, state_dtype, route):
    params = make_params(dtype)
    options = {"rule": random_rule(), "state_dtype": state_dtype}
    optimizer = Celo2(make_groups(params), lr=0.05, weight_decay=0.1, betas=(0.85, 0.9), eps=1e-7, **options)
    optimizer.param_groups[0] |= {"lr": 0.01, "weight_decay": 0.3}
    train(optimizer, range(3))
    saved = route(optimizer.state_dict())
    kept = copy.deepcopy(saved)

    resumed_params = {name: nn.Parameter(p.detach().clone()) for name, p in params.items()}
    resumed = Celo2(make_groups(resumed_params), lr=9.0, weight_decay=9.0, **options)
    resumed.load_state_dict(saved)
    assert_same_groups(resumed.param_groups, optimizer.param_groups)
    assert_same_state(copy_of_state(resumed), copy_of_state(optimizer))

    train(optimizer, range(3, 6))
    train(resumed, range(3, 6))
    assert all(torch.equal(params[name], resumed_params[name]) for name in KINDS)
    assert_same_state(copy_of_state(resumed), copy_of_state(optimizer))
    if state_dtype == torch.float32:
        assert all(v.dtype == torch.float32 for state in copy_of_state(resumed) for v in state.values())
    # Neither loading nor the steps after it wrote into the saved dictionary.
    assert_same_state(list(saved["state"].values()), list(kept["state"].values()))
    assert saved["param_groups"] == kept["param_groups"]


def test_state_dict_can_be_loaded_by_the_optimizer_that_made_it():
    params = make_params()
    optimizer = Celo2(make_groups(params), lr=0.05, rule=random_rule())
    train(optimizer, range(2))
    before = copy_of_state(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    assert_same_state(copy_of_state(optimizer), before)
    assert list(optimizer.state) == list(params.values())


def test_load_state_dict_hooks():
    """A pre-hook adapts what is saved, as torch documents it; a post-hook sees the loaded state."""
    p, q = nn.Parameter(randn(6, 8)), nn.Parameter(randn(6, 8))
    source, target = Celo2([p], lr=0.1), Celo2([q], lr=0.1)
    train(source, range(1))
    seen = []

    def rename(optimizer, state_dict):
        return {**state_dict, "state": {0: {k.removeprefix("old_"): v for k, v in state_dict["state"][0].items()}}}

    target.register_load_state_dict_pre_hook(rename)
    target.register_load_state_dict_post_hook(lambda optimizer: seen.extend(copy_of_state(optimizer)))
    saved = source.state_dict()
    target.load_state_dict({**saved, "state": {0: {f"old_{k}": v for k, v in saved["state"][0].items()}}})
    assert_same_state(seen, copy_of_state(source))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_copy_continues_identically(state_dtype, clone):
    params = make_params()
    options = {"lr": 0.05, "rule": random_rule(), "weight_decay": 0.1, "orthogonalize": True, "ns_dtype": torch.bfloat16}
    optimizer = Celo2(make_groups(params), state_dtype=state_dtype, **options)
    train(optimizer, range(2))
    twin_params, twin = clone((params, optimizer))
    assert all(twin_params[name] is not p for name, p in params.items())
    assert twin.param_groups[0]["params"][0] is twin_params["wide"]
    assert all(torch.equal(twin.rule.weights[name], w) for name, w in optimizer.rule.weights.items())
    assert twin.rule.momentum_decays == optimizer.rule.momentum_decays
    assert (twin.ns_dtype, twin.state_dtype) == (torch.bfloat16, state_dtype)
    train(optimizer, range(2, 4))
    untouched = {name: p.detach().clone() for name, p in params.items()}
    train(twin, range(2, 4))
    for name, p in params.items():
        assert torch.equal(p, untouched[name])
        assert torch.equal(p, twin_params[name])
    assert_same_state(copy_of_state(twin), copy_of_state(optimizer))


def matrix_and_vector() -> Celo2:
    groups = [{"params": [nn.Parameter(randn(6, 8))]}, {"params": [nn.Parameter(randn(7)), nn.Parameter(randn(3))]}]
    optimizer = Celo2(groups, lr=0.1, rule=random_rule())
    train(optimizer, range(1))
    return optimizer


def edit(*path, value):
    """Change one entry of a state dict; `value` may be a function of the old one."""

    def damage(saved: dict) -> None:
        for key in path[:-1]:
            saved = saved[key]
        saved[path[-1]] = value(saved[path[-1]]) if callable(value) else value

    return damage


DAMAGED = {
    "a group less": (edit("param_groups", value=lambda groups: groups[:1]), "parameter group"),
    "a group more": (edit("param_groups", value=lambda g: [*g, {**g[0], "params": [3]}]), "parameter group"),
    "a parameter less": (edit("param_groups", 1, "params", value=[1]), r"parameter group 1\b"),
    "no state": (edit("state", value={}), r"parameter group 0\b.*momentum"),
    "no state of a parameter": (edit("state", value=lambda s: {0: s[0], 1: s[1]}), r"parameter group 1\b.*exp_avg"),
    "an accumulator missing": (edit("state", 0, value=lambda s: {k: s[k] for k in s if k != "row"}), r"parameter group 0\b.*row"),
    "state of AdamW for the rule": (edit("state", 0, value=lambda s: {"step": torch.tensor(1.0)}), r"parameter group 0\b"),
    "state of the rule for AdamW": (edit("state", value=lambda s: {**s, 2: s[0]}), r"parameter group 1\b.*momentum"),
    "another shape": (edit("state", 0, "row", value=lambda row: row[:, :-1]), r"parameter group 0\b.*row.*\(3, 5\).*\(3, 6\)"),
    "another shape of AdamW": (edit("state", 2, "exp_avg", value=torch.zeros(4)), r"parameter group 1\b.*exp_avg"),
    "unknown update": (edit("param_groups", 1, "update", value="muon"), r"parameter group 1\b.*muon"),
    "negative lr": (edit("param_groups", 1, "lr", value=-1.0), r"parameter group 1\b.*lr"),
    "bad betas": (edit("param_groups", 1, "betas", value=[0.9]), r"parameter group 1\b.*betas"),
    "bad layout": (edit("param_groups", 0, "matrices", value=[[6, 8], [0, 0], [1, 6, 8]]), r"parameter group 0\b.*matrices"),
    "layout of another shape": (
        edit("param_groups", 0, "matrices", value=[[9], [0], [1, 3, 3]]),
        r"parameter group 0\b.*matrices",
    ),
    "option missing": (edit("param_groups", 0, value=lambda g: {"params": g["params"]}), r"parameter group 0\b"),
    "group of another optimizer": (
        edit("param_groups", 0, value=lambda g: {**torch.optim.SGD([torch.zeros(1)]).state_dict()["param_groups"][0]}),
        r"parameter group 0\b",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_saved_state_that_does_not_fit(name):
    """An error that names the group, after which the optimizer is what it was."""
    damage, message = DAMAGED[name]
    saved = copy.deepcopy(matrix_and_vector().state_dict())
    damage(saved)
    optimizer = matrix_and_vector()
    train(optimizer, range(1, 2))
    groups, state = copy.deepcopy(optimizer.state_dict()["param_groups"]), copy_of_state(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert optimizer.state_dict()["param_groups"] == groups
    assert_same_state(copy_of_state(optimizer), state)
    train(optimizer, range(1))


# --- strides ----------------------------------------------------------------------------------------------------------------

STRIDED = {
    "transposed": (lambda r: r(7, 5).t(), {}),
    "transposed by adamw": (lambda r: r(7, 5).t(), {"update": "adamw"}),
    "columns of a larger matrix": (lambda r: r(5, 20)[:, 3:17:2], {}),
    "columns of a larger matrix by adamw": (lambda r: r(5, 20)[:, 3:17:2], {"update": "adamw"}),
    "batch permuted": (lambda r: r(6, 3, 8).permute(1, 2, 0), {}),
    "batch axes swapped": (lambda r: r(3, 2, 8, 4).transpose(0, 1), {}),
    "factored over the batch": (lambda r: r(6, 9, 8).permute(1, 2, 0), {}),
    "fused": (lambda r: r(18, 8).t(), {"matrices": FUSED}),
    "fused, axes merged": (lambda r: r(4, 3, 5).permute(1, 2, 0), {"matrices": ((15, 4), (0, 1), (1, 15, 4))}),
    "channels last": (lambda r: r(6, 3, 2, 2).to(memory_format=torch.channels_last), {"matrices": FLAT}),
    "channels last by adamw": (lambda r: r(6, 3, 2, 2).to(memory_format=torch.channels_last), {"update": "adamw"}),
    "every second element": (lambda r: r(22)[::2], {"update": "adamw"}),
    "every second element by rule": (lambda r: r(22)[::2], {"update": "celo2"}),
}


def strided_like(x: torch.Tensor) -> torch.Tensor:
    """x with other strides than those it has: every axis reversed in memory, with gaps."""
    big = torch.zeros([2 * n for n in reversed(x.shape)], dtype=x.dtype).permute(list(reversed(range(x.ndim))))
    view = big[tuple(slice(None, None, 2) for _ in x.shape)]
    return view.copy_(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strided_gradient", [True, False])
@pytest.mark.parametrize("strided_weight", [True, False])
@pytest.mark.parametrize("kind", STRIDED)
def test_strides_do_not_matter(kind, strided_weight, strided_gradient, dtype):
    make, options = STRIDED[kind]
    w = make(lambda *shape: randn(*shape).to(dtype))
    assert not w.is_contiguous()
    strides = w.stride()
    q = nn.Parameter(w.clone(memory_format=torch.contiguous_format))
    p = nn.Parameter(w if strided_weight else q.detach().clone())
    optimizers = [Celo2([{"params": [x], **options}], lr=0.1, rule=random_rule(), weight_decay=0.1) for x in (p, q)]
    for step in range(3):
        g = randn(*w.shape, seed=step + 1).to(dtype)
        p.grad, q.grad = strided_like(g) if strided_gradient else g.clone(), g
        for optimizer in optimizers:
            optimizer.step()
        # Sums of whole strided tensors may run in another order: worst measured 6.6e-7, and 0 in bfloat16.
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)
    if strided_weight:
        assert p.stride() == strides


@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_memory_may_move_between_steps(state_dtype):
    """Weights, gradients and accumulators that are other tensors, or lie otherwise, in every step; options that change."""
    rule, generator = random_rule(), torch.Generator().manual_seed(3)
    moving, still = make_params(), make_params()
    options = {"lr": 0.1, "rule": rule, "weight_decay": 0.1, "state_dtype": state_dtype}
    first, second = Celo2(make_groups(moving), **options), Celo2(make_groups(still), **options)
    for step in range(6):
        for optimizer in (first, second):
            for i, group in enumerate(optimizer.param_groups):
                group["lr"], group["weight_decay"] = 0.1 / (1 + step), 0.1 * step
                group["orthogonalize"] = (step + i) % 2 == 0
        for p, q in zip(moving.values(), still.values(), strict=True):
            drawn = torch.randint(5, (4,), generator=generator).tolist()
            q.grad = randn(*p.shape, seed=step) if drawn[0] else None
            p.data = strided_like(p.data) if drawn[1] % 2 else p.data.clone(memory_format=torch.contiguous_format)
            p.grad = None if q.grad is None else strided_like(q.grad) if drawn[2] % 2 else q.grad.clone()
            if drawn[3] % 2:
                first.state[p] = {name: value.clone() for name, value in first.state[p].items()}
            else:
                for value in first.state[p].values():
                    value.data = value.data.clone()
        if step == 3:
            first.load_state_dict(copy.deepcopy(first.state_dict()))
        first.step()
        second.step()
        for name in KINDS:  # sums over a strided tensor may run in another order: worst measured 3e-7
            torch.testing.assert_close(moving[name], still[name], rtol=0, atol=1e-5)
    for one, other in zip(copy_of_state(first), copy_of_state(second), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_what_a_parameter_is_is_worked_out_once():
    params = make_params()
    optimizer = Celo2(make_groups(params), lr=0.1, rule=random_rule())
    train(optimizer, range(1))
    before = form_of.cache_info().misses
    train(optimizer, range(1, 3))
    assert form_of.cache_info().misses == before


@pytest.mark.parametrize("update", ["celo2", "adamw"])
@pytest.mark.parametrize("shape", [(12, 20), (40,)])
def test_parameter_within_a_larger_storage_leaves_the_rest_alone(shape, update):
    """Flat buffers and padded weights: what lies between and after the parameter's elements is not its own."""
    buffer = randn(*shape)
    window = tuple(slice(1, n - 3, 2) for n in shape)
    inside = torch.zeros(shape, dtype=torch.bool)
    inside[window] = True
    before = buffer.clone()
    p = nn.Parameter(buffer[window])
    optimizer = Celo2([{"params": [p], "update": update}], lr=0.1, rule=random_rule(), weight_decay=0.1)
    expected = run_one(before[window].contiguous(), update=update, weight_decay=0.1)
    train(optimizer, range(3))
    assert torch.equal(buffer[~inside], before[~inside])
    torch.testing.assert_close(buffer[window], expected, rtol=0, atol=1e-6)


# --- AdamW ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_side_equals_torch(weight_decay, dtype):
    """Every group "adamw" for 20 steps under a cosine schedule, two groups: bitwise torch's fused AdamW."""
    shapes = [(5, 7), (3, 4, 5), (11,), (), (64, 33)]

    def groups() -> list[dict]:
        params = [nn.Parameter(randn(*shape, seed=i).to(dtype)) for i, shape in enumerate(shapes)]
        first = {"params": params[:2], "lr": 0.02, "weight_decay": weight_decay}
        return [first, {"params": params[2:], "betas": (0.8, 0.99), "eps": 1e-5}]

    ours = Celo2([{**group, "update": "adamw"} for group in groups()], lr=0.01, weight_decay=0.3)
    options = {"lr": 0.01, "weight_decay": 0.3, "betas": (0.9, 0.95), "eps": 1e-8}
    fused, foreach = torch.optim.AdamW(groups(), **options, fused=True), torch.optim.AdamW(groups(), **options, foreach=True)
    schedulers = [lr_scheduler.CosineAnnealingLR(o, T_max=20) for o in (ours, fused, foreach)]
    for step in range(20):
        for optimizer, scheduler in zip((ours, fused, foreach), schedulers, strict=True):
            train(optimizer, range(step, step + 1))
            scheduler.step()
    for mine, bitwise, near in zip(ours.param_groups, fused.param_groups, foreach.param_groups, strict=True):
        for p, q, r in zip(mine["params"], bitwise["params"], near["params"], strict=True):
            assert torch.equal(p, q)
            assert ours.state[p].keys() == fused.state[q].keys()
            for name, value in fused.state[q].items():
                assert torch.equal(ours.state[p][name], value)
            torch.testing.assert_close(p, r, rtol=0, atol=1e-6)  # worst measured 2.8e-9


def test_adamw_beside_the_rule_equals_torch():
    """The vectors of a network, by default routing, take torch's AdamW while its matrices take the rule."""
    vectors = [nn.Parameter(randn(n, seed=n)) for n in (3, 8)]
    twins = [nn.Parameter(p.detach().clone()) for p in vectors]
    ours = Celo2([nn.Parameter(randn(4, 5)), *vectors], lr=0.03, weight_decay=0.2)
    theirs = torch.optim.AdamW(twins, lr=0.03, weight_decay=0.2, betas=(0.9, 0.95), eps=1e-8, fused=True)
    for step in range(5):
        set_gradients(ours.param_groups[0]["params"], step)
        for p, q in zip(vectors, twins, strict=True):
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    assert all(torch.equal(p, q) for p, q in zip(vectors, twins, strict=True))


# --- mixed precision --------------------------------------------------------------------------------------------------------


def test_grad_scaler_unscales_and_skips():
    """A loss scaled by 2^16 takes the steps of an unscaled one; an overflow is a step that did not happen."""
    params, expected = make_params(), make_params()
    scaled = Celo2(make_groups(params), lr=0.05, rule=random_rule(), weight_decay=0.1)
    plain = Celo2(make_groups(expected), lr=0.05, rule=random_rule(), weight_decay=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=1000)
    for step in range(5):
        overflow = step == 2
        scaled.zero_grad()
        plain.zero_grad()
        loss = sum((p * randn(*p.shape, seed=100 * step + i)).sum() for i, p in enumerate(params.values()))
        scaler.scale(loss * torch.inf if overflow else loss).backward()
        before, state = {name: p.detach().clone() for name, p in params.items()}, copy_of_state(scaled)
        scaler.unscale_(scaled)
        scaler.step(scaled)
        scaler.update()
        if overflow:
            assert all(torch.equal(p, before[name]) for name, p in params.items())
            assert_same_state(copy_of_state(scaled), state)
            assert scaler.get_scale() == 2.0**15
            continue
        sum((p * randn(*p.shape, seed=100 * step + i)).sum() for i, p in enumerate(expected.values())).backward()
        plain.step()
    assert all(torch.equal(params[name], expected[name]) for name in KINDS)


# --- layouts ----------------------------------------------------------------------------------------------------------------


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(n_embd=12, n_layer=1, n_head=3, n_positions=8, vocab_size=17, bos_token_id=0, eos_token_id=0)
    )


def neox() -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 20}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, vocab_size=17, bos_token_id=0, eos_token_id=0))


MOE = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 10}


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**MOE, num_local_experts=3, vocab_size=17))


def gpt_oss() -> nn.Module:
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {**MOE, "head_dim": 6, "num_local_experts": 3, "vocab_size": 17, "layer_types": ["full_attention"]}
    return GptOssForCausalLM(GptOssConfig(**sizes, pad_token_id=0, bos_token_id=0, eos_token_id=0))


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 2)


def experts_of(matrices_of_expert):
    return lambda w: [m for expert in w for m in matrices_of_expert(expert)]


# (model, parameter, the separate (outputs, inputs) matrices that it holds, as its forward reads them)
HOLDS = {
    "gpt2 c_attn": (gpt2, "transformer.h.0.attn.c_attn.weight", lambda w: [w[:, :12].T, w[:, 12:24].T, w[:, 24:].T]),
    "gpt2 attention c_proj": (gpt2, "transformer.h.0.attn.c_proj.weight", lambda w: [w.T]),
    "gpt2 c_fc": (gpt2, "transformer.h.0.mlp.c_fc.weight", lambda w: [w.T]),
    "gpt2 mlp c_proj": (gpt2, "transformer.h.0.mlp.c_proj.weight", lambda w: [w.T]),
    "neox query_key_value": (
        neox,
        "gpt_neox.layers.0.attention.query_key_value.weight",
        lambda w: [torch.cat([w[12 * head + 4 * i : 12 * head + 4 * i + 4] for head in range(3)]) for i in range(3)],
    ),
    "mixtral gate and up": (mixtral, "model.layers.0.mlp.experts.gate_up_proj", experts_of(lambda w: [w[:10], w[10:]])),
    "mixtral down": (mixtral, "model.layers.0.mlp.experts.down_proj", experts_of(lambda w: [w])),
    "gpt_oss gate and up": (
        gpt_oss,
        "model.layers.0.mlp.experts.gate_up_proj",
        experts_of(lambda w: [w[:, ::2].T, w[:, 1::2].T]),
    ),
    "gpt_oss down": (gpt_oss, "model.layers.0.mlp.experts.down_proj", experts_of(lambda w: [w.T])),
    "convolution": (Convolution, "conv.weight", lambda w: [w.flatten(1)]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", HOLDS)
def test_fused_weight_trains_as_its_separate_matrices(kind, dtype):
    """A whole weight of a model, grouped by `param_groups`, against one plain (outputs, inputs) parameter a matrix."""
    make, name, separate = HOLDS[kind]
    model = make().to(dtype)
    fused = dict(model.named_parameters())[name]
    fused.data.copy_(randn(*fused.shape))
    groups = [group for group in param_groups(model, 0.1, 0.1, 0.1) if any(p is fused for p in group["params"])]
    optimizer = Celo2(groups, lr=0.1, rule=random_rule())
    parts = [nn.Parameter(m.detach().clone(memory_format=torch.contiguous_format)) for m in separate(fused)]
    assert sum(p.numel() for p in parts) == fused.numel()
    reference = Celo2([{"params": [p], "weight_decay": 0.1} for p in parts], lr=0.1, rule=random_rule())
    for step in range(6):
        fused.grad = randn(*fused.shape, seed=step).to(dtype)
        for p, g in zip(parts, separate(fused.grad), strict=True):
            p.grad = g.contiguous()
        optimizer.step()
        reference.step()
        for p, m in zip(parts, separate(fused), strict=True):
            # The order of sums may depend on the batch: worst measured 0. bfloat16 may round weights up to 4 to a neighbour.
            torch.testing.assert_close(m, p, rtol=0, atol=1e-5 if dtype == torch.float32 else 2**-6)


# --- memory -----------------------------------------------------------------------------------------------------------------

MEMORY = """
    import pathlib, resource, torch
    from celo2 import Celo2

    def used() -> float:
        status = pathlib.Path("/proc/self/status")
        if not status.exists():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        # Not ru_maxrss: on Linux it begins with the peak of the process that started this one.
        return float(status.read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e6

    def prepared(*shape):
        p = torch.nn.Parameter(torch.randn(shape))
        p.grad = torch.randn(shape)
        optimizer = Celo2([p], lr=0.01, weight_decay=0.1)
        for value in optimizer.state[p].values():
            value.fill_(0.0)  # zeros are not resident until they are written
        return optimizer

    prepared(64, 48).step()  # code and thread pools
    optimizer = prepared(8192, 2048)
    before = used()
    optimizer.step()
    print(used() - before)
"""


def test_memory_of_one_step():
    """8192 × 2048 in float32: at most 400 MB beyond weight, gradient and state. Measured 285 to 339; all channels are 2,013."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(MEMORY)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    used = float(done.stdout)
    assert 60 < used < 400  # the direction alone is 67: less means that the measurement is broken
