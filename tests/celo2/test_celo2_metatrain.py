"""The unroll, its fast path, and the estimator: each against a plain version of itself."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from celo2 import Rule
from celo2.baselines import hand_momentum
from celo2.metatrain import engine as plain
from celo2.metatrain import pes
from celo2.metatrain.config import Config
from celo2.metatrain.families import family_of
from celo2.metatrain.problems import Problems, draw_episode, warm_up_and_cosine
from celo2.metatrain.tasks import load_data
from celo2.metatrain.theta import SIZE, odd_part, parts, rule_of, theta_of
from celo2.metatrain.train import PESTraining
from celo2.rule import accumulator_shapes, factored_axes, update
from celo2.rule_files import load_rule
from celo2.training.configuration import Nest, build

SMALL = """
    tasks.sources=[digits] tasks.problems=3 images.batch_size=16 images.min_scale=0.1 images.max_scale=10.0
    inner.truncation=6 inner.min_length=6 inner.max_length=30 engine.name=plain
"""


def small(changes: str = "") -> Config:
    """The small configuration with `section.key=value` changes."""
    nest = Nest(Config)
    for word in (SMALL + changes).split():
        nest.add(*nest.parse(word))
    return build(Config, nest.tree)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Images and text, by family."""
    path = tmp_path_factory.mktemp("text") / "code.txt"
    path.write_bytes(Path(__file__).read_bytes())
    return dict(zip(("images", "text"), load_data([f"text:{path}", "digits"]), strict=True))


@pytest.fixture(scope="module")
def digits(data):
    return data["images"]


@pytest.fixture(scope="module")
def fast():
    return pytest.importorskip("celo2.metatrain.numba_engine.unroll")


def prepared(config: Config, family, spread: float = 0.1):
    """The first truncation with a reset, a state, and a θ near hand-momentum for every unroll."""
    problems = Problems(config, family)
    truncation = next(t for t in map(problems.truncation, range(20)) if (t.reset_at < config.inner.truncation).any())
    noise = np.random.default_rng(0).standard_normal((2 * len(problems.task), SIZE))
    theta = (theta_of(hand_momentum(config.rule.variant)) + spread * noise).astype(np.float32)
    return truncation, problems.state, theta


def image_loss(data, weights, rows):
    """Of one network 64-32-10."""
    x, y = (torch.from_numpy(array[rows]) for array in data.arrays)
    return F.cross_entropy(torch.relu(x @ weights["w1"] + weights["b1"]) @ weights["w2"] + weights["b2"], y)


def text_loss(data, weights, rows, heads=1):
    """Of one transformer, sequence by sequence, out of torch's own pieces."""
    losses, (context, width) = [], weights["position"].shape
    for row in rows:
        tokens = torch.from_numpy(data.arrays[0][row : row + context + 1].astype(np.int64))
        x = F.embedding(tokens[:-1], weights["embedding"]) + weights["position"]
        for i in range(sum(name.startswith("q") for name in weights)):
            h = F.rms_norm(x, (width,), eps=1e-6)
            q, k, v = (F.linear(h, weights[f"{name}{i}"]).view(1, context, heads, -1).transpose(1, 2) for name in "qkv")
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1).reshape(context, width)
            x = x + F.linear(mixed, weights[f"o{i}"])
            h = F.relu(F.linear(F.rms_norm(x, (width,), eps=1e-6), weights[f"up{i}"])) ** 2
            x = x + F.linear(h, weights[f"down{i}"])
        losses.append(F.cross_entropy(F.linear(F.rms_norm(x, (width,), eps=1e-6), weights["head"]), tokens[1:]))
    return torch.stack(losses).mean()


def loop_of_one_unroll(config, family, state, theta, truncation, u, expert=None):
    """One unroll by `celo2.rule.update` and autograd, with nothing batched: its losses and last weights."""
    n, rule, options = u // 2, rule_of(theta[u], config, ""), family.options
    teacher = None
    if expert is not None:
        teacher = replace(rule_of(expert.theta, config, ""), step_bound=load_rule(config.expert.rule).step_bound)
    orthogonalize, losses, terms = config.rule.variant == "celo2", [], []

    def started(source):
        keys = {name: [key for key in source if key.startswith(f"{name}.")] for name in family.shapes}
        return {name: {key.partition(".")[2]: torch.from_numpy(source[key][u].copy()) for key in keys[name]} for name in keys}

    arrays, scale = started(state), truncation.scale_before
    for t in range(config.inner.truncation):
        if t == truncation.reset_at[n]:
            arrays, scale = started(truncation.fresh), truncation.scale_after
        leaves = {name: s["weight"].clone().requires_grad_() for name, s in arrays.items()}
        real = {name: torch.from_numpy(scale[name][n].copy()) * w for name, w in leaves.items()}
        if family.data.kind == "images":
            loss = image_loss(family.data, real, truncation.rows[n, t])
        else:
            loss = text_loss(family.data, real, truncation.rows[n, t], options.heads)
        loss.backward()
        losses.append(loss.item())
        if config.inner.grad_clip is not None:
            norm = torch.cat([leaf.grad.flatten() for leaf in leaves.values()]).norm()
            for leaf in leaves.values():
                leaf.grad *= min(1.0, config.inner.grad_clip / float(norm))
        own, others = [], []
        for name, s in arrays.items():
            g, w, rate = leaves[name].grad, s["weight"], float(truncation.rate[n, t])
            if name in family.by_adam:
                s["m"].lerp_(g, 0.1)
                s["v"].lerp_(g * g, 0.05)
                w -= rate * options.adam_lr * s["m"] / (s["v"] + 1e-8).sqrt()
                continue
            accumulators = {key: x for key, x in s.items() if key != "weight"}
            if teacher is not None:
                copies = {key: x.clone() for key, x in accumulators.items()}
                others.append(rate * config.expert.lr * update(teacher, copies, g, w, orthogonalize=orthogonalize))
            own.append(rate * options.lr * update(rule, accumulators, g, w, orthogonalize=orthogonalize))
            w -= own[-1] if teacher is None else (1 - expert.forcing) * own[-1] + expert.forcing * others[-1]
        if teacher is not None:
            x, y = (torch.cat([step.flatten() for step in steps]) for steps in (own, others))
            terms.append((1 - float(F.cosine_similarity(x, y, dim=0)), float((x.abs() - y.abs()).abs().mean())))
    return losses, {name: s["weight"] for name, s in arrays.items()}, np.array(terms)


@pytest.mark.parametrize(
    "changes",
    [
        "rule.variant=celo2 inner.schedule=constant",
        "rule.variant=celo2-base inner.schedule=constant",
        "rule.variant=celo2 rule.normalize_gradient=true inner.schedule=cosine",
        "rule.variant=celo2-base rule.normalize_gradient=true inner.schedule=cosine",
        "rule.init=hand-whitened inner.schedule=cosine",
    ],
)
@pytest.mark.parametrize("name", ["images", "text"])
def test_unroll_equals_a_loop_with_a_reset(name, changes, data):
    """Scales from 0.1 to 10, since larger ones make six steps chaotic."""
    config = small(f"tasks.problems=2 {changes}")
    family = family_of(config, data[name])
    truncation, state, theta = prepared(config, family)
    start = {key: x.copy() for key, x in state.items()}
    losses = plain.unroll(config, family, state, theta, truncation)
    for u in range(len(theta)):
        expected, weights, _ = loop_of_one_unroll(config, family, start, theta, truncation, u)
        np.testing.assert_allclose(losses[u], expected, rtol=0, atol=1e-5)  # worst of 4 seeds 9.5e-7
        for key, w in weights.items():
            # Worst of 4 seeds 1.7e-6.
            np.testing.assert_allclose(state[f"{key}.weight"][u], w, rtol=0, atol=1e-5, err_msg=key)


@pytest.mark.parametrize("name", ["images", "text"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_replayed_steps_equal_the_unroll(device, name, data, monkeypatch):
    """Two truncations after each other; without a GPU, a plain call of the step stands for the replay of its graph."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if device == "cpu":
        monkeypatch.setattr(plain, "captured", lambda step, warm_up: SimpleNamespace(replay=step))
    config = small(f"engine.device={device}")
    family = family_of(config, data[name])
    truncation, state, theta = prepared(config, family)
    other, replayed = {key: x.copy() for key, x in state.items()}, plain.GraphUnroll()
    for factor in (1.0, 1.1):
        expected = plain.unroll(config, family, state, np.float32(factor) * theta, truncation)
        losses = replayed(config, family, other, np.float32(factor) * theta, truncation)
        np.testing.assert_allclose(losses, expected, rtol=0, atol=0 if device == "cpu" else 1e-5)
        for key, x in state.items():
            np.testing.assert_allclose(other[key], x, rtol=0, atol=0 if device == "cpu" else 1e-5)


@pytest.mark.parametrize("variant", ["celo2", "celo2-base"])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("images", ""),
        ("images", "inner.reparametrization=parameter"),
        ("images", "rule.normalize_gradient=true inner.schedule=cosine"),
        ("text", "text.layers=2"),
        ("text", "inner.reparametrization=parameter"),
        ("text", "rule.normalize_gradient=true inner.schedule=cosine"),
    ],
)
def test_fast_equals_plain(name, changes, variant, data, fast):
    config = small(f"rule.variant={variant} {changes}")
    family = family_of(config, data[name])
    truncation, state, theta = prepared(config, family)
    other = {key: x.copy() for key, x in state.items()}
    expected = plain.unroll(config, family, state, theta, truncation)
    losses = fast.unroll(config, family, other, theta, truncation)
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-5)  # worst of 10 seeds 9.5e-7
    # Beyond rtol, worst of 10 seeds 7.1e-8 of an array's largest number; text 2.6e-6, with normalized gradients 4.3e-5: those of
    # q and k start a thousand times smaller than the others.
    share = 1e-5 if name == "images" else 2e-4
    for key, x in state.items():
        np.testing.assert_allclose(other[key], x, rtol=1e-4, atol=share * max(1e-3, np.abs(x).max()), err_msg=key)


def test_fast_stays_close_over_a_published_truncation(digits, fast):
    """Fifty steps of batch 64 over the whole range of scales: the median over unrolls, since some are chaotic."""
    config = small(
        "inner.truncation=50 inner.min_length=100 inner.max_length=200 images.batch_size=64"
        " images.min_scale=1e-3 images.max_scale=1e3"
    )
    family = family_of(config, digits)
    truncation, state, theta = prepared(config, family)
    other = {key: x.copy() for key, x in state.items()}
    expected = plain.unroll(config, family, state, theta, truncation)
    losses = fast.unroll(config, family, other, theta, truncation)
    assert np.median(np.abs(losses - expected)[:, -1]) < 1e-4  # measured 5e-7


@pytest.mark.parametrize("name", ["images", "text"])
def test_threads_do_not_change_a_bit(name, data, fast):
    results = []
    for threads in (1, 3):
        config = small(f"engine.threads={threads}")
        family = family_of(config, data[name])
        truncation, state, theta = prepared(config, family)
        results.append((fast.unroll(config, family, state, theta, truncation), state))
    (first, first_state), (second, second_state) = results
    np.testing.assert_array_equal(first, second)
    for key, x in first_state.items():
        np.testing.assert_array_equal(x, second_state[key])


@pytest.mark.parametrize("reparametrization", ["none", "global", "tensor", "parameter"])
def test_reparametrization_keeps_the_function(reparametrization, digits):
    """s · (w / s) is the same network for every s; how many different s there are is the level."""
    config = small(f"inner.reparametrization={reparametrization}")
    family = family_of(config, digits)
    episodes = [draw_episode(config, family, 0, e) for e in range(30)]
    for e in episodes:
        real = e.scale["w1"].astype(np.float64) * e.weights["w1"]
        assert 0.5 / 8 < real.std() < 1.0 / 8  # truncated normal of deviation 0.88 / sqrt(64)
        assert config.images.min_scale <= e.scale["w1"].min() and e.scale["w1"].max() <= config.images.max_scale
        assert config.inner.min_length <= e.length <= config.inner.max_length
    distinct = {np.unique(np.concatenate([s.ravel() for s in e.scale.values()])).size for e in episodes}
    count = sum(int(np.prod(shape)) for shape in family.shapes.values())
    expected = {"none": 1, "global": 1, "tensor": len(family.shapes), "parameter": count}[reparametrization]
    assert max(distinct) <= expected and min(distinct) >= 0.95 * expected


def test_starts_are_staggered_and_lengths_are_kept(digits):
    """The steps at which one problem starts anew, counted by hand over many truncations."""
    config = small("tasks.problems=8")
    family = family_of(config, digits)
    problems = Problems(config, family)
    left = problems.length - problems.age
    assert len(set(left)) > 3
    ends = [[int(steps)] for steps in left]
    for i in range(40):
        truncation = problems.truncation(i)
        for n, t in enumerate(truncation.reset_at):
            if t < config.inner.truncation:
                assert i * config.inner.truncation + t == ends[n][-1]
                ends[n].append(ends[n][-1] + draw_episode(config, family, n, len(ends[n])).length)
    assert all(len(e) > 5 for e in ends)


def test_cosine_follows_the_episode(digits):
    """A twentieth of warm-up, then down to a tenth at the end; anew from a reset on; on the scale of the published constant."""
    ages = [warm_up_and_cosine(age, 100) for age in range(100)]
    np.testing.assert_allclose(ages[:5], [0.2, 0.4, 0.6, 0.8, 1.0])
    assert (np.diff(ages[5:]) < 0).all() and ages[-1] == pytest.approx(0.1, abs=1e-3)
    config = small("inner.schedule=cosine")
    problems = Problems(config, family_of(config, digits))
    for i in range(20):
        age, length = problems.age.copy(), problems.length.copy()
        truncation = problems.truncation(i)
        for n, reset in enumerate(truncation.reset_at):
            expected = [warm_up_and_cosine(age[n] + t, length[n]) for t in range(reset)]
            np.testing.assert_allclose(truncation.rate[n, :reset], expected, rtol=1e-6)
            expected = [warm_up_and_cosine(t, problems.length[n]) for t in range(config.inner.truncation - reset)]
            np.testing.assert_allclose(truncation.rate[n, reset:], expected, rtol=1e-6)
    assert (Problems(small(), family_of(small(), digits)).truncation(0).rate == 1).all()


def test_problems_do_not_depend_on_their_number(digits):
    family = family_of(small(), digits)
    few, many = (Problems(small(f"tasks.problems={n}"), family).truncation(3) for n in (2, 5))
    np.testing.assert_array_equal(few.rows, many.rows[:2])
    np.testing.assert_array_equal(few.scale_before["w1"], many.scale_before["w1"][:2])


# A toy inner problem of two weights: x <- x - tanh(θ) ∘ x ∘ c, loss |x|² / 2 before each step, over whole episodes.
CURVATURE = np.array([0.3, 0.25])


def toy_losses(theta: np.ndarray, x: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Losses (U, steps) and the last x (U, 2) of unrolls with θ (U, 2)."""
    losses = []
    for _ in range(steps):
        losses.append((x**2).sum(1) / 2)
        x = x - np.tanh(theta) * x * CURVATURE
    return np.stack(losses, 1), x


def test_pes_is_unbiased_where_truncated_es_is_not():
    """Four truncations of three steps, 40,000 problems: PES gives the finite-difference gradient of the whole episode's loss."""
    theta, sigma, steps, count = np.array([0.4, 0.3]), 0.05, 3, 40_000
    rng = np.random.default_rng(0)
    x, xi, pes_sum, es_sum = np.ones((2 * count, 2)), np.zeros((count, 2)), 0.0, 0.0
    never = np.full(count, steps)
    for _ in range(4):
        epsilon = sigma * rng.standard_normal((count, 2))
        losses, x = toy_losses(pes.antithetic(theta, epsilon), x, steps)
        before, after = pes.differences(losses, never)
        xi = xi + epsilon
        pes_sum = pes_sum + pes.estimate(before, after, xi, epsilon, sigma, np.ones(count)) / 4
        es_sum = es_sum + pes.estimate(before, after, epsilon, epsilon, sigma, np.ones(count)) / 4
        xi = pes.persisted(xi, epsilon, never, steps)
    expected = []
    for i in range(2):
        h = np.eye(2)[i] * 1e-5
        high, low = (toy_losses((theta + d)[None], np.ones((1, 2)), 12)[0].mean() for d in (h, -h))
        expected.append((high - low) / 2e-5)
    np.testing.assert_allclose(pes_sum, expected, rtol=0.05)  # worst of eight seeds 0.019
    assert (es_sum / expected).max() < 0.5  # forgets earlier perturbations: measured 0.23 to 0.29


def test_pes_of_one_truncation_is_antithetic_es():
    rng = np.random.default_rng(0)
    epsilon, losses = 0.1 * rng.standard_normal((7, 5)), rng.standard_normal((14, 4))
    before, after = pes.differences(losses, np.full(7, 4))
    expected = ((losses[0::2].mean(1) - losses[1::2].mean(1))[:, None] * epsilon).mean(0) / (2 * 0.1**2)
    np.testing.assert_allclose(pes.estimate(before, after, epsilon, epsilon, 0.1, np.ones(7)), expected)


def test_after_a_reset_only_the_new_perturbation_counts():
    """A problem that restarts before its third of four steps, written out."""
    xi_old, epsilon = np.array([[5.0, -3.0]]), np.array([[1.0, 2.0]])
    losses, reset_at = np.array([[1.0, 2.0, 4.0, 8.0], [0.5, 0.5, 1.0, 1.0]]), np.array([2])
    before, after = pes.differences(losses, reset_at)
    assert (before[0], after[0]) == (2.0 / 4, 10.0 / 4)
    xi = xi_old + epsilon
    gradient = pes.estimate(before, after, xi, epsilon, 1.0, np.ones(1))
    np.testing.assert_allclose(gradient, (0.5 * xi[0] + 2.5 * epsilon[0]) / 2)
    np.testing.assert_array_equal(pes.persisted(xi, epsilon, reset_at, 4), epsilon)
    np.testing.assert_array_equal(pes.persisted(xi, epsilon, np.array([4]), 4), xi)


def test_buckets_weigh_large_and_small_differences_alike():
    scale, bucket = pes.BucketScale(2), np.array([0, 0, 1, 1])
    rng = np.random.default_rng(0)
    for _ in range(300):
        difference = rng.standard_normal(4) * np.array([1e-3, 1e-3, 1e3, 1e3])
        weighted = difference * scale.weights(bucket, difference)
    assert scale.mean_square == pytest.approx([1e-6, 1e6], rel=0.5)
    assert np.abs(weighted).max() < 5


def test_meta_training_lowers_the_loss(digits):
    """A rule that walks uphill is turned round; the fixed seed makes the test exact."""
    short = "engine.name=auto tasks.problems=8 images.batch_size=8 inner.truncation=5 inner.min_length=5 inner.max_length=10"
    steep = "images.min_scale=10.0 images.max_scale=10.0 rule.init=hand-momentum estimator.sigma=0.1 outer.lr=0.2 run.seed=1"
    training = PESTraining(small(f"{short} {steep}"), digits)
    with torch.no_grad():
        training.theta.mul_(0.0).add_(torch.from_numpy(uphill_theta()))
    losses = [training.step()["loss"] for _ in range(60)]
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.1


@pytest.mark.parametrize("loss_clip", [None, 1.5])
def test_losses_that_are_not_finite_do_not_spoil_theta(loss_clip, digits):
    """Clipped they count as the bound; raw, the pair says nothing. The metrics show a uniform guess for each."""
    training = PESTraining(small(f"estimator.loss_clip={loss_clip or 'null'} rule.init=hand-momentum"), digits)
    losses = np.ones((2 * len(training.task), training.config.inner.truncation), np.float32)
    losses[1, 3:], losses[4, :] = np.nan, np.inf
    training.unrolls[0] = lambda *_: losses
    record = training.step()
    assert np.isfinite(training.theta.detach().numpy()).all()
    assert record["not_finite"] == pytest.approx((3 + 6) / 36)
    assert record["loss"] == record["loss/digits"] == pytest.approx((27 + 9 * np.log(10)) / 36)
    assert (record["gradient_norm"] == 0) == (loss_clip is None)


def test_both_families_make_one_gradient(data):
    """Images are what they are alone; the estimate is of all problems, each loss bounded by its own uniform guess."""
    config = small("rule.init=hand-momentum estimator.loss_clip=1.5 estimator.scale_buckets=2")
    alone, both = PESTraining(config, data["images"]), PESTraining(config, data["images"], data["text"])
    theta = pes.antithetic(both.theta.detach().numpy(), np.zeros((6, SIZE), np.float32))
    np.testing.assert_array_equal(both.advance(theta)[0][:6], alone.advance(theta[:6])[0])
    np.testing.assert_allclose(both.uniform_loss, np.log([10] * 3 + [128] * 3))
    assert set(np.concatenate([both.bucket(problems) for problems in both.problems])) <= {0, 1, 2, 3}
    both.unrolls = [lambda *_: np.full((6, config.inner.truncation), 1e9, np.float32)] * 2
    record = both.step()
    assert record["loss/digits"] == pytest.approx(np.log(10)) and record["loss/code"] == pytest.approx(np.log(128))
    assert record["loss"] == pytest.approx(np.log(1280) / 2)


def test_the_rule_says_that_it_normalizes_gradients(digits):
    assert PESTraining(small("rule.normalize_gradient=true"), digits).rule().normalize_gradient
    assert not PESTraining(small(), digits).rule().normalize_gradient


def uphill_theta() -> np.ndarray:
    """hand-momentum with its output turned round."""
    rule = hand_momentum()
    return theta_of(Rule({**rule.weights, "w2": -rule.weights["w2"]}))


def test_odd_rules_turn_with_their_input():
    """The update of -g and -W is minus that of g and W; for θ drawn at random it is not."""
    rng = np.random.default_rng(0)
    theta = rng.standard_normal(SIZE)
    parts(theta)["step"][...] = 0  # of random exponents the first updates are tiny
    g, w = (torch.from_numpy(rng.standard_normal((3, 12, 20)).astype(np.float32)) for _ in range(2))

    def updates(theta, sign):
        rule = rule_of(theta, Config(), "")
        state = {name: torch.zeros(shape) for name, shape in accumulator_shapes((12, 20), factored_axes((12, 20))).items()}
        return torch.stack([update(rule, state, sign * g[i], sign * w[i], orthogonalize=False) for i in range(3)])

    odd = odd_part(theta)
    torch.testing.assert_close(updates(odd, -1), -updates(odd, 1), rtol=0, atol=1e-5)  # worst of 20 draws 1.4e-6
    assert (updates(theta, -1) + updates(theta, 1)).square().mean() > 0.1
    np.testing.assert_array_equal(odd_part(odd), odd)
    np.testing.assert_array_equal(odd_part(theta_of(hand_momentum())), theta_of(hand_momentum()))


def test_an_odd_rule_stays_odd(digits):
    training = PESTraining(small("rule.odd=true rule.init=hand-momentum rule.init_noise=0.1 outer.lr=0.01"), digits)
    start = training.theta.detach().numpy().copy()
    for _ in range(3):
        training.step()
    theta = training.theta.detach().numpy()
    np.testing.assert_allclose(odd_part(theta), theta, rtol=0, atol=1e-7)  # float32 rounding
    moved = np.abs(theta - start) > 1e-3
    assert moved.mean() > 0.9  # the weights of unused outputs only decay


def test_frozen_weights_keep_their_value(digits):
    training = PESTraining(small("rule.frozen=[weight,w1] rule.init=celo2 rule.init_noise=0.1 outer.lr=0.01"), digits)
    for _ in range(2):
        training.step()
    first, last = load_rule("celo2").weights, training.rule().weights
    assert {name for name, w in last.items() if torch.equal(w, first[name])} == {"w0__2", "w1"}
