"""The truncated unroll on CPU threads: packs the state for the compiled kernels, runs them, and unpacks it.

Each unroll is one call that runs all T steps in memory of its own, so the result does not depend on the number of threads.

The state of an unroll is one row of float32, weight after weight. A weight (20, 40) of the state with whiteners lies there as

    weight    momentum     second_moment  row      col      right_whitener  left_whitener
    (40, 32)  (3, 40, 32)  (40, 32)       (3, 32)  (3, 40)  (48, 48)        (32, 32)

with its longer axis as rows, and rows padded with zeros to whole vectors. A weight (40, 20) has the same shapes, is not
transposed, and has its left whitener first. `kernels.py` reads the parts of such a segment in that order.
"""

from __future__ import annotations

import hashlib
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from celo2 import orthogonalize
from celo2 import rule as rules
from celo2 import whitening as whiteners
from celo2.metatrain.config import Config, Images, normalizes, start_rule, step_bounds
from celo2.metatrain.engine import Expert
from celo2.metatrain.families import Arrays, Family
from celo2.metatrain.numba_engine import mlp, transformer
from celo2.metatrain.numba_engine.kernels import ADAM, MATRIX, VECTOR, Update
from celo2.metatrain.numba_engine.products import padded
from celo2.metatrain.problems import Truncation
from celo2.metatrain.theta import whitening_of

SOURCES = ("config", "families", "tasks", "theta")  # modules of celo2.metatrain whose constants the kernels hold
NETWORKS = {"images": mlp, "text": transformer}
ELEMENTWISE = {"weight", "momentum", "second_moment", "m", "v"}  # what of a matrix's segment has its two axes


@dataclass(frozen=True)
class Segment:
    """Where an array of the state lies in a packed row: its padded shape there, and whether its axes are swapped."""

    at: int
    shape: tuple[int, ...]
    transposed: bool


def held(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a weight as the kernels hold it: the longer axis as rows, a square one transposed, a vector a row."""
    return (max(shape), min(shape)) if len(shape) == 2 else (1, shape[0])


def segments(family: Family, whole: bool) -> dict[str, Segment]:
    """The place of each array of one unroll's state, in the kernels' order; if not `whole`, of its weights alone."""
    result, at = {}, 0
    for name, weight in family.shapes.items():
        transposed = len(weight) == 2 and weight[0] <= weight[1]
        accumulators = family.accumulator_shapes(name) if whole else {}
        for key, shape in in_order({"weight": weight, **accumulators}, transposed):
            flip = transposed and key in ELEMENTWISE
            shape = (*shape[:-2], *shape[:-3:-1]) if flip else shape
            if key in whiteners.WHITENERS:
                shape = (padded(shape[0]), padded(shape[1]))
            elif key != "col":  # (K, rows), along the axis that is not padded
                shape = (*shape[:-1], padded(shape[-1]))
            result[f"{name}.{key}"] = Segment(at, shape, flip)
            at += math.prod(shape)
    return result


def in_order(shapes: dict[str, tuple[int, ...]], transposed: bool) -> list[tuple[str, tuple[int, ...]]]:
    """The arrays of a weight in the order of its segment: as in the state, but with the whitener of its rows there first."""
    sides = [key for key in (whiteners.RIGHT, whiteners.LEFT) if key in shapes]
    last = sides if transposed else sides[::-1]
    return [(key, shapes[key]) for key in [*(key for key in shapes if key not in last), *last]]


def table_of(family: Family) -> np.ndarray:
    """The weights of a family as the rows (P, 6) that `kernels.step_all` reads."""
    of_state, of_gradient, table = segments(family, whole=True), segments(family, whole=False), []
    for name, shape in family.shapes.items():
        rows, cols = held(shape)
        kind = ADAM if name in family.by_adam else MATRIX if len(shape) == 2 else VECTOR
        table.append((kind, of_state[f"{name}.weight"].at, of_gradient[f"{name}.weight"].at, rows, cols, padded(cols)))
    return np.array(table, np.int64)


def pack(layout: dict[str, Segment], state: Arrays) -> np.ndarray:
    """The arrays as one row of float32 per unroll; zeros in the padding and where the state has none."""
    last = max(layout.values(), key=lambda segment: segment.at)
    packed = np.zeros((len(next(iter(state.values()))), last.at + math.prod(last.shape)), np.float32)
    for key, view in views(layout, packed, state).items():
        view[...] = state[key]
    return packed


def views(layout: dict[str, Segment], packed: np.ndarray, state: Arrays) -> dict[str, np.ndarray]:
    """The packed rows as arrays of the state's shapes, without the padding."""
    result = {}
    for key, x in state.items():
        segment = layout[key]
        view = packed[:, segment.at : segment.at + math.prod(segment.shape)].reshape(-1, *segment.shape)
        rows, cols = x.shape[:-3:-1] if segment.transposed else x.shape[-2:]
        view = view[..., :rows, :cols]
        result[key] = view.swapaxes(-1, -2) if segment.transposed else view
    return result


def unroll(
    config: Config, family: Family, state: Arrays, theta: np.ndarray, truncation: Truncation, expert: Expert | None = None
) -> np.ndarray:
    """As `celo2.metatrain.engine.unroll`."""
    layout, of_weights, table = segments(family, whole=True), segments(family, whole=False), table_of(family)
    packed, steps = pack(layout, state), truncation.rows.shape[1]
    fresh = pack(layout, truncation.fresh) if (truncation.reset_at < steps).any() else packed
    before, after = (pack(of_weights, by_key(s)) for s in (truncation.scale_before, truncation.scale_after))
    losses = np.full((len(theta), steps), np.nan, np.float32)
    terms = np.zeros((len(theta), steps, 2), np.float32) if expert is None else expert.terms
    unroll_one, arrays = kernel(family.data.kind), tuple(x.ravel() for x in family.data.arrays)
    sizes, copies = sizes_of(family), len(theta) // len(truncation.rows)

    def run(u: int) -> None:
        n = u // copies
        count = steps if truncation.steps is None else truncation.steps[n]
        unroll_one(
            arrays, sizes, truncation.rows[n, :count], truncation.rate[n], truncation.reset_at[n], before[n], after[n], fresh[u],
            table, packed[u], losses[u], terms[u], update_of(config, family, theta[u], expert),
        )  # fmt: skip

    with ThreadPoolExecutor(config.engine.threads or os.cpu_count()) as pool:
        list(pool.map(run, range(len(theta))))
    for key, view in views(layout, packed, state).items():
        state[key][...] = view
    return losses


def sizes_of(family: Family) -> transformer.Sizes:
    """The sizes of a text family; of images, where nothing reads them, those of a small text."""
    options = family.options
    if isinstance(options, Images):
        return transformer.sizes_of(1, 16, 16, 1)
    return transformer.sizes_of(options.sequences, options.context, options.width, options.heads)


def update_of(config: Config, family: Family, theta: np.ndarray, expert: Expert | None) -> Update:
    """How the weights of an unroll with the rule θ (D,) are trained."""
    start, options, clip = start_rule(config), family.options, config.inner.grad_clip

    def rates(decays: tuple[float, float, float]) -> tuple[np.float32, np.float32, np.float32]:
        return np.float32(1 - decays[0]), np.float32(1 - decays[1]), np.float32(1 - decays[2])

    return Update(
        np.ascontiguousarray(theta, np.float32),
        np.empty(0, np.float32) if expert is None else np.ascontiguousarray(expert.theta, np.float32),
        config.rule.variant == "celo2",
        normalizes(config),
        rates(start.momentum_decays),
        np.float32(1 - start.second_moment_decay),
        rates(start.factored_decays),
        np.float32(options.lr),
        np.float32(options.adam_lr),
        np.float32(config.expert.lr),
        np.float32(math.inf if clip is None else clip),
        np.float32(0 if expert is None else expert.forcing),
        np.float32(whitening_of(theta, config)),
        *(np.float32(bound) for bound in step_bounds(config)),
    )


def by_key(weights: Arrays) -> Arrays:
    """`weights`, by their names in the state."""
    return {f"{name}.weight": w for name, w in weights.items()}


@cache
def kernel(kind: str):
    """The compiled unroll of the family of that kind; a hash of its sources is part of its key in the cache on disk."""
    folder = Path(__file__).parent
    files = [*sorted(folder.glob("*.py")), *(folder.parent / f"{module}.py" for module in SOURCES)]
    files += [Path(rules.__file__), Path(orthogonalize.__file__), Path(whiteners.__file__)]
    source = b"".join(file.read_bytes() for file in files)
    return NETWORKS[kind].compiled(hashlib.sha256(source).hexdigest())
