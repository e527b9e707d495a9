"""`Celo2` keeps the contract of `torch.optim.Optimizer`, item by item, and what trainers around it count on."""

import copy
import io
import pickle
import warnings
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.distributed as dist
from optimizer_kinds import STATE_DTYPES, copy_of_state, make_groups, make_params, randn, random_rule, train
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.optim import lr_scheduler, swa_utils
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from celo2 import Celo2, load_rule, param_groups
from celo2.blocked import apply_
from celo2.rule_files import SHIPPED


def matrix_and_vector() -> list[nn.Parameter]:
    return [nn.Parameter(randn(6, 8)), nn.Parameter(randn(5))]


def optimizer_of_two(**options) -> Celo2:
    return Celo2(matrix_and_vector(), **{"lr": 0.1, "rule": random_rule(), **options})


def weights(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]


def same(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def every_kind(**options) -> Celo2:
    return Celo2(make_groups(make_params()), lr=0.05, weight_decay=0.1, rule=random_rule(), **options)


# --- torch's global settings ------------------------------------------------------------------------------------------------


@pytest.fixture
def torch_defaults():
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.float16, "meta"], ids=str)
def test_defaults_of_torch_change_no_bit(default, state_dtype, torch_defaults):
    rules = {name: load_rule(name) for name in SHIPPED}
    expected = every_kind(state_dtype=state_dtype)
    train(expected, range(3))
    torch.set_default_device("meta") if default == "meta" else torch.set_default_dtype(default)
    assert all(load_rule(name) == rule for name, rule in rules.items())
    optimizer = every_kind(state_dtype=state_dtype)
    train(optimizer, range(3))
    resumed = every_kind(state_dtype=state_dtype)
    resumed.load_state_dict(optimizer.state_dict())
    assert same(weights(optimizer), weights(expected))
    for one, other, third in zip(*(copy_of_state(o) for o in (optimizer, expected, resumed)), strict=True):
        assert {k: v.dtype for k, v in one.items()} == {k: v.dtype for k, v in other.items()}
        assert same([*one.values()], [*other.values()]) and same([*one.values()], [*third.values()])


@pytest.mark.parametrize("options", [{}, {"state_dtype": torch.bfloat16}, {"ns_dtype": torch.float64}], ids=str)
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_a_step_inside_autocast_is_the_step_outside(autocast, options):
    outside, inside = every_kind(**options), every_kind(**options)
    train(outside, range(3))
    seen = []

    def closure():
        seen.append(torch.is_autocast_enabled("cpu"))
        return 1.5

    for step in range(3):
        for i, p in enumerate(p for group in inside.param_groups for p in group["params"]):
            p.grad = randn(*p.shape, seed=1000 * step + i)
        with torch.autocast("cpu", autocast), torch.autocast("cuda", torch.bfloat16, enabled=torch.cuda.is_available()):
            assert inside.step(closure) == 1.5
            assert torch.is_autocast_enabled("cpu")  # what comes after the step is as the user wants it
    assert same(weights(inside), weights(outside))
    assert seen == [True] * 3


def test_deterministic_algorithms_and_inference_mode():
    """Settings of the process under which a step may run."""
    expected, optimizer = every_kind(), every_kind()
    train(expected, range(3))
    train(optimizer, range(1))
    torch.use_deterministic_algorithms(True)
    try:
        train(optimizer, range(1, 2))
    finally:
        torch.use_deterministic_algorithms(False)
    with torch.inference_mode():
        train(optimizer, range(2, 3))
    assert same(weights(optimizer), weights(expected))


# --- groups -----------------------------------------------------------------------------------------------------------------

# Keys that libraries write into groups: Lightning, timm and BEiT, torch, ScheduleFree, TRAC, Lookahead, SAM, Megatron.
FOREIGN = {"name": "hidden", "layer_id": 3, "lr_scale": 0.5, "initial_lr": 0.1, "max_lr": 0.2, "weight_decay_at_y": 0.0}
FOREIGN |= {"foreach": True, "fused": True, "capturable": True, "maximize": False, "amsgrad": False, "nesterov": False}
FOREIGN |= {"differentiable": False, "decoupled_weight_decay": True, "steps": 4, "k": 7, "rho": 0.05, "counter": 0}
FOREIGN |= {"weight_sum": 1.0, "train_mode": True, "is_expert": False, "wd_mult": 1.0, "momentum": 0.9, 3: "not a string"}


def test_keys_of_others_stay_and_change_nothing():
    ours, theirs = optimizer_of_two(), Celo2([{"params": matrix_and_vector(), **FOREIGN}], lr=0.1, rule=random_rule())
    theirs.add_param_group({"params": [nn.Parameter(randn(3, 3))], **FOREIGN})
    for group in theirs.param_groups:
        assert {key: group[key] for key in FOREIGN} == FOREIGN
    assert {key: theirs.state_dict()["param_groups"][0][key] for key in FOREIGN} == FOREIGN
    train(ours, range(2))
    train(theirs, range(2))
    assert same(weights(theirs)[:2], weights(ours))

    # Saved keys come with the saved state; own ones that were not saved stay.
    plain = Celo2([{"params": matrix_and_vector(), "name": "mine"}, {"params": [nn.Parameter(randn(3, 3))]}], lr=0.1)
    plain.load_state_dict(theirs.state_dict())
    assert {key: plain.param_groups[0][key] for key in FOREIGN} == FOREIGN
    theirs.load_state_dict(Celo2([{"params": matrix_and_vector()}, {"params": [nn.Parameter(randn(3, 3))]}], lr=0.3).state_dict())
    assert theirs.param_groups[0]["lr_scale"] == 0.5 and theirs.param_groups[0]["lr"] == 0.3


def test_written_later_is_saved_and_loaded():
    """What wrappers and users write into groups and state of a running optimizer, by any name, does not stop its loading."""
    one, other = optimizer_of_two(), optimizer_of_two()
    one.param_groups[0] |= {"beta": 0.9, "lr_scale": 0.5}
    train(one, range(1))
    for p in one.param_groups[0]["params"]:
        one.state[p] |= {"z": p.detach().clone(), "k": 3}  # ScheduleFree's
    other.load_state_dict(one.state_dict())
    assert other.param_groups[0]["beta"] == 0.9
    p, q = one.param_groups[0]["params"][0], other.param_groups[0]["params"][0]
    assert other.state[q]["k"] == 3 and torch.equal(other.state[q]["z"], one.state[p]["z"])
    assert other.state[q]["z"] is not one.state[p]["z"]


class ListConfig(Sequence):
    """What OmegaConf gives for a list."""

    def __init__(self, *items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


@pytest.mark.parametrize(
    "betas",
    [[0.75, 0.5], (0.75, 0.5), torch.tensor([0.75, 0.5]), np.array([0.75, 0.5]), ListConfig(0.75, 0.5), (np.float32(0.75), 0.5)],
    ids=lambda betas: type(betas).__name__,
)
def test_betas_of_any_sequence(betas):
    for optimizer in (optimizer_of_two(betas=betas), Celo2([{"params": matrix_and_vector(), "betas": betas}], lr=0.1)):
        assert repr(optimizer.param_groups[0]["betas"]) == "(0.75, 0.5)"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one, other = optimizer_of_two(betas=betas), optimizer_of_two(betas=(0.75, 0.5))
    train(one, range(2))
    train(other, range(2))
    assert same(weights(one), weights(other))


def test_numbers_of_numpy_are_saved_as_python_s():
    optimizer = optimizer_of_two(lr=np.float64(0.1), weight_decay=np.float32(0.5), eps=np.float64(1e-6))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    group = torch.load(file, weights_only=True)["param_groups"][0]
    assert (group["lr"], group["weight_decay"], group["eps"]) == (0.1, 0.5, 1e-6)


UNUSED = {
    "weight_decay": ({"weight_decay": 0.3}, "weight_decay=0.3 has no effect.*own .0.1, 0.0"),
    "lr": ({"lr": 0.7}, "lr=0.7 has no effect.*own .0.5, 0.2"),
    "tensor lr": ({"lr": torch.tensor(0.7)}, "lr=tensor.* has no effect"),
}


@pytest.mark.parametrize("name", UNUSED)
def test_an_argument_that_every_group_overrules_is_said(name):
    options, message = UNUSED[name]
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 8), nn.Linear(8, 9))
    with pytest.warns(UserWarning, match=message) as caught:
        Celo2(param_groups(model, 0.5, 0.2, weight_decay=0.1), **{"lr": 0.5, **options})
    assert len(caught) == 1 and caught[0].filename == __file__


def test_nothing_is_said_of_arguments_that_a_group_uses():
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 8), nn.Linear(8, 9))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for lr in (0.5, torch.tensor(0.5)):
            Celo2(param_groups(model, lr, 0.2, weight_decay=0.1), lr=lr, weight_decay=0.1)
        Celo2(param_groups(model, 0.5, 0.2, weight_decay=0.1), lr=0.2)
        Celo2(param_groups(model, 0.5, 0.2), lr=0.5, betas=[0.8, 0.9], eps=1e-6, orthogonalize=False)
        Celo2([*model.parameters()], lr=0.5, weight_decay=0.3)


def test_tensor_lr_on_another_device():
    """Tensors without numbers, of which torch checks the devices; the one number of the lr is asked for."""
    with FakeTensorMode():
        w, lr = torch.zeros(2, 3, 4, device="cuda"), torch.full((1,), 0.1)
        with pytest.raises(DataDependentOutputException):  # float(lr)
            apply_(w, torch.ones_like(w), 1.0, {"lr": lr, "weight_decay": 0.1})


# --- parameters -------------------------------------------------------------------------------------------------------------


def frozen_kinds() -> list[nn.Parameter]:
    """What quantized models have among their parameters."""
    dtypes = (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.complex64, torch.bool)
    return [nn.Parameter(torch.zeros(4, 4).to(dtype), requires_grad=False) for dtype in dtypes]


def test_frozen_parameters_of_any_dtype_are_left_alone():
    frozen = frozen_kinds()
    optimizer = Celo2([*matrix_and_vector(), *frozen], lr=0.1, rule=random_rule())
    learning = optimizer.param_groups[0]["params"][:2]
    expected = optimizer_of_two()
    for step in range(2):
        for i, (p, q) in enumerate(zip(learning, expected.param_groups[0]["params"], strict=True)):
            p.grad = q.grad = randn(*p.shape, seed=10 * step + i)
        optimizer.step()
        expected.step()
    assert same(weights(optimizer)[:2], weights(expected))
    assert not any(p.to(torch.complex64).any() for p in frozen)


def test_gradient_of_a_parameter_that_cannot_learn():
    p = torch.zeros(4, 4, dtype=torch.float8_e4m3fn)
    optimizer = Celo2([{"params": [nn.Parameter(randn(3, 3))]}, {"params": [p]}], lr=0.1)
    p.grad = torch.zeros(4, 4, dtype=torch.float8_e4m3fn)
    with pytest.raises(RuntimeError, match=r"parameter group 1: torch.float8_e4m3fn gradient"):
        optimizer.step()


# --- torch.optim.Optimizer, item by item --------------------------------------------------------------------------------------


def zero_grad(optimizer: Celo2) -> None:
    train(optimizer, range(1))
    p = optimizer.param_groups[0]["params"][0]
    optimizer.zero_grad(set_to_none=False)
    assert p.grad is not None and not p.grad.any()
    optimizer.zero_grad()
    assert p.grad is None


def pre_hook_changes_arguments(optimizer: Celo2) -> None:
    optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: 2.5), {}))
    assert optimizer.step() == 2.5


def global_step_hooks(optimizer: Celo2) -> None:
    seen = []
    handles = [register_optimizer_step_pre_hook(lambda *_: seen.append("before"))]
    handles.append(register_optimizer_step_post_hook(lambda *_: seen.append("after")))
    optimizer.step()
    for handle in handles:
        handle.remove()
    assert seen == ["before", "after"]


def state_dict_hooks(optimizer: Celo2) -> None:
    seen = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("before"))
    optimizer.register_state_dict_post_hook(lambda o, saved: {**saved, "note": 1})
    assert optimizer.state_dict()["note"] == 1 and seen == ["before"]


def state_dict_has_what_torch_s_has(optimizer: Celo2) -> None:
    train(optimizer, range(1))
    saved = optimizer.state_dict()
    assert saved.keys() == {"state", "param_groups"} and saved["param_groups"][0]["params"] == [0, 1]
    assert saved["state"].keys() == {0, 1}


def defaults_and_groups(optimizer: Celo2) -> None:
    assert optimizer.defaults.items() <= optimizer.param_groups[0].items()
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert "lr: 0.1" in repr(optimizer)


def state_may_be_replaced(optimizer: Celo2) -> None:
    """As ZeroRedundancyOptimizer and Accelerate do: other tensors with the same values."""
    twin = copy.deepcopy(optimizer)
    for o in (optimizer, twin):
        train(o, range(2))
    optimizer.state.update({p: {k: v.clone() for k, v in s.items()} for p, s in [*optimizer.state.items()]})
    for o in (optimizer, twin):
        train(o, range(2, 4))
    assert same(weights(optimizer), weights(twin))


def lr_written_by_hand(optimizer: Celo2) -> None:
    before = weights(optimizer)
    optimizer.param_groups[0]["lr"] = 0.0
    train(optimizer, range(1))
    assert same(weights(optimizer), before)


def clipping(optimizer: Celo2) -> None:
    params = optimizer.param_groups[0]["params"]
    for p in params:
        p.grad = torch.full_like(p, 100.0)
    nn.utils.clip_grad_norm_(params, 1.0)
    optimizer.step()
    assert all(w.isfinite().all() for w in weights(optimizer))


def averaged_weights(optimizer: Celo2) -> None:
    """SWALR, AveragedModel."""
    model = nn.Linear(4, 3)
    optimizer = Celo2(model.parameters(), lr=0.1, rule=random_rule())
    averaged, schedule = swa_utils.AveragedModel(model), swa_utils.SWALR(optimizer, swa_lr=0.01, anneal_epochs=2)
    for step in range(3):
        train(optimizer, range(step, step + 1))
        averaged.update_parameters(model)
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    optimizer.load_state_dict(optimizer.state_dict())


def other_schedulers(optimizer: Celo2) -> None:
    """Those that tests/celo2/test_celo2_optimizer.py does not run."""
    for schedule in (
        lr_scheduler.MultiplicativeLR(optimizer, lambda step: 0.5),
        lr_scheduler.LinearLR(optimizer),
        lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, mode="exp_range"),
    ):
        train(optimizer, range(1))
        schedule.step()
        optimizer.load_state_dict(optimizer.state_dict())


def grad_scaler_skips(optimizer: Celo2) -> None:
    """No claim to unscale by itself, so that the scaler leaves out a step whose gradient is not finite."""
    assert not getattr(optimizer, "_step_supports_amp_scaling", False)
    before, scaler = weights(optimizer), torch.amp.GradScaler("cpu")
    p = optimizer.param_groups[0]["params"][0]
    scaler.scale(p.sum() * torch.inf).backward()
    assert scaler.step(optimizer) is None
    scaler.update()
    assert same(weights(optimizer), before)


def profiler(optimizer: Celo2) -> None:
    with torch.profiler.profile() as profile:
        optimizer.step()
    assert any(event.key == "Optimizer.step#Celo2.step" for event in profile.key_averages())


def foreach_on_the_class(optimizer: Celo2) -> None:
    """A subclass is an optimizer like any other."""

    class Mine(Celo2):
        pass

    mine = Mine(matrix_and_vector(), lr=0.1, rule=random_rule())
    train(mine, range(2))
    train(optimizer, range(2))
    assert same(weights(mine), weights(optimizer))


CONTRACT = (zero_grad, pre_hook_changes_arguments, global_step_hooks, state_dict_hooks, state_dict_has_what_torch_s_has)
CONTRACT += (defaults_and_groups, state_may_be_replaced, lr_written_by_hand, clipping, averaged_weights, other_schedulers)
CONTRACT += (grad_scaler_skips, profiler, foreach_on_the_class)


@pytest.mark.parametrize("item", CONTRACT, ids=lambda item: item.__name__)
def test_contract(item):
    item(optimizer_of_two())


def test_torch_compile_leaves_the_step_alone():
    """Compiled, it would be many small graphs, minutes of work; it runs as it is."""
    compiled, plain, graphs = optimizer_of_two(), optimizer_of_two(), []
    step = torch.compile(compiled.step, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    for i in range(2):
        for optimizer in (compiled, plain):
            for j, p in enumerate(optimizer.param_groups[0]["params"]):
                p.grad = randn(*p.shape, seed=10 * i + j)
        step()
        plain.step()
    assert same(weights(compiled), weights(plain)) and not graphs


# --- CUDA graphs --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def capturing(monkeypatch):
    """As if a CUDA graph were being captured."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    return lambda: monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


def test_a_captured_step_needs_an_lr_on_the_device(capturing, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    number, tensor = optimizer_of_two(), optimizer_of_two(lr=torch.tensor(0.1))
    new = optimizer_of_two(lr=torch.tensor(0.1))
    for optimizer in (number, tensor):
        train(optimizer, range(1))
    elsewhere = nn.Parameter(torch.zeros(3, 4, device="meta"))
    elsewhere.grad = torch.zeros_like(elsewhere)
    before = weights(number)
    capturing()
    train(tensor, range(1, 2))
    with pytest.raises(
        RuntimeError, match=r"parameter group 0: .*this lr, a number, for ever; give lr=torch.tensor\(0.1, device='cpu'"
    ):
        train(number, range(1, 2))
    assert same(weights(number), before)
    with pytest.raises(RuntimeError, match=r"this lr, a tensor on cpu, for ever; .*device='meta'"):
        Celo2([elsewhere], lr=torch.tensor(0.1)).step()
    with pytest.raises(RuntimeError, match=r"parameter group 0: .*take a step before capturing"):
        train(new, range(1))


# --- copies and ranks ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("shard_state", [False, True])
def test_copy_with_replicas(one_rank, shard_state):
    """A deep copy shares the process group and continues identically; pickling is refused in one line."""
    params = make_params()
    optimizer = Celo2(make_groups(params), lr=0.1, rule=random_rule(), replicas=one_rank, shard_state=shard_state)
    train(optimizer, range(1))
    twin_params, twin = copy.deepcopy((params, optimizer))
    assert twin.replicas.group is one_rank and twin.replicas is not optimizer.replicas
    assert set(twin.replicas.owners) == set(twin_params.values())
    train(optimizer, range(1, 3))
    train(twin, range(1, 3))
    assert same(weights(optimizer), weights(twin))
    twin.add_param_group({"params": [nn.Parameter(randn(3, 4))]})
    assert len(optimizer.replicas.owners) + 1 == len(twin.replicas.owners)
    with pytest.raises(TypeError, match=r"with replicas cannot be pickled.*save its state_dict\(\)"):
        pickle.dumps(optimizer)


def test_zero_redundancy_optimizer(one_rank):
    """A rank has the names of all parameters and some of the parameters."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6), nn.Linear(6, 9))
    twin = copy.deepcopy(model)
    zero = ZeroRedundancyOptimizer(param_groups(model, 0.1, 0.2, 0.3), Celo2, lr=0.1, rule=random_rule())
    plain = Celo2(param_groups(twin, 0.1, 0.2, 0.3), lr=0.1, rule=random_rule())
    for group in zero.optim.param_groups:
        del group["params"][1:]  # those of other ranks
    mine = {id(p) for group in zero.optim.param_groups for p in group["params"]}
    for step in range(2):
        for i, (p, q) in enumerate(zip(model.parameters(), twin.parameters(), strict=True)):
            p.grad = q.grad = randn(*p.shape, seed=10 * step + i)
        zero.step()
        plain.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q) == (id(p) in mine)
