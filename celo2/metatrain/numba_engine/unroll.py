"""The truncated unroll on CPU threads: packs the state for the compiled kernels, runs them, and unpacks it.

Each unroll is one call that runs all T steps in memory of its own, so the result does not depend on the number of threads.
`kernels.py` says how the state is packed.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from celo2 import orthogonalize
from celo2 import rule as rules
from celo2.metatrain import families, tasks
from celo2.metatrain.config import Config
from celo2.metatrain.engine import State, accumulator_shapes, by_adam
from celo2.metatrain.families import Family
from celo2.metatrain.numba_engine import mlp, transformer
from celo2.metatrain.numba_engine.kernels import ADAM, MATRIX, VECTOR
from celo2.metatrain.numba_engine.products import padded
from celo2.metatrain.problems import Truncation, Weights

NETWORKS = {"images": mlp, "text": transformer}
ELEMENTWISE = {"weight", "momentum", "second_moment", "m", "v"}  # what of a matrix's segment has its two axes


@dataclass(frozen=True)
class Segment:
    """Where an array of the state lies in a packed row: its padded shape there, and whether that is a transposed matrix's."""

    at: int
    shape: tuple[int, ...]
    transposed: bool


def held(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a weight as the kernels hold it: the longer axis as rows, a square one transposed, a vector a row."""
    return (max(shape), min(shape)) if len(shape) == 2 else (1, shape[0])


def segments(variant: str, family: Family) -> dict[str, Segment]:
    """The place of each state array of one unroll, in the kernels' order."""
    result, at = {}, 0
    for name, weight in family.shapes.items():
        transposed = len(weight) == 2 and weight[0] <= weight[1]
        for key, shape in {"weight": weight, **accumulator_shapes(variant, family, name)}.items():
            flip = transposed and key in ELEMENTWISE
            shape = (*shape[:-2], *shape[:-3:-1]) if flip else shape
            # `col` (K, rows) alone runs along the axis that is not padded.
            shape = shape if key == "col" else (*shape[:-1], padded(shape[-1]))
            result[f"{name}.{key}"] = Segment(at, shape, flip)
            at += int(np.prod(shape))
    return result


def table_of(variant: str, family: Family) -> np.ndarray:
    """The weights of a family as the rows (P, 6) that `kernels.step_all` reads."""
    layout, table, g_at = segments(variant, family), [], 0
    for name, shape in family.shapes.items():
        rows, cols = held(shape)
        kind = ADAM if by_adam(variant, family, name) else MATRIX if len(shape) == 2 else VECTOR
        table.append((kind, layout[f"{name}.weight"].at, g_at, rows, cols, padded(cols)))
        g_at += rows * padded(cols)
    return np.array(table, np.int64)


def pack(layout: dict[str, Segment], state: State) -> np.ndarray:
    """The state as one row of float32 per unroll, padded with zeros."""
    last = max(layout.values(), key=lambda segment: segment.at)
    packed = np.zeros((len(next(iter(state.values()))), last.at + int(np.prod(last.shape))), np.float32)
    for key, view in views(layout, packed, state).items():
        view[...] = state[key]
    return packed


def views(layout: dict[str, Segment], packed: np.ndarray, state: State) -> dict[str, np.ndarray]:
    """The packed rows as arrays of the state's shapes, without the padding."""
    result = {}
    for key, segment in layout.items():
        view = packed[:, segment.at : segment.at + int(np.prod(segment.shape))].reshape(-1, *segment.shape)
        view = view[..., : state[key].shape[-2 if segment.transposed else -1]]
        result[key] = view.swapaxes(-1, -2) if segment.transposed else view
    return result


def pack_weights(weights: Weights) -> np.ndarray:
    """Scales of all problems (N, weights) in the order of a packed gradient."""
    rows = []
    for x in weights.values():
        flipped = x.swapaxes(-1, -2) if x.ndim == 3 and x.shape[1] <= x.shape[2] else x
        wide = np.zeros((*flipped.shape[:-1], padded(flipped.shape[-1])), np.float32)
        wide[..., : flipped.shape[-1]] = flipped
        rows.append(wide.reshape(len(x), -1))
    return np.concatenate(rows, 1)


def unroll(config: Config, family: Family, state: State, theta: np.ndarray, truncation: Truncation) -> np.ndarray:
    """As `celo2.metatrain.engine.unroll`."""
    layout, table = segments(config.rule.variant, family), table_of(config.rule.variant, family)
    packed = pack(layout, state)
    zeros = {key: np.zeros((len(truncation.rows), *x.shape[1:]), np.float32) for key, x in state.items()}
    fresh = pack(layout, zeros | {f"{name}.weight": w for name, w in truncation.fresh.items()})
    before, after = pack_weights(truncation.scale_before), pack_weights(truncation.scale_after)
    losses = np.empty((len(theta), config.inner.truncation), np.float32)
    theta = np.ascontiguousarray(theta, np.float32)
    unroll_one, arrays = kernel(family.name), tuple(x.ravel() for x in family.arrays)
    flags = config.rule.variant == "celo2", config.rule.normalize_gradient
    rates = np.float32(family.lr), np.float32(family.adam_lr)

    def run(u: int) -> None:
        n = u // 2
        unroll_one(
            arrays, truncation.rows[n], truncation.rate[n], truncation.reset_at[n], before[n], after[n], fresh[n], table,
            theta[u], packed[u], losses[u], *flags, *rates,
        )  # fmt: skip

    with ThreadPoolExecutor(config.engine.threads or os.cpu_count()) as pool:
        list(pool.map(run, range(len(theta))))
    for key, view in views(layout, packed, state).items():
        state[key][...] = view
    return losses


@cache
def kernel(name: str):
    """The compiled unroll of the family of that name; its cache on disk is found by the sources it is made of."""
    shared = [Path(str(module.__file__)) for module in (families, tasks, rules, orthogonalize)]
    source = b"".join(path.read_bytes() for path in (*shared, *sorted(Path(__file__).parent.glob("*.py"))))
    return NETWORKS[name].compiled(hashlib.sha256(source).hexdigest())
