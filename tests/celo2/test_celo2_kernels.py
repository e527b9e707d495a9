"""The Triton kernels equal the plain functions: in Triton's interpreter on any machine, and on a GPU where there is one.

Triton decides at its import whether it interprets, so the cases run in a process of their own that begins with
TRITON_INTERPRET=1 and ends with what failed, as JSON. The same cases run on the GPU in this process.
"""

import itertools
import json
import os
import subprocess
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from optimizer_kinds import directions_
from torch import nn

from celo2 import Celo2, Rule, blocked, orthogonalize
from celo2.kernels.traffic import bytes_moved
from celo2.layout import regions, stacked_shape
from celo2.rule import accumulator_shapes, factored_axes, update, weight_shapes
from celo2.stack import Piece, Stack, stack_of_whole

pytest.importorskip("triton", reason="Triton, which there is for Linux only, cannot be imported")
ROOT = Path(__file__).parents[2]
NAMES = ("momentum", "second_moment", "row", "col")
CONV1D = ((10, 7), (1, 0), (1, 7, 10))  # one matrix, stored transposed
C_ATTN = ((6, 3, 5), (1, 2, 0), (3, 5, 6))  # q, k and v of (5, 6), stored transposed beside each other
PER_HEAD = ((2, 3, 4, 9), (1, 0, 2, 3), (3, 8, 9))  # each head's q, k and v lie together
# name -> (shape, options of its group)
PARAMETERS = {
    "square": ((7, 7), {}),
    "tall": ((29, 3), {}),
    "batch": ((3, 6, 8), {}),
    "conv1d": ((10, 7), {"matrices": CONV1D}),
    "beside conv1d": ((7, 10), {}),  # the same matrices, stored the other way
    "c_attn": ((6, 15), {"matrices": C_ATTN}),
    "not orthogonalized": ((9, 4), {"orthogonalize": False}),
    "vector": ((13,), {"update": "celo2"}),
    "bias": ((5,), {}),
}


def random_rule(hidden: int = 8) -> Rule:
    generator = torch.Generator().manual_seed(0)
    return Rule({name: torch.randn(shape, generator=generator) for name, shape in weight_shapes(hidden).items()})


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def kernels():
    from celo2.kernels import passes, symmetric

    return passes, symmetric


def rms_normalized(u: torch.Tensor) -> torch.Tensor:
    return u / u.square().mean((1, 2), keepdim=True).add(1e-9).sqrt()


def updates_equal_the_reference(device, shape, n=3, hidden=8, dtype=torch.float32):
    """Stacks of 1 and n - 1 matrices, gradients from 1e-6 to 1e3, the first of them zero, against `rule.update` on the CPU."""
    passes, symmetric = kernels()
    rule, cuts = random_rule(hidden), [(0, 1), (1, n)] if n > 1 else [(0, 1)]
    w = randn(n, *shape, seed=1).to(dtype).to(device)
    states = [{k: torch.zeros(s) for k, s in accumulator_shapes(shape, factored_axes(shape)).items()} for _ in range(n)]
    fast = [{name: torch.zeros(b - a, *states[0][name].shape, device=device) for name in NAMES} for a, b in cuts]
    for step in range(3 if n > 1 else 2):
        g = randn(n, *shape, seed=10 + step) * torch.tensor([1.0, 1e-6, 1e3])[:n].view(n, 1, 1)
        g = (g * randn(n, *shape, seed=20 + step).mul(2).exp() * (step > 0)).to(dtype).to(device)
        stacks = [stack_of_whole(g[a:b], w[a:b], *(s[name] for name in NAMES)) for (a, b), s in zip(cuts, fast, strict=True)]
        out = torch.empty(g.shape, device=device)
        directions_(rule.to(device), stacks, out, passes.TRITON)
        expected = torch.stack(
            [update(rule, s, *gw, orthogonalize=True) for s, *gw in zip(states, g.float().cpu(), w.float().cpu(), strict=True)]
        )
        out = rms_normalized(symmetric.newton_schulz(out).cpu())
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-4)  # worst measured 1.1e-5
    for name in NAMES:
        joined = torch.cat([state[name].cpu() for state in fast])
        reference = torch.stack([s[name] for s in states])
        scale = reference.flatten(1).abs().amax(1).view(n, *(1,) * (reference.ndim - 1))
        torch.testing.assert_close(joined / scale, reference / scale, rtol=0, atol=1e-6)  # worst measured 4.2e-7


def copied(stack: Stack) -> Stack:
    """The stack with accumulators of its own, laid out as they were."""

    def copy(t):
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t)

    pieces = [p._replace(m=copy(p.m), v=copy(p.v)) for p in stack.pieces]
    return replace(stack, pieces=pieces, row=stack.row.clone(), col=stack.col.clone())


def cut_stack(device, shape, layout, n, cuts, state_dtype) -> Stack:
    """Matrix n of a parameter of `shape`, from the runs of elements between `cuts`."""
    numel = torch.Size(shape).numel()
    g, w, m, v = (t.to(device) for t in (randn(numel, seed=1), randn(numel, seed=2), randn(3, numel, seed=3), randn(numel)))
    m, v = (0.1 * m).to(state_dtype), (0.1 * v.abs()).to(state_dtype)
    rows, cols = stacked_shape(shape, layout)[-2:]
    pieces = []
    for start, stop in itertools.pairwise([0, *cuts, numel]):
        for region in regions(shape, layout, start, stop):
            if region.matrices.start <= n < region.matrices.stop:
                r, run = region.of_matrix(n), slice(start, stop)
                pieces.append(Piece(r.of(g[run]), r.of(w[run]), r.of_each(m[:, run]), r.of(v[run]), r.rows, r.cols))
    row, col = (randn(1, 3, s, seed=5 + s).square().to(device) for s in sorted((rows, cols)))
    count = None if state_dtype is torch.float32 else torch.tensor([7], dtype=torch.int32, device=device).expand(1)
    return Stack((1, rows, cols), pieces, row, col, count)


def pieces_equal_the_plain_passes(device, state_dtype):
    """Every pass on matrices that are cut into local shards, stored as they are, transposed and fused."""
    rule = random_rule().to(device)
    for shape, layout, n, cuts in [
        ((11, 13), None, 0, (20, 77, 78)),
        ((2, 9, 5), None, 1, (50,)),
        ((10, 7), CONV1D, 0, (33,)),
        ((6, 15), C_ATTN, 1, (40,)),
        ((24, 9), PER_HEAD, 2, (100,)),
    ]:
        plain = cut_stack(device, shape, layout, n, cuts, state_dtype)
        fast = copied(plain)
        results = []
        for functions, stack in ((blocked.PLAIN, plain), (kernels()[0].TRITON, fast)):
            sums = functions.accumulate_(rule, [stack])
            blocked.move_means_(rule, stack, sums)
            factors = blocked.factors_of(stack)
            factored_sums = functions.factor([stack], factors)
            layer = blocked.first_layer(rule, stack, sums, factored_sums)
            outs = [torch.full(p.g.shape, torch.nan, device=device) for p in stack.pieces]
            functions.emit_(rule, [stack], factors, layer, [outs])
            results.append([sums, *factors, factored_sums, *outs])
        for got, expected in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)  # worst measured 3.3e-6 of 1 + the number
        for got, expected in zip(fast.pieces, plain.pieces, strict=True):
            for a, b in zip(got[2:4], expected[2:4], strict=True):
                if state_dtype is torch.float32:
                    torch.testing.assert_close(a, b, rtol=0, atol=1e-7)  # worst measured 6e-8
                else:  # torch's fused multiply-add may round to the other neighbour; none of these did
                    torch.testing.assert_close(a, b, rtol=2**-7, atol=0)
                    assert (a != b).float().mean() < 0.02


def faults_travel_as_in_the_plain_passes(device):
    """NaN and infinity in a gradient end where they end in the plain path."""
    passes, _ = kernels()
    for fault in (torch.nan, torch.inf, -torch.inf):
        for state_dtype in (torch.float32, torch.bfloat16):
            plain = cut_stack(device, (6, 9), None, 0, (), state_dtype)
            plain.pieces[0].g[0, 2, 3] = fault
            fast, outs = copied(plain), [torch.empty(1, 6, 9, device=device) for _ in range(2)]
            directions_(random_rule().to(device), [plain], outs[0])
            directions_(random_rule().to(device), [fast], outs[1], passes.TRITON)
            pairs = [(fast.row, plain.row), (fast.col, plain.col), (outs[1], outs[0])]
            pairs += [(a.float(), b.float()) for a, b in zip(fast.pieces[0][2:4], plain.pieces[0][2:4], strict=True)]
            for got, expected in pairs:
                torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-4, equal_nan=True)
            assert outs[0].isnan().any() == (fault != fault)


def newton_schulz_equals_plain(device, dtype):
    """Sides that fill tiles and sides that do not, wide and tall, one matrix and several, zeros; loaded in both ways."""
    _, symmetric = kernels()
    shapes = [((), 48, 64), ((2,), 24, 40), ((2, 1), 45, 30), ((1,), 9, 50)]
    for (lead, rows, cols), descriptors in [*((shape, True) for shape in shapes), (shapes[2], False)]:
        tile = symmetric.Tile(16, 32, 16, 4, 3, descriptors)
        u = randn(*lead, rows, cols).to(dtype).to(device)
        exact = orthogonalize.newton_schulz(u.float())
        plain, fast = orthogonalize.newton_schulz(u), symmetric.newton_schulz_tiled(u, tile)
        assert fast.shape == u.shape and fast.dtype == dtype
        error, plain_error = ((x.float() - exact).norm() / exact.norm() for x in (fast, plain))
        # Worst measured: float32 1.4e-6; bfloat16 0.019, what the plain path has.
        assert error < (1e-5 if dtype is torch.float32 else 1.2 * plain_error), (error, plain_error)
    assert not symmetric.newton_schulz_tiled(torch.zeros(32, 40, dtype=dtype, device=device), tile).any()


def last_step_equals_plain(device):
    """Every dtype of weights, learning rates as number and as tensor, transposed weights beside directions that are not."""
    passes, _ = kernels()
    u, scale = randn(3, 20, 33).to(device), torch.tensor([0.5, 1.0, 2.0], device=device).view(3, 1, 1)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-12), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)):
        for lr in (0.3, torch.tensor(0.3), torch.tensor([0.3], device=device)):
            for w in (randn(3, 20, 33, seed=1), randn(3, 33, 20, seed=1).mT):
                w, options = w.to(dtype).to(device), {"lr": lr, "weight_decay": 0.1}
                plain = w.clone()
                blocked.apply_(plain, u, scale, options)
                passes.apply_(w, u, scale, options)
                torch.testing.assert_close(w, plain, rtol=tolerance, atol=tolerance)


def run_optimizer(device, functions, settings=None, refused=False, **options):
    """Weights after two steps of Celo2 on PARAMETERS with `functions` as the passes; with `refused`, and a bad one in between."""
    params = {name: nn.Parameter(randn(*shape, seed=len(name)).to(device)) for name, (shape, _) in PARAMETERS.items()}
    groups = [{"params": [p], **PARAMETERS[name][1]} for name, p in params.items()]
    rule = replace(random_rule(), **settings or {})
    optimizer = Celo2(groups, lr=0.05, rule=rule, weight_decay=0.1, ns_dtype=torch.float32, **options)
    optimizer.passes = functions
    for step in range(2):
        for name, p in params.items():
            p.grad = (0.1 * randn(*p.shape, seed=100 * step + len(name))).to(device)
        if refused:
            optimizer.found_inf = torch.zeros((), device=device)
        optimizer.step()
        if refused and step == 0:
            before = [v.clone() for p in params.values() for v in (p.detach(), *optimizer.state[p].values())]
            for p in params.values():
                p.grad.view(-1)[1:3] = torch.tensor([torch.nan, torch.inf])
            optimizer.found_inf = torch.ones((), device=device)
            optimizer.step()
            after = [v for p in params.values() for v in (p.detach(), *optimizer.state[p].values())]
            assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    return {name: p.detach().cpu() for name, p in params.items()}


def optimizer_equals_plain(device, tolerance, **options):
    fast = run_optimizer(device, kernels()[0].TRITON, refused=bool(options), **options)
    plain = run_optimizer(device, blocked.PLAIN, **options)
    for name in PARAMETERS:
        torch.testing.assert_close(fast[name], plain[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


CASES = {
    **{
        f"reference {shape}": lambda device, shape=shape, n=n, hidden=hidden: updates_equal_the_reference(
            device, shape, n, hidden
        )
        for shape, n, hidden in [((7, 5), 3, 5), ((5, 7), 3, 8), ((1, 9), 3, 8), ((9, 1), 3, 8), ((64, 33), 2, 8)]
    },
    "reference (130, 70)": lambda device: updates_equal_the_reference(device, (130, 70), n=1),
    "reference in bfloat16": lambda device: updates_equal_the_reference(device, (12, 20), dtype=torch.bfloat16),
    "pieces": lambda device: pieces_equal_the_plain_passes(device, torch.float32),
    "pieces with bfloat16 accumulators": lambda device: pieces_equal_the_plain_passes(device, torch.bfloat16),
    "faults": faults_travel_as_in_the_plain_passes,
    "newton_schulz float32": lambda device: newton_schulz_equals_plain(device, torch.float32),
    "newton_schulz bfloat16": lambda device: newton_schulz_equals_plain(device, torch.bfloat16),
    "last step": last_step_equals_plain,
    "optimizer": lambda device: optimizer_equals_plain(device, 1e-5),  # worst measured 6e-7
    "optimizer that normalizes gradients": lambda device: optimizer_equals_plain(
        device, 1e-5, settings={"normalize_gradient": True}
    ),
    "optimizer with step sizes": lambda device: optimizer_equals_plain(
        device, 1e-5, settings={"step_exponents": (0.7, -0.4, 0.5)}
    ),
    "optimizer with bfloat16 accumulators": lambda device: optimizer_equals_plain(device, 1e-5, state_dtype=torch.bfloat16),
}


def interpret(cases: list[str]) -> dict[str, str | None]:
    """These cases in the interpreter: {case: what failed, or None}."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    product, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def create_dot(self, a, b, *rest):
        """The interpreter keeps bfloat16 as the upper 16 bits of a float32, and would multiply those bits as integers."""
        for operand in (a, b):
            if operand.dtype.scalar == tl.bfloat16:
                operand.data = (operand.data.astype(np.uint32) << 16).view(np.float32)
        return product(self, a, b, *rest)

    def cast_impl(self, source, target):
        """The interpreter would truncate float32 to bfloat16; GPUs round it to nearest."""
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, target)
        bits = torch.tensor(source.data).bfloat16().view(torch.int16).numpy().view(np.uint16)
        return TensorHandle(bits, tl.bfloat16)

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl
    torch.set_num_threads(1)
    results: dict[str, str | None] = dict.fromkeys(cases)
    for name in cases:
        try:
            CASES[name]("cpu")
        except Exception:
            results[name] = traceback.format_exc()
    return results


# Cases of the interpreter that take long, beside others that go through the same kernels.
SLOW = ("reference (5, 7)", "reference (9, 1)", "reference (130, 70)", *(case for case in CASES if case.startswith("optimizer ")))


@pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_kernels_in_the_interpreter(slow):
    """All cases of a kind in one process, which imports Triton once and as its interpreter."""
    paths = os.pathsep.join(map(os.fspath, (ROOT, Path(__file__).parent)))
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    cases = [case for case in CASES if (case in SLOW) == slow]
    done = subprocess.run(
        [sys.executable, __file__, *cases], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    failed = [f"{case}: {error}" for case, error in results.items() if error]
    assert list(results) == cases and not failed, "\n".join(failed)


def test_passes_of_the_cpu_is_plain_and_imports_no_kernel():
    program = (
        "import sys, torch; from celo2.kernels import PLAIN, passes_for; assert passes_for(torch.device('cpu')) is PLAIN; "
        "assert 'celo2.kernels.passes' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=120)


def test_bytes_moved():
    assert [bytes_moved(10, *sizes) for sizes in ((4, 4, 4, 2), (4, 4, 2, 2), (2, 2, 2, 2))] == [940, 640, 500]
    # A rule that normalizes gradients reads them once more.
    assert [bytes_moved(10, *sizes, True) for sizes in ((4, 4, 4, 2), (2, 2, 2, 2))] == [980, 520]


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@on_gpu
@pytest.mark.parametrize("case", CASES)
def test_kernels_on_the_gpu(case):
    CASES[case]("cuda")


@on_gpu
@pytest.mark.parametrize("shape", [(512, 768), (3, 1000, 520), (2, 2048, 2048)])
def test_newton_schulz_on_the_gpu(shape):
    """The tiles that training uses, against float32; no tolerance here was measured yet."""
    u = randn(*shape).bfloat16().cuda()
    exact = orthogonalize.newton_schulz(u.float())
    error, plain_error = (
        ((f(u).float() - exact).norm() / exact.norm()) for f in (kernels()[1].newton_schulz, orthogonalize.newton_schulz)
    )
    assert error < 1.5 * plain_error + 1e-3, (error, plain_error)


def gpu_optimizer(lr, state_dtype=torch.float32):
    shapes = [(256, 320), (256, 320), (64, 96), (3, 40, 24)]
    params = [nn.Parameter(randn(*shape, seed=i).cuda()) for i, shape in enumerate(shapes)]
    params += [nn.Parameter(randn(7).cuda()), nn.Parameter(randn(9).bfloat16().cuda())]  # by AdamW, fused
    for p in params:
        p.grad = torch.zeros_like(p)
    return params, Celo2(params, lr=lr, rule=random_rule(), weight_decay=0.1, state_dtype=state_dtype)


def set_gradients(params, step):
    for i, p in enumerate(params):
        p.grad.copy_(randn(*p.shape, seed=100 * step + i))


@on_gpu
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_a_step_on_the_gpu(state_dtype):
    """It waits for nothing, gives the same bits again, compiles nothing for another learning rate, and fits a CUDA graph."""
    results = []
    for graphed in (False, False, True):
        lr = torch.tensor(0.01, device="cuda")
        params, optimizer = gpu_optimizer(lr, state_dtype)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):  # it has state and a plan before it is captured
            for step in range(2):
                set_gradients(params, step)
                optimizer.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        if graphed:
            with torch.cuda.graph(graph):
                optimizer.step()
        for step in range(2, 5):
            set_gradients(params, step)
            lr.fill_(0.01 / step)
            torch.cuda.set_sync_debug_mode("error")
            graph.replay() if graphed else optimizer.step()
            torch.cuda.set_sync_debug_mode("default")
        results.append([p.detach().cpu() for p in params])
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))

    from celo2.kernels.device import apply_kernel

    params, optimizer = gpu_optimizer(0.01)
    optimizer.step()
    with pytest.raises(RuntimeError, match="this lr, a number, for ever"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
    params, optimizer = gpu_optimizer(0.01)
    sizes = set()
    for step in range(3):
        set_gradients(params, step)
        optimizer.param_groups[0]["lr"] = 0.01 / (step + 1)
        optimizer.step()
        sizes.add(len(apply_kernel.device_caches[torch.cuda.current_device()][0]))
    assert len(sizes) == 1


if __name__ == "__main__":
    print(json.dumps(interpret(sys.argv[1:])))
