"""Scales of blocks, exact in float32, and the maxima that they are made of."""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from sparsity.numbers.rounding import (
    INFINITY,
    MAGNITUDE,
    bits_of,
    divide,
    float_of,
    lower,
    power,
    split,
)

T = TypeVar("T")


class Scale(NamedTuple):
    """The scale significand * 2^exponent of every block, [.., 1, ..] where entries share it.

    Attributes:
      exponent: int32; for fixed-point elements that of one step.
      significand: float32 in [1, 2), or None for 1.
      zero_point: int32 code of the value zero, for `Int` that is not symmetric.
      nan: bool, where the block is NaN; or None.
      block_scale: NVFP4: float32, the E4M3 scale of the block.
      tensor_scale: NVFP4: float32 scalar.
    """

    exponent: jax.Array
    significand: jax.Array | None = None
    zero_point: jax.Array | None = None
    nan: jax.Array | None = None
    block_scale: jax.Array | None = None
    tensor_scale: jax.Array | None = None


def present(what: str, part: T | None) -> T:
    """A scale, or a part of one, that the format in question always has.

    Raises:
      ValueError: it is None: the scale is another format's.
    """
    if part is None:
        raise ValueError(f"a scale without {what}, which the format has; use one that it made")
    return part


def ratio_scale(largest: jax.Array, numerator: int, denominator: int) -> Scale:
    """The scale max |x| * numerator / denominator in float32; 1 of a block of zeros.

    Args:
      largest: int32, the bits of max |x| of every block.
      numerator, denominator: a power of two, and a number below 2^24.
    """
    significand, exponent = divided(*split(largest), numerator, denominator)
    zero = largest == 0
    return kept(
        Scale(
            jnp.where(zero, 0, exponent), jnp.where(zero, 1.0, significand), nan=largest >= INFINITY
        )
    )


def kept(scale: Scale) -> Scale:
    """Returns a scale of equal numbers, each written as a quotient, which XLA keeps.

    XLA's CPU compiler computes cheap operands anew for every entry of a block; a quotient it keeps.
    """

    def quotient(number: jax.Array) -> jax.Array:
        if number.dtype == jnp.float32:
            return divide(number, 1.0)
        whole = (number.astype(jnp.int32) + 512).astype(jnp.float32)
        return (divide(whole, 1.0).astype(jnp.int32) - 512).astype(number.dtype)

    written: Scale = jax.tree.map(quotient, scale)
    return written


def from_float(scale: jax.Array, zero_point: jax.Array | None = None) -> Scale:
    """The Scale of positive float32 numbers, subnormals among them."""
    significand, exponent = split(bits_of(scale))
    return Scale(exponent, significand, zero_point=zero_point)


def to_float(scale: Scale) -> jax.Array:
    """The float32 numbers of a Scale."""
    significand = jnp.float32(1) if scale.significand is None else scale.significand
    return float_of(lower(significand, scale.exponent, scale.nan))


def reduce_max(
    blocks: jax.Array, axes: tuple[int, ...], of: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """The maximum over axes, kept as 1, of an int32 >= 0 made of the bits of every entry.

    XLA's CPU compiler computes what a reduction of at most 32 reads in passing, but writes it out
    first for a longer one, and is slow where it nests two. So: a reduction of at most 32, then one
    of more, or the maximum of slices, which it does not nest. An axis that is split over devices is
    reduced at once, since slices of it would move.
    """
    bits = bits_of(blocks)
    for axis in reversed(axes):
        bits = _reduce_axis(bits, axis, of)
        of = _same
    return bits


def _reduce_axis(bits: jax.Array, axis: int, of: Callable[[jax.Array], jax.Array]) -> jax.Array:
    size = bits.shape[axis]
    step = max((d for d in range(1, 33) if size % d == 0), default=1)
    sharding = jax.typeof(bits).sharding
    split_over_devices = sharding is not None and sharding.spec[axis] is not None
    if size <= 32 or step == 1 or split_over_devices:
        return jnp.max(of(bits), axis=axis, keepdims=True, initial=0)
    bits = bits.reshape(*bits.shape[:axis], size // step, step, *bits.shape[axis + 1 :])
    bits = jnp.max(of(bits), axis=axis + 1)
    if size // step > 32:
        return jnp.max(jax.lax.optimization_barrier(bits), axis=axis, keepdims=True)
    slices = [jax.lax.slice_in_dim(bits, i, i + 1, axis=axis) for i in range(size // step)]
    return functools.reduce(jnp.maximum, slices)


def magnitude_bits(bits: jax.Array) -> jax.Array:
    """The bits of |x| from the bits of x; as integers they are in the order of |x|."""
    return bits & MAGNITUDE


def positive_bits(bits: jax.Array) -> jax.Array:
    """The bits of max(x, 0) from the bits of x."""
    return jnp.maximum(bits, 0)


def negative_bits(bits: jax.Array) -> jax.Array:
    """The bits of max(-x, 0) from the bits of x."""
    return jnp.where(bits < 0, bits & MAGNITUDE, 0)


def _same(bits: jax.Array) -> jax.Array:
    return bits


def divided(
    significand: jax.Array, exponent: jax.Array, numerator: int, denominator: int
) -> tuple[jax.Array, jax.Array]:
    """significand * 2^exponent * numerator / denominator as IEEE float32, at least 2^-149.

    The numerator is a power of two, the denominator below 2^24. Where the quotient is subnormal it
    is a count of 2^-149: an estimate that is at most one off, set right by the remainder, which is
    small and so is right although its terms are computed modulo 2^32.
    """
    quotient = divide(significand * numerator, denominator)
    normal, above = split(bits_of(quotient))
    above = above + exponent

    scaled = (bits_of(significand) & 0x007FFFFF | 0x00800000).astype(jnp.uint32)
    left = jnp.clip(exponent + 126, 0, 31).astype(jnp.uint32)
    right = jnp.clip(-126 - exponent, 0, 31).astype(jnp.uint32)
    units = ((scaled >> right) << left) * numerator  # of 2^-149
    count = jnp.floor(quotient * power(jnp.minimum(exponent + 149, 60)))
    count = jnp.minimum(count, 2.0**24).astype(jnp.uint32)
    rest = (units - count * denominator).astype(jnp.int32)
    off = (rest >= denominator).astype(jnp.int32) - (rest < 0).astype(jnp.int32)
    rest = rest - off * denominator
    count = count.astype(jnp.int32) + off
    up = (2 * rest > denominator) | ((2 * rest == denominator) & (count % 2 == 1))
    count = jnp.maximum(count + up, 1).astype(jnp.float32)
    subnormal, below = split(bits_of(count))

    small = above < -126
    return jnp.where(small, subnormal, normal), jnp.where(small, below - 149, above)
