"""Rules in files: the published theta.state, `.safetensors` with a description, and an import without side effects."""

import json
import textwrap
from dataclasses import replace

import numpy as np
import pytest
import torch
from rule_files import DESCRIBED, VECTORS, assert_same_weights, python, random_rule, unpacked, write_safetensors
from safetensors import safe_open

from celo2 import Celo2, RuleError, load_rule, save_rule
from celo2.rule_files import SHIPPED

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


def test_written_state_is_the_published_format(tmp_path):
    save_rule(load_rule(VECTORS / "theta.state"), tmp_path / "again.state")
    assert unpacked(tmp_path / "again.state") == unpacked(VECTORS / "theta.state")


def test_a_base_rule_in_the_published_format_is_a_warning(tmp_path):
    """The format cannot say it: read without `variant`, it is a celo2 rule."""
    rule = random_rule(variant="celo2-base")
    with pytest.warns(
        UserWarning, match=r"base\.state does not store the variant: load it with load_rule\(\.\.\., variant='celo2-base'\)$"
    ):
        save_rule(rule, tmp_path / "base.state")
    assert load_rule(tmp_path / "base.state", variant="celo2-base") == rule


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


@pytest.mark.parametrize("name", SHIPPED)
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


def test_step_sizes_and_whitening_make_a_file_that_older_programs_refuse(tmp_path):
    """They know version 1 alone; of a rule without them the file is as it was."""
    for rule, version in (
        (random_rule(), "1"),
        (random_rule(step_exponents=(1.0, 0.0, 0.0)), "2"),
        (random_rule(step_factor=0.5), "2"),
        (random_rule(whitening=0.1), "3"),
        (random_rule(whitening=0.1, step_exponents=(1.0, 0.0, 0.0)), "3"),
        (random_rule(step_exponents=(1.0, 0.0, 0.0), step_bound=1.5), "4"),
        (random_rule(whitening=0.1, step_factor=0.5, step_bound=1.0), "4"),
        (random_rule(step_bound=0.5), "4"),
        (random_rule(step_bound=1.5), "1"),  # there is no step size that it could bound
    ):
        save_rule(rule, tmp_path / "rule.safetensors")
        with safe_open(tmp_path / "rule.safetensors", "pt") as file:
            assert file.metadata()["version"] == version
            assert ("step_exponents" in file.metadata()) == rule.has_step_sizes
            assert ("whitening" in file.metadata()) == (rule.whitening > 0)
            assert ("step_bound" in file.metadata()) == (version == "4")
        assert load_rule(tmp_path / "rule.safetensors") == rule
    with pytest.raises(RuleError, match=r"rule\.state: the published format cannot hold step_exponents \(1.0, 0.0, 0.0\)"):
        save_rule(random_rule(step_exponents=(1.0, 0.0, 0.0)), tmp_path / "rule.state")
    with pytest.raises(RuleError, match=r"rule\.state: the published format cannot hold whitening 0.1"):
        save_rule(random_rule(whitening=0.1), tmp_path / "rule.state")
    with pytest.raises(RuleError, match=r"rule\.state: the published format cannot hold step_bound 0.5"):
        save_rule(random_rule(step_bound=0.5), tmp_path / "rule.state")


def test_rules_compare_by_weights_and_decays():
    rule = random_rule()
    assert rule == random_rule(description="another word for it")
    assert rule != random_rule(seed=1)
    assert rule != random_rule(hidden=5)
    assert rule != random_rule(variant="celo2-base")
    assert rule != random_rule(second_moment_decay=0.9)
    assert rule != random_rule(normalize_gradient=True)
    assert rule != random_rule(step_exponents=(1.0, 0.0, 0.0)) != random_rule(step_exponents=(0.0, 1.0, 0.0))
    assert rule != random_rule(step_factor=2.0) != random_rule(step_factor=2.0, step_bound=1.0)
    assert rule == random_rule(step_bound=1.0) != random_rule(step_bound=0.5)
    assert rule != random_rule(whitening=0.1) != random_rule(whitening=0.2)
    assert rule != "celo2"


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
    for name in celo2.rule_files.SHIPPED:
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
        "huggingface_hub",
        "flax",
        "jax",
    }
    assert not foreign & set(report["new"]), report["new"]
    assert "celo2" in report["new"]
    assert list(tmp_path.iterdir()) == []
