"""What meta-training can do beyond the published recipe: other sizes, an expert, late states, clipping. Against plain loops."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from test_celo2_metatrain import data, digits, fast, loop_of_one_unroll, prepared, small  # noqa: F401
from test_celo2_metatrain_cli import TINY, folder_of, numbers

from celo2 import load_rule, save_rule
from celo2.metatrain import engine as plain
from celo2.metatrain import pes
from celo2.metatrain.__main__ import main
from celo2.metatrain.config import ConfigError, load_config, text_sizes
from celo2.metatrain.engine import Expert, choose_unroll
from celo2.metatrain.families import families_of, family_of
from celo2.metatrain.generations import Generations
from celo2.metatrain.outer import FORMAT
from celo2.metatrain.theta import SIZE, odd_noise, odd_part, theta_of
from celo2.metatrain.train import PESTraining, outer_rate
from celo2.rule_files import LARGEST_EXPONENT, LARGEST_FACTOR
from celo2.training.metrics import rewind

NEW = {
    "a wide text, clipped": (
        "text",
        "text.width=48 text.heads=3 text.context=16 text.sequences=4 text.layers=2 inner.schedule=cosine inner.grad_clip=0.5",
    ),
    "a long text, an expert": (
        "text",
        "text.heads=2 text.context=48 text.sequences=2 inner.final=0 inner.schedule=cosine expert.rule=hand-nesterov",
    ),
    "an expert, clipped": ("images", "expert.rule=hand-nesterov rule.variant=celo2-base inner.grad_clip=0.01"),
    "late states": ("images", "inner.restart=0"),
    "other decays": ("images", "rule.init={decays}"),
    "an expert with step sizes": ("images", "rule.init={decays} expert.rule={decays}"),
    "a text, an expert with step sizes": ("text", "rule.init={decays} expert.rule={decays}"),
    "step sizes with a bound": ("images", "rule.init={decays} rule.step_bound=0.9"),
    "a text, step sizes with a bound, an expert with another": (
        "text",
        "rule.init={decays} rule.step_bound=0.9 expert.rule={bounded}",
    ),
    "an expert with a bound": ("images", "rule.init={decays} expert.rule={bounded} rule.variant=celo2-base"),
}


@pytest.fixture(scope="module")
def decays(tmp_path_factory):
    """A rule whose decays are not the published ones, and which has step sizes."""
    path = tmp_path_factory.mktemp("rule") / "rule.safetensors"
    rule = load_rule("hand-nesterov")
    settings = {"momentum_decays": (0.8, 0.95, 0.99), "second_moment_decay": 0.9, "factored_decays": (0.7, 0.9, 0.95)}
    save_rule(replace(rule, **settings, normalize_gradient=True, step_exponents=(0.5, -0.2, 0.3), step_factor=1.5), path)
    return path


@pytest.fixture(scope="module")
def bounded(decays):
    """The same with a bound of its step sizes."""
    path = decays.with_name("bounded.safetensors")
    save_rule(replace(load_rule(decays), step_bound=0.7), path)
    return path


def setting(case, data, decays, bounded):  # noqa: F811
    """Configuration, family, truncation with a reset, state, θ of all unrolls, and an expert or None."""
    kind, changes = NEW[case]
    config = small(f"tasks.problems=2 {changes.format(decays=decays, bounded=bounded)}")
    family = family_of(config, data[kind])
    truncation, state, theta = prepared(config, family)
    expert = None
    if config.expert.rule is not None:
        terms = np.zeros((len(theta), config.inner.truncation, 2), np.float32)
        expert = Expert(theta_of(load_rule(config.expert.rule)), 0.3, terms)
    return config, family, truncation, state, theta, expert


@pytest.mark.parametrize("case", NEW)
def test_unroll_equals_a_loop(case, data, decays, bounded):  # noqa: F811
    config, family, truncation, state, theta, expert = setting(case, data, decays, bounded)
    start = {key: x.copy() for key, x in state.items()}
    losses = plain.unroll(config, family, state, theta, truncation, expert)
    for u in (0, 3):
        expected, weights, terms = loop_of_one_unroll(config, family, start, theta, truncation, u, expert)
        np.testing.assert_allclose(losses[u], expected, rtol=0, atol=1e-5)  # as `test_unroll_equals_a_loop_with_a_reset`
        for key, w in weights.items():
            np.testing.assert_allclose(state[f"{key}.weight"][u], w, rtol=0, atol=1e-5, err_msg=key)
        if expert is not None:
            np.testing.assert_allclose(expert.terms[u], terms, rtol=1e-3, atol=1e-5)
            assert (terms > 0).all()


@pytest.mark.parametrize("case", NEW)
def test_fast_equals_plain(case, data, decays, bounded, fast):  # noqa: F811
    config, family, truncation, state, theta, expert = setting(case, data, decays, bounded)
    other = {key: x.copy() for key, x in state.items()}
    expected = plain.unroll(config, family, state, theta, truncation, expert)
    terms = None if expert is None else expert.terms.copy()
    losses = fast.unroll(config, family, other, theta, truncation, expert)
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-5)
    for key, x in state.items():  # as the test of the same name in test_celo2_metatrain.py
        np.testing.assert_allclose(other[key], x, rtol=1e-4, atol=2e-4 * max(1e-3, np.abs(x).max()), err_msg=key)
    if expert is not None:
        np.testing.assert_allclose(expert.terms, terms, rtol=1e-3, atol=1e-5)


def test_an_expert_in_full_is_the_expert_and_one_without_a_share_changes_nothing(digits):  # noqa: F811
    config = small("expert.rule=hand-nesterov expert.lr=5e-3")
    family = family_of(config, digits)
    truncation, state, theta = prepared(config, family)
    teacher, terms = theta_of(load_rule("hand-nesterov")), np.zeros((len(theta), config.inner.truncation, 2), np.float32)
    copies = [{key: x.copy() for key, x in state.items()} for _ in range(4)]
    nothing = plain.unroll(config, family, copies[0], theta, truncation, Expert(teacher, 0.0, terms))
    np.testing.assert_array_equal(nothing, plain.unroll(config, family, copies[1], theta, truncation))
    full = plain.unroll(config, family, copies[2], theta, truncation, Expert(teacher, 1.0, terms))
    by_it = small("images.lr=5e-3")
    own = np.repeat(teacher[None], len(theta), 0)
    np.testing.assert_array_equal(
        full, plain.unroll(by_it, family_of(by_it, digits), copies[3], own, truncation, Expert(teacher, 0.0, terms))
    )
    assert np.abs(full - nothing).max() > 1e-3


# --- late states --------------------------------------------------------------------------------------------------------------


def test_ended_problems_go_on_from_late_states_with_their_sums_of_epsilon(digits):  # noqa: F811
    """Every restart in 24 truncations, against a record of where all problems stood before each truncation."""
    training = PESTraining(
        small("inner.restart=0.3 inner.saved=2 rule.init=hand-momentum outer.lr=0.01 images.batch_size=8"), digits
    )
    (problems,) = training.problems
    steps, unroll = training.config.inner.truncation, training.unrolls[0]
    saved, seen, epsilons = {n: [] for n in range(3)}, [], []

    def watched(config, family, state, theta, truncation, expert):
        epsilons.append((theta[0::2].astype(np.float64) - theta[1::2]) / 2)
        for n, reset in enumerate(truncation.reset_at):
            if reset < steps:
                own = truncation.fresh["w1.weight"][2 * n : 2 * n + 2]
                late = [s for s in saved[n][-2:] if np.array_equal(s["state.w1.weight"], own)]
                expected_age = int(steps - reset) + (int(late[0]["age"]) if late else 0)
                assert problems.age[n] == expected_age
                if late:
                    for key, x in truncation.fresh.items():
                        np.testing.assert_array_equal(x[2 * n : 2 * n + 2], late[0][f"state.{key}"])
                    np.testing.assert_array_equal(truncation.scale_after["w1"][n], late[0]["scale.w1"])
                    np.testing.assert_array_equal(truncation.xi[n], late[0]["xi"])
                    assert problems.length[n] > late[0]["age"]
                else:
                    assert not truncation.xi[n].any() and not truncation.fresh["w1.momentum"][2 * n].any()
                seen.append(bool(late))
                saved[n].append(before[n])
        return unroll(config, family, state, theta, truncation, expert)

    training.unrolls[0] = watched
    for _ in range(24):
        position = {key: x.copy() for key, x in problems.position(training.xi).items()}
        before = [{key: x[n] for key, x in position.items()} for n in range(3)]
        xi, count = training.xi.copy(), len(seen)
        training.step()
        if len(seen) == count:
            np.testing.assert_allclose(training.xi, xi + epsilons[-1], atol=1e-6)
    assert len(seen) > 8 and 0.4 < np.mean(seen) < 0.9  # seven in ten, and the first ends have nothing to go on from
    assert {"images.late.count", "images.late.xi", "images.late.state.w1.weight"} <= training.tensors().keys()


def test_after_a_late_state_its_sum_counts_too():
    before, after = np.array([2.0]), np.array([3.0])
    xi, xi_after = np.array([[1.0, 0.0]]), np.array([[0.5, 4.0]])
    np.testing.assert_allclose(pes.estimate(before, after, xi, xi_after, 1.0, np.ones(1)), (2 * xi[0] + 3 * xi_after[0]) / 2)
    np.testing.assert_array_equal(pes.persisted(xi, xi_after, np.array([1]), 4), xi_after)


LATE = (
    "inner.restart=0.2",
    "inner.grad_clip=1",
    "expert.rule=hand-nesterov",
    "expert.begin=1",
    "expert.end=7",
    "inner.truncation=2",
    "inner.max_length=8",
    "outer.grad_clip=0.1",
    "outer.warm_up=3",
    "outer.schedule=cosine",
    "text.also=[layers=2 sequences=2]",
)


@pytest.mark.slow
def test_late_training_resumes_exactly(tmp_path):
    """Two sizes of text and images, an expert that leaves, late states: 8 iterations, and 8 with a kill after the sixth."""
    (tmp_path / "code.txt").write_bytes(b"def f(x): return x + 1\n" * 20)
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.replace("problems: 2", "problems: 1").replace("iterations: 12", "iterations: 8"))
    overrides = (
        f"tasks.sources=[text:{tmp_path / 'code.txt'},digits]",
        "text.width=16",
        "text.context=16",
        "text.sequences=1",
        *LATE,
    )
    whole = folder_of(path, "whole", *overrides)
    pieces = tmp_path / "pieces"
    config = load_config(path, [f"run.dir={pieces}", *overrides])
    from celo2.metatrain import train

    class Killed(Exception):
        pass

    for last in (6, None):

        def show(iteration, record, last=last):
            if iteration == last:
                raise Killed

        try:
            train.run(config, show)
        except Killed:
            assert last
    assert load_rule(pieces / "rule.safetensors") == load_rule(whole / "rule.safetensors")
    assert numbers(pieces) == numbers(whole)
    assert {"loss/digits", "loss/code", "loss/code layers=2 sequences=2"} <= numbers(whole)[0].keys()


def test_another_length_does_not_continue_a_cosine(tmp_path, capsys):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    folder = folder_of(path, "run", "outer.schedule=cosine", "outer.iterations=4")
    assert main([str(path), f"run.dir={folder}", "outer.schedule=cosine", "outer.iterations=8"]) == 2
    assert "was written with outer.iterations 4, now it is 8" in capsys.readouterr().err


# --- the outer loop -----------------------------------------------------------------------------------------------------------


def test_imitation_takes_its_share_of_the_loss():
    rng = np.random.default_rng(0)
    losses, terms = rng.random((6, 4)), rng.random((6, 4, 2)) * [1.0, 1e-3]
    np.testing.assert_array_equal(pes.with_imitation(losses, terms, (0.0, 0.0)), losses)
    total = pes.with_imitation(losses, terms, (0.6, 0.3))
    expected = 0.1 * (losses[0::2] - losses[1::2])
    for n, weight in enumerate((0.6, 0.3)):
        difference = terms[0::2, :, n] - terms[1::2, :, n]
        expected += weight * 0.01 * difference / np.sqrt(np.square(difference).mean())
    np.testing.assert_allclose(total[0::2] - total[1::2], expected, atol=1e-12)
    terms[2, 1, 0] = np.nan
    assert np.isfinite(pes.with_imitation(losses, terms, (0.6, 0.3))).all()
    assert [pes.fallen(0.8, i, 10, 20) for i in (0, 10, 15, 20, 30)] == [0.8, 0.8, 0.4, 0.0, 0.0]


def test_outer_warm_up_cosine_and_clip(digits):  # noqa: F811
    config = small("outer.warm_up=4 outer.schedule=cosine outer.final=0.1 outer.iterations=24")
    rates = [outer_rate(config, i) for i in range(24)]
    np.testing.assert_allclose(rates[:4], [0.25, 0.5, 0.75, 1.0])
    assert rates[4] == 1.0 and (np.diff(rates[4:]) < 0).all() and 0.1 < rates[-1] < 0.11
    assert [outer_rate(small(), i) for i in (0, 5)] == [1.0, 1.0]
    free = PESTraining(small("rule.init=hand-momentum"), digits)
    clipped = PESTraining(small("rule.init=hand-momentum outer.grad_clip=1e-3"), digits)
    norm = free.step()["gradient_norm"]
    assert clipped.step()["gradient_norm"] == norm > 1e-3
    torch.testing.assert_close(clipped.theta.grad, free.theta.grad * (1e-3 / norm))


@pytest.mark.parametrize("reset_at", [0, 3, 6])
def test_a_difference_counts_under_the_scale_it_ran_with(reset_at, digits):  # noqa: F811
    """One problem with s = 0.1 (bucket 0), then s = 10 (bucket 1): the steps before and after a reset go to theirs."""
    training = PESTraining(small("estimator.scale_buckets=2 rule.init=hand-momentum tasks.problems=1"), digits)
    (problems,) = training.problems
    low, high = ({name: np.full_like(s, value) for name, s in problems.scale.items()} for value in (0.1, 10.0))
    problems.scale = low
    truncated = problems.truncation

    def truncation(iteration, xi):
        found = truncated(iteration, xi)
        problems.scale = high if reset_at < 6 else low
        return replace(found, reset_at=np.array([reset_at]))

    problems.truncation = truncation
    training.unrolls[0] = lambda *_: np.stack([np.arange(6.0), np.zeros(6)]).astype(np.float32)
    training.step()
    before, after = sum(range(reset_at)) / 6, sum(range(reset_at, 6)) / 6
    np.testing.assert_array_equal(training.buckets.count, [reset_at > 0, reset_at < 6])
    np.testing.assert_allclose(training.buckets.mean_square, [before**2, after**2])


# --- settings -----------------------------------------------------------------------------------------------------------------


def test_a_rule_keeps_the_settings_of_its_start(digits, decays, tmp_path):  # noqa: F811
    """`normalize_gradient` and decays; what is asked for otherwise counts."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    for init, expected in (("celo2-lm", True), ("hand-nesterov", False), ("random", False)):
        config = load_config(path, [f"rule.init={init}"])
        assert config.rule.normalize_gradient is expected
        assert PESTraining(config, digits).rule().normalize_gradient is expected
    assert load_config(path, ["rule.init=celo2-lm", "rule.normalize_gradient=false"]).rule.normalize_gradient is False
    found, start = PESTraining(load_config(path, [f"rule.init={decays}"]), digits).rule(), load_rule(decays)
    assert found.settings() == start.settings()
    with pytest.raises(ConfigError, match=r"expert\.rule has momentum_decays"):
        PESTraining(load_config(path, [f"rule.init={decays}", "expert.rule=celo2"]), digits)


def test_other_decays_are_those_of_the_rule_and_of_its_problems(digits, tmp_path):  # noqa: F811
    path = tmp_path / "c.yaml"
    path.write_text(TINY)
    config = load_config(path, ["rule.init=celo2-lm", "rule.init_noise=0", "rule.decays=[0.8,0.9,0.95]"])
    rule = PESTraining(config, digits).rule()
    assert rule.momentum_decays == rule.factored_decays == (0.8, 0.9, 0.95)
    assert rule == replace(load_rule("celo2-lm"), momentum_decays=(0.8, 0.9, 0.95), factored_decays=(0.8, 0.9, 0.95))
    with pytest.raises(ConfigError, match=r"rule.decays is \[0.8, 0.9\], expected three numbers"):
        load_config(path, ["rule.decays=[0.8,0.9]"])
    with pytest.raises(ConfigError, match=r"rule\.decays"):
        load_config(path, ["rule.decays=[0.8,0.9,1.0]"])


def test_step_sizes_that_are_not_trained_do_not_decay(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(TINY)
    with pytest.raises(ConfigError, match=r"outer\.weight_decay is 0\.1, expected 0 where rule\.init has step sizes"):
        load_config(path, ["rule.init=hand-agreement", "outer.weight_decay=0.1"])
    load_config(path, ["rule.init=hand-agreement", "outer.weight_decay=0.1", "rule.step_sizes=true"])


@pytest.mark.parametrize("method", ["pes outer.lr=40", "cma estimator.sigma=40"])
def test_step_sizes_stop_at_the_bounds_of_a_rule_file(method, digits, tmp_path):  # noqa: F811
    """A search that leaves them writes rules that can be read."""
    path = tmp_path / "c.yaml"
    path.write_text(TINY)
    changes = f"rule.init=hand-agreement rule.init_noise=0 rule.step_sizes=true outer.method={method}".split()
    config = load_config(path, changes)
    training = (Generations if config.outer.method == "cma" else PESTraining)(config, digits)
    for _ in range(3):
        training.step()
        rule = training.rule()
        save_rule(rule, tmp_path / "rule.safetensors")
        assert load_rule(tmp_path / "rule.safetensors") == rule
    assert max(map(abs, rule.step_exponents)) == LARGEST_EXPONENT


@pytest.mark.parametrize("factor", [LARGEST_FACTOR, 1 / LARGEST_FACTOR])
def test_a_start_at_the_bounds_keeps_its_step_sizes(factor, digits, tmp_path):  # noqa: F811
    start = replace(load_rule("hand-agreement"), step_exponents=(-4.0, 4.0, 0.1), step_factor=factor)
    save_rule(start, tmp_path / "start.safetensors")
    path = tmp_path / "c.yaml"
    path.write_text(TINY)
    for asked in ("false", "true"):
        config = load_config(path, [f"rule.init={tmp_path}/start.safetensors", "rule.init_noise=0", f"rule.step_sizes={asked}"])
        training = PESTraining(config, digits)
        assert training.rule() == start
        training.step()
        save_rule(training.rule(), tmp_path / "rule.safetensors")
        assert (training.rule().step_factor == factor) or asked == "true"


def test_noise_of_odd_rules_has_deviation_1():
    noise = odd_noise(np.random.default_rng(0).standard_normal((20_000, SIZE)))
    deviation = noise.std(0)
    np.testing.assert_allclose(deviation[deviation > 0], 1, rtol=0, atol=0.04)  # worst measured 0.013
    assert (deviation[-5:] > 0).all()
    np.testing.assert_array_equal(odd_part(noise), noise)


def test_step_sizes_are_trained_where_they_are_asked_for(digits, tmp_path):  # noqa: F811
    """And keep those of the start elsewhere."""
    path = tmp_path / "c.yaml"
    path.write_text(TINY)
    start = load_rule("hand-agreement")
    for asked in (False, True):
        training = PESTraining(load_config(path, ["rule.init=hand-agreement", f"rule.step_sizes={asked}".lower()]), digits)
        for _ in range(2):
            training.step()
        rule = training.rule()
        assert (rule.step_exponents != start.step_exponents and rule.step_factor != 1) == asked
        assert rule.step_exponents == start.step_exponents or asked


@pytest.mark.parametrize("missing", [1, 5])
def test_a_state_with_fewer_numbers_goes_on(missing, digits, tmp_path):  # noqa: F811
    """One from before rules had whitening, and one of the weights alone."""
    path = tmp_path / "c.yaml"
    path.write_text(TINY)
    config = load_config(path, ["rule.init=celo2-lm"])
    whole, older = PESTraining(config, digits), PESTraining(config, digits)
    whole.step()
    whole.save(tmp_path / "state.safetensors")
    with safe_open(tmp_path / "state.safetensors", "numpy") as file:
        arrays, meta = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    cut = {key: np.ascontiguousarray(x[..., :-missing]) if x.shape[-1:] == (SIZE,) else x for key, x in arrays.items()}
    assert sum(cut[key].shape != x.shape for key, x in arrays.items()) >= 4
    save_file(cut, tmp_path / "older.safetensors", meta)
    older.load(tmp_path / "older.safetensors")
    for _ in range(2):
        assert older.step() == whole.step()
    assert older.rule() == whole.rule()


def test_a_state_without_the_newer_options_continues(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    whole = folder_of(path, "whole")
    folder = folder_of(path, "older", "outer.iterations=4")
    with safe_open(folder / "state.safetensors", "numpy") as file:
        meta = json.loads(file.metadata()[FORMAT])
    del (
        meta["config"]["expert"],
        meta["config"]["inner"]["restart"],
        meta["config"]["text"]["width"],
        meta["config"]["outer"]["method"],
    )
    save_file(load_file(folder / "state.safetensors"), folder / "state.safetensors", {FORMAT: json.dumps(meta)})
    folder_of(path, "older")
    assert load_rule(folder / "rule.safetensors") == load_rule(whole / "rule.safetensors")


def test_further_sizes_are_families_of_their_own(data):  # noqa: F811
    config = small()
    config.text.also = ["layers=2 width=64", "context=16 sequences=2 lr=0.005"]
    first, second, third = families_of(config, data["text"])
    assert (second.options.layers, second.options.width, second.options.context) == (2, 64, 32)
    assert third.shapes["position"] == (16, 32) and third.batch == 2 and third.options.lr == 0.005
    assert len({family.name for family in (first, second, third)}) == 3
    training = PESTraining(config, data["text"])
    assert training.tasks == ["code", "code layers=2 width=64", "code context=16 sequences=2 lr=0.005"]
    assert [list(p.number) for p in training.problems] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["text.also=[depth=2]"], "text.also: 'depth=2' in 'depth=2', expected NAME=NUMBER, NAME one of layers, width"),
        (["text.also=[width=wide]"], "text.also: 'width=wide' in 'width=wide', expected width=int"),
        (["text.also=[width=0]"], "text.also: 'width=0' in 'width=0', expected width above 0"),
        (["text.heads=3"], "text.heads is 3, expected a divisor of text.width (32)"),
        (["inner.final=0"], "inner.final needs inner.schedule=cosine: leave it out"),
        (["inner.restart=0.5", "inner.max_length=4"], "inner.restart is 0.5, expected 1 where an episode is one truncation"),
        (["expert.lr=0.1"], "expert.lr needs expert.rule: leave it out"),
        (["expert.rule=nobody"], "no rule 'nobody'"),
        (["expert.rule=celo2", "expert.begin=9", "expert.end=9"], "expert.begin is 9, expected below expert.end (9)"),
        (["expert.rule=celo2", "expert.size=0.5"], "expert.direction is 0.7 and expert.size 0.5, expected a sum of at most 1"),
        (["outer.population=8"], "outer.population is 8, which outer.method=pes does not use: leave it out"),
        (["outer.method=cma", "outer.lr=0.1"], "outer.lr is 0.1, which outer.method=cma does not use: leave it out"),
        (["outer.method=cma", "outer.population=2"], "outer.population is 2, expected at least 4"),
        (["outer.method=cma", "estimator.last=0"], "estimator.last is 0.0, expected above 0 and at most 1"),
    ],
)
def test_a_mistake_is_one_clear_line(overrides, message, tmp_path, capsys):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.replace(", scale_buckets: 2", "").replace("scale_buckets: 2, ", ""))
    assert main([str(path), f"run.dir={tmp_path / 'bad'}", *overrides]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors[-1].startswith("error: ") and message in errors[-1]
    assert not (tmp_path / "bad").exists()


def test_the_compiled_engine_says_which_sizes_it_has(tmp_path, fast):  # noqa: F811
    (tmp_path / "code.txt").write_bytes(b"x" * 200)
    for change in ("text.width=24", "text.context=24", "text.width=32 text.heads=4", "text.width=128"):
        config = small(f"engine.name=fast {change}")
        config.tasks.sources = ["text:code.txt"]
        with pytest.raises(ConfigError, match=r"engine\.name=fast needs a text\.width of 16 to 112"):
            choose_unroll(config)
    assert len(text_sizes(small())) == 1


def test_metrics_are_rewritten_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1}\n{"iteration": 2}\n')
    monkeypatch.setattr("celo2.training.atomic.os.fsync", lambda _: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        rewind(path, lambda record: record["iteration"] < 2)
    assert path.read_text() == '{"iteration": 1}\n{"iteration": 2}\n'
