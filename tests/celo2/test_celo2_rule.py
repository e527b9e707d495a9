"""The fast path against the reference, Newton–Schulz, and what the rule reduces to with weights set by hand."""

import math
from dataclasses import replace

import pytest
import torch
from optimizer_kinds import directions_

from celo2 import Celo2, Rule, load_rule
from celo2 import blocked as blocked_module
from celo2.baselines import hand_agreement, hand_momentum
from celo2.orthogonalize import newton_schulz
from celo2.rule import accumulator_shapes, factored_axes, normalized_gradient, step_size_of, update, weight_shapes
from celo2.stack import stack_of_whole


def random_rule(seed: int = 0, hidden: int = 8) -> Rule:
    generator = torch.Generator().manual_seed(seed)
    return Rule({name: torch.randn(shape, generator=generator) for name, shape in weight_shapes(hidden).items()})


def zero_state(shape, lead=()):
    return {name: torch.zeros(*lead, *s) for name, s in accumulator_shapes(shape, factored_axes(shape)).items()}


@pytest.mark.parametrize("block_elements", [1, 50, 1 << 16])
@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6), (1, 9), (9, 1), (64, 33), (130, 70)])
def test_blocked_equals_reference(shape, block_elements, monkeypatch):
    """Three matrices in two stacks, cut into blocks of one row up to whole stacks, gradients from 1e-6 to 1e3."""
    monkeypatch.setitem(blocked_module.BLOCK_ELEMENTS, "cpu", block_elements)
    rule = random_rule(hidden=5)
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(3, *shape, generator=generator)
    states = [zero_state(shape) for _ in w]
    names = ("momentum", "second_moment", "row", "col")
    fast = [{name: torch.zeros(n, *value.shape) for name, value in states[0].items()} for n in (1, 2)]
    for step in range(4):
        g = torch.randn(3, *shape, generator=generator) * torch.tensor([1e-6, 1.0, 1e3]).view(3, 1, 1)
        g *= torch.randn(3, *shape, generator=generator).mul(2).exp() * (step > 0)  # the first gradient is zero
        stacks = [
            stack_of_whole(g[a:b], w[a:b], *(state[name] for name in names))
            for (a, b), state in zip([(0, 1), (1, 3)], fast, strict=True)
        ]
        out = torch.empty_like(g)
        directions_(rule, stacks, out)
        out = out / out.square().mean((1, 2), keepdim=True).add(1e-9).sqrt()
        expected = torch.stack([update(rule, s, *gw, orthogonalize=False) for s, *gw in zip(states, g, w, strict=True)])
        # Worst measured 8.6e-6.
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-4)
    for name in names:
        joined = torch.cat([state[name] for state in fast])
        torch.testing.assert_close(joined, torch.stack([s[name] for s in states]), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_normalized_gradient_has_rms_one_in_float32(dtype):
    g = torch.randn(3, 5, 40, 60, generator=torch.Generator().manual_seed(0))
    g *= torch.logspace(-4, 4, 5).view(5, 1, 1)
    g[0, 1] = 0
    normalized = normalized_gradient(g.to(dtype), (-2, -1))
    assert normalized.dtype == torch.float32
    expected = torch.ones(3, 5)
    expected[0, 1] = 0
    # Worst measured 1.2e-7. The smallest mean square is 1e-8, beside the floor of 1e-30.
    torch.testing.assert_close(normalized.square().mean((-2, -1)).sqrt(), expected, rtol=0, atol=2e-6)
    assert not normalized[0, 1].any()


@pytest.mark.parametrize("shape", [(12, 20), (2, 3, 9, 4), (15,)])
def test_a_rule_that_normalizes_is_the_rule_on_normalized_gradients(shape):
    rule, last_two = random_rule(), (-2, -1)[-len(shape) :]
    axes = factored_axes(shape) if len(shape) > 1 else None
    first, second = ({n: torch.zeros(s) for n, s in accumulator_shapes(shape, axes).items()} for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    for step in range(3):
        g, w = (torch.randn(shape, generator=generator) for _ in range(2))
        g *= 10.0 ** (4 * step - 4)
        u = update(replace(rule, normalize_gradient=True), first, g, w, orthogonalize=True)
        assert torch.equal(u, update(rule, second, normalized_gradient(g, last_two), w, orthogonalize=True))
    assert all(torch.equal(first[name], second[name]) for name in first)


EXPONENTS = (0.5, -0.25, 1.0)


def mean_squares(gradients, decays):
    """Of the last gradient (1,), and of the momenta (3, 1) of decays `decays`, by hand."""
    momenta = [torch.zeros_like(gradients[0]) for _ in decays]
    for g in gradients:
        momenta = [beta * m + (1 - beta) * g for m, beta in zip(momenta, decays, strict=True)]
    return gradients[-1].square().mean()[None], torch.stack([m.square().mean()[None] for m in momenta])


def test_the_step_size_is_1_for_noise_and_bounded_by_gradients_that_stay_or_turn_round():
    rule = replace(random_rule(), momentum_decays=(0.5, 0.9, 0.95), step_exponents=EXPONENTS, step_factor=3.0)
    noise = [((1 - beta) / (1 + beta)) ** 0.5 for beta in rule.momentum_decays]
    product = lambda ratios: 3.0 * torch.tensor([r**p for r, p in zip(ratios, EXPONENTS, strict=True)]).prod()[None]  # noqa: E731
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(40, 50, generator=generator)
    cases = {
        "constant": ([g] * 400, product([1 / n for n in noise]), 1e-4),
        "alternating": ([g * (-1) ** t for t in range(400)], product(noise), 1e-4),
        # 2,000 numbers and a memory of 20 steps: worst measured 0.6 %
        "noise": (
            [torch.randn(40, 50, generator=torch.Generator().manual_seed(t)) for t in range(400)],
            product([1, 1, 1]),
            0.03,
        ),
    }
    for name, (gradients, expected, tolerance) in cases.items():
        found = step_size_of(rule, *mean_squares(gradients, rule.momentum_decays))
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=0, msg=lambda m, n=name: f"{n}: {m}")
    zero, some = torch.zeros(1), torch.ones(1)
    for g_square, m_square in ((zero, zero), (zero, some), (some, zero), (torch.full((1,), 1e38), zero)):
        assert step_size_of(rule, g_square, m_square.expand(3, 1)).isfinite().all()
    assert step_size_of(replace(rule, step_exponents=(0.0, 0.0, 0.0)), some, torch.full((3, 1), 0.1)) == 3


def test_no_step_size_is_above_the_bound():
    """Under it a rule with a bound is the one without, bit for bit; at it an update has the bound as its RMS."""
    free = replace(random_rule(), step_exponents=(1.0, 0.0, 0.0), step_factor=0.8)
    bounded = replace(free, step_bound=1.0)
    first, second = ({n: torch.zeros(s) for n, s in accumulator_shapes((12, 20), (0, 1)).items()} for _ in range(2))
    generator, sizes = torch.Generator().manual_seed(1), []
    steady = torch.randn(12, 20, generator=generator)
    for share in (0, 0, 0, 0.3, 0.3, 1, 1, 1, 1, 1):  # of each gradient, what is the same in all
        g = share * steady + (1 - share) * torch.randn(12, 20, generator=generator)
        u, expected = update(bounded, first, g, g, orthogonalize=True), update(free, second, g, g, orthogonalize=True)
        sizes.append(expected.square().mean().sqrt().item())
        if sizes[-1] < 1:
            assert torch.equal(u, expected)
        else:
            torch.testing.assert_close(u, expected / sizes[-1], rtol=1e-6, atol=0)
            assert u.square().mean().sqrt().item() == pytest.approx(1, abs=1e-6)
    assert min(sizes) < 0.9 and max(sizes) > 1.2
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_bound_below_1_alone_makes_every_step_as_long_as_it():
    rule, g = replace(random_rule(), step_bound=0.25), torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    state = {n: torch.zeros(s) for n, s in accumulator_shapes((12, 20), (0, 1)).items()}
    assert rule.has_step_sizes and not replace(rule, step_bound=1.0).has_step_sizes
    assert update(rule, state, g, g, orthogonalize=True).square().mean().sqrt().item() == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize("shape", [(12, 20), (2, 3, 9, 4), (15,)])
def test_a_rule_with_step_sizes_is_the_rule_times_the_step_size(shape):
    rule, last_two = random_rule(), (-2, -1)[-len(shape) :]
    axes = factored_axes(shape) if len(shape) > 1 else None
    first, second = ({n: torch.zeros(s) for n, s in accumulator_shapes(shape, axes).items()} for _ in range(2))
    generator, gradients = torch.Generator().manual_seed(1), []
    for _ in range(4):
        g, w = (torch.randn(shape, generator=generator) for _ in range(2))
        gradients.append(g)
        u = update(rule, second, g, w, orthogonalize=True)
        sized = update(replace(rule, step_exponents=EXPONENTS, step_factor=0.5), first, g, w, orthogonalize=True)
        ratio = (sized.square().mean(last_two) / u.square().mean(last_two)).sqrt()
        matrices = [x.reshape(-1, math.prod(shape[-len(last_two) :])) for x in gradients]
        for n, found in enumerate(ratio.flatten()):
            squares = mean_squares([x[n] for x in matrices], rule.momentum_decays)
            expected = step_size_of(replace(rule, step_exponents=EXPONENTS, step_factor=0.5), *squares)
            torch.testing.assert_close(found[None], expected, rtol=2e-6, atol=0)  # worst measured 2.3e-7
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_without_a_gradient_a_step_is_as_long_as_of_noise():
    """A gradient of zeros after noise, as of a layer behind a zero: the momentum still moves the weight, by the step factor."""
    rule = replace(hand_agreement(), step_factor=0.5)
    state = {name: torch.zeros(shape) for name, shape in accumulator_shapes((12, 20), (0, 1)).items()}
    generator = torch.Generator().manual_seed(0)
    for g in [torch.randn(12, 20, generator=generator) for _ in range(50)] + [torch.zeros(12, 20)] * 3:
        u = update(rule, state, g, g, orthogonalize=True)
    assert u.square().mean().sqrt().item() == pytest.approx(0.5, rel=1e-5)


SHAPES = [(12, 20), (20, 12), (8, 8), (1, 9), (3, 9, 7), (2, 3, 4, 9), (9, 3, 2), (300, 260), (15,)]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("bound", [math.inf, 0.097])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_optimizer_takes_steps_of_the_reference_size(shape, bound, normalize):
    """Matrices, stacks, one factored over the batch, one of several blocks, a vector; weights move by lr u of the reference."""
    rule = replace(random_rule(), variant="celo2-base", normalize_gradient=normalize)
    rule = replace(rule, step_exponents=EXPONENTS, step_factor=2.0, step_bound=bound)
    axes = factored_axes(shape) if len(shape) > 1 else None
    state = {name: torch.zeros(s) for name, s in accumulator_shapes(shape, axes).items()}
    generator, sizes = torch.Generator().manual_seed(0), []
    p = torch.nn.Parameter(torch.randn(shape, generator=generator))
    optimizer = Celo2([{"params": [p], "update": "celo2"}], lr=1.0, rule=rule, orthogonalize=False)
    for step in range(5):
        p.grad = torch.randn(shape, generator=generator) * 10.0 ** (step - 2)
        before = p.detach().clone()
        u = update(rule, state, p.grad, before, orthogonalize=False, axes=axes)
        optimizer.step()
        sizes.append(u.square().mean().sqrt().item())
        torch.testing.assert_close(before - p.detach(), u, rtol=0, atol=2e-4 * sizes[-1])  # worst measured 2.0e-5
    assert all(abs(size - 2) > 0.5 for size in sizes)  # not the factor alone
    assert max(sizes) <= bound * (1 + 1e-6)
    if bound < math.inf and normalize:
        assert max(sizes) > bound * (1 - 1e-6) > min(sizes) + 5e-4


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 8), (2, 3, 4, 9), (3, 9, 4)])
def test_newton_schulz_keeps_singular_vectors(shape):
    u = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = newton_schulz(u)
    left, values, right = torch.linalg.svd(u, full_matrices=False)
    in_basis = left.mT @ x @ right.mT  # (..., min, min)
    diagonal = in_basis.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(in_basis, torch.diag_embed(diagonal), rtol=0, atol=1e-4)  # worst measured 1.1e-6
    assert ((diagonal > 0.5) & (diagonal < 1.3))[values > 0.05 * values.amax(-1, keepdim=True)].all()


def test_batch_of_matrices_equals_its_matrices():
    u = torch.randn(5, 12, 7, generator=torch.Generator().manual_seed(0))
    each = torch.stack([newton_schulz(m) for m in u])
    torch.testing.assert_close(newton_schulz(u), each, rtol=0, atol=1e-5)  # worst measured 0


def muon_momentum_step(u: torch.Tensor, lr: float) -> torch.Tensor:
    return lr * u / u.square().mean((-2, -1), keepdim=True).sqrt()


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_hand_momentum_is_muon_normalized_to_rms_1(shape):
    """Orthogonalized momentum of decay 0.9 in float32, written out, equals Celo2 with the hand-set rule."""
    p = torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    expected, momentum = p.detach().clone(), torch.zeros(shape)
    optimizer = Celo2([p], lr=0.01, rule="hand-momentum", weight_decay=0.1)
    for step in range(10):
        p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        momentum = 0.9 * momentum + 0.1 * p.grad
        expected -= muon_momentum_step(newton_schulz(momentum), 0.01) + 0.01 * 0.1 * expected
        torch.testing.assert_close(p.data, expected, rtol=0, atol=1e-5)  # worst measured 1.2e-6


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_hand_nesterov_written_out(shape):
    """Momentum and gradient over Adafactor's second moment, each divided by its RMS, 1 to 0.8."""
    p = torch.nn.Parameter(torch.zeros(shape))
    optimizer = Celo2([p], lr=1.0, rule="hand-nesterov", orthogonalize=False)
    momentum, rows, cols = torch.zeros(shape), torch.zeros(shape[0], 1), torch.zeros(1, shape[1])
    for step in range(10):
        p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        before = p.detach().clone()
        optimizer.step()
        momentum = 0.9 * momentum + 0.1 * p.grad
        rows = 0.9 * rows + 0.1 * p.grad.square().mean(1, keepdim=True)
        cols = 0.9 * cols + 0.1 * p.grad.square().mean(0, keepdim=True)
        root = (rows * cols / rows.mean()).sqrt()
        normalized = lambda x: x / x.square().mean().sqrt()  # noqa: E731
        u = normalized(normalized(momentum / root) + 0.8 * normalized(p.grad / root))
        torch.testing.assert_close(before - p.data, u, rtol=0, atol=1e-5)  # worst measured 1.7e-6


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_hand_momentum_against_torch_muon(shape):
    """torch's Muon works in bfloat16, its updates are not normalized; after both are, the directions agree to bfloat16."""
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    celo2 = Celo2([ours], lr=1.0, rule="hand-momentum", ns_dtype=torch.bfloat16)
    muon = torch.optim.Muon([theirs], lr=1.0, weight_decay=0.0, momentum=0.9, nesterov=False)
    for step in range(5):
        ours.data.copy_(start)
        theirs.data.copy_(start)
        ours.grad = theirs.grad = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        celo2.step()
        muon.step()
        direction = muon_momentum_step(start - theirs.data, 1.0)
        # Five iterations in bfloat16. RMS difference of two updates of RMS 1: worst measured 0.021 (each is 0.016 from float32).
        assert (start - ours.data - direction).square().mean().sqrt() < 0.04


def test_base_variant_never_orthogonalizes():
    start = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    p, base = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    p.grad = base.grad = torch.randn(12, 20, generator=torch.Generator().manual_seed(1))
    Celo2([p], lr=1.0, rule="hand-momentum", orthogonalize=False).step()
    Celo2([base], lr=1.0, rule=hand_momentum("celo2-base")).step()
    torch.testing.assert_close(base.data, p.data, rtol=0, atol=0)
    expected = p.grad / p.grad.square().mean().sqrt()
    torch.testing.assert_close(start - p.data, expected, rtol=0, atol=1e-5)


def test_update_has_rms_one():
    p = torch.nn.Parameter(torch.zeros(30, 50))
    optimizer = Celo2([p], lr=0.5, rule=random_rule())
    p.grad = torch.randn(30, 50, generator=torch.Generator().manual_seed(0)) * 1e-3
    optimizer.step()
    assert p.data.square().mean().sqrt().item() == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "origin"),
    [
        ("celo2", "meta-trained"),
        ("celo2-base", "meta-trained"),
        ("celo2-lm", "meta-trained"),
        ("celo2-whitened", "meta-trained"),
        ("hand-momentum", "hand-set"),
        ("hand-nesterov", "hand-set"),
        ("hand-agreement", "hand-set"),
        ("hand-whitened", "hand-set"),
    ],
)
def test_shipped_rules_say_where_they_come_from(name, origin):
    assert load_rule(name).description.startswith(origin)
