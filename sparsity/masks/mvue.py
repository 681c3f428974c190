"""Unbiased N:M estimates, for gradients that a matmul reads sparse."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from sparsity.masks.nm import Axis, join_groups, split_groups
from sparsity.numbers.rounding import INFINITY, MAGNITUDE, bits_of, lift, power, split


def mvue(x: jax.Array, n: int, m: int, key: Any, axis: Axis = -1) -> jax.Array:
    """An unbiased estimate of x with at most n nonzeros in every m, of the least variance there is.

    An entry that is kept with probability p must become x / p on average, so its second moment is
    x^2 / p at least; their sum under sum(p) <= n is least where p = min(1, |x| / t), t being such
    that the p add up to n. One uniform number a group draws the entries (systematic sampling), of
    which exactly n are kept where as many are not 0: each becomes sign(x) max(|x|, t). For 1:2 and
    2:4 this is the estimator of Chmiel et al., "Minimum Variance Unbiased N:M Sparsity for the
    Neural Gradients", ICLR 2023 (arXiv:2203.10991): of 1:2, a is kept with probability
    |a| / (|a| + |b|) and becomes sign(a) (|a| + |b|).

    Args:
      x: floating. A group that is not finite is NaN in the estimate.
      n: entries kept of a group.
      m: the size of a group.
      key: of `jax.random`; the same gives the same estimate.
      axis: as in `nm_mask`.

    Returns:
      Of the shape and dtype of x, computed in float32; a lower precision rounds the estimate, and
      a t below the least normal number may become 0.

    Raises:
      ValueError: n is not in 1 .. m, m does not divide the axis, the axes are not adjacent, or x is
        not floating.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x of {x.dtype}: an estimate is of a floating array")
    groups, at = split_groups(x, m, axis, n=n)
    found: jax.Array = _mvue(groups, n, at, key)
    return join_groups(found, x)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _mvue(groups: jax.Array, n: int, at: int, key: Any) -> jax.Array:
    bits = bits_of(groups.astype(jnp.float32)) & MAGNITUDE
    greatest = jnp.max(bits, axis=at, keepdims=True)  # of NaN the greatest
    _, exponent = split(jnp.maximum(greatest, 1))
    unit = lift(bits, exponent)  # below 2: no sum overflows, no number is lost
    t = _threshold(unit, n, at)
    p = jnp.minimum(unit / jnp.where(t > 0, t, 1), 1)
    p = jnp.where(t > 0, p, (unit > 0).astype(jnp.float32))  # no more than n that are not 0
    upto = jnp.cumsum(p, axis=at)
    total = jax.lax.slice_in_dim(upto, p.shape[at] - 1, p.shape[at], axis=at)
    # The p add up to an integer, but for rounding.
    upto = upto * (jnp.round(total) / jnp.where(total > 0, total, 1))
    upto = jnp.minimum(upto, jnp.round(total))
    before = jnp.concatenate(
        [jnp.zeros_like(total), jax.lax.slice_in_dim(upto, 0, p.shape[at] - 1, axis=at)], axis=at
    )
    u = jax.random.uniform(key, total.shape, jnp.float32)
    kept = jnp.ceil(upto - u) > jnp.ceil(before - u)  # an integer + u lies between
    half = exponent >> 1
    shared = jnp.sign(groups) * (t * power(half) * power(exponent - half)).astype(groups.dtype)
    found = jnp.where(kept, jnp.where(p < 1, shared, groups), 0)
    return jnp.where(greatest < INFINITY, found, jnp.nan)


def _threshold(unit: jax.Array, n: int, at: int) -> jax.Array:
    """t with sum min(1, unit / t) = n; 0 where no more than n of a group are not 0."""
    m = unit.shape[at]
    order = jnp.sort(unit, axis=at)  # the least first, whose sums lose the least
    below = jnp.cumsum(order, axis=at)
    t = jnp.zeros_like(jax.lax.slice_in_dim(unit, 0, 1, axis=at))
    for whole in range(n):  # the so many greatest are kept for sure, the others share n - whole
        rest = jax.lax.slice_in_dim(below, m - whole - 1, m - whole, axis=at) / (n - whole)
        largest = jax.lax.slice_in_dim(order, m - whole - 1, m - whole, axis=at)
        # The first for which no other is to be kept with a probability over 1.
        t = jnp.where((t == 0) & (largest <= rest), rest, t)
    return t
