"""Arithmetic whose bits do not depend on how a compiler lays out its loops.

Compilers also make a division by what is broadcast a product with its inverse, in some shapes; so
here inverses are written out.
"""

import jax
import jax.numpy as jnp
import numpy as np


def rounded(product: jax.Array) -> jax.Array:
    """A product before it is added to anything, rounded to its dtype.

    Compilers fuse a product into the addition after it, without rounding in between, in some loops
    (wide ones) and not in others (their remainders): the bits would be those of the shape. None
    sees through a comparison.
    """
    return jnp.where(product == product, product, jnp.nan)


def mean_of_columns(x: jax.Array) -> jax.Array:
    """Means over the last axis, as a binary tree of additions, [..., D] -> [...]."""
    columns = x.shape[-1]
    size = 1 << (columns - 1).bit_length()
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - columns)])
    while size > 1:
        size //= 2
        x = x[..., :size] + x[..., size:]
    return x[..., 0] * np.float32(1 / columns)


def power(base: float, exponent: jax.Array) -> jax.Array:
    """base^exponent for whole exponents from 0 to 2^24, float32 of their shape, by squares."""
    bits = exponent.astype(jnp.int32)
    result = jnp.ones(bits.shape, jnp.float32)
    for i in range(25):
        factor = np.float32(float(base) ** (2**i))
        result = result * jnp.where(bits >> i & 1, factor, np.float32(1))
    return result
