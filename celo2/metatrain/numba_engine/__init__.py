"""The unroll compiled by Numba for CPUs: the numbers of `celo2.metatrain.engine` to within rounding, about ten times as fast."""
