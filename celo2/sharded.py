"""The rule on matrices that are split over ranks.

The rule is elementwise except for four sums over a matrix, which need a few numbers of every rank, and Newton–Schulz, which
needs the whole direction. So the accumulators stay where they are; `Split.update` completes the sums of all split matrices in
three all-reduces (four for a rule that normalizes gradients) and sends the direction alone, in the dtype of Newton–Schulz, to
one owner for each matrix and back. Matrices that lie whole on a rank are no part of this.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from celo2.backend import Backend, apply_
from celo2.blocked import Stack, gradient_scale, gradient_squares, move_means_, scaled
from celo2.distributed.collectives import add_up_, swap
from celo2.layout import Layout, Region, regions
from celo2.orthogonalize import newton_schulz_flops
from celo2.rule import GRADIENT_CLIP, RMS_EPS, Rule, channels, mlp
from celo2.rule import accumulate_ as accumulate_vector_

Runs = list[tuple[int, int]]  # (start, stop) of every rank of a process group

# Newton–Schulz takes matrices of one shape together, up to this many elements or one matrix. CPU: 64 MB in float32. Elsewhere
# 256 MB in bfloat16: eight matrices of 2048 x 8192, whose 576 tiles of X Xᵀ (`celo2.kernels.symmetric`) keep 132
# multiprocessors busy to 87 %; the 72 tiles of one matrix, only to 55 %.
BATCH_ELEMENTS = {"cpu": 1 << 24}
DEFAULT_BATCH_ELEMENTS = 1 << 27


def batch_elements(device: torch.device) -> int:
    """Elements that Newton–Schulz takes at once on `device`."""
    return BATCH_ELEMENTS.get(device.type, DEFAULT_BATCH_ELEMENTS)


@dataclass
class SplitMatrix:
    """One matrix (R, C) that no rank holds whole: which regions of it every rank holds, in the order in which they travel."""

    rows: int
    cols: int
    held: list[list[Region]]
    owner: int = 0  # the rank that orthogonalizes it

    def elements(self, rank: int) -> int:
        """Elements of it on `rank`."""
        return sum(size(region) for region in self.held[rank])


def size(region: Region) -> int:
    """Elements of a region of one matrix."""
    return (region.rows.stop - region.rows.start) * (region.cols.stop - region.cols.start)


def is_full(region: Region, rows: int, cols: int) -> bool:
    """Whether a region holds whole matrices (rows, cols)."""
    return region.rows == slice(0, rows) and region.cols == slice(0, cols)


def split_matrices(
    shape: tuple[int, ...], stack: tuple[int, int, int], layout: Layout | None, runs: Runs
) -> tuple[dict[int, SplitMatrix], list[int]]:
    """The matrices of a parameter that are split, by their number in its stack (N, R, C), and how many each rank holds whole."""
    n_matrices, rows, cols = stack
    held: dict[int, list[list[Region]]] = {n: [[] for _ in runs] for n in range(n_matrices)}
    whole = [0] * len(runs)
    for rank, (start, stop) in enumerate(runs):
        for region in regions(shape, layout, start, stop):
            for n in range(region.matrices.start, region.matrices.stop):
                if is_full(region, rows, cols):
                    del held[n]
                    whole[rank] += 1
                else:
                    held[n][rank].append(region.of_matrix(n))
    return {n: SplitMatrix(rows, cols, regions_of) for n, regions_of in held.items()}, whole


def assign_owners(matrices: Sequence[SplitMatrix], loads: list[float]) -> None:
    """Give every matrix an owner, the dearest first, each to the rank with the least to do; `loads` is what ranks do already."""
    for matrix in sorted(matrices, key=lambda m: -newton_schulz_flops(m.rows, m.cols)):
        matrix.owner = min(range(len(loads)), key=loads.__getitem__)
        loads[matrix.owner] += newton_schulz_flops(matrix.rows, matrix.cols)


def orthogonalize_split(
    matrices: Sequence[SplitMatrix],
    pieces: Sequence[Sequence[Tensor]],
    empty: Tensor,
    group: dist.ProcessGroup,
    orthogonalize: Callable[[Tensor], Tensor],
) -> list[list[Tensor]]:
    """`orthogonalize` on matrices of which every rank of `group` holds `pieces` (matrix by matrix, in the order of its regions).

    `empty` (0,) has the dtype and device of the pieces, of which a rank may have none. -> pieces of the results, like those
    that came in. Every matrix is worked on once, by its owner.
    """
    me, world = dist.get_rank(group), dist.get_world_size(group)
    owned = [m for m in matrices if m.owner == me]
    outgoing = [
        [p.reshape(-1) for m, parts in zip(matrices, pieces, strict=True) if m.owner == rank for p in parts]
        for rank in range(world)
    ]
    incoming = [sum(m.elements(rank) for m in owned) for rank in range(world)]
    received = swap(joined(outgoing, empty), incoming, group)
    arrived = [t.split([size(r) for m in owned for r in m.held[rank]]) for rank, t in enumerate(received)]
    results = gathered_orthogonalize(owned, arrived, orthogonalize)

    outgoing = [
        [u[r.rows, r.cols].reshape(-1) for m, u in zip(owned, results, strict=True) for r in m.held[rank]]
        for rank in range(world)
    ]
    incoming = [sum(m.elements(me) for m in matrices if m.owner == rank) for rank in range(world)]
    back = swap(joined(outgoing, empty), incoming, group)
    streams = [iter(t.split([size(r) for m in matrices if m.owner == rank for r in m.held[me]])) for rank, t in enumerate(back)]
    return [[next(streams[m.owner]).view(p.shape) for p in parts] for m, parts in zip(matrices, pieces, strict=True)]


def joined(parts: list[list[Tensor]], empty: Tensor) -> list[Tensor]:
    """One vector for each list of vectors."""
    return [torch.cat(tensors) if tensors else empty for tensors in parts]


def gathered_orthogonalize(
    owned: list[SplitMatrix], arrived: list[Sequence[Tensor]], orthogonalize: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Put the matrices together from what every rank sent, in order, and orthogonalize those of one shape together."""
    streams = [iter(parts) for parts in arrived]
    whole: list[Tensor] = []
    by_shape: dict[tuple[int, int], list[list[int]]] = defaultdict(lambda: [[]])
    for i, matrix in enumerate(owned):
        u = None
        for rank, regions_of in enumerate(matrix.held):
            for region in regions_of:
                part = next(streams[rank])
                if u is None:
                    u = torch.empty(matrix.rows, matrix.cols, dtype=part.dtype, device=part.device)
                u[region.rows, region.cols] = part.view(region.rows.stop - region.rows.start, -1)
        whole.append(u)
        batches = by_shape[matrix.rows, matrix.cols]
        if batches[-1] and (len(batches[-1]) + 1) * matrix.rows * matrix.cols > batch_elements(u.device):
            batches.append([])
        batches[-1].append(i)
    for batches in by_shape.values():
        for batch in batches:
            for i, u in zip(batch, orthogonalize(torch.stack([whole[i] for i in batch])), strict=True):
                whole[i] = u
    return whole


@dataclass
class Part:
    """A split matrix with what is here of its accumulators."""

    matrix: SplitMatrix
    stack: Stack  # of one matrix
    options: dict[str, Any]  # the param group
    orthogonalize: bool


@dataclass
class VectorPart:
    """A vector (numel) that the rule updates, with what is here of it: g, w (n,) and its accumulators (·, n)."""

    g: Tensor
    w: Tensor
    state: dict[str, Tensor]
    numel: int
    options: dict[str, Any]


@dataclass
class Split:
    """Everything that one process group has to update together in one step."""

    group: dist.ProcessGroup
    parts: list[Part] = field(default_factory=list)
    vectors: list[VectorPart] = field(default_factory=list)

    def update(self, rule: Rule, ns_dtype: torch.dtype, backend: Backend) -> None:
        """Steps 0 to 10 of the rule on everything that is here."""
        device = self.parts[0].stack.row.device if self.parts else self.vectors[0].g.device
        scales, vector_scales = self.gradient_scales(rule)  # applied in every pass anew, so that one scaled copy exists at a time
        sums = [backend.accumulate_(rule, scaled(part.stack, scale)) for part, scale in zip(self.parts, scales, strict=True)]
        add_up_(sums, self.group)
        for part, total in zip(self.parts, sums, strict=True):
            move_means_(rule, part.stack, total)

        factored = [backend.factor(scaled(part.stack, scale)) for part, scale in zip(self.parts, scales, strict=True)]
        inputs = [vector_channels(rule, vector, scale) for vector, scale in zip(self.vectors, vector_scales, strict=True)]
        squares = [x.square().sum(1) for x in inputs]
        add_up_([*(s for _, s in factored), *squares], self.group)
        directions: list[list[Tensor]] = []
        for part, scale, total, (factors, factored_sums) in zip(self.parts, scales, sums, factored, strict=True):
            dtype = ns_dtype if part.orthogonalize else torch.float32
            outs = [torch.empty_like(piece.v, dtype=dtype) for piece in part.stack.pieces]
            backend.emit_(rule, scaled(part.stack, scale), total, factors, factored_sums, outs)
            directions.append(outs)
        for vector, x, square in zip(self.vectors, inputs, squares, strict=True):
            directions.append([mlp(rule, x * (square / vector.numel + RMS_EPS).rsqrt()[:, None])])

        chosen = [i for i, part in enumerate(self.parts) if part.orthogonalize]
        if chosen:
            matrices, pieces = [self.parts[i].matrix for i in chosen], [directions[i] for i in chosen]
            empty = torch.empty(0, dtype=ns_dtype, device=device)
            for i, u in zip(chosen, orthogonalize_split(matrices, pieces, empty, self.group, backend.newton_schulz), strict=True):
                directions[i] = u
        norms = torch.zeros(len(directions), device=device)
        for i, parts in enumerate(directions):
            for u in parts:
                norms[i] += torch.linalg.vector_norm(u, dtype=torch.float32).square()
        add_up_([norms], self.group)
        for i, part in enumerate(self.parts):
            scale = (norms[i] / math.prod(part.stack.shape) + RMS_EPS).rsqrt()
            for piece, u in zip(part.stack.pieces, directions[i], strict=True):
                backend.apply_(piece.w, u, scale, part.options)
        for vector, norm, (u,) in zip(self.vectors, norms[len(self.parts) :], directions[len(self.parts) :], strict=True):
            apply_(vector.w, u, (norm / vector.numel + RMS_EPS).rsqrt(), vector.options)

    def gradient_scales(self, rule: Rule) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """1 / RMS of the gradients of parts (1,) and of vectors (); None for each where the rule takes them as they are."""
        n = len(self.parts)
        if not rule.normalize_gradient:
            return [None] * n, [None] * len(self.vectors)
        squares = [*(gradient_squares(p.stack) for p in self.parts), *(v.g.float().square().sum() for v in self.vectors)]
        add_up_(squares, self.group)
        sizes = [*(math.prod(part.stack.shape) for part in self.parts), *(vector.numel for vector in self.vectors)]
        scales = [gradient_scale(square, size) for square, size in zip(squares, sizes, strict=True)]
        return scales[:n], scales[n:]


def vector_channels(rule: Rule, vector: VectorPart, scale: Tensor | None) -> Tensor:
    """Move the accumulators of a vector, whose gradient times `scale` counts; -> its channels (15, n), not normalized."""
    g = vector.g.float() if scale is None else vector.g.float() * scale
    g = g.clamp(-GRADIENT_CLIP, GRADIENT_CLIP)
    accumulate_vector_(vector.state, g, rule, None)
    return torch.cat(channels(vector.state, g, vector.w.float(), None))
