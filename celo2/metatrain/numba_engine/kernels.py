"""The rule on small matrices and vectors in Numba: the mathematics of `celo2.rule`, one unroll at a time, without temporaries.

Legend: a matrix is held with its longer axis as rows (a square one transposed), `rows` × `cols`, each row padded with zeros
to `width`, a multiple of 16. `row` accumulators (3, width) are means over the long axis, `col` (3, rows) over the short one.
A state segment is weight, three momenta, second moment, then row and col, or diag for a vector; then the whiteners of rows and of
columns of a matrix that has them. K decays (3), H hidden (8).

Two sums are factored out. The twelve row and column channels are constant along one axis, so they enter the first layer as
one vector per row and one per column; and a channel's 1 / RMS multiplies its row of first-layer weights, not the channel.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from celo2 import rule
from celo2.metatrain import families
from celo2.metatrain.config import HIDDEN
from celo2.metatrain.numba_engine.products import ONE, OPTIONS, ZERO, newton_schulz_, scale_, sum_of_squares
from celo2.metatrain.numba_engine.simd import (
    LANES,
    accumulate,
    add,
    add_eight,
    broadcast,
    broadcast_eight,
    div,
    floor,
    fma,
    hidden_layer,
    lane_sum,
    larger,
    load,
    load_eight,
    mul,
    output_layer,
    power_of_two,
    smaller,
    splat,
    square_root,
    store,
    sub,
)
from celo2.metatrain.numba_engine.whitening import whiten_
from celo2.metatrain.theta import CHANNELS, STARTS

# The first channel of each group, and where the other weights begin in θ.
FIRST = {group: STARTS[weight] // HIDDEN for group, weight in rule.FIRST_LAYER.items()}
GRADIENT, CLIPPED_GRADIENT, WEIGHT = FIRST["gradient"], FIRST["clipped_gradient"], FIRST["weight"]
MOMENTUM, SCALED_MOMENTUM, FACTORED_MOMENTUM = FIRST["momentum"], FIRST["scaled_momentum"], FIRST["factored_momentum"]
SECOND_MOMENT, SCALE, SCALED_GRADIENT = FIRST["second_moment"], FIRST["scale"], FIRST["scaled_gradient"]
FACTORED_GRADIENT, ROW_MEAN, COLUMN_MEAN = FIRST["factored_gradient"], FIRST["row_mean"], FIRST["column_mean"]
ROW_SCALE, COLUMN_SCALE = FIRST["row_scale"], FIRST["column_scale"]
OF_ELEMENTS = tuple(FIRST[g.name] + k for g in rule.groups_of(rule.ELEMENT, rule.FACTORED) for k in range(g.count))
VECTOR_CHANNELS = sum(group.count for group in rule.CHANNEL_GROUPS if group.in_vectors)  # the first ones
H, OUTPUTS = HIDDEN, rule.OUTPUTS
B0, W1, B1, W2, B2, STEP = (STARTS[name] for name in ("b0", "w1", "b1", "w2", "b2", "step"))

CLIP, SMALL_CLIP = np.float32(rule.GRADIENT_CLIP), np.float32(rule.SMALL_CLIP)
SQUARE_FLOOR, FACTOR_EPS = np.float32(rule.SQUARE_FLOOR), np.float32(rule.FACTOR_EPS)
RSQRT_EPS, RMS_EPS = np.float32(rule.RSQRT_EPS), np.float32(rule.RMS_EPS)
EXP_COEFFICIENTS = tuple(
    np.float32(c) for c in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
)
MATRIX, VECTOR, ADAM = range(3)  # what trains a weight: the rule, the rule on a vector, Adam
ADAM_BETA1, ADAM_BETA2, ADAM_EPS = (np.float32(x) for x in (*families.ADAM_BETAS, families.ADAM_EPS))
TINY, TWO = np.float32(families.TINY), np.float32(2)


class Update(NamedTuple):
    """How every weight of an unroll is trained; numbers are float32.

    Attributes:
        theta: (D,), the rule. expert: (D,) of the rule that it may imitate, or empty.
        orthogonalized, normalized: whether both rules use Newton–Schulz, and first divide a gradient by its RMS.
        momentum, second_moment, factored: 1 - decay, of the three momenta, v, and the three factored second moments.
        lr, adam_lr, expert_lr: peak learning rates.
        clip: largest norm of an inner gradient; inf: any.
        forcing: the share of the expert in a step.
        whitening: how far whiteners move in a step; 0: there are none.
        step_bound, expert_step_bound: largest step size of the rule, and of the expert.
    """

    theta: np.ndarray
    expert: np.ndarray
    orthogonalized: bool
    normalized: bool
    momentum: tuple[np.float32, np.float32, np.float32]
    second_moment: np.float32
    factored: tuple[np.float32, np.float32, np.float32]
    lr: np.float32
    adam_lr: np.float32
    expert_lr: np.float32
    clip: np.float32
    forcing: np.float32
    whitening: np.float32
    step_bound: np.float32
    expert_step_bound: np.float32


@njit(**OPTIONS)
def reciprocal_root(x):
    """1 / sqrt(x)."""
    return div(splat(ONE), square_root(x))


@njit(**OPTIONS)
def exponential(x):
    """e ** x for -60 <= x <= 0, e ** -60 below: nothing becomes denormal. As Cephes' expf: 2 ** n times a polynomial."""
    x = larger(x, splat(np.float32(-60)))
    n = floor(fma(x, splat(np.float32(1.44269504)), splat(np.float32(0.5))))
    r = fma(n, splat(np.float32(-0.693359375)), x)  # ln 2 in two parts
    r = fma(n, splat(np.float32(2.12194440e-4)), r)
    p = splat(EXP_COEFFICIENTS[0])
    for c in EXP_COEFFICIENTS[1:]:
        p = fma(p, r, splat(c))
    return mul(fma(mul(r, r), p, add(r, splat(ONE))), power_of_two(n))


@njit(**OPTIONS)
def moved(x, y, rate):
    """x + rate (y - x)."""
    return fma(splat(rate), sub(y, x), x)


@njit(**OPTIONS)
def clipped(x, bound):
    """x between -bound and bound."""
    return larger(smaller(x, splat(bound)), splat(-bound))


@njit(**OPTIONS)
def lane_mask(mask, width, n):
    """mask (width,) = 1 on the first n lanes, 0 on the padding."""
    for j in range(width):
        mask[j] = ONE if j < n else ZERO


@njit(**OPTIONS)
def accumulate_elementwise(state, at, size, p, g, q, mask, s, sums, update):
    """Steps 1 to 3 on sixteen elements: element p of the segment at `at`, gradient element q. Returns the clipped gradient.

    Stores s = rsqrt(v + eps) at s[q], and adds the squares of the channels that depend on the element alone to sums.
    """
    x = clipped(load(g, q), CLIP)
    store(g, q, x)
    v = moved(load(state, at + 4 * size + p), mul(x, x), update.second_moment)
    store(state, at + 4 * size + p, v)
    r = mul(reciprocal_root(add(v, splat(RSQRT_EPS))), mask)
    store(s, q, r)
    add_square(sums, GRADIENT, x)
    add_square(sums, CLIPPED_GRADIENT, clipped(x, SMALL_CLIP))
    add_square(sums, WEIGHT, load(state, at + p))
    for k in range(3):
        place = at + (1 + k) * size + p
        m = moved(load(state, place), x, update.momentum[k])
        store(state, place, m)
        add_square(sums, MOMENTUM + k, m)
        add_square(sums, SCALED_MOMENTUM + k, mul(m, r))
    add_square(sums, SECOND_MOMENT, v)
    add_square(sums, SCALE, r)
    add_square(sums, SCALED_GRADIENT, mul(x, r))
    return x


@njit(**OPTIONS)
def add_square(sums, channel, x):
    """Add x² to the sixteen partial sums of a channel."""
    store(sums, channel * LANES, fma(x, x, load(sums, channel * LANES)))


@njit(**OPTIONS)
def elementwise_channels(h, state, at, size, p, x, r, scaled):
    """h + what the channels of the element alone add, for sixteen elements with gradient x and r = rsqrt(v + eps)."""
    h = accumulate(h, scaled, GRADIENT * H, 1, x)
    h = accumulate(h, scaled, CLIPPED_GRADIENT * H, 1, clipped(x, SMALL_CLIP))
    h = accumulate(h, scaled, WEIGHT * H, 1, load(state, at + p))
    for k in range(3):
        m = load(state, at + (1 + k) * size + p)
        h = accumulate(h, scaled, (MOMENTUM + k) * H, 1, m)
        h = accumulate(h, scaled, (SCALED_MOMENTUM + k) * H, 1, mul(m, r))
    h = accumulate(h, scaled, SECOND_MOMENT * H, 1, load(state, at + 4 * size + p))
    h = accumulate(h, scaled, SCALE * H, 1, r)
    return accumulate(h, scaled, SCALED_GRADIENT * H, 1, mul(x, r))


@njit(**OPTIONS)
def scale_first_layer(theta, scaled, channel, mean_square):
    """scaled[channel] = w0[channel] / RMS of the channel."""
    scale = ONE / np.sqrt(mean_square + RMS_EPS)
    for i in range(channel * H, (channel + 1) * H):
        scaled[i] = theta[i] * scale


@njit(**OPTIONS)
def matrix_factors(theta, state, row_at, col_at, rows, cols, width, mask, row_factor, col_factor, row_term, col_term, scaled):
    """The row and col accumulators as factors (3, width), (3, rows), and as first-layer terms (H, width), (rows, H)."""
    for h in range(H):
        for j in range(width):
            row_term[h * width + j] = theta[B0 + h]
        for i in range(rows):
            col_term[i * H + h] = ZERO
    for k in range(3):
        total = ZERO
        for j in range(cols):
            total += state[row_at + k * width + j]
        mean = total / np.float32(cols) + FACTOR_EPS
        squares, root_squares = ZERO, ZERO
        for j in range(cols):
            x = state[row_at + k * width + j]
            row_factor[k * width + j] = ONE / np.sqrt(max(x / mean, FACTOR_EPS))
            squares += x * x
            root_squares += ONE / (x + RSQRT_EPS)
        scale_first_layer(theta, scaled, ROW_MEAN + k, squares / np.float32(cols))
        scale_first_layer(theta, scaled, ROW_SCALE + k, root_squares / np.float32(cols))
        squares, root_squares = ZERO, ZERO
        for i in range(rows):
            x = state[col_at + k * rows + i]
            col_factor[k * rows + i] = ONE / np.sqrt(max(x, FACTOR_EPS))
            squares += x * x
            root_squares += ONE / (x + RSQRT_EPS)
        scale_first_layer(theta, scaled, COLUMN_MEAN + k, squares / np.float32(rows))
        scale_first_layer(theta, scaled, COLUMN_SCALE + k, root_squares / np.float32(rows))
        for j in range(0, width, LANES):
            x = load(state, row_at + k * width + j)
            r = reciprocal_root(add(x, splat(RSQRT_EPS)))
            for h in range(H):
                t = fma(x, broadcast(scaled, (ROW_MEAN + k) * H + h), load(row_term, h * width + j))
                store(row_term, h * width + j, fma(r, broadcast(scaled, (ROW_SCALE + k) * H + h), t))
        for i in range(rows):
            x = state[col_at + k * rows + i]
            r = ONE / np.sqrt(x + RSQRT_EPS)
            for h in range(H):
                col_term[i * H + h] += scaled[(COLUMN_MEAN + k) * H + h] * x + scaled[(COLUMN_SCALE + k) * H + h] * r


@njit(**OPTIONS)
def accumulate_matrix(state, at, g, rows, cols, width, s, sums, update):
    """Steps 1 to 4 for one matrix: moves its accumulators at `at` of `state`; s (rows, width) and sums as `matrix_direction`."""
    size = rows * width
    row_at, col_at = at + 5 * size, at + 5 * size + 3 * width
    mask, row_sum = np.empty(width, np.float32), np.zeros(width, np.float32)
    lane_mask(mask, width, cols)
    sums[:] = ZERO
    for i in range(rows):
        col_sum = splat(ZERO)
        for j in range(0, width, LANES):
            p = i * width + j
            x = accumulate_elementwise(state, at, size, p, g, p, load(mask, j), s, sums, update)
            square = mul(fma(x, x, splat(SQUARE_FLOOR)), load(mask, j))
            store(row_sum, j, add(load(row_sum, j), square))
            col_sum = add(col_sum, square)
        mean = lane_sum(col_sum) / np.float32(cols)
        for k in range(3):
            state[col_at + k * rows + i] += update.factored[k] * (mean - state[col_at + k * rows + i])
    for k in range(3):
        for j in range(width):
            state[row_at + k * width + j] += update.factored[k] * (row_sum[j] / np.float32(rows) - state[row_at + k * width + j])


@njit(**OPTIONS)
def matrix_direction(theta, state, at, g, u, rows, cols, width, s, sums):
    """Steps 5 to 7 for one matrix with moved accumulators at `at` of `state`: the direction goes into u (rows, width).

    s: rsqrt(v + eps). sums: the squares of the elementwise channels; those of the factored ones are added.
    """
    size, n = rows * width, np.float32(rows * cols)
    row_at, col_at = at + 5 * size, at + 5 * size + 3 * width
    mask = np.empty(width, np.float32)
    row_factor, col_factor = np.zeros(3 * width, np.float32), np.empty(3 * rows, np.float32)
    row_term, col_term = np.empty(H * width, np.float32), np.empty(H * rows, np.float32)
    scaled = np.empty(CHANNELS * H, np.float32)
    lane_mask(mask, width, cols)
    for k in range(3):
        store(sums, (FACTORED_GRADIENT + k) * LANES, splat(ZERO))
        store(sums, (FACTORED_MOMENTUM + k) * LANES, splat(ZERO))

    matrix_factors(theta, state, row_at, col_at, rows, cols, width, mask, row_factor, col_factor, row_term, col_term, scaled)
    for i in range(rows):
        for j in range(0, width, LANES):
            p = i * width + j
            x = load(g, p)
            for k in range(3):
                f = mul(load(row_factor, k * width + j), broadcast(col_factor, k * rows + i))
                add_square(sums, FACTORED_GRADIENT + k, mul(x, f))
                add_square(sums, FACTORED_MOMENTUM + k, mul(load(state, at + (1 + k) * size + p), f))
    for c in OF_ELEMENTS:
        scale_first_layer(theta, scaled, c, lane_sum(load(sums, c * LANES)) / n)

    for i in range(rows):
        for j in range(0, width, LANES):
            p = i * width + j
            x = load(g, p)
            h = add_eight(load_eight(row_term, j, width), broadcast_eight(col_term, i * H, 1))
            h = elementwise_channels(h, state, at, size, p, x, load(s, p), scaled)
            for k in range(3):
                f = mul(load(row_factor, k * width + j), broadcast(col_factor, k * rows + i))
                h = accumulate(h, scaled, (FACTORED_GRADIENT + k) * H, 1, mul(x, f))
                h = accumulate(h, scaled, (FACTORED_MOMENTUM + k) * H, 1, mul(load(state, at + (1 + k) * size + p), f))
            store(u, p, mul(output_layer(hidden_layer(h, theta, W1, B1), theta, W2, OUTPUTS, B2), load(mask, j)))


@njit(**OPTIONS)
def step_size_of(theta, sums, n, update, bound):
    """The RMS of an update of n elements: `celo2.rule.step_size_of`, from the sums of squared channels."""
    g, logarithm = lane_sum(load(sums, GRADIENT * LANES)) / n, theta[STEP + 3]
    for k in range(3 if g > SQUARE_FLOOR else 0):
        noise = update.momentum[k] / (TWO - update.momentum[k])
        ratio = (lane_sum(load(sums, (MOMENTUM + k) * LANES)) / n + SQUARE_FLOOR) / (g + SQUARE_FLOOR) / noise
        logarithm += theta[STEP + k] * np.log(min(max(ratio, noise), ONE / noise)) / TWO
    return min(np.exp(logarithm), bound)


@njit(**OPTIONS)
def step_matrix(state, at, g, u, rows, cols, width, lr, expert_lr, update, sums):
    """One step of the rule on a matrix: W <- W - lr u, u of the step size as its RMS. `u` is scratch; sums as `step_towards`."""
    size = rows * width
    s, squares = np.empty(size, np.float32), np.empty(CHANNELS * LANES, np.float32)
    accumulate_matrix(state, at, g, rows, cols, width, s, squares, update)
    lr *= step_size_of(update.theta, squares, np.float32(rows * cols), update, update.step_bound)
    matrix_direction(update.theta, state, at, g, u, rows, cols, width, s, squares)
    if update.whitening > ZERO:
        whiten_(u, state, at + 5 * size + 3 * (width + rows), rows, cols, width, update.whitening)
    if update.orthogonalized:
        newton_schulz_(u, rows, width)
    if len(update.expert) == 0:
        subtract_normalized(state, at, u, size, rows * cols, lr)
        return
    e = np.empty(size, np.float32)
    expert_lr *= step_size_of(update.expert, squares, np.float32(rows * cols), update, update.expert_step_bound)
    matrix_direction(update.expert, state, at, g, e, rows, cols, width, s, squares)
    if update.orthogonalized:
        newton_schulz_(e, rows, width)
    step_towards(state, at, u, e, size, rows * cols, lr, expert_lr, update.forcing, sums)


@njit(**OPTIONS)
def rate_of(u, size, n, lr):
    """lr / RMS of u over its n elements: step 9."""
    return lr / np.sqrt(sum_of_squares(u, size) / np.float32(n) + RMS_EPS)


@njit(**OPTIONS)
def subtract_normalized(state, at, u, size, n, lr):
    """Step 9 and the step itself: the weight loses lr times u divided by its RMS over n elements."""
    rate = splat(-rate_of(u, size, n, lr))
    for i in range(0, size, LANES):
        store(state, at + i, fma(rate, load(u, i), load(state, at + i)))


@njit(**OPTIONS)
def step_towards(state, at, u, e, size, n, lr, expert_lr, forcing, sums):
    """As `subtract_normalized`, but the share `forcing` of the step is that of the expert, with direction e.

    Adds to sums (5, 16) of the steps that both would take: products, squares of the rule's and of the expert's, differences of
    absolute values; and n.
    """
    rate, expert_rate = splat(rate_of(u, size, n, lr)), splat(rate_of(e, size, n, expert_lr))
    own, share = splat(forcing - ONE), splat(-forcing)
    for i in range(0, size, LANES):
        x, y = mul(rate, load(u, i)), mul(expert_rate, load(e, i))
        store(state, at + i, fma(own, x, fma(share, y, load(state, at + i))))
        difference = sub(larger(x, sub(splat(ZERO), x)), larger(y, sub(splat(ZERO), y)))
        store(sums, 0, fma(x, y, load(sums, 0)))
        store(sums, LANES, fma(x, x, load(sums, LANES)))
        store(sums, 2 * LANES, fma(y, y, load(sums, 2 * LANES)))
        store(sums, 3 * LANES, add(larger(difference, sub(splat(ZERO), difference)), load(sums, 3 * LANES)))
    sums[4 * LANES] += n


@njit(**OPTIONS)
def vector_direction(theta, state, at, g, u, n, width, s, sums):
    """As `matrix_direction` for a vector of n elements (Celo2-base): the channels of vectors, full accumulators."""
    mask, scaled = np.empty(width, np.float32), np.empty(VECTOR_CHANNELS * H, np.float32)
    factor = np.empty(3 * width, np.float32)
    lane_mask(mask, width, n)
    for k in range(3):
        store(sums, (FACTORED_GRADIENT + k) * LANES, splat(ZERO))
    for j in range(0, width, LANES):
        for k in range(3):
            d = load(state, at + (5 + k) * width + j)
            f = reciprocal_root(larger(add(d, splat(FACTOR_EPS)), splat(FACTOR_EPS)))
            store(factor, k * width + j, f)
            add_square(sums, FACTORED_GRADIENT + k, mul(load(g, j), f))
    for c in range(VECTOR_CHANNELS):
        scale_first_layer(theta, scaled, c, lane_sum(load(sums, c * LANES)) / np.float32(n))
    for j in range(0, width, LANES):
        x = load(g, j)
        h = elementwise_channels(broadcast_eight(theta, B0, 1), state, at, width, j, x, load(s, j), scaled)
        for k in range(3):
            h = accumulate(h, scaled, (FACTORED_GRADIENT + k) * H, 1, mul(x, load(factor, k * width + j)))
        store(u, j, mul(output_layer(hidden_layer(h, theta, W1, B1), theta, W2, OUTPUTS, B2), load(mask, j)))


@njit(**OPTIONS)
def step_vector(state, at, g, n, width, lr, expert_lr, update, sums):
    """One step of the rule on a vector of n elements, as `step_matrix`."""
    mask, s, u = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.float32)
    squares = np.zeros(VECTOR_CHANNELS * LANES, np.float32)
    lane_mask(mask, width, n)
    for j in range(0, width, LANES):
        x = accumulate_elementwise(state, at, width, j, g, j, load(mask, j), s, squares, update)
        for k in range(3):
            place = at + (5 + k) * width + j
            store(state, place, moved(load(state, place), fma(x, x, splat(SQUARE_FLOOR)), update.factored[k]))
    lr *= step_size_of(update.theta, squares, np.float32(n), update, update.step_bound)
    vector_direction(update.theta, state, at, g, u, n, width, s, squares)
    if len(update.expert) == 0:
        subtract_normalized(state, at, u, width, n, lr)
        return
    e = np.empty(width, np.float32)
    expert_lr *= step_size_of(update.expert, squares, np.float32(n), update, update.expert_step_bound)
    vector_direction(update.expert, state, at, g, e, n, width, s, squares)
    step_towards(state, at, u, e, width, n, lr, expert_lr, update.forcing, sums)


@njit(**OPTIONS)
def step_adam(state, at, g, width, lr):
    """One step of Adam as published for biases: epsilon inside the root, no bias correction. Segment: weight, m, v."""
    for j in range(at, at + width):
        x = g[j - at]
        state[j + width] = ADAM_BETA1 * state[j + width] + (ONE - ADAM_BETA1) * x
        state[j + 2 * width] = ADAM_BETA2 * state[j + 2 * width] + (ONE - ADAM_BETA2) * x * x
        state[j] -= lr * state[j + width] / np.sqrt(state[j + 2 * width] + ADAM_EPS)


@njit(**OPTIONS)
def multiply(a, a_at, b, b_at, c, c_at, size):
    """c = a * b on `size` elements from the three offsets."""
    for i in range(0, size, LANES):
        store(c, c_at + i, mul(load(a, a_at + i), load(b, b_at + i)))


@njit(**OPTIONS)
def scaled_weights(table, scale, state, w):
    """w = scale * weight, for the weights of `table` (see `step_all`); scale and w are packed like a gradient."""
    for p in range(len(table)):
        _, at, g_at, rows, _, width = table[p]
        multiply(scale, g_at, state, at, w, g_at, rows * width)


@njit(**OPTIONS)
def step_all(table, scale, state, g, u, rate, update, terms):
    """One step of every weight with packed gradient g in the scaled weights. `u` is scratch as large as the largest weight.

    A row of `table` (P, 6), int64, is one weight: what trains it (MATRIX, VECTOR or ADAM), offset of its segment in the state,
    offset in g, rows, columns, width. `rate` multiplies all learning rates. With an expert, terms (2,) becomes 1 - cosine of its
    step and the rule's, and the mean difference of their absolute values.
    """
    multiply(scale, 0, g, 0, g, 0, len(g))
    norm = np.sqrt(sum_of_squares(g, len(g)))
    if norm > update.clip:
        scale_(g, len(g), update.clip / norm)
    sums = np.zeros(5 * LANES, np.float32)
    for p in range(len(table)):
        kind, at, g_at, rows, cols, width = table[p]
        size = rows * width
        own = g[g_at : g_at + size]
        if kind == ADAM:
            step_adam(state, at, own, size, rate * update.adam_lr)
            continue
        if update.normalized:
            scale_(own, size, ONE / np.sqrt(sum_of_squares(own, size) / np.float32(rows * cols) + SQUARE_FLOOR))
        lr, expert_lr = rate * update.lr, rate * update.expert_lr
        if kind == MATRIX:
            step_matrix(state, at, own, u, rows, cols, width, lr, expert_lr, update, sums)
        else:
            step_vector(state, at, own, cols, width, lr, expert_lr, update, sums)
    if len(update.expert):
        product, squares, of_expert = lane_sum(load(sums, 0)), lane_sum(load(sums, LANES)), lane_sum(load(sums, 2 * LANES))
        terms[0] = ONE - product / (np.sqrt(squares) * np.sqrt(of_expert) + TINY)
        terms[1] = lane_sum(load(sums, 3 * LANES)) / sums[4 * LANES]
