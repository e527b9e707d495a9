"""Bytes that one step of the rule must move between GPU memory and the chip: a lower bound of its time.

Bytes per weight in each pass, with gradient and weight in float32 and the direction u in bfloat16:

| pass            | reads                    | writes      | float32 state | bfloat16 state |
|-----------------|--------------------------|-------------|---------------|----------------|
| `accumulate_`   | g, w, three momenta, v   | momenta, v  | 40            | 24             |
| `factor`        | g, momenta               |             | 16            | 10             |
| `emit_`         | g, w, three momenta, v   | u           | 26            | 18             |
| square norm     | u                        |             | 2             | 2              |
| `apply_`        | w, u                     | w           | 10            | 10             |
| together        |                          |             | 94            | 64             |

A rule that normalizes gradients reads g once more, for its norm: 4 bytes. The passes multiply as they read.

Newton–Schulz is not included: it is bound by arithmetic. The partial sums of a tile of 32 x 128 take 0.17 bytes per weight.
"""


def bytes_moved(
    elements: int, g_bytes: int, w_bytes: int, state_bytes: int, u_bytes: int, normalize_gradient: bool = False
) -> int:
    """Bytes read and written for `elements` weights, given the bytes of one number of g, of w, of an accumulator and of u."""
    scaling = g_bytes if normalize_gradient else 0
    accumulate = g_bytes + w_bytes + 2 * 4 * state_bytes
    factor = g_bytes + 3 * state_bytes
    emit = g_bytes + w_bytes + 4 * state_bytes + u_bytes
    norm, apply = u_bytes, 2 * w_bytes + u_bytes
    return elements * (scaling + accumulate + factor + emit + norm + apply)
