"""Damaged files of rules: one error that names the file, nothing executed, nothing written."""

import pickle
import random
from dataclasses import replace
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch
from rule_files import assert_same_weights, random_rule, write_safetensors
from safetensors.torch import save_file

from celo2 import Celo2, Rule, RuleError, load_rule, save_rule
from celo2.convert import main


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

EXPONENTS = {"version": "2", "step_exponents": "[1, 0, 0]", "step_factor": "1"}
WHITENED = {"version": "3", "whitening": "0.1"}
BOUNDED = EXPONENTS | {"version": "4", "step_bound": "1"}
DAMAGED_DESCRIPTIONS = {
    "no format": ({"format": None}, "format"),
    "other format": ({"format": "pt"}, "format.*pt"),
    "other version": ({"version": "5"}, "version '5'.*'1' to '4'"),
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
    "version 2 without step sizes": ({"version": "2"}, "description"),
    "version 3 without whitening": ({"version": "3"}, "description"),
    "whitening above 1": (WHITENED | {"whitening": "1.5"}, "whitening is 1.5, expected 0 to 1"),
    "negative whitening": (WHITENED | {"whitening": "-0.1"}, "whitening is -0.1, expected 0 to 1"),
    "NaN whitening": (WHITENED | {"whitening": "NaN"}, "whitening is nan"),
    "whitening not a number": (WHITENED | {"whitening": "fast"}, "description"),
    "whitening of a base rule": (WHITENED | {"variant": "celo2-base"}, "whitening is a part of orthogonalization"),
    "whitening and half of step sizes": (WHITENED | {"step_factor": "1"}, "description"),
    "two exponents": (EXPONENTS | {"step_exponents": "[1, 0]"}, "step_exponents is .*expected 3 exponents"),
    "infinite exponent": (EXPONENTS | {"step_exponents": "[1, 0, Infinity]"}, "step_exponents is .*expected 3 exponents"),
    "NaN exponent": (EXPONENTS | {"step_exponents": "[1, 0, NaN]"}, "step_exponents is .*expected 3 exponents"),
    "exponent of 5": (EXPONENTS | {"step_exponents": "[0, -5, 0]"}, "expected 3 exponents from -4 to 4"),
    "exponent of 400 digits": (EXPONENTS | {"step_exponents": f"[{10**400}, 0, 0]"}, "description"),
    "decay of 400 digits": ({"momentum_decays": f"[{10**400}, 0, 0]"}, "description"),
    "exponents in a text": (EXPONENTS | {"step_exponents": '"123"'}, "description.*not a list"),
    "exponents a number": (EXPONENTS | {"step_exponents": "1"}, "description"),
    "step factor of 0": (EXPONENTS | {"step_factor": "0"}, "step_factor is 0.0, expected 0.001 to 1000"),
    "version 4 without a bound": (EXPONENTS | {"version": "4"}, "description.*step_bound"),
    "version 4 without step sizes": (BOUNDED | {"step_factor": None}, "description.*step_factor"),
    "bound of 0": (BOUNDED | {"step_bound": "0"}, "step_bound is 0.0, expected 0.001 or more"),
    "negative bound": (BOUNDED | {"step_bound": "-1"}, "step_bound is -1.0, expected 0.001 or more"),
    "NaN bound": (BOUNDED | {"step_bound": "NaN"}, "step_bound is nan"),
    "bound in words": (BOUNDED | {"step_bound": "one"}, "description"),
    "bound and NaN whitening": (BOUNDED | {"whitening": "NaN"}, "whitening is nan"),
    "step factor not a number": (EXPONENTS | {"step_factor": "NaN"}, "step_factor is nan"),
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
    known = "celo2, celo2-base, celo2-lm, celo2-whitened, hand-momentum, hand-nesterov, hand-agreement"
    with pytest.raises(RuleError, match=rf"'{name}'.*{known}"):
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
UNUSABLE = UNSAVABLE | {
    "no weights": Rule({}),
    "step factor 0": random_rule(step_factor=0.0),
    "decay above 1": random_rule(second_moment_decay=1.5),
    "whitening 5": random_rule(whitening=5.0),
    "whitening not a number": random_rule(whitening=float("nan")),
    "a base rule whitened": random_rule(variant="celo2-base", whitening=0.1),
    "decays a number": random_rule(momentum_decays=0.9),
    "weights a list": Rule([]),
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


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_rule_made_in_memory_is_checked(name):
    """As one from a file, by whatever takes a rule; the optimizer keeps the rule that it has."""
    optimizer = Celo2([torch.zeros(2, 3)], lr=0.1, rule="hand-nesterov")
    for use in (
        load_rule,
        lambda rule: Celo2([torch.zeros(2, 3)], lr=0.1, rule=rule),
        lambda rule: setattr(optimizer, "rule", rule),
    ):
        with pytest.raises(RuleError, match=r"^the rule: ") as caught:
            use(UNUSABLE[name])
        assert "\n" not in str(caught.value)
    assert optimizer.rule == load_rule("hand-nesterov")


@pytest.mark.parametrize("source", [None, 3, b"celo2", ["celo2"]])
def test_what_is_no_rule(source):
    with pytest.raises(RuleError, match=r"^a rule is a name, a path or a Rule, not "):
        Celo2([torch.zeros(2, 3)], lr=0.1, rule=source)


@pytest.mark.parametrize("name", ["rule.pt", "rule", "rule.msgpack"])
def test_other_endings_are_refused(tmp_path, capsys, name):
    with pytest.raises(RuleError, match=r"\.safetensors or \.state"):
        save_rule(random_rule(), tmp_path / name)
    assert main(["celo2", str(tmp_path / name)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / name).exists()


def test_a_name_that_no_file_can_have():
    with pytest.raises(RuleError, match=r"rule 'x{300}': File name too long"):
        load_rule("x" * 300)


def test_a_theta_state_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    write_state(tmp_path / "theta.state")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(RuleError, match=r"theta\.state: cannot be read \(Permission denied\)"):
        load_rule(tmp_path / "theta.state")
