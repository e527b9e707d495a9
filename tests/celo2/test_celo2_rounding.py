"""Accumulators in bfloat16: the rounding itself, and the same bits from the reference and the fast path, in any layout."""

import pytest
import torch
from optimizer_kinds import directions_
from torch import nn

from celo2 import Celo2, Rule
from celo2 import blocked as blocked_module
from celo2.rounding import noise, places, stochastic_round
from celo2.rule import accumulator_shapes, factored_axes, update, weight_shapes
from celo2.stack import stack_of_whole

FUSED = ((7, 3, 5), (1, 2, 0), (3, 5, 7))  # GPT-2's c_attn: a (7, 15) weight, inputs first, that holds three (5, 7) matrices


def random_rule(**decays) -> Rule:
    generator = torch.Generator().manual_seed(0)
    return Rule({name: torch.randn(shape, generator=generator) for name, shape in weight_shapes(5).items()}, **decays)


def zero_state(shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    wide = {name: torch.zeros(s) for name, s in accumulator_shapes(shape, factored_axes(shape)).items()}
    low = {name: wide[name].bfloat16() for name in ("momentum", "second_moment")}
    return wide | low | {"count": torch.zeros((), dtype=torch.int32)}


def int32(value: int) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.int32)


# --- noise and rounding -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "slot"), [(1, 0), (7, 1), (123_456, 2), (2**31 - 1, 3)])
def test_noise_is_the_published_hash(count, slot):
    """Against the same in Python's integers, for small and for wrapped-around places."""
    index = torch.tensor([0, 1, 2, 65_535, 2**31 - 1, -(2**31), -1], dtype=torch.int32)
    expected = []
    for i in index.tolist():
        x = (i ^ (count * 0x9E3779B9) ^ (slot * 0x85EBCA6B)) & 0xFFFFFFFF
        x ^= x >> 16
        x = x * 0x7FEB352D & 0xFFFFFFFF
        x ^= x >> 15
        x = x * 0x846CA68B & 0xFFFFFFFF
        expected.append((x ^ x >> 16) & 0xFFFF)
    assert noise(index, int32(count), slot).tolist() == expected


def test_places_are_those_in_the_whole_matrix():
    whole_matrix = places(slice(0, 9), slice(0, 13), 13, torch.device("cpu"))
    assert torch.equal(whole_matrix.flatten(), torch.arange(9 * 13, dtype=torch.int32))
    part = places(slice(2, 5), slice(3, 11), 13, torch.device("cpu"))
    assert torch.equal(part, whole_matrix[2:5, 3:11])


def test_noise_is_uniform_and_independent():
    """Over the elements of a matrix, over steps, and between slots, steps and neighbours."""
    index = places(slice(0, 256), slice(0, 256), 256, torch.device("cpu"))
    samples = {(c, s): noise(index, int32(c), s).flatten() for c in (1, 2, 1000) for s in range(4)}
    samples["one element"] = noise(index[3, 5], torch.arange(1, 65_537, dtype=torch.int32), 2)
    for sample in samples.values():
        counts = torch.bincount(sample >> 8, minlength=256).double()
        # Chi-squared with 255 degrees of freedom has mean 255 and deviation 22.6; measured 207 to 303.
        assert 255 - 5 * 22.6 < ((counts - 256) ** 2 / 256).sum() < 255 + 5 * 22.6
        low = torch.bincount(sample & 255, minlength=256).double()
        assert ((low - 256) ** 2 / 256).sum() < 255 + 5 * 22.6
    unit = torch.stack(list(samples.values())).double() / 65_536 - 0.5
    correlations = unit @ unit.T / (65_536 / 12)
    correlations.fill_diagonal_(0)
    assert correlations.abs().max() < 5 / 256  # five standard errors; measured 0.010
    neighbours = (unit[:, 1:] * unit[:, :-1]).sum(1) / (65_535 / 12)
    assert neighbours.abs().max() < 5 / 256  # measured 0.0075


@pytest.mark.parametrize("value", [1.0 + 1e-3, -3.3333e-7, 0.7, 1e-40, 3.1e30, 65_536.1])
def test_mean_over_all_noise_is_exact(value):
    """Sixteen bits go and there are 2^16 noises, so that the mean is the value itself, not only nearly."""
    x = torch.full((1 << 16,), value)
    rounded = stochastic_round(x, torch.arange(1 << 16, dtype=torch.int32)).double()
    assert rounded.unique().numel() == 2
    assert rounded.mean().item() == pytest.approx(x[0].double().item(), rel=1e-12)


def test_many_roundings_of_one_value_are_unbiased():
    x = torch.full((1 << 16,), 1.0 + 1 / 1024)  # an eighth of the way from 1 to 1 + 1/128
    rounded = stochastic_round(x, noise(torch.arange(1 << 16, dtype=torch.int32), int32(3), 1)).double()
    error = (rounded.mean() - x[0]).item()
    assert abs(error) < 5 * rounded.std().item() / 256  # five standard errors


def test_rounding_leaves_what_bfloat16_holds_and_what_is_not_finite():
    exact = torch.tensor([0.0, -0.0, 1.0, -2.5, 3.3895e38, 2.0**-133]).bfloat16().float()
    for n in (0, 1, 65_535):
        assert torch.equal(stochastic_round(exact, torch.full((6,), n, dtype=torch.int32)).float(), exact)
    infinite = torch.tensor([torch.inf, -torch.inf, torch.nan])
    last_nan = torch.tensor([2**31 - 1, -1], dtype=torch.int32).view(torch.float32)  # all bits set: adding must not wrap around
    every = torch.cat([infinite, last_nan])
    assert torch.equal(
        torch.nan_to_num(stochastic_round(every, torch.full((5,), 65_535, dtype=torch.int32)).float(), nan=7.0),
        torch.nan_to_num(every, nan=7.0),
    )
    largest = torch.tensor([torch.finfo(torch.float32).max])  # has no upper neighbour
    assert stochastic_round(largest, int32(0)).item() == torch.finfo(torch.bfloat16).max
    assert stochastic_round(largest, int32(65_535)).item() == largest.bfloat16().item()


def test_slow_momentum_stalls_when_rounded_to_nearest():
    """A gradient of 1 for 2,000 steps: decay 0.999 brings the momentum to 0.865. Rounded to nearest it stops where a thousandth
    of the rest of the way is less than half the distance between neighbours; truncated it stops earlier."""
    expected, weight, n = 1 - 0.999**2000, 1 - 0.999, 256
    float32, nearest, truncated, stochastic = torch.zeros(()), *torch.zeros(2).bfloat16(), torch.zeros(n).bfloat16()
    index = torch.arange(n, dtype=torch.int32)
    for step in range(1, 2001):
        float32 = float32.lerp(torch.ones(()), weight)
        nearest = nearest.float().lerp(torch.ones(()), weight).bfloat16()
        moved = truncated.float().lerp(torch.ones(()), weight)
        truncated = (moved.view(torch.int32) & -65_536).view(torch.float32).bfloat16()
        moved = stochastic.float().lerp(torch.ones(n), weight)
        stochastic = stochastic_round(moved, noise(index, int32(step), 2))
    assert float32.item() == pytest.approx(expected, rel=1e-4)
    assert nearest.item() < 0.5 * expected and truncated.item() < 0.5 * expected  # measured 0.25 and 0.125
    assert stochastic.float().mean().item() == pytest.approx(expected, rel=5e-3)  # measured 5e-4
    assert (stochastic.float() - expected).abs().max() < 0.2 * expected  # measured 0.065


# --- the reference and the fast path ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_elements", [1, 50, 1 << 16])
@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6), (1, 9), (9, 1), (64, 33), (130, 70)])
def test_blocked_equals_reference(shape, block_elements, monkeypatch):
    """Three matrices in two stacks, cut into blocks of one row up to whole stacks, gradients from 1e-6 to 1e3."""
    monkeypatch.setitem(blocked_module.BLOCK_ELEMENTS, "cpu", block_elements)
    rule = random_rule()
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(3, *shape, generator=generator)
    states = [zero_state(shape) for _ in w]
    names = ("momentum", "second_moment", "row", "col")
    fast = [{name: value.expand(n, *value.shape).clone() for name, value in states[0].items()} for n in (1, 2)]
    for step in range(4):
        g = torch.randn(3, *shape, generator=generator) * torch.tensor([1e-6, 1.0, 1e3]).view(3, 1, 1)
        g *= torch.randn(3, *shape, generator=generator).mul(2).exp() * (step > 0)  # the first gradient is zero
        for state in [*states, *fast]:
            state["count"] += 1
        stacks = [
            stack_of_whole(g[a:b], w[a:b], *(state[name] for name in names), state["count"])
            for (a, b), state in zip([(0, 1), (1, 3)], fast, strict=True)
        ]
        out = torch.empty_like(g)
        directions_(rule, stacks, out)
        out = out / out.square().mean((1, 2), keepdim=True).add(1e-9).sqrt()
        expected = torch.stack([update(rule, s, *gw, orthogonalize=False) for s, *gw in zip(states, g, w, strict=True)])
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-4)  # worst measured 8.6e-6
        for name in ("momentum", "second_moment"):
            joined, apart = torch.cat([state[name] for state in fast]), torch.stack([s[name] for s in states])
            assert joined.dtype == apart.dtype == torch.bfloat16
            assert torch.equal(joined, apart), name


KINDS = {
    "wide": ((6, 10), {}),
    "tall": ((11, 6), {}),
    "one row": ((1, 9), {}),
    "three axes": ((3, 8, 6), {}),
    "three axes, factored over the batch": ((9, 8, 6), {}),
    "fused": ((7, 15), {"matrices": FUSED}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_optimizer_equals_reference(kind):
    """The accumulators bit for bit, the weights nearly, over three steps of the optimizer and of the reference on its stack."""
    shape, options = KINDS[kind]
    generator = torch.Generator().manual_seed(2)
    rule = random_rule()
    p = nn.Parameter(torch.randn(shape, generator=generator))
    optimizer = Celo2([{"params": [p], **options}], lr=0.1, rule=rule, state_dtype=torch.bfloat16)

    def stack(x: torch.Tensor) -> torch.Tensor:
        if "matrices" not in options:
            return x.clone()
        return x.unflatten(-1, (3, 5)).movedim(-3, -1).clone()  # (7, 15) -> (3, 5, 7)

    w = stack(p.detach())
    axes = None if "matrices" not in options else (1, 2)
    state = {name: torch.zeros(s) for name, s in accumulator_shapes(w.shape, axes or factored_axes(w.shape)).items()}
    state |= {name: state[name].bfloat16() for name in ("momentum", "second_moment")} | {"count": int32(0)}
    for _ in range(3):
        p.grad = torch.randn(shape, generator=generator)
        optimizer.step()
        state["count"] += 1
        u = update(rule, state, stack(p.grad), w, orthogonalize=True, axes=axes)
        w -= 0.1 * u
        own = optimizer.state[p]
        for name in ("momentum", "second_moment"):
            assert own[name].dtype == torch.bfloat16 and own[name].shape[-len(shape) :] == p.shape
            assert torch.equal(stack(own[name]), state[name]), name
        assert torch.equal(own["count"], state["count"])
        torch.testing.assert_close(stack(p.detach()), w, rtol=0, atol=1e-4)


def test_state_stays_near_float32_and_has_half_the_bytes():
    """Over 300 steps of one matrix: the rounding neither drifts nor is forgotten."""
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(40, 60, generator=generator)
    params = {dtype: nn.Parameter(w.clone()) for dtype in (torch.float32, torch.bfloat16)}
    optimizers = {dtype: Celo2([p], lr=1e-3, rule=random_rule(), state_dtype=dtype) for dtype, p in params.items()}
    for _ in range(300):
        g = torch.randn(w.shape, generator=generator) + 0.3
        for dtype, p in params.items():
            p.grad = g.clone()
            optimizers[dtype].step()
    full, half = (optimizers[dtype].state[p] for dtype, p in params.items())
    for k in range(3):
        error = half["momentum"][k].float() - full["momentum"][k]
        scale = full["momentum"][k].square().mean().sqrt()
        assert 0 < error.square().mean().sqrt() < 0.05 * scale  # measured 0.005, 0.016, 0.024
        assert error.mean().abs() < 5 * error.std() / w.numel() ** 0.5  # measured 0.4, 0.1, 0.5 standard errors
    assert {name: value.dtype for name, value in half.items()} == {
        "momentum": torch.bfloat16,
        "second_moment": torch.bfloat16,
        "row": torch.float32,
        "col": torch.float32,
        "count": torch.int32,
    }
    four = ("momentum", "second_moment")
    assert sum(half[n].nbytes for n in four) * 2 == sum(full[n].nbytes for n in four) == 16 * w.numel()


def test_only_matrices_under_the_rule_are_rounded():
    vector, embedding, matrix = (nn.Parameter(torch.randn(s)) for s in ((5,), (6, 4), (6, 4)))
    groups = [{"params": [vector, matrix], "update": "celo2"}, {"params": [embedding], "update": "adamw"}]
    optimizer = Celo2(groups, lr=0.1, rule=random_rule(), state_dtype=torch.bfloat16)
    optimizer.allocate_state()
    for p in (vector, embedding):
        assert all(v.dtype == torch.float32 for v in optimizer.state[p].values()) and "count" not in optimizer.state[p]
    assert optimizer.state[matrix]["momentum"].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int8, "bfloat16"])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match=f"state_dtype must be torch.float32 or torch.bfloat16, not {dtype}"):
        Celo2([nn.Parameter(torch.zeros(2, 3))], lr=0.1, state_dtype=dtype)


# --- saving -----------------------------------------------------------------------------------------------------------------


def stepped(dtype: torch.dtype, steps: int) -> tuple[nn.Parameter, Celo2]:
    p = nn.Parameter(torch.randn(6, 10, generator=torch.Generator().manual_seed(4)))
    optimizer = Celo2([p], lr=0.1, rule=random_rule(), state_dtype=dtype)
    for step in range(steps):
        p.grad = torch.randn(6, 10, generator=torch.Generator().manual_seed(10 + step))
        optimizer.step()
    return p, optimizer


def test_float32_state_into_bfloat16_and_back():
    """Rounded to nearest once, `count` from the start; what comes back is what bfloat16 held, and training goes on."""
    p, full = stepped(torch.float32, 3)
    q, half = stepped(torch.bfloat16, 5)
    half.load_state_dict(full.state_dict())
    for name in ("momentum", "second_moment"):
        assert torch.equal(half.state[q][name], full.state[p][name].bfloat16())
    assert half.state[q]["count"] == 0 and torch.equal(half.state[q]["row"], full.state[p]["row"])

    back_p, back = stepped(torch.float32, 1)
    back.load_state_dict(half.state_dict())
    assert back.state[back_p].keys() == full.state[p].keys()
    assert torch.equal(back.state[back_p]["momentum"], half.state[q]["momentum"].float())
    assert back.state[back_p]["momentum"].dtype == torch.float32
    q.grad = torch.ones_like(q)
    half.step()
    assert half.state[q]["count"] == 1
