"""`Celo2` as a `torch.optim.Optimizer`: groups, steps, AdamW, schedulers, mixed precision."""

import copy
import pickle

import pytest
import torch
from optimizer_kinds import (
    FUSED,
    KINDS,
    STATE_DTYPES,
    assert_same_groups,
    assert_same_state,
    copy_of_state,
    make_groups,
    make_params,
    randn,
    random_rule,
    run_one,
    set_gradients,
    train,
)
from torch import nn
from torch.optim import lr_scheduler

from celo2 import Celo2, load_rule, save_rule
from celo2 import step as step_module

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
    optimizer.allocate_state()
    by_rule = ["momentum" in optimizer.state[p] for p in params]
    assert by_rule == [True, True, True, False, False]
    assert ["exp_avg" in optimizer.state[p] for p in params] == [not rule for rule in by_rule]
    base = Celo2(params, lr=0.1, rule="celo2-base")
    base.allocate_state()
    assert all("momentum" in base.state[p] for p in params)
    explicit = Celo2([{"params": params, "update": "adamw"}], lr=0.1, rule="celo2-base")
    explicit.allocate_state()
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
    assert params[1] not in optimizer.state


@pytest.mark.parametrize("update", ["celo2", "adamw"])
@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 3), (0, 4, 3)])
def test_empty_parameter_is_skipped(shape, update):
    empty, full = nn.Parameter(torch.empty(shape)), nn.Parameter(randn(5, 7))
    optimizer = Celo2([{"params": [empty, full], "update": update}], lr=0.1, rule=random_rule(), weight_decay=0.1)
    expected = run_one(full, update=update, weight_decay=0.1)
    for step in range(3):
        full.grad, empty.grad = randn(5, 7, seed=1000 * step), torch.empty(shape)
        optimizer.step()
    assert torch.equal(full, expected)
    assert all(not value.any() for value in optimizer.state[empty].values())


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
    monkeypatch.setitem(step_module.BATCH_ELEMENTS, "cpu", batch_elements)
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
    assert optimizer.param_groups[1]["params"] == [late]
    assert optimizer.param_groups[0].keys() == optimizer.param_groups[1].keys()
    for step in range(3):
        set_gradients([late, first], step)
        optimizer.step()
    assert torch.equal(late, expected)
    assert optimizer.state[late]


def test_add_param_group_after_loading_or_copying():
    """Groups that are added late have the keys of the others, however the optimizer came about."""
    optimizer = Celo2([nn.Parameter(randn(6, 8))], lr=0.1)
    optimizer.load_state_dict(optimizer.state_dict())
    for one in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        one.add_param_group({"params": [nn.Parameter(randn(3))]})
        assert one.param_groups[1].keys() == one.param_groups[0].keys()
        Celo2(one.param_groups, lr=0.1)  # its own groups are groups that it accepts


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
