"""Blocks along an axis, and the scales that a format gives them."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparsity.masks.axes import positive, shards
from sparsity.numbers.formats import E4M3, FP8, HBFP, MX, NVFP4, Block, Format, Int, check_block
from sparsity.numbers.rounding import (
    INFINITY,
    MAGNITUDE,
    bits_of,
    divide,
    float_of,
    lift,
    lower,
    power,
    round_to_step,
    split,
    step_of,
)

_TENSOR_SCALE_LIMIT = 2.0**100  # NVFP4: with it every product of its two scales is normal
_LARGEST_SIXTH = float.fromhex("0x1.555554p125")  # a sixth of the greatest float32


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


def split_blocks(x: jax.Array, block: Block | None, axis: int) -> tuple[jax.Array, tuple[int, ...]]:
    """x with the blocks along the axis as [.., blocks, block, ..], and the axes of one block.

    Zeros fill the last block up. Where one block holds the whole axis, or array, x stays as it is.

    Raises:
      ValueError: x has no such axis, or a shard of it cuts a block.
    """
    axis = positive(axis, x.ndim)
    if block is None or block == "tensor":
        return x, tuple(range(x.ndim))
    size = x.shape[axis]
    if block == "channel" or block >= size:
        return x, (axis,)
    if (ways := shards(x, axis)) > 1:
        check_block(block, size, ways=ways, name=f"axis {axis} of {x.shape}")
    if size % block:
        x = jnp.pad(x, [(0, -size % block * (a == axis)) for a in range(x.ndim)])
    count = x.shape[axis] // block
    return x.reshape(*x.shape[:axis], count, block, *x.shape[axis + 1 :]), (axis + 1,)


def join_blocks(blocks: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    """The array of that shape which `split_blocks` made the blocks of."""
    if blocks.shape == shape:
        return blocks
    axis %= len(shape)
    size = blocks.shape[axis] * blocks.shape[axis + 1]
    joined = blocks.reshape(*shape[:axis], size, *shape[axis + 1 :])
    return jax.lax.slice_in_dim(joined, 0, shape[axis], axis=axis)


def scale_shape(shape: tuple[int, ...], block: Block | None, axis: int) -> tuple[int, ...]:
    """Of scales as they are given and stored: that of x, its axis cut to the blocks."""
    if block is None or block == "tensor":
        return ()
    axis = positive(axis, len(shape))
    count = 1 if block == "channel" else max(1, -(-shape[axis] // block))
    return (*shape[:axis], count, *shape[axis + 1 :])


def dynamic_scale(blocks: jax.Array, axes: tuple[int, ...], format: Format) -> Scale:
    """The scales that a format takes from the data, as its class says."""
    if isinstance(format, Int) and not format.symmetric:
        return _asymmetric_scale(blocks, axes, format)
    largest = reduce_max(blocks, axes, magnitude_bits)
    if isinstance(format, MX):
        element = format.element
        exponent = jnp.clip((largest >> 23) - 127 - element.emax, -127, 127)
        exponent = exponent - getattr(element, "fraction_bits", 0)
        return Scale(exponent, nan=largest >= INFINITY)
    if isinstance(format, HBFP):
        nan = largest >= INFINITY
        if format.epsilon:
            largest = bits_of(float_of(largest) + jnp.float32(format.epsilon))
        exponent = (largest + 0x007FFFFF >> 23) - 127  # up to the next power of two
        return Scale(jnp.maximum(exponent, -126) - format.mantissa_bits, nan=nan)
    if isinstance(format, NVFP4):
        return nvfp4_scale(largest)
    if isinstance(format, FP8):
        ratio = (1, int(format.element.largest))
    elif format.narrow:
        ratio = (1, 2 ** (format.bits - 1) - 1)
    else:
        ratio = (2, 2**format.bits - 1)
    significand, exponent = _divided(*split(largest), *ratio)
    zero = largest == 0
    return _kept(
        Scale(
            jnp.where(zero, 0, exponent), jnp.where(zero, 1.0, significand), nan=largest >= INFINITY
        )
    )


def _asymmetric_scale(blocks: jax.Array, axes: tuple[int, ...], format: Int) -> Scale:
    below = reduce_max(blocks, axes, negative_bits)
    above = reduce_max(blocks, axes, positive_bits)
    largest = jnp.maximum(below, above)
    zero = largest == 0
    at = split(largest)[1]  # with it the sum can be neither subnormal nor infinite
    below, above = lift(below, at), lift(above, at)
    span, carry = split(bits_of(below + above))
    significand, exponent = _divided(span, at + carry, 1, 2**format.bits - 1)
    zero_point = jnp.round(divide(below, significand) * power(at - exponent))
    zero_point = jnp.where(zero, 0.0, jnp.minimum(zero_point, 2.0**format.bits - 1))
    return _kept(
        Scale(
            jnp.where(zero, 0, exponent),
            jnp.where(zero, 1.0, significand),
            zero_point=zero_point.astype(jnp.int32) - 2 ** (format.bits - 1),
            nan=largest >= INFINITY,
        )
    )


def _kept(scale: Scale) -> Scale:
    """The same numbers, each a quotient.

    XLA's CPU compiler computes cheap operands anew for every entry of a block; a quotient it keeps.
    """

    def kept(number):
        if number.dtype == jnp.float32:
            return divide(number, 1.0)
        whole = (number.astype(jnp.int32) + 512).astype(jnp.float32)
        return (divide(whole, 1.0).astype(jnp.int32) - 512).astype(number.dtype)

    return jax.tree.map(kept, scale)


def nvfp4_scale(largest: jax.Array, tensor_scale: jax.Array | None = None) -> Scale:
    """Both scales of NVFP4.

    Args:
      largest: int32, the bits of max |x| of every block.
      tensor_scale: positive float32 scalar, else taken from the data.
    """
    nan = largest >= INFINITY
    size = float_of(jnp.where(nan, 0, largest))
    if tensor_scale is None:
        greatest = jnp.max(size, initial=0.0)
        tensor_scale = jnp.minimum(divide(jnp.float32(448 * 6), greatest), _TENSOR_SCALE_LIMIT)
    wanted = jnp.minimum(divide(size, 6.0) * tensor_scale, E4M3.largest)
    block_scale = round_to_step(wanted, step_of(wanted, E4M3), "even")
    return from_nvfp4(block_scale, tensor_scale, nan)


def from_nvfp4(block_scale: jax.Array, tensor_scale: jax.Array, nan: jax.Array) -> Scale:
    """The Scale of the stored ones: E4M3 as float32, and float32."""
    product = jnp.minimum(divide(block_scale, tensor_scale), _LARGEST_SIXTH)
    significand, exponent = split(bits_of(product))
    zero = block_scale == 0
    return Scale(
        jnp.where(zero, 0, exponent),
        jnp.where(zero, 1.0, significand),
        nan=nan,
        block_scale=block_scale,
        tensor_scale=tensor_scale,
    )


def from_float(scale: jax.Array, zero_point: jax.Array | None = None) -> Scale:
    """The Scale of positive float32 numbers, subnormals among them."""
    significand, exponent = split(bits_of(scale))
    return Scale(exponent, significand, zero_point=zero_point)


def to_float(scale: Scale) -> jax.Array:
    """The float32 numbers of a Scale."""
    return float_of(lower(scale.significand, scale.exponent, scale.nan))


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
    """The bits of |x|, of those of x; integers in the order of |x|."""
    return bits & MAGNITUDE


def positive_bits(bits: jax.Array) -> jax.Array:
    """The bits of max(x, 0)."""
    return jnp.maximum(bits, 0)


def negative_bits(bits: jax.Array) -> jax.Array:
    """The bits of max(-x, 0)."""
    return jnp.where(bits < 0, bits & MAGNITUDE, 0)


def _same(bits: jax.Array) -> jax.Array:
    return bits


def _divided(
    significand: jax.Array, exponent: jax.Array, numerator: int, denominator: int
) -> tuple[jax.Array, jax.Array]:
    """significand * 2^exponent * numerator / denominator as IEEE float32, at least 2^-149.

    The numerator is 1 or 2. Where the quotient is subnormal it is a count of 2^-149: an estimate
    that is at most one off, set right by the remainder.
    """
    quotient = divide(significand * numerator, denominator)
    normal, above = split(bits_of(quotient))
    above = above + exponent

    scaled = (bits_of(significand) & 0x007FFFFF | 0x00800000).astype(jnp.uint32)
    left = jnp.clip(exponent + 126, 0, 9).astype(jnp.uint32)
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
