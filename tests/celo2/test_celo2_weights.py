"""Rules in files: the published theta.state, `.safetensors` with a description, `python -m celo2.convert`, and every damage."""

import json
import os
import pickle
import random
import runpy
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from celo2 import Celo2, Rule, RuleError, load_rule, save_rule
from celo2.convert import main
from celo2.weights import weight_shapes

ROOT = Path(__file__).resolve().parents[2]
VECTORS = Path(__file__).parent / "vectors"


def random_rule(hidden: int = 8, seed: int = 0, **described) -> Rule:
    generator = torch.Generator().manual_seed(seed)
    return Rule({name: torch.randn(shape, generator=generator) for name, shape in weight_shapes(hidden).items()}, **described)


DESCRIBED = {
    "variant": "celo2-base",
    "momentum_decays": (0.8, 0.95, 0.99),
    "second_moment_decay": 0.9,
    "factored_decays": (0.1, 0.2, 0.30000000000000004),
    "normalize_gradient": True,
    "description": "meta-trained on nothing, β = 0.9,\n“quoted” and in two lines",
}


def assert_same_weights(rule: Rule, expected: dict[str, torch.Tensor]) -> None:
    assert rule.weights.keys() == expected.keys()
    for name, weight in rule.weights.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, torch.as_tensor(expected[name])), name


# --- the published file -----------------------------------------------------------------------------------------------------


def test_published_file_is_read_exactly():
    with np.load(VECTORS / "theta_expected.npz") as file:
        expected = {name.removeprefix("theta."): file[name] for name in file.files}
    rule = load_rule(VECTORS / "theta.state")
    assert_same_weights(rule, expected)
    assert sum(w.numel() for w in rule.weights.values()) == 347
    assert rule.hidden == 8
    assert rule.variant == "celo2"
    assert "theta.state" in rule.description
    assert rule.momentum_decays == rule.factored_decays == (0.9, 0.99, 0.999)
    assert rule.second_moment_decay == 0.95


def test_published_file_by_string_and_in_the_optimizer():
    p = torch.nn.Parameter(torch.ones(3, 4))
    p.grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    optimizer = Celo2([p], lr=0.1, rule=str(VECTORS / "theta.state"))
    optimizer.step()
    assert (p != 1).all()
    assert_same_weights(optimizer.rule, load_rule(VECTORS / "theta.state").weights)


def unpacked(path: Path) -> dict:
    """A `.state` file decoded here, independently: {name: (shape, dtype, bytes)}."""

    def array(code: int, payload: bytes) -> tuple:
        assert code == 1
        shape, dtype, raw = msgpack.unpackb(payload)
        return tuple(shape), dtype, raw

    tree = msgpack.unpackb(path.read_bytes(), ext_hook=array)
    assert list(tree) == ["ff_mod_stack"]
    assert list(tree["ff_mod_stack"]) == ["~"]
    return tree["ff_mod_stack"]["~"]


def test_written_state_is_the_published_format(tmp_path):
    save_rule(load_rule(VECTORS / "theta.state"), tmp_path / "again.state")
    assert unpacked(tmp_path / "again.state") == unpacked(VECTORS / "theta.state")


# --- round trips ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [1, 5, 8, 32])
def test_safetensors_carries_everything(tmp_path, hidden):
    rule = random_rule(hidden, **DESCRIBED)
    save_rule(rule, tmp_path / "rule.safetensors")
    again = load_rule(tmp_path / "rule.safetensors")
    assert_same_weights(again, rule.weights)
    assert again.hidden == hidden
    for name, value in DESCRIBED.items():
        assert getattr(again, name) == value
        assert type(getattr(again, name)) is type(value)


@pytest.mark.parametrize("name", ["celo2", "celo2-base", "celo2-lm", "hand-momentum", "hand-nesterov"])
def test_shipped_rule_survives_a_file(tmp_path, name):
    rule = load_rule(name)
    save_rule(rule, tmp_path / "rule.safetensors")
    again = load_rule(tmp_path / "rule.safetensors")
    assert_same_weights(again, rule.weights)
    assert (again.variant, again.description) == (rule.variant, rule.description)
    assert rule.variant == ("celo2-base" if name == "celo2-base" else "celo2")


def test_shipped_rules_are_not_shared():
    """Training one copy of a shipped rule must not change what the next caller loads."""
    before = load_rule("celo2")
    load_rule("celo2").weights["b0"].add_(1)
    assert load_rule("celo2") == before


def test_load_rule_returns_a_rule_unchanged():
    rule = random_rule()
    assert load_rule(rule) is rule


def test_weights_with_strides_are_saved_as_they_read(tmp_path):
    rule = random_rule()
    strided = replace(rule, weights={name: w.T.contiguous().T if w.ndim == 2 else w for name, w in rule.weights.items()})
    for ending in ("safetensors", "state"):
        save_rule(strided, tmp_path / f"rule.{ending}")
        assert_same_weights(load_rule(tmp_path / f"rule.{ending}"), rule.weights)


def test_weights_that_require_gradients_are_saved(tmp_path):
    """What meta-training holds."""
    rule = random_rule()
    trained = replace(rule, weights={name: w.clone().requires_grad_() for name, w in rule.weights.items()})
    for ending in ("safetensors", "state"):
        save_rule(trained, tmp_path / f"rule.{ending}")
        assert_same_weights(load_rule(tmp_path / f"rule.{ending}"), rule.weights)


@pytest.mark.parametrize("ending", ["safetensors", "state"])
def test_loaded_rule_does_not_follow_its_file(tmp_path, ending):
    """A file may be rewritten or cut while a run uses the rule that it was loaded from."""
    path = tmp_path / f"rule.{ending}"
    first, second = random_rule(seed=1), random_rule(seed=2)
    save_rule(first, path)
    loaded = load_rule(path)
    save_rule(second, path)
    assert_same_weights(loaded, first.weights)
    assert_same_weights(load_rule(path), second.weights)


def test_state_never_loses_decays_silently(tmp_path):
    """The published format holds the weights alone: other decays than the published ones must be refused, or come back."""
    rule = random_rule(momentum_decays=(0.5, 0.6, 0.7))
    try:
        save_rule(rule, tmp_path / "rule.state")
    except RuleError as error:
        assert "decays" in str(error) and "rule.state" in str(error)
        assert not (tmp_path / "rule.state").exists()
    else:
        assert load_rule(tmp_path / "rule.state").momentum_decays == rule.momentum_decays


def test_state_never_loses_the_normalization_silently(tmp_path):
    with pytest.raises(RuleError, match=r"rule\.state: the published format cannot hold normalize_gradient True"):
        save_rule(random_rule(normalize_gradient=True), tmp_path / "rule.state")
    assert not (tmp_path / "rule.state").exists()


def test_a_file_that_does_not_say_whether_it_normalizes_is_as_published(tmp_path):
    for said, expected in ((None, False), ("false", False), ("true", True)):
        write_safetensors(tmp_path / "rule.safetensors", normalize_gradient=said)
        assert load_rule(tmp_path / "rule.safetensors").normalize_gradient is expected


def test_rules_compare_by_weights_and_decays():
    rule = random_rule()
    assert rule == random_rule(description="another word for it")
    assert rule != random_rule(seed=1)
    assert rule != random_rule(hidden=5)
    assert rule != random_rule(variant="celo2-base")
    assert rule != random_rule(second_moment_decay=0.9)
    assert rule != random_rule(normalize_gradient=True)
    assert rule != "celo2"


# --- damage -----------------------------------------------------------------------------------------------------------------


def good_metadata() -> dict[str, str]:
    decays = {"momentum_decays": "[0.9, 0.99, 0.999]", "second_moment_decay": "0.95", "factored_decays": "[0.9, 0.99, 0.999]"}
    return {"format": "celo2-rule", "version": "1", "variant": "celo2", "description": "a test", **decays}


def write_safetensors(path: Path, weights: dict | None = None, **metadata: str | None) -> None:
    given = {name: value for name, value in (good_metadata() | metadata).items() if value is not None}
    save_file(random_rule().weights if weights is None else weights, path, given)


def packed(shape: object, dtype: object, raw: bytes, code: int = 1) -> msgpack.ExtType:
    return msgpack.ExtType(code, msgpack.packb([shape, dtype, raw]))


def packed_weights(weights: dict[str, torch.Tensor]) -> dict:
    return {n: packed(list(w.shape), str(w.dtype).removeprefix("torch."), w.numpy().tobytes()) for n, w in weights.items()}


def write_state(path: Path, weights: dict | None = None, **arrays: object) -> None:
    packed_all = packed_weights(random_rule().weights if weights is None else weights)
    path.write_bytes(msgpack.packb({"ff_mod_stack": {"~": packed_all | arrays}}))


def test_the_writers_of_these_tests_write_good_files(tmp_path):
    write_safetensors(tmp_path / "rule.safetensors")
    write_state(tmp_path / "rule.state")
    for ending in ("safetensors", "state"):
        assert_same_weights(load_rule(tmp_path / f"rule.{ending}"), random_rule().weights)


def changed(**weights: torch.Tensor) -> dict[str, torch.Tensor]:
    return random_rule().weights | weights


def lacking(name: str) -> dict[str, torch.Tensor]:
    return {n: w for n, w in random_rule().weights.items() if n != name}


def one_value(name: str, value: float) -> dict[str, torch.Tensor]:
    weights = changed()
    weights[name] = weights[name].clone()
    weights[name].view(-1)[-1] = value
    return weights


# The weights of a file, and what its error must say.
DAMAGED_WEIGHTS = {
    "no weights": ({}, "lacks"),
    "missing weight": (lacking("w0__7"), "lacks.*w0__7"),
    "missing b0": (lacking("b0"), "lacks.*b0"),
    "missing b2": (lacking("b2"), "lacks.*b2"),
    "extra weight": (changed(w3=torch.zeros(3)), "unknown.*w3"),
    "extra group": (changed(w0__14=torch.zeros(3, 8)), "unknown.*w0__14"),
    "shape of one group": (changed(w0__3=torch.zeros(1, 8)), r"w0__3.*\(1, 8\).*\(3, 8\)"),
    "transposed": (changed(w2=torch.zeros(3, 8)), r"w2.*\(3, 8\).*\(8, 3\)"),
    "two outputs": (changed(w2=torch.zeros(8, 2), b2=torch.zeros(2)), r"\(8, 2\).*\(8, 3\)|\(2,\).*\(3,\)"),
    "other hidden size": (changed(b0=torch.zeros(4)), r"expected \(\d+, 4\)|expected \(4"),
    "b0 of two axes": (changed(b0=torch.zeros(1, 8)), r"b0.*\(1, 8\).*\(8,\)"),
    "b0 a scalar": (changed(b0=torch.zeros(())), r"b0.*\(\).*\(8,\)"),
    "float64": (changed(b1=torch.zeros(8, dtype=torch.float64)), "float64.*float32"),
    "float16": (changed(b1=torch.zeros(8, dtype=torch.float16)), "float16.*float32"),
    "integers": (changed(b1=torch.zeros(8, dtype=torch.int32)), "int32.*float32"),
    "NaN": (one_value("w1", float("nan")), "w1.*not finite"),
    "infinite": (one_value("b2", float("inf")), "b2.*not finite"),
}

DAMAGED_DESCRIPTIONS = {
    "no format": ({"format": None}, "format"),
    "other format": ({"format": "pt"}, "format.*pt"),
    "other version": ({"version": "2"}, "version.*2"),
    "no version": ({"version": None}, "version"),
    "no variant": ({"variant": None}, "variant"),
    "other variant": ({"variant": "celo3"}, "celo3"),
    "no momentum decays": ({"momentum_decays": None}, "momentum_decays"),
    "no second moment decay": ({"second_moment_decay": None}, "second_moment_decay"),
    "no factored decays": ({"factored_decays": None}, "factored_decays"),
    "two decays": ({"momentum_decays": "[0.9, 0.99]"}, "3 decays"),
    "four decays": ({"factored_decays": "[0.9, 0.99, 0.999, 0.9999]"}, "3 decays"),
    "decay of 1": ({"momentum_decays": "[0.9, 0.99, 1.0]"}, "decays"),
    "negative decay": ({"factored_decays": "[-0.9, 0.99, 0.999]"}, "decays"),
    "NaN decay": ({"momentum_decays": "[0.9, 0.99, NaN]"}, "decays"),
    "decays not JSON": ({"momentum_decays": "0.9 0.99 0.999"}, "description"),
    "decays null": ({"momentum_decays": "null"}, "description"),
    "decays of nulls": ({"factored_decays": "[null, null, null]"}, "description"),
    "decays a number": ({"factored_decays": "0.9"}, "description"),
    "decays nested too deep": ({"factored_decays": "[" * 100_000}, "description"),
    "second moment decay of 2": ({"second_moment_decay": "2"}, "decays"),
    "second moment decay empty": ({"second_moment_decay": ""}, "decays|description"),
    "two second moment decays": ({"second_moment_decay": "0.9, 0.95"}, "decays"),
    "normalization a number": ({"normalize_gradient": "1"}, "normalize_gradient must be True or False, not 1"),
    "normalization null": ({"normalize_gradient": "null"}, "normalize_gradient.*None"),
    "normalization text": ({"normalize_gradient": '"true"'}, "normalize_gradient.*'true'"),
    "normalization not JSON": ({"normalize_gradient": "True"}, "description"),
}

# What stands in the place of a `.state` file.
DAMAGED_STATES = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("theta"),
    "random bytes": lambda path: path.write_bytes(random.Random(0).randbytes(2000)),
    "never-used byte": lambda path: path.write_bytes(b"\xc1"),
    "msgpack of a number": lambda path: path.write_bytes(msgpack.packb(5)),
    "msgpack of a list": lambda path: path.write_bytes(msgpack.packb([1, 2])),
    "msgpack of another map": lambda path: path.write_bytes(msgpack.packb({"params": {}})),
    "no inner map": lambda path: path.write_bytes(msgpack.packb({"ff_mod_stack": {}})),
    "inner list": lambda path: path.write_bytes(msgpack.packb({"ff_mod_stack": {"~": [1, 2]}})),
    "nested too deep": lambda path: path.write_bytes(b"\x91" * 100_000),
    "keys are numbers": lambda path: path.write_bytes(msgpack.packb({1: 2})),
    "weight a number": lambda path: write_state(path, b0=5),
    "weight a timestamp": lambda path: write_state(path, b0=msgpack.Timestamp(1)),
    "weight of another extension": lambda path: write_state(path, b0=packed([8], "float32", bytes(32), code=2)),
    "array not msgpack": lambda path: write_state(path, b0=msgpack.ExtType(1, b"\xc1")),
    "array empty": lambda path: write_state(path, b0=msgpack.ExtType(1, b"")),
    "array of two parts": lambda path: write_state(path, b0=msgpack.ExtType(1, msgpack.packb([[8], "float32"]))),
    "array a number": lambda path: write_state(path, b0=msgpack.ExtType(1, msgpack.packb(7))),
    "too few bytes": lambda path: write_state(path, b0=packed([8], "float32", bytes(31))),
    "too many bytes": lambda path: write_state(path, b0=packed([8], "float32", bytes(36))),
    "bytes are text": lambda path: write_state(path, b0=packed([8], "float32", "x" * 32)),
    "bytes are a number": lambda path: write_state(path, b0=packed([8], "float32", 32)),
    "dtype of eight bytes": lambda path: write_state(path, b0=packed([8], "float64", bytes(64))),
    "dtype of objects": lambda path: write_state(path, b0=packed([8], "object", bytes(64))),
    "dtype a list": lambda path: write_state(path, b0=packed([8], ["float32"], bytes(32))),
    "shape of texts": lambda path: write_state(path, b0=packed(["8"], "float32", bytes(32))),
    "shape negative": lambda path: write_state(path, b0=packed([-8], "float32", bytes(32))),
    "shape too large": lambda path: write_state(path, b0=packed([2**63], "float32", bytes(32))),
    "name of bytes": lambda path: path.write_bytes(
        msgpack.packb({"ff_mod_stack": {"~": packed_weights(random_rule().weights) | {b"b3": packed([1], "float32", bytes(4))}}})
    ),
    "trailing bytes": lambda path: (write_state(path), path.write_bytes(path.read_bytes() + b"\x00")),
    "safetensors inside": lambda path: write_safetensors(path),
}

DAMAGED_SAFETENSORS = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("a rule"),
    "random bytes": lambda path: path.write_bytes(random.Random(0).randbytes(2000)),
    "no metadata": lambda path: save_file(random_rule().weights, path),
    "another model": lambda path: save_file({"weight": torch.zeros(2)}, path, {"format": "pt"}),
    "header too long": lambda path: path.write_bytes((2**40).to_bytes(8, "little") + b"{}"),
    "header not JSON": lambda path: path.write_bytes((4).to_bytes(8, "little") + b"{{{{"),
    "trailing bytes": lambda path: (write_safetensors(path), path.write_bytes(path.read_bytes() + bytes(8))),
    "msgpack inside": lambda path: write_state(path),
}


def assert_is_refused(path: Path, capsys: pytest.CaptureFixture, message: str = "") -> None:
    """A RuleError that names the file and says what is wrong; one line and status 2 from the command, which writes nothing."""
    with pytest.raises(RuleError, match=rf"(?s){message}") as caught:
        load_rule(path)
    assert str(path) in str(caught.value)
    for out in ("out.state", "out.safetensors"):
        output = path.with_name(out)
        assert main([str(path), str(output)]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1, captured.err
        assert str(path) in captured.err
        assert not output.exists()


@pytest.mark.parametrize("ending", ["safetensors", "state"])
@pytest.mark.parametrize("name", DAMAGED_WEIGHTS)
def test_damaged_weights(tmp_path, capsys, name, ending):
    weights, message = DAMAGED_WEIGHTS[name]
    path = tmp_path / f"rule.{ending}"
    (write_safetensors if ending == "safetensors" else write_state)(path, weights)
    assert_is_refused(path, capsys, message)


@pytest.mark.parametrize("name", DAMAGED_DESCRIPTIONS)
def test_damaged_description(tmp_path, capsys, name):
    metadata, message = DAMAGED_DESCRIPTIONS[name]
    write_safetensors(tmp_path / "rule.safetensors", **metadata)
    assert_is_refused(tmp_path / "rule.safetensors", capsys, message)


@pytest.mark.parametrize("name", DAMAGED_STATES)
def test_damaged_state(tmp_path, capsys, name):
    DAMAGED_STATES[name](tmp_path / "rule.state")
    assert_is_refused(tmp_path / "rule.state", capsys)


@pytest.mark.parametrize("name", DAMAGED_SAFETENSORS)
def test_damaged_safetensors(tmp_path, capsys, name):
    DAMAGED_SAFETENSORS[name](tmp_path / "rule.safetensors")
    assert_is_refused(tmp_path / "rule.safetensors", capsys)


@pytest.mark.parametrize("part", [0.001, 0.01, 0.3, 0.9, 0.9999])
@pytest.mark.parametrize("ending", ["safetensors", "state"])
def test_truncated_file(tmp_path, capsys, ending, part):
    path = tmp_path / f"rule.{ending}"
    save_rule(random_rule(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    assert_is_refused(path, capsys)


@pytest.mark.parametrize("ending", ["safetensors", "state"])
def test_any_flipped_byte_is_a_rule_or_a_rule_error(tmp_path, ending):
    """400 single bytes of the structure of a file, changed: nothing but RuleError may come out."""
    path = tmp_path / f"rule.{ending}"
    save_rule(replace(random_rule(), weights={n: torch.zeros_like(w) for n, w in random_rule().weights.items()}), path)
    whole, generator = path.read_bytes(), random.Random(0)
    structure = [i for i, byte in enumerate(whole) if byte]  # the weights are zero
    refused = 0
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[generator.choice(structure)] = generator.randrange(256)
        path.write_bytes(damaged)
        try:
            load_rule(path)
        except RuleError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused > 200


@pytest.mark.parametrize("name", ["missing.state", "missing.safetensors", "celo3", "", "."])
def test_missing_file_or_unknown_name(tmp_path, capsys, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuleError, match=rf"'{name}'.*celo2, celo2-base, celo2-lm, hand-momentum, hand-nesterov"):
        load_rule(name)
    with pytest.raises(RuleError):
        load_rule(tmp_path / name)
    assert main([name, "out.state"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


class Attack:
    """Unpickled, it creates the file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("ending", ["safetensors", "state", "pt", "pkl"])
@pytest.mark.parametrize("how", ["pickle", "torch.save", "numpy"])
def test_pickle_is_never_executed(tmp_path, capsys, ending, how):
    path, sentinel = tmp_path / f"rule.{ending}", tmp_path / "executed"
    if how == "pickle":
        path.write_bytes(pickle.dumps(Attack(sentinel)))
    elif how == "torch.save":
        torch.save(Attack(sentinel), path)
    else:
        with path.open("wb") as file:
            np.save(file, np.array([Attack(sentinel)], dtype=object), allow_pickle=True)
    assert_is_refused(path, capsys)
    assert not sentinel.exists()


# --- saving -----------------------------------------------------------------------------------------------------------------

UNSAVABLE = {
    "missing weight": replace(random_rule(), weights=lacking("w1")),
    "NaN": replace(random_rule(), weights=one_value("w1", float("nan"))),
    "float64": replace(random_rule(), weights={n: w.double() for n, w in random_rule().weights.items()}),
    "unknown variant": random_rule(variant="celo3"),
    "decay of 1": random_rule(momentum_decays=(0.9, 0.99, 1.0)),
    "two decays": random_rule(factored_decays=(0.9, 0.99)),
    "negative decay": random_rule(second_moment_decay=-0.5),
    "normalization a number": random_rule(normalize_gradient=1),
}


@pytest.mark.parametrize("ending", ["safetensors", "state"])
@pytest.mark.parametrize("name", UNSAVABLE)
def test_what_could_not_be_loaded_is_not_saved(tmp_path, name, ending):
    """A run that ends by saving its rule must not leave a file that nobody can read, nor replace a good one."""
    path = tmp_path / f"rule.{ending}"
    path.write_text("before")
    with pytest.raises(RuleError) as caught:
        save_rule(UNSAVABLE[name], path)
    assert str(path) in str(caught.value)
    assert path.read_text() == "before"


@pytest.mark.parametrize("name", ["rule.pt", "rule", "rule.msgpack"])
def test_other_endings_are_refused(tmp_path, capsys, name):
    with pytest.raises(RuleError, match=r"\.safetensors or \.state"):
        save_rule(random_rule(), tmp_path / name)
    assert main(["celo2", str(tmp_path / name)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / name).exists()


# --- the command ------------------------------------------------------------------------------------------------------------


def test_convert_there_and_back(tmp_path, capsys):
    there, back = tmp_path / "rule.safetensors", tmp_path / "back.state"
    assert main([str(VECTORS / "theta.state"), str(there)]) == 0
    assert main([str(there), str(back)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert str(there) in captured.out and str(back) in captured.out
    expected = load_rule(VECTORS / "theta.state")
    assert_same_weights(load_rule(there), expected.weights)
    assert_same_weights(load_rule(back), expected.weights)
    assert load_rule(there).description == expected.description
    assert unpacked(back) == unpacked(VECTORS / "theta.state")


def test_convert_records_what_theta_does_not_say(tmp_path):
    out = tmp_path / "rule.safetensors"
    assert main([str(VECTORS / "theta.state"), str(out), "--variant", "celo2-base", "--description", "downloaded"]) == 0
    assert (load_rule(out).variant, load_rule(out).description) == ("celo2-base", "downloaded")


def test_convert_keeps_the_description(tmp_path, capsys):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    save_rule(random_rule(5, **DESCRIBED), first)
    assert main([str(first), str(second)]) == 0
    again = load_rule(second)
    assert again.hidden == 5
    assert {name: getattr(again, name) for name in DESCRIBED} == DESCRIBED
    assert "celo2-base, 5 hidden units, gradients normalized; meta-trained" in capsys.readouterr().out


@pytest.mark.parametrize("ending", ["safetensors", "state"])
def test_convert_onto_itself(tmp_path, ending):
    path = tmp_path / f"rule.{ending}"
    save_rule(random_rule(), path)
    assert main([str(path), str(path), "--description", "renamed"]) == 0
    assert_same_weights(load_rule(path), random_rule().weights)


def test_convert_shipped_rule(tmp_path):
    assert main(["celo2-base", str(tmp_path / "rule.safetensors")]) == 0
    assert load_rule(tmp_path / "rule.safetensors").variant == "celo2-base"


def test_convert_into_a_folder_that_is_not_there(tmp_path, capsys):
    out = tmp_path / "nowhere" / "rule.state"
    assert main(["celo2", str(out)]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert str(out) in captured.err


def test_failed_conversion_keeps_the_output_of_before(tmp_path):
    out = tmp_path / "out.state"
    save_rule(random_rule(), out)
    (tmp_path / "bad.safetensors").write_text("not a rule")
    assert main([str(tmp_path / "bad.safetensors"), str(out)]) == 2
    assert_same_weights(load_rule(out), random_rule().weights)


@pytest.mark.parametrize("argv", [[], ["celo2"], ["celo2", "out.state", "--variant", "celo3"], ["celo2", "out.state", "more"]])
def test_bad_command_line(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "celo2.convert" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def python(*args: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )


@pytest.mark.filterwarnings("ignore:'celo2.convert' found in sys.modules")
def test_command_succeeds(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["celo2.convert", str(VECTORS / "theta.state"), "rule.safetensors"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("celo2.convert", run_name="__main__")
    assert caught.value.code == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("rule.safetensors: celo2, 8 hidden units")
    assert captured.err == ""
    assert_same_weights(load_rule("rule.safetensors"), load_rule(VECTORS / "theta.state").weights)


def test_command_fails_in_one_line(tmp_path):
    (tmp_path / "damaged.state").write_bytes((VECTORS / "theta.state").read_bytes()[:-9])
    failed = python("-m", "celo2.convert", "damaged.state", "out.safetensors", cwd=tmp_path)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.count("\n") == 1
    assert failed.stderr.startswith("error: ")
    assert "damaged.state" in failed.stderr
    assert not (tmp_path / "out.safetensors").exists()


# --- import -----------------------------------------------------------------------------------------------------------------

IMPORT = """
    import importlib, json, os, pkgutil, sys
    import numpy, safetensors.torch, msgpack, torch

    def flags():
        matmul = torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision()
        return torch.get_default_dtype(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), matmul

    touched = []
    before = dict(os.environ), flags(), set(sys.modules)
    watched = ("socket.", "urllib.", "subprocess.", "os.system", "os.exec", "os.fork")
    sys.addaudithook(lambda event, args: touched.append(event) if event.startswith(watched) else None)

    import celo2
    for module in pkgutil.walk_packages(celo2.__path__, "celo2."):
        if not module.name.startswith(("celo2.metatrain", "celo2.kernels")):
            importlib.import_module(module.name)
    for name in ("celo2", "celo2-base", "celo2-lm", "hand-momentum", "hand-nesterov"):
        celo2.load_rule(name)
    celo2.Celo2(celo2.param_groups(torch.nn.Linear(2, 2), 0.1, 0.1), lr=0.1)

    new = {name.partition(".")[0] for name in set(sys.modules) - before[2]}
    print(json.dumps({"touched": touched, "changed": before[:2] != (dict(os.environ), flags()), "new": sorted(new)}))
"""


def test_import_is_quiet_and_needs_nothing_else(tmp_path):
    """No network, no process, no flag, no environment variable; nothing of transformers or of the rest of this project."""
    done = python("-c", textwrap.dedent(IMPORT), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["touched"] == []
    assert not report["changed"]
    foreign = {
        "transformers",
        "models",
        "data",
        "launch",
        "train",
        "accelerate",
        "datasets",
        "deepspeed",
        "tokenizers",
        "flax",
        "jax",
    }
    assert not foreign & set(report["new"]), report["new"]
    assert "celo2" in report["new"]
    assert list(tmp_path.iterdir()) == []
