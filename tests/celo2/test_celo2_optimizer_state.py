"""`Celo2` saved, loaded and copied, and what it refuses."""

import copy
import io
import json
import pickle

import pytest
import torch
from optimizer_kinds import (
    DTYPES,
    KINDS,
    STATE_DTYPES,
    assert_same_groups,
    assert_same_state,
    copy_of_state,
    make_groups,
    make_params,
    randn,
    random_rule,
    set_gradients,
    train,
)
from torch import nn

from celo2 import Celo2, param_groups

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


def named(*names: str) -> tuple[dict[str, nn.Parameter], Celo2]:
    params = {name: nn.Parameter(randn(4, 6)) for name in names}
    return params, Celo2(list(params.items()), lr=0.1)


@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_state_goes_to_the_parameter_of_its_name(prefix):
    """The same names in another order, with a wrapper or without."""
    params, optimizer = named("wq", "wk", "wv")
    train(optimizer, range(2))
    others, another = named(*(f"{prefix}{name}" for name in ("wv", "wq", "wk")))
    another.load_state_dict(through_torch_save(optimizer.state_dict()))
    for name, p in params.items():
        assert torch.equal(another.state[others[f"{prefix}{name}"]]["momentum"], optimizer.state[p]["momentum"])
    assert another.param_groups[0]["param_names"] == list(others)


@pytest.mark.parametrize(("prefix", "other"), [("module.", ""), ("", "_orig_mod."), ("model.", ""), ("a._orig_mod.", "module.")])
def test_names_that_wrappers_lengthen_are_the_same(prefix, other):
    params, optimizer = named(f"{prefix}wq.weight", f"{prefix}wk.weight")
    train(optimizer, range(2))
    others, another = named(f"{other}wq.weight", f"{other}wk.weight")
    another.load_state_dict(optimizer.state_dict())
    for p, q in zip(params.values(), others.values(), strict=True):
        assert torch.equal(another.state[q]["momentum"], optimizer.state[p]["momentum"])
    assert another.param_groups[0]["param_names"] == list(others)


def test_state_of_another_parameter_is_refused():
    """A run that was saved with one part frozen and goes on with another."""
    _, optimizer = named("a.weight")
    train(optimizer, range(1))
    _, another = named("b.weight")
    saved = optimizer.state_dict()
    with pytest.raises(ValueError, match=r"parameter group 0: the saved state is of 'a\.weight', not of 'b\.weight'; .* delete"):
        another.load_state_dict(saved)
    assert not another.state
    for group in saved["param_groups"]:  # the remedy
        del group["param_names"]
    another.load_state_dict(saved)
    assert another.state and another.param_groups[0]["param_names"] == ["b.weight"]


def test_other_parameters_than_the_saved_ones_are_named():
    """A parameter more or less, by the names that only one side has."""
    _, saved = named("a", "b", "c", "d", "e")
    for names, unlike in (
        (("a", "b", "c", "d", "e", "f"), "; not saved: f$"),
        (("a", "z"), "; not saved: z; no longer here: b, c, d, ...$"),
        (("e",), "; no longer here: a, b, c, ...$"),
    ):
        text = rf"parameter group 0: 5 parameters were saved, expected {len(names)}{unlike}"
        with pytest.raises(ValueError, match=text):
            named(*names)[1].load_state_dict(saved.state_dict())


def test_a_decay_that_divides_the_groups_otherwise_is_said():
    """`param_groups` without decay has one group less. The remedy: the options that were saved, and others after loading."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    build = lambda decay: Celo2(param_groups(model, 1e-3, 1e-2, decay), lr=1e-3)  # noqa: E731
    saved = build(0.1)
    train(saved, range(1))
    text = r"the saved state has 3 parameter groups, expected 2; the parameters are the same, .* where weight_decay is 0\): build"
    with pytest.raises(ValueError, match=text):
        build(0.0).load_state_dict(saved.state_dict())
    again = build(0.1)
    again.load_state_dict(saved.state_dict())
    for group in again.param_groups:
        group["weight_decay"] = 0.0
    train(again, range(1, 2))


def test_what_wrappers_keep_is_loaded():
    """Under a key of their own, as pytorch_optimizer's TRAC does, and beside a parameter that has no state of ours yet."""
    params, optimizer = named("a", "b")
    set_gradients([params["a"]], 0)
    optimizer.step()
    optimizer.state["trac"] = {"scale": torch.ones(3)}
    optimizer.state[params["b"]]["ema"] = torch.full((4, 6), 2.0)
    others, another = named("a", "b")
    train(another, range(1))
    another.state["old"] = {}
    another.load_state_dict(through_torch_save(optimizer.state_dict()))
    assert set(another.state) == {"trac", *others.values()} and torch.equal(another.state["trac"]["scale"], torch.ones(3))
    assert set(another.state[others["b"]]) == {"ema"}
    for one in (optimizer, another):
        train(one, range(1, 3))
    assert torch.equal(another.state[others["b"]]["momentum"], optimizer.state[params["b"]]["momentum"])
    assert torch.equal(another.state[others["b"]]["ema"], torch.full((4, 6), 2.0))


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
    "no state dict": (lambda saved: saved.clear(), "lacks param_groups and state"),
    "a key misspelt": (
        edit("param_groups", 0, value=lambda g: {"weigth_decay" if k == "weight_decay" else k: g[k] for k in g}),
        r"parameter group 0\b.*lacks weight_decay; it has 'weigth_decay'",
    ),
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


# --- errors -----------------------------------------------------------------------------------------------------------------

SHARED = nn.Parameter(torch.zeros(2, 3))  # a parameter that is already in group 0

BAD_GROUPS = {
    "misspelt weight_decay": ({"wieght_decay": 0.1}, ValueError, "unknown key 'wieght_decay'.*'weight_decay'"),
    "misspelt betas": ({"beta": (0.9, 0.9)}, ValueError, "unknown key 'beta'.*'betas'"),
    "misspelt orthogonalize": ({"ortogonalize": True}, ValueError, "unknown key 'ortogonalize'.*'orthogonalize'"),
    "another name of lr": ({"Learning-Rate": 0.1}, ValueError, "unknown key 'Learning-Rate'.*'lr'"),
    "argument of param_groups": ({"adamw_lr": 0.1}, ValueError, "unknown key 'adamw_lr'.*'lr'"),
    "key of Muon": ({"use_muon": False}, ValueError, "unknown key 'use_muon'.*'update'"),
    "maximize": ({"maximize": True}, ValueError, "maximize=True.*negative loss"),
    "nesterov": ({"nesterov": True}, ValueError, "nesterov=True"),
    "amsgrad": ({"amsgrad": True}, ValueError, "amsgrad=True"),
    "coupled decay": ({"decoupled_weight_decay": False}, ValueError, "decoupled_weight_decay=False"),
    "unknown update": ({"update": "muon"}, ValueError, "unknown update 'muon'.*celo2, adamw"),
    "negative lr": ({"lr": -0.1}, ValueError, "lr.*-0.1"),
    "NaN lr": ({"lr": float("nan")}, ValueError, "lr.*nan"),
    "negative tensor lr": ({"lr": torch.tensor(-0.1)}, ValueError, "lr"),
    "lr of two elements": ({"lr": torch.ones(2)}, ValueError, "lr.*one element"),
    "infinite lr": ({"lr": float("inf")}, ValueError, "lr.*finite.*inf"),
    "infinite tensor lr": ({"lr": torch.tensor(float("inf"))}, ValueError, "lr.*finite.*inf"),
    "lr of integers": ({"lr": torch.tensor(1)}, ValueError, "lr.*float dtype"),
    "lr True": ({"lr": True}, ValueError, "lr.*True"),
    "lr complex": ({"lr": 0.1 + 0j}, ValueError, "lr.*0j"),
    "lr None": ({"lr": None}, (ValueError, TypeError), "lr.*None"),
    "lr a string": ({"lr": "0.1"}, (ValueError, TypeError), "lr.*0.1"),
    "negative decay": ({"weight_decay": -1.0}, ValueError, "weight_decay.*-1"),
    "infinite decay": ({"weight_decay": float("inf")}, ValueError, "weight_decay.*inf"),
    "decay of two elements": ({"weight_decay": torch.ones(2)}, ValueError, "weight_decay"),
    "decay True": ({"weight_decay": True}, ValueError, "weight_decay.*True"),
    "infinite eps": ({"eps": float("inf")}, ValueError, "eps.*inf"),
    "NaN decay": ({"weight_decay": float("nan")}, ValueError, "weight_decay.*nan"),
    "decay a string": ({"weight_decay": "big"}, (ValueError, TypeError), "weight_decay.*big"),
    "negative eps": ({"eps": -1e-8}, ValueError, "eps"),
    "beta of 1": ({"betas": (0.9, 1.0)}, ValueError, "betas.*1.0"),
    "negative beta": ({"betas": (-0.1, 0.9)}, ValueError, "betas.*-0.1"),
    "NaN beta": ({"betas": (float("nan"), 0.9)}, ValueError, "betas.*nan"),
    "one beta": ({"betas": (0.9,)}, ValueError, "betas"),
    "betas a number": ({"betas": 0.9}, (ValueError, TypeError), "betas.*0.9"),
    "betas True": ({"betas": (True, 0.9)}, ValueError, "betas.*True"),
    "betas a set": ({"betas": {0.9, 0.95}}, ValueError, "betas"),
    "betas by name": ({"betas": {0: 0.9, 1: 0.95}}, ValueError, "betas"),
    "betas three": ({"betas": (0.9, 0.9, 0.9)}, ValueError, "betas"),
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
    "float8 parameter": ({"params": [nn.Parameter(torch.zeros(2, 3).to(torch.float8_e4m3fn))]}, TypeError, "float8"),
    "complex parameter": ({"params": [nn.Parameter(torch.zeros(2, 3, dtype=torch.complex64))]}, TypeError, "complex64"),
    "second parameter complex": (
        {"params": [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2).cfloat())]},
        TypeError,
        "complex64",
    ),
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
    assert not optimizer.state
    assert_same_state(copy_of_state(optimizer), state)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, 3))]})
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr"),
        ({"lr": float("inf")}, "lr.*finite"),
        ({"lr": float("nan")}, "lr.*finite"),
        ({"lr": 0.1, "weight_decay": -1.0}, "weight_decay"),
        ({"lr": 0.1, "weight_decay": float("inf")}, "weight_decay.*finite"),
        ({"lr": 0.1, "betas": (2.0, 0.9)}, "betas"),
        ({"lr": 0.1, "eps": -1.0}, "eps"),
        ({"lr": 0.1, "state_dtype": torch.float16}, "state_dtype.*float16"),
        ({"lr": 0.1, "ns_dtype": torch.int32}, "ns_dtype.*int32"),
        ({"lr": 0.1, "ns_dtype": torch.float8_e4m3fn}, "ns_dtype.*float8"),
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
    with pytest.raises(
        (RuntimeError, TypeError), match=rf"parameter group 1\b.*{kind} gradient.*\(4, 5\) of 'parameter 0 of group 1'; "
    ):
        optimizer.step()
    assert not bad.any()


def test_sparse_embedding_gradient():
    embedding = nn.Embedding(6, 4, sparse=True)
    optimizer = Celo2([{"params": embedding.named_parameters("words"), "update": "adamw"}], lr=0.1)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(
        RuntimeError, match=r"parameter group 0: sparse .* of 'words.weight'; use .* as of nn\.Embedding\(\.\.\., sparse=False\)$"
    ):
        optimizer.step()
