"""Meta-training of rules with whitening: both engines against `celo2.rule.update`, and runs that stop and go on."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from test_celo2_generations import CMA
from test_celo2_metatrain import data, digits, fast, prepared, small  # noqa: F401
from test_celo2_metatrain_cli import TINY, folder_of, numbers

from celo2 import load_rule, save_rule, whitening
from celo2.metatrain import config as configuration
from celo2.metatrain import engine as plain
from celo2.metatrain.__main__ import main
from celo2.metatrain.config import ConfigError, load_config
from celo2.metatrain.families import family_of
from celo2.metatrain.outer import FORMAT
from celo2.metatrain.theta import SIZE, rule_of, theta_of
from celo2.metatrain.train import MetaTraining
from celo2.rule import accumulator_shapes, factored_axes, update
from celo2.whitening import LEFT, RIGHT, WHITENERS, whiten_

WHITENED = "rule.init=hand-whitened"


def whitened_state(state):
    return {key: x for key, x in state.items() if key.endswith(WHITENERS)}


# --- engines ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
def test_a_step_of_the_plain_engine_is_that_of_the_rule(shape):
    """Three unrolls, each with its own θ and rate of whitening: updates, whiteners and all other accumulators in every one of six
    steps."""
    config, unrolls = small(WHITENED), 3
    random = np.random.default_rng(0)
    theta = (theta_of(load_rule("hand-whitened")) + 0.1 * random.standard_normal((unrolls, SIZE))).astype(np.float32)
    theta[:, -1] = np.log([0.5, 2, 20])  # the last: a rate of 1, the largest
    networks = {name: torch.from_numpy(x) for name, x in plain.batched_mlp(theta).items()}
    shapes = accumulator_shapes(shape, factored_axes(shape), whitened=True)
    parameter = {key: torch.zeros(unrolls, *of_key) for key, of_key in shapes.items()}
    parameter["weight"] = torch.from_numpy(random.standard_normal((unrolls, *shape)).astype(np.float32))
    states = [{key: torch.zeros(of_key) for key, of_key in shapes.items()} for _ in range(unrolls)]
    for _ in range(6):
        g = torch.from_numpy(random.standard_normal((unrolls, *shape)).astype(np.float32))
        given = plain.accumulated(config, parameter, g)
        step = plain.directed(config, networks, given, {key: parameter[key] for key in WHITENERS}, math.inf)
        for u, state in enumerate(states):
            expected = update(rule_of(theta[u], config, ""), state, g[u], parameter["weight"][u], orthogonalize=True)
            torch.testing.assert_close(step[u], expected, rtol=0, atol=1e-5)  # worst of 10 seeds 4.8e-7
            for key, x in state.items():
                torch.testing.assert_close(parameter[key][u], x, rtol=1e-5, atol=1e-6)
    assert all(parameter[key].abs().max() > 0.05 for key in WHITENERS)


def test_only_matrices_under_the_rule_have_whiteners(data):  # noqa: F811
    for name, matrices in (("images", {"w1", "w2"}), ("text", {f"{m}0" for m in ("q", "k", "v", "o", "up", "down")})):
        state = MetaTraining(small(WHITENED), data[name]).problems[0].state
        assert {key.partition(".")[0] for key in whitened_state(state)} == matrices
        assert not any(x.any() for x in whitened_state(state).values())
        for changes in ("rule.init=hand-agreement", f"{WHITENED} rule.variant=celo2-base"):
            config = small(changes)
            family = family_of(config, data[name])
            assert not any(set(WHITENERS) & family.accumulator_shapes(weight).keys() for weight in family.shapes)
    up = family_of(small(WHITENED), data["text"]).accumulator_shapes("up0")
    assert (up[LEFT], up[RIGHT]) == ((128, 128), (32, 32))


@pytest.mark.parametrize(("rows", "cols"), [(16, 16), (32, 10), (64, 32), (128, 48)])
@pytest.mark.parametrize("directions", ["new ones", "nearly always the same", "zeros at last"])
def test_the_compiled_whitening_is_that_of_the_rule(directions, rows, cols, fast):  # noqa: F811
    """Also with padding, of ranks below both sides, and of any scale: every direction, and both whiteners in the end."""
    from celo2.metatrain.numba_engine.products import padded
    from celo2.metatrain.numba_engine.whitening import whiten_ as compiled

    width, random = padded(cols), np.random.default_rng(0)
    whiteners = {key: torch.zeros(n, n) for key, n in ((LEFT, rows), (RIGHT, cols))}
    state = np.zeros(rows * rows + width * width, np.float32)
    always = np.outer(random.standard_normal(rows), random.standard_normal(cols))
    for step in range(30):
        u = random.standard_normal((rows, cols)) * np.geomspace(0.1, 1, cols) * 10.0 ** (step % 5 - 2)
        if directions == "nearly always the same":
            u = always + 0.1 * random.standard_normal((rows, cols))
        if directions == "zeros at last" and step > 20:
            u *= 0
        held = np.zeros((rows, width), np.float32)
        held[:, :cols] = u
        expected = whiten_(torch.from_numpy(held[:, :cols].copy()), whiteners, 0.3)
        flat = held.ravel()
        compiled(flat, state, 0, rows, cols, width, np.float32(0.3))
        np.testing.assert_allclose(flat.reshape(rows, width)[:, :cols], expected, rtol=0, atol=2e-4)  # worst of 10 seeds 3.8e-5
        assert not flat.reshape(rows, width)[:, cols:].any()
    left, right = state[: rows * rows].reshape(rows, rows), state[rows * rows :].reshape(width, width)
    np.testing.assert_allclose(left, whiteners[LEFT], rtol=0, atol=1e-5)  # worst of 10 seeds 2.5e-6
    np.testing.assert_allclose(right[:cols, :cols], whiteners[RIGHT], rtol=0, atol=1e-5)
    assert not right[cols:].any() and not right[:, cols:].any()
    for p in (left, right):
        np.testing.assert_array_equal(p, p.T)
        assert np.abs(p).max() > 0.05 and np.linalg.eigvalsh(p + np.eye(len(p))).min() > 0


FAST = {
    "images": ("images", "", 0.1),  # two matrices that are not square, one of them padded
    "images, a scale for each weight": ("images", "inner.reparametrization=parameter", 0.1),
    "text": ("text", "text.layers=2", 0.01),  # square, long and wide matrices
    "a text of another size": ("text", "text.width=48 text.heads=3 text.context=16 text.sequences=4", 0.01),
}


@pytest.mark.parametrize("case", FAST)
def test_fast_equals_plain_over_twenty_steps(case, data, fast):  # noqa: F811
    """Texts with θ nearer to hand-momentum: further away whitening makes rounding errors grow a thousandfold in ten steps, also
    between two runs of the plain engine."""
    name, changes, spread = FAST[case]
    config = small(f"{WHITENED} inner.schedule=cosine tasks.problems=2 inner.truncation=20 inner.max_length=60 {changes}")
    family = family_of(config, data[name])
    truncation, state, theta = prepared(config, family, spread)
    theta[:, -1] = np.log(np.linspace(0.5, 2, len(theta)))  # rates of whitening from 0.05 to 0.2
    other = {key: x.copy() for key, x in state.items()}
    expected = plain.unroll(config, family, state, theta, truncation)
    losses = fast.unroll(config, family, other, theta, truncation)
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-5)
    # Beyond rtol, worst of 10 seeds 1.7e-6 of an array's largest number; texts 1.7e-4.
    share = 1e-5 if name == "images" else 1e-3
    for key, x in state.items():
        np.testing.assert_allclose(other[key], x, rtol=1e-4, atol=share * max(1e-3, np.abs(x).max()), err_msg=key)
    assert all(np.abs(x).max() > 0.05 for x in whitened_state(other).values())


@pytest.mark.parametrize("engine", ["plain", "fast"])
@pytest.mark.parametrize("name", ["images", "text"])
def test_a_reset_sets_whiteners_to_zero(name, engine, data, fast):  # noqa: F811
    config = small(WHITENED)
    family = family_of(config, data[name])
    truncation, state, theta = prepared(config, family)
    truncation = replace(truncation, reset_at=np.full(len(truncation.rows), 2))
    unroll, results = (plain if engine == "plain" else fast).unroll, []
    for factor in (0.0, 1.0):
        own = {key: x.copy() for key, x in state.items()}
        for key, x in whitened_state(own).items():
            noise = factor * np.random.default_rng(0).standard_normal(x.shape[1:])
            own[key] = np.repeat(((noise + noise.T) / len(noise))[None], len(x), 0).astype(np.float32)
        results.append((unroll(config, family, own, theta, truncation), own))
    (first, first_state), (second, second_state) = results
    assert (first[:, 1] != second[:, 1]).all()  # the whiteners of the state count before it
    np.testing.assert_array_equal(first[:, 2:], second[:, 2:])
    for key, x in first_state.items():
        np.testing.assert_array_equal(x, second_state[key])
    assert all(x.any() for x in whitened_state(first_state).values())


def test_problems_that_start_anew_have_whiteners_of_zeros(digits):  # noqa: F811
    training = MetaTraining(small(WHITENED), digits)
    training.step()
    (problems,) = training.problems
    assert all(x.any() for x in whitened_state(problems.state).values())
    assert not any(x.any() for x in whitened_state(problems.truncation(1).fresh).values())


def test_packed_whiteners_have_room_for_their_padding(data, fast):  # noqa: F811
    """Squares of whole vectors, that of the longer side first, up to where the next weight begins."""
    for name, weight, first, sides in (("images", "w2", LEFT, (32, 16)), ("text", "down0", RIGHT, (128, 32))):
        family = family_of(small(WHITENED), data[name])
        places = fast.segments(family, whole=True)
        rows, columns = places[f"{weight}.{first}"], places[f"{weight}.{RIGHT if first == LEFT else LEFT}"]
        assert (rows.shape, columns.shape) == tuple((n, n) for n in sides)
        assert columns.at == rows.at + sides[0] ** 2
        assert columns.at + sides[1] ** 2 in [place.at for place in places.values()] or columns is list(places.values())[-1]


def test_other_constants_of_whitening_make_another_kernel(fast, monkeypatch):  # noqa: F811
    """Kernels stay on disk; they are found by their sources."""
    found, read = [], Path.read_bytes
    monkeypatch.setitem(fast.NETWORKS, "images", SimpleNamespace(compiled=found.append))
    fast.kernel.__wrapped__("images")
    fast.kernel.__wrapped__("images")
    constants = Path(whitening.__file__)
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + (b"LEAK = 0.1" if path == constants else b""))
    fast.kernel.__wrapped__("images")
    assert found[0] == found[1] != found[2]


# --- runs ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["plain", "fast"])
def test_resumes_exactly_from_late_states_too(engine, tmp_path, fast):  # noqa: F811
    """Images and a text; most ended problems go on from saved states. The rule keeps its whitening."""
    (tmp_path / "code.txt").write_bytes(b"def f(x): return x + 1\n" * 20)
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.replace("problems: 2", "problems: 1"))
    overrides = (
        f"tasks.sources=[text:{tmp_path / 'code.txt'},digits]",
        "text.width=16",
        "text.context=16",
        "text.sequences=1",
        "inner.truncation=2",
        "inner.max_length=8",
        "inner.restart=0.2",
        f"engine.name={engine}",
        WHITENED,
    )
    whole = folder_of(path, "whole", *overrides)
    for iterations in (4, 8, 12):
        pieces = folder_of(path, "pieces", *overrides, f"outer.iterations={iterations}")
    rule = load_rule(pieces / "rule.safetensors")
    assert rule == load_rule(whole / "rule.safetensors")
    assert numbers(pieces) == numbers(whole)
    first, second = (load_file(folder / "state.safetensors") for folder in (whole, pieces))
    assert first.keys() == second.keys()
    for key, x in first.items():
        np.testing.assert_array_equal(x, second[key])
    for key in ("images.state.w1", "images.late.state.w1", "text.state.up0", "text.late.state.up0"):
        assert all(first[f"{key}.{side}"].any() for side in WHITENERS)
    assert rule.settings() == load_rule("hand-whitened").settings()


def test_generations_keep_whitening(tmp_path):
    path = tmp_path / "cma.yaml"
    path.write_text(CMA.replace("hand-nesterov", "hand-whitened"))
    runs = {"whole": (3,), "pieces": (2, 3)}
    for name, ends in runs.items():
        for end in ends:
            folder_of(path, name, f"outer.iterations={end}")
    whole, pieces = (load_rule(tmp_path / name / "rule.safetensors") for name in runs)
    assert whole == pieces and whole.settings() == load_rule("hand-whitened").settings()
    assert numbers(tmp_path / "whole") == numbers(tmp_path / "pieces")
    other = folder_of(path, "other", "outer.iterations=3", "rule.init=hand-agreement", "rule.normalize_gradient=true")
    assert numbers(other)[0]["final"] != numbers(tmp_path / "whole")[0]["final"]


@pytest.mark.parametrize("text", [TINY, CMA], ids=["pes", "cma"])
def test_the_rate_of_whitening_is_trained_where_it_is_asked_for(text, tmp_path):
    """A start without whitening gets one; a run in pieces equals a whole one; unasked the rate stays what it is."""
    path = tmp_path / "run.yaml"
    path.write_text(text)
    asked = ("rule.init=hand-nesterov", "rule.whitening=0.05", "rule.train_whitening=true")
    whole = load_rule(folder_of(path, "whole", *asked, "outer.iterations=4") / "rule.safetensors")
    for iterations in (2, 4):
        pieces = folder_of(path, "pieces", *asked, f"outer.iterations={iterations}")
    assert load_rule(pieces / "rule.safetensors") == whole and numbers(pieces) == numbers(tmp_path / "whole")
    assert whole.whitening not in (0, 0.05) and 0.01 < whole.whitening < 0.25
    kept = folder_of(path, "kept", *asked[:2], "outer.iterations=4")
    assert load_rule(kept / "rule.safetensors").whitening == 0.05
    without = folder_of(path, "without", "rule.init=hand-whitened", "rule.whitening=0", "outer.iterations=2")
    assert load_rule(without / "rule.safetensors").whitening == 0


def test_a_rate_beyond_the_bounds_is_the_nearest(digits, tmp_path):  # noqa: F811
    config = small("rule.init=hand-nesterov rule.whitening=0.1 rule.train_whitening=true")
    theta = MetaTraining(config, digits).current().copy()
    for number, rate in ((5, 1), (1e30, 1), (-1e30, 1e-6)):
        theta[-1] = number
        save_rule(rule_of(theta, config, ""), tmp_path / "rule.safetensors")
        assert load_rule(tmp_path / "rule.safetensors").whitening == pytest.approx(rate, rel=1e-5)


@pytest.mark.parametrize("text", [TINY, CMA], ids=["pes", "cma"])
def test_a_run_does_not_continue_with_another_start(text, tmp_path, capsys, monkeypatch):
    """The same path with another rule in it: other whitening, decays, weights. And states from before rules had whitening."""
    monkeypatch.setattr(configuration, "loaded", load_rule)  # without a cache
    path, start = tmp_path / "run.yaml", tmp_path / "start.safetensors"
    path.write_text(text)
    rule = load_rule("hand-agreement")
    others = [replace(rule, whitening=0.1), replace(rule, momentum_decays=(0.9, 0.99, 0.999))]
    others.append(replace(rule, weights=load_rule("hand-nesterov").weights))
    save_rule(rule, start)
    folder = folder_of(path, "run", f"rule.init={start}", "outer.iterations=2")
    for other in others:
        save_rule(other, start)
        assert main([str(path), f"run.dir={folder}", f"rule.init={start}"]) == 2
        assert f"was written with another rule in rule.init, '{start}'" in capsys.readouterr().err
    save_rule(rule, start)
    assert main([str(path), f"run.dir={folder}", f"rule.init={start}"]) == 0

    state = folder / "state.safetensors"
    with safe_open(state, "numpy") as file:
        meta = json.loads(file.metadata()[FORMAT])
    meta.pop("start")
    save_file(load_file(state), state, {FORMAT: json.dumps(meta)})
    assert main([str(path), f"run.dir={folder}", f"rule.init={start}"]) == 0
    save_rule(others[0], start)
    save_file(load_file(state), state, {FORMAT: json.dumps(meta)})
    assert main([str(path), f"run.dir={folder}", f"rule.init={start}"]) == 2
    assert "was written before rules had whitening" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([WHITENED, "rule.variant=celo2-base"], "rule.variant is celo2-base, expected celo2: rule.init has whitening"),
        ([WHITENED, "expert.rule=hand-agreement"], "rule.init has whitening 0.1, expected 0 where an expert helps"),
        ([WHITENED, "expert.rule=hand-whitened"], "expert.rule has whitening 0.1, expected 0 where an expert helps"),
        (["rule.init=hand-agreement", "expert.rule=hand-whitened"], "expert.rule has whitening 0.1, expected 0"),
        (["rule.train_whitening=true"], "rule.train_whitening is true, expected false: the rule has no whitening"),
        ([WHITENED, "rule.whitening=0", "rule.train_whitening=true"], "the rule has no whitening; rule.whitening=0.1 would give"),
        (["rule.whitening=1.5"], "rule.whitening is 1.5, expected a fraction between 0 and 1"),
        (["rule.whitening=0.2", "rule.variant=celo2-base"], "expected celo2: rule.whitening is 0.2, a part of orthogonalization"),
        (["rule.whitening=0.2", "expert.rule=hand-nesterov"], "rule.whitening is 0.2, expected 0 where an expert helps"),
    ],
)
def test_a_mistake_is_one_clear_line(overrides, message, tmp_path, capsys):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    assert main([str(path), f"run.dir={tmp_path / 'bad'}", *overrides]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors[-1].startswith("error: ") and message in errors[-1]
    assert not (tmp_path / "bad").exists()


def test_settings_of_the_run_keep_whitening(digits, tmp_path):  # noqa: F811
    """Other decays, trained step sizes: the file of the rule has them and its whitening."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    config = load_config(path, [WHITENED, "rule.decays=[0.8,0.9,0.95]", "rule.step_sizes=true"])
    training = MetaTraining(config, digits)
    training.step()
    save_rule(training.rule(), tmp_path / "rule.safetensors")
    rule = load_rule(tmp_path / "rule.safetensors")
    assert rule == training.rule() and (rule.whitening, rule.momentum_decays) == (0.1, (0.8, 0.9, 0.95))
    with pytest.raises(ConfigError, match="expected celo2"):
        load_config(path, [WHITENED, "rule.variant=celo2-base"])
