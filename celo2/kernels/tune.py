"""Time the kernels with several tile sizes on this GPU, to check the tile sizes in `passes` and `symmetric`.

    python -m celo2.kernels.tune ROWS COLS [MATRICES]

The tile sizes are fixed, not searched for during training: a search would wait for the GPU in the first steps and could choose
different ones on two ranks.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator

import torch

from celo2 import blocked, orthogonalize
from celo2.rule import Rule
from celo2.rule_files import load_rule
from celo2.stack import Stack, stack_of_whole

PASS_TILES = ((1024, 4), (2048, 4), (2048, 8), (4096, 8), (8192, 8))
EMIT_TILES = ((512, 2), (512, 4), (1024, 4), (1024, 8), (2048, 8))
PRODUCT_TILES = (  # with descriptors and with pointers
    *((*tile, True) for tile in ((128, 128, 64, 4, 3), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 256, 64, 8, 3))),
    *((*tile, False) for tile in ((128, 128, 32, 8, 4), (128, 128, 64, 8, 3), (128, 256, 32, 8, 3))),
)


def random_stack(n: int, rows: int, cols: int) -> Stack:
    """A random `Stack` of n matrices (rows, cols) with accumulators, all in float32."""
    draw = lambda *shape: torch.randn(shape, device="cuda").square()  # noqa: E731
    short, long = sorted((rows, cols))
    fields = draw(n, rows, cols), draw(n, rows, cols), draw(n, 3, rows, cols), draw(n, rows, cols)
    return stack_of_whole(*fields, draw(n, 3, short), draw(n, 3, long))


def pass_times(rule: Rule, stack: Stack) -> Iterator[tuple[str, object, float, str]]:
    """Times of the passes and of `apply_`: (kernel, tile, milliseconds, rate) for each tile."""
    from triton.testing import do_bench

    from celo2.kernels import passes

    elements = stack.pieces[0].g.numel()
    stacks, factors = [stack], blocked.factors_of(stack)
    layer = blocked.first_layer(rule, stack, passes.accumulate_(rule, stacks), passes.factor(stacks, factors))
    u = torch.empty_like(stack.pieces[0].g, dtype=torch.bfloat16)
    scale, options = torch.ones(len(u), 1, 1, device="cuda"), {"lr": 0.0, "weight_decay": 0.1}
    runs = {  # name -> (bytes a weight, tiles to try, what to run)
        "accumulate": (40, PASS_TILES, lambda tile: passes.accumulate_(rule, stacks, tile)),
        "factor": (16, PASS_TILES, lambda tile: passes.factor(stacks, factors, tile)),
        "emit": (26, EMIT_TILES, lambda tile: passes.emit_(rule, stacks, factors, layer, [[u]], tile)),
        "apply": (10, PASS_TILES, lambda tile: passes.apply_(stack.pieces[0].w, u, scale, options, tile)),
    }
    for name, (size, tiles, run) in runs.items():
        for tile in tiles:
            milliseconds = do_bench(functools.partial(run, passes.Tile(*tile)))
            yield name, tile, milliseconds, f"{size * elements / milliseconds / 1e9:.2f} TB/s"


def product_times(n: int, rows: int, cols: int) -> Iterator[tuple[str, object, float, str]]:
    """Times of X Xᵀ by cuBLAS and by the kernel, and of a whole Newton–Schulz: (product, tile, milliseconds, rate).

    The rate counts the FLOPs of the full product for both, so that they can be compared.
    """
    from triton.testing import do_bench

    from celo2.kernels import symmetric
    from celo2.kernels.passes import TRITON

    short, long = sorted((rows, cols))
    x = torch.randn(n, short, long, device="cuda", dtype=torch.bfloat16)
    flops = 2 * n * short * short * long
    milliseconds = do_bench(lambda: x @ x.mT)
    yield "product", "cuBLAS", milliseconds, f"{flops / milliseconds / 1e9:.0f} TFLOP/s"
    for tile in PRODUCT_TILES:
        milliseconds = do_bench(functools.partial(symmetric.symmetric_product, x, 1.0, symmetric.Tile(*tile)))
        yield "product", tile, milliseconds, f"{flops / milliseconds / 1e9:.0f} TFLOP/s"
    flops = n * orthogonalize.newton_schulz_flops(rows, cols)
    for name, functions in (("plain", blocked.PLAIN), ("kernel", TRITON)):
        milliseconds = do_bench(functools.partial(functions.newton_schulz, x))
        yield "Newton-Schulz", name, milliseconds, f"{flops / milliseconds / 1e9:.0f} TFLOP/s"


def main(argv: list[str]) -> int:
    """Print a line for every kernel and tile. Returns the exit status: 2 for bad arguments or without a GPU."""
    try:
        rows, cols, n = (int(a) for a in (argv if len(argv) == 3 else [*argv, "1"]))
        if min(rows, cols, n) < 1:
            raise ValueError
    except ValueError:
        print("usage: python -m celo2.kernels.tune ROWS COLS [MATRICES], positive integers", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("celo2.kernels.tune needs a CUDA GPU", file=sys.stderr)
        return 2
    rule = load_rule("celo2").to("cuda")
    for times in (pass_times(rule, random_stack(n, rows, cols)), product_times(n, rows, cols)):
        for name, tile, milliseconds, rate in times:
            print(f"{name:14} {tile!s:24} {milliseconds:9.3f} ms  {rate}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
