"""State is made when a parameter first has a gradient, where the parameter is then. torch's AdamW does the same."""

import copy
from collections import defaultdict

import pytest
import torch
from optimizer_kinds import assert_same_state, copy_of_state, random_rule, set_gradients, train
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from celo2 import Celo2, ShardingError


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3))


def optimizer_of(layers, **options):
    return Celo2(layers.parameters(), lr=0.05, rule=random_rule(), weight_decay=0.1, **options)


def params_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def test_frozen_weights_have_no_state():
    layers = model().requires_grad_(False)
    layers[2].requires_grad_(True)
    optimizer = optimizer_of(layers)
    set_gradients(list(layers[2].parameters()), 0)
    optimizer.step()
    assert set(optimizer.state) == set(layers[2].parameters())
    assert len(optimizer.state_dict()["state"]) == 2


def test_freezing_and_unfreezing_in_mid_training():
    """A layer continues with the state that it had; one that was never trained begins, as if it alone had been added."""
    layers, always = model(), model()
    optimizer, reference = optimizer_of(layers), optimizer_of(always[0])
    for step in range(6):
        active = layers if step in (0, 1, 5) else layers[1:]
        set_gradients(list(layers.parameters()), step)
        for p in set(layers.parameters()) - set(active.parameters()):
            p.grad = None
        optimizer.step()
        if step in (0, 1, 5):
            for p, q in zip(always[0].parameters(), layers[0].parameters(), strict=True):
                p.grad = q.grad
            reference.step()
    assert all(torch.equal(p, q) for p, q in zip(layers[0].parameters(), always[0].parameters(), strict=True))


@pytest.mark.parametrize("flat", [False, True])
def test_set_state_dict_with_a_frozen_layer(flat):
    """torch drops the state of frozen parameters when it loads; the others continue exactly."""
    layers, options = model(), StateDictOptions(flatten_optimizer_state_dict=flat)
    optimizer = optimizer_of(layers)
    train(optimizer, range(2))
    layers[1].requires_grad_(False)
    for p in layers.parameters():
        p.grad = None
    weights, state = get_state_dict(layers, optimizer, options=options)
    weights, state, before = copy.deepcopy(weights), copy.deepcopy(state), copy_of_state(optimizer)
    set_state_dict(layers, optimizer, model_state_dict=weights, optim_state_dict=state, options=options)
    frozen = set(layers[1].parameters())
    for p, old in zip(params_of(optimizer), before, strict=True):
        if p in frozen:
            assert p not in optimizer.state
        else:
            assert_same_state([optimizer.state[p]], [old])
    layers[1].requires_grad_(True)
    train(optimizer, range(2, 3))
    assert set(optimizer.state) == set(layers.parameters())


@pytest.mark.parametrize("nothing", [lambda: defaultdict(dict), dict], ids=["defaultdict", "dict"])
def test_state_that_a_user_replaces_begins_again(nothing):
    layers = model()
    optimizer = optimizer_of(layers)
    train(optimizer, range(2))
    fresh = optimizer_of(again := copy.deepcopy(layers))
    optimizer.state = nothing()
    for one in (optimizer, fresh):
        train(one, range(2))
    assert_same_state(copy_of_state(optimizer), copy_of_state(fresh))
    assert all(torch.equal(p, q) for p, q in zip(layers.parameters(), again.parameters(), strict=True))
    del optimizer.state[layers[0].weight]
    optimizer.state[layers[1].weight] = {}
    train(optimizer, range(1))
    assert optimizer.state[layers[0].weight] and optimizer.state[layers[1].weight]


def test_state_loaded_before_the_first_step():
    """What is saved is taken whole: nothing was there to fill. What is not saved has no state afterwards, as with AdamW."""
    layers, others = model(), model(seed=1)
    optimizer, other = optimizer_of(layers), optimizer_of(others)
    train(optimizer, range(2))
    other.load_state_dict(optimizer.state_dict())
    assert_same_state(copy_of_state(other), copy_of_state(optimizer))
    saved = optimizer.state_dict()
    saved["state"] = {i: state for i, state in saved["state"].items() if i in (0, 3)}
    other.load_state_dict(saved)
    assert [i for i, p in enumerate(params_of(other)) if other.state.get(p)] == [0, 3]
    other.load_state_dict(optimizer_of(model()).state_dict())
    assert not other.state


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moved", ["before the first step", "after a step", "and loaded"])
def test_state_follows_the_parameter_to_its_device(moved, state_dtype):
    """`.cuda()` keeps the parameter and changes its device; "meta" stands for the GPU, since no other device is everywhere."""
    layers = model()
    optimizer = optimizer_of(layers, state_dtype=state_dtype)
    if moved != "before the first step":
        train(optimizer, range(1))
    saved = copy.deepcopy(optimizer.state_dict())
    for p in layers.parameters():
        p.grad = None
        torch.utils.swap_tensors(p, nn.Parameter(p.detach().to("meta")))  # as `Module.to` may do
    if moved == "and loaded":
        optimizer.load_state_dict(saved)
        assert {v.device.type for state in optimizer.state.values() for v in state.values()} == {"meta"}
    for p in layers.parameters():
        p.grad = torch.empty_like(p)
    optimizer.step()
    assert {v.device.type for state in optimizer.state.values() for v in state.values()} == {"meta"}


def test_built_on_meta_and_materialized():
    """A model that gets its weights after the optimizer has been built."""
    with torch.device("meta"):
        layers = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    optimizer, expected = optimizer_of(layers), model()
    layers.to_empty(device="cpu")
    layers.load_state_dict(expected.state_dict())
    if not set(layers.parameters()) <= set(params_of(optimizer)):  # torch has replaced them, as some versions do
        optimizer.param_groups[0]["params"] = list(layers.parameters())
    for one in (optimizer, optimizer_of(expected)):
        train(one, range(2))
    assert all(torch.equal(p, q) for p, q in zip(layers.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_model_cast_after_construction(dtype):
    """The state is that of an optimizer that was built afterwards."""
    layers = model()
    optimizer = optimizer_of(layers)
    layers.to(dtype)
    again = copy.deepcopy(layers)
    for one in (optimizer, built_after := optimizer_of(again)):
        train(one, range(2))
    assert_same_state(copy_of_state(optimizer), copy_of_state(built_after))
    assert all(torch.equal(p, q) for p, q in zip(layers.parameters(), again.parameters(), strict=True))


def test_parameters_that_are_replaced_by_others_of_their_shapes():
    """What Accelerate does for FSDP2 when it prepares an optimizer."""
    layers, again = model(), model()
    optimizer = optimizer_of(layers)
    group = optimizer.param_groups[0]
    group["params"] = [torch.empty(1) for _ in group["params"]]  # so that the old weights are freed
    optimizer.load_state_dict(optimizer.state_dict())
    group = optimizer.param_groups[0]
    group["params"] = list(again.parameters())
    for one in (optimizer, optimizer_of(layers)):
        train(one, range(2))
    assert all(torch.equal(p, q) for p, q in zip(layers.parameters(), again.parameters(), strict=True))


FLATTENED = {
    "all in one": lambda layers: [torch.zeros(sum(p.numel() for p in layers.parameters()))],
    "each by itself": lambda layers: [torch.zeros(p.numel()) for p in layers.parameters()],
    "some elsewhere": lambda layers: [torch.zeros(0) if p.ndim > 1 else torch.zeros_like(p) for p in layers.parameters()],
    "one more": lambda layers: [*layers.parameters(), torch.zeros(6, 8)],
}


@pytest.mark.parametrize("how", FLATTENED)
@pytest.mark.parametrize("update", [None, "celo2"])
@pytest.mark.parametrize("stepped", [False, True])
def test_what_nothing_explains_is_refused(how, update, stepped):
    """DeepSpeed ZeRO's flat tensors, empty ones in place of matrices: never AdamW for everything without a word."""
    layers = model()
    optimizer = Celo2([{"params": list(layers.parameters()), "update": update}], lr=0.1, rule=random_rule())
    if stepped:
        train(optimizer, range(1))
    replaced = [t.detach().requires_grad_() for t in FLATTENED[how](layers)]
    optimizer.param_groups[0]["params"] = replaced
    before = [t.detach().clone() for t in replaced]
    set_gradients(replaced, 0)
    with pytest.raises(ShardingError, match=r"parameter group 0 holds a tensor of shape .* that Celo2 was not built with"):
        optimizer.step()
    assert all(torch.equal(t, b) for t, b in zip(replaced, before, strict=True))


def test_a_parameter_that_is_flattened_in_place_is_refused():
    """The object stays, and its data becomes a part of a flat tensor, or nothing."""
    for part in (slice(0, 20), slice(0, 0)):
        layers = model()
        optimizer = optimizer_of(layers)
        layers[1].weight.data = layers[1].weight.data.flatten()[part]
        set_gradients(params_of(optimizer), 0)
        with pytest.raises(ShardingError, match="Celo2 was not built with"):
            optimizer.step()


def test_a_parameter_that_is_taken_out_of_its_group_is_left_alone():
    layers = model()
    optimizer = optimizer_of(layers)
    train(optimizer, range(1))
    out = optimizer.param_groups[0]["params"].pop(0)
    before = out.detach().clone()
    train(optimizer, range(1, 2))
    assert torch.equal(out, before)


def test_tensors_without_memory():
    """Under FakeTensorMode, as torch's memory estimators have it, with a rule that is no file: a step, and its state."""
    with FakeTensorMode():
        layers = model()
        optimizer = Celo2(layers.parameters(), lr=0.05, rule="hand-whitened")
        train(optimizer, range(2))
    shapes = {name: tuple(value.shape) for name, value in optimizer.state[layers[0].weight].items()}
    again = model()
    real = Celo2(again.parameters(), lr=0.05, rule="hand-whitened")
    train(real, range(1))
    assert shapes == {name: tuple(value.shape) for name, value in real.state[again[0].weight].items()}


RESIZED = {"longer": (12, 8), "shorter": (2, 8), "another view": (48,), "as large": (8, 6)}


@pytest.mark.parametrize("update", ["celo2", "adamw"])
@pytest.mark.parametrize("how", RESIZED)
def test_a_parameter_that_is_resized_after_a_step_is_refused(how, update):
    """Neither a part of it is trained without a word, nor memory beside its state written."""
    p = nn.Parameter(torch.ones(6, 8))
    optimizer = Celo2([{"params": [p], "update": update}], lr=0.1)
    train(optimizer, range(1))
    p.grad = None
    p.data = torch.ones(RESIZED[how])
    set_gradients([p], 1)
    with pytest.raises(ShardingError, match=r"parameter group 0 holds a tensor of shape .* that Celo2 was not built with"):
        optimizer.step()
    assert torch.equal(p, torch.ones(RESIZED[how]))


def test_two_parameters_that_change_shapes_are_refused():
    p, q = (nn.Parameter(torch.ones(shape)) for shape in ((6, 8), (8, 6)))
    optimizer = Celo2([p, q], lr=0.1)
    train(optimizer, range(1))
    p.grad = q.grad = None
    p.data, q.data = q.data, p.data
    set_gradients([p, q], 1)
    with pytest.raises(ValueError, match=r"shape \(8, 6\): its state .* is not that of the update celo2"):
        optimizer.step()
    optimizer.state.clear()  # the remedy
    optimizer.step()


def test_groups_that_are_edited_after_a_step():
    """Removed, merged, or another update: done, or refused with the remedy; never what was there before."""
    layers = model()
    groups = [{"params": [p], "update": "celo2" if p.ndim > 1 else "adamw"} for p in layers.parameters()]
    optimizer = Celo2(groups, lr=0.1, rule=random_rule())
    train(optimizer, range(1))
    again, once = copy.deepcopy(optimizer), copy.deepcopy(optimizer)

    last = again.param_groups.pop()["params"][0]
    before = last.detach().clone()
    first = again.param_groups.pop(0)
    next(group for group in again.param_groups if group["update"] == first["update"])["params"] += first["params"]
    train(again, range(1, 2))
    assert torch.equal(last, before)

    group = next(group for group in once.param_groups if group["update"] == "celo2")
    group["update"] = "adamw"
    set_gradients(params_of(once), 1)
    with pytest.raises(ValueError, match=r"is not that of the update adamw.*optimizer\.state\.pop\(parameter\)"):
        once.step()
    once.state.pop(group["params"][0])
    once.step()
    assert "exp_avg" in once.state[group["params"][0]]
    group["update"] = "adamv"
    with pytest.raises(ValueError, match="unknown update 'adamv'"):
        once.step()
