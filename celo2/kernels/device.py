"""The GPU code of the three passes of the rule and of step 10: one program for each tile of a matrix.

Legend: a piece of N matrices has A positions along its major axis and B along its minor axis, the axis along which memory is
contiguous. These are rows and columns, or columns and rows where a parameter stores its matrices transposed. H hidden units,
K = 3 decays. A `view` is a tuple (pointer, strides...) for a field (N, A, B), for the momenta (N, K, A, B), or for values
along one axis (N, F, A).

NaN propagates as in torch: minimum and maximum get an option for it. Each tile writes its sums to its own place, and torch
adds them in a fixed order: no atomics, the same bits in every run.
"""

import triton
import triton.language as tl

from celo2 import rounding, rule
from celo2.blocked import FACTORED_PLACES, LOCAL_PLACES, N_FACTORED, N_LOCAL

GRADIENT_CLIP = tl.constexpr(rule.GRADIENT_CLIP)
SMALL_CLIP = tl.constexpr(rule.SMALL_CLIP)
RSQRT_EPS = tl.constexpr(rule.RSQRT_EPS)
SECOND_MOMENT_SLOT = tl.constexpr(rounding.SECOND_MOMENT_SLOT)
STEP_FACTOR = tl.constexpr(rounding.STEP_FACTOR % (1 << 32))
SLOT_FACTOR = tl.constexpr(rounding.SLOT_FACTOR)
HASH_FACTOR_0 = tl.constexpr(rounding.HASH_FACTORS[0] % (1 << 32))
HASH_FACTOR_1 = tl.constexpr(rounding.HASH_FACTORS[1] % (1 << 32))

# Positions of the local channels, and of the factored channels among themselves; in `emit_kernel` these follow the local ones.
LOCAL = tl.constexpr(N_LOCAL)
FACTORED = tl.constexpr(N_FACTORED)
ELEMENTS = tl.constexpr(N_LOCAL + N_FACTORED)
GRADIENT = tl.constexpr(LOCAL_PLACES["gradient"].start)
CLIPPED_GRADIENT = tl.constexpr(LOCAL_PLACES["clipped_gradient"].start)
WEIGHT = tl.constexpr(LOCAL_PLACES["weight"].start)
MOMENTUM = tl.constexpr(LOCAL_PLACES["momentum"].start)
SECOND_MOMENT = tl.constexpr(LOCAL_PLACES["second_moment"].start)
SCALED_MOMENTUM = tl.constexpr(LOCAL_PLACES["scaled_momentum"].start)
SCALE = tl.constexpr(LOCAL_PLACES["scale"].start)
SCALED_GRADIENT = tl.constexpr(LOCAL_PLACES["scaled_gradient"].start)
FACTORED_GRADIENT = tl.constexpr(FACTORED_PLACES["factored_gradient"].start)
FACTORED_MOMENTUM = tl.constexpr(FACTORED_PLACES["factored_momentum"].start)

# Integers that are only added or multiplied: specialized kernels for 1 or for multiples of 16 would not be faster.
UNSPECIALIZED = ["index_start", "index_a", "index_b"]


@triton.jit
def tile_of(A, B, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr):
    """This program's matrix n, its tile's number in the matrix and along both axes, and the tile's positions a, b, all int64."""
    program = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(B, BLOCK_B)
    per_matrix = tl.cdiv(A, BLOCK_A) * across
    n, tile = program // per_matrix, program % per_matrix
    tile_a, tile_b = tile // across, tile % across
    a = tile_a * BLOCK_A + tl.arange(0, BLOCK_A)
    b = tile_b * BLOCK_B + tl.arange(0, BLOCK_B)
    return n, tile, tile_a, tile_b, a, b


@triton.jit
def at(view, n, a, b):
    """Pointers to the positions a x b of matrix n in a view (N, A, B)."""
    return view[0] + n * view[1] + a[:, None] * view[2] + b[None, :] * view[3]


@triton.jit
def momentum_at(view, n, k: tl.constexpr, a, b):
    """Pointers to the positions a x b of momentum k of matrix n in a view (N, K, A, B)."""
    return view[0] + n * view[1] + tl.full((), k, tl.int64) * view[2] + a[:, None] * view[3] + b[None, :] * view[4]


@triton.jit
def along(view, n, f: tl.constexpr, places, size):
    """Load feature f of matrix n at those of `places` that are below `size`, from a float32 view (N, F, size)."""
    return tl.load(view[0] + n * view[1] + tl.full((), f, tl.int64) * view[2] + places * view[3], mask=places < size, other=0.0)


@triton.jit
def load(pointers, mask):
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def clip(x, limit: tl.constexpr):
    return tl.clamp(x, -limit, limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def load_gradient(g, scale, gate, n, a, b, mask):
    """`celo2.blocked.load_gradient_`: the gradient at the positions a x b, normalized if there is a scale, and clipped."""
    grad = load(at(g, n, a, b), mask)
    if scale is not None:
        grad *= tl.load(scale[0] + n * scale[1])
    if gate is not None:
        grad = tl.where(tl.load(gate) != 0, grad, 0.0)
    return clip(grad, GRADIENT_CLIP)


@triton.jit
def relu(x):
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def noise(index, count, slot: tl.constexpr):
    """`celo2.rounding.noise`, from uint32 index and count."""
    x = index ^ (count * STEP_FACTOR) ^ ((slot * SLOT_FACTOR) % 4294967296)
    x ^= x >> 16
    x *= HASH_FACTOR_0
    x ^= x >> 15
    x *= HASH_FACTOR_1
    x ^= x >> 16
    return x & 0xFFFF


@triton.jit
def is_finite(bits):
    return (bits & 0x7F800000) != 0x7F800000


# Integer arithmetic throughout: converting single numbers from float32 to bfloat16 would run at an eighth of the speed.
@triton.jit
def stochastic_round(x, noise):
    """`celo2.rounding.stochastic_round` of float32 x, a result of arithmetic; returns bits, the upper 16 are the bfloat16."""
    bits = x.to(tl.uint32, bitcast=True)
    nearest = 0x7FFF + ((bits >> 16) & 1)
    return bits + tl.where(is_finite(bits), tl.where(is_finite(bits + noise), noise, nearest), 0)


@triton.jit
def moved(pointers, mask, target, weight, gate, index, count, slot: tl.constexpr):
    """`celo2.rounding.lerp_`: move an accumulator towards `target`, and store it unless the gate skips it; returns float32."""
    old = load(pointers, mask)
    new = old + weight * (target - old)
    if gate is not None:
        mask &= tl.load(gate) != 0
    if count is None:
        tl.store(pointers, new, mask=mask)
        return new
    else:
        bits = stochastic_round(new, noise(index, count, slot))
        tl.store(pointers, (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
        return (bits & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def square_sum(x):
    return tl.sum(x * x)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def accumulate_kernel(
    g,  # views (N, A, B)
    w,
    m,  # view (N, K, A, B)
    v,  # view (N, A, B)
    counts,  # view (N,) of int32, or None
    scale,  # view (N,): factor of the gradients, or None
    gate,  # int32: 0 if the step is skipped; or None
    by_a,  # (N, tiles along B, A): sums of g² over the columns of a tile
    by_b,  # (N, tiles along A, B)
    local,  # (N, tiles, 12): square sums of the local channels
    A,
    B,
    index_start,  # the row-major position of (a, b) in its matrix is index_start + a * index_a + b * index_b
    index_a,
    index_b,
    momentum_weights,  # 1 - decay
    second_moment_weight,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    n, tile, tile_a, tile_b, a, b = tile_of(A, B, BLOCK_A, BLOCK_B)
    mask = (a < A)[:, None] & (b < B)[None, :]
    if counts is not None:
        index = (index_start + a[:, None] * index_a + b[None, :] * index_b).to(tl.uint32)
        count = tl.load(counts[0] + n * counts[1]).to(tl.uint32, bitcast=True)
    else:
        index = None
        count = None
    local += (n * tl.cdiv(A, BLOCK_A) * tl.cdiv(B, BLOCK_B) + tile) * LOCAL

    grad = load_gradient(g, scale, gate, n, a, b, mask)
    square = grad * grad
    tl.store(by_a + (n * tl.cdiv(B, BLOCK_B) + tile_b) * A + a, tl.sum(square, 1), mask=a < A)
    tl.store(by_b + (n * tl.cdiv(A, BLOCK_A) + tile_a) * B + b, tl.sum(square, 0), mask=b < B)
    tl.store(local + GRADIENT, tl.sum(square))
    tl.store(local + CLIPPED_GRADIENT, square_sum(clip(grad, SMALL_CLIP)))
    tl.store(local + WEIGHT, square_sum(load(at(w, n, a, b), mask)))
    second = moved(at(v, n, a, b), mask, square, second_moment_weight, gate, index, count, SECOND_MOMENT_SLOT)
    s = tl.where(mask, tl.rsqrt(second + RSQRT_EPS), 0.0)
    tl.store(local + SECOND_MOMENT, square_sum(second))
    tl.store(local + SCALE, square_sum(s))
    tl.store(local + SCALED_GRADIENT, square_sum(grad * s))
    for k in tl.static_range(3):
        momentum = moved(momentum_at(m, n, k, a, b), mask, grad, momentum_weights[k], gate, index, count, k)
        tl.store(local + MOMENTUM + k, square_sum(momentum))
        tl.store(local + SCALED_MOMENTUM + k, square_sum(momentum * s))


@triton.jit
def factor_kernel(
    g,  # view (N, A, B)
    m,  # view (N, K, A, B)
    scale,  # view (N,), or None
    gate,
    factor_a,  # view (N, K, A)
    factor_b,  # view (N, K, B)
    factored,  # (N, tiles, 6): square sums of the factored channels
    A,
    B,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    n, tile, _, _, a, b = tile_of(A, B, BLOCK_A, BLOCK_B)
    mask = (a < A)[:, None] & (b < B)[None, :]
    factored += (n * tl.cdiv(A, BLOCK_A) * tl.cdiv(B, BLOCK_B) + tile) * FACTORED
    grad = load_gradient(g, scale, gate, n, a, b, mask)
    for k in tl.static_range(3):
        factor = along(factor_a, n, k, a, A)[:, None] * along(factor_b, n, k, b, B)[None, :]
        momentum = load(momentum_at(m, n, k, a, b), mask)
        tl.store(factored + FACTORED_GRADIENT + k, square_sum(grad * factor))
        tl.store(factored + FACTORED_MOMENTUM + k, square_sum(momentum * factor))


@triton.jit
def with_channel(h, x, weights, H: tl.constexpr):
    """Add channel x to the H sums h of the first layer; its weights (H,) begin at `weights`."""
    new = ()
    for j in tl.static_range(H):
        new += (h[j] + x * tl.load(weights + j),)
    return new


# The MLP runs as multiply-adds on the CUDA cores, not by tl.dot: 18 channels x 8 units + 8 x 8 + 8 = 216 fused multiply-adds per
# weight. At 29.6e12 per second (132 multiprocessors x 128 lanes x 1.75 GHz) they take 7.3 ps. With all other instructions (2,704
# for 256 elements, counted in the code for compute capability 9.0) a weight takes 11.4 ps. Its 26 bytes take 6.0 ps at 4.3 TB/s.
# So this pass is bound by arithmetic, by less than a factor of two. Tensor cores would need three TF32 products to keep the
# accuracy of float32 (a single one has an error of 5e-4), on shapes padded to 32 x 16: 1,536 multiply-adds at 2.5e14 per second
# take 6.2 ps, and the channels would have to go through shared memory first. Each channel is added to all H sums as soon as it
# is computed, so that about 18 numbers per element are alive at once, not 18 channels and 8 sums.
@triton.jit
def emit_kernel(
    g,  # views (N, A, B)
    w,
    m,  # view (N, K, A, B)
    v,  # view (N, A, B)
    scale,  # view (N,), or None
    gate,
    factor_a,  # view (N, K, A)
    factor_b,  # view (N, K, B)
    share_a,  # view (N, H, A): share of the first layer from the channels that depend on a alone
    share_b,  # view (N, H, B): the same for b; one of the two includes the bias
    element,  # (N, 18, H): first-layer weights of the local and factored channels, with the normalizers folded in
    layers,  # w1 (H, H), b1 (H,), w2 (H,), b2 (1,), concatenated
    out,  # view (N, A, B)
    A,
    B,
    H: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    n, _, _, _, a, b = tile_of(A, B, BLOCK_A, BLOCK_B)
    mask = (a < A)[:, None] & (b < B)[None, :]
    element += n * ELEMENTS * H
    # All loads come before the first use of a loaded value, so that they overlap.
    grad = load_gradient(g, scale, gate, n, a, b, mask)
    second = load(at(v, n, a, b), mask)
    weight = load(at(w, n, a, b), mask)
    momenta = ()
    for k in tl.static_range(3):
        momenta += (load(momentum_at(m, n, k, a, b), mask),)
    h = ()
    for j in tl.static_range(H):
        h += (along(share_a, n, j, a, A)[:, None] + along(share_b, n, j, b, B)[None, :],)

    s = tl.rsqrt(second + RSQRT_EPS)
    h = with_channel(h, weight, element + WEIGHT * H, H)
    h = with_channel(h, second, element + SECOND_MOMENT * H, H)
    h = with_channel(h, s, element + SCALE * H, H)
    h = with_channel(h, grad, element + GRADIENT * H, H)
    h = with_channel(h, clip(grad, SMALL_CLIP), element + CLIPPED_GRADIENT * H, H)
    h = with_channel(h, grad * s, element + SCALED_GRADIENT * H, H)
    for k in tl.static_range(3):
        factor = along(factor_a, n, k, a, A)[:, None] * along(factor_b, n, k, b, B)[None, :]
        h = with_channel(h, momenta[k], element + (MOMENTUM + k) * H, H)
        h = with_channel(h, momenta[k] * s, element + (SCALED_MOMENTUM + k) * H, H)
        h = with_channel(h, grad * factor, element + (LOCAL + FACTORED_GRADIENT + k) * H, H)
        h = with_channel(h, momenta[k] * factor, element + (LOCAL + FACTORED_MOMENTUM + k) * H, H)

    hidden = ()
    for j in tl.static_range(H):
        hidden += (relu(h[j]),)
    u = tl.load(layers + H * H + 2 * H) + tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    for i in tl.static_range(H):
        unit = tl.load(layers + H * H + i) + hidden[0] * tl.load(layers + i)
        for j in tl.static_range(1, H):
            unit += hidden[j] * tl.load(layers + j * H + i)
        u += relu(unit) * tl.load(layers + H * H + H + i)
    tl.store(at(out, n, a, b), u.to(out[0].dtype.element_ty), mask=mask)


@triton.jit
def apply_kernel(
    w,  # views (N, A, B)
    u,
    scale,  # (N,): 1 / RMS of u
    lr,  # a number, used if lr_pointer is None
    lr_pointer,  # pointer to the learning rate, or None
    weight_decay,
    A,
    B,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    n, _, _, _, a, b = tile_of(A, B, BLOCK_A, BLOCK_B)
    mask = (a < A)[:, None] & (b < B)[None, :]
    rate = lr if lr_pointer is None else tl.load(lr_pointer).to(tl.float32)
    weight = load(at(w, n, a, b), mask)
    update = load(at(u, n, a, b), mask) * tl.load(scale + n)
    weight = weight * (1 - rate * weight_decay) - rate * update
    tl.store(at(w, n, a, b), weight.to(w[0].dtype.element_ty), mask=mask)
