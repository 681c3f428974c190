"""The float32 values that an array takes in a number format, and training through them."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsity.numbers.formats import FP8, HBFP, MX, NVFP4, FixedElement, Format, Int, get_format
from sparsity.numbers.rounding import (
    INFINITY,
    MAGNITUDE,
    Rounding,
    bits_of,
    check_rounding,
    divide,
    float_of,
    lift,
    lower,
    noise_of,
    round_to_step,
    step_of,
)
from sparsity.numbers.scales import (
    Scale,
    dynamic_scale,
    from_float,
    join_blocks,
    magnitude_bits,
    nvfp4_scale,
    reduce_max,
    scale_shape,
    split_blocks,
    to_float,
)


def quantize(
    x: jax.Array,
    format: str | Format,
    *,
    axis: int = -1,
    rounding: Rounding = "even",
    key: jax.Array | None = None,
    scale: jax.Array | None = None,
    zero_point: jax.Array | None = None,
) -> jax.Array:
    """The values that x takes in a format, as float32.

    Exact for every finite float32, compiled or not: of the arithmetic that the format's class
    states, with subnormals, the greatest float32 where a value would be infinite. The last block
    may be shorter than the others; `check_blocks` refuses that. A block that holds NaN or infinity
    is NaN, save in FP8 and with given scales, where infinity is clipped and NaN stays alone. An
    array sharded so that no block is cut is quantized without communication (a scale of the whole
    tensor needs one maximum). Its derivative is that of a step function: see `fake_quantize`.

    Args:
      x: any real array; used as float32.
      format: a name of FORMATS, or a format object.
      axis: the axis that is cut into blocks, of a matmul the contracted one.
      rounding: "even" and "away" (from zero) round to nearest and say where ties go, "floor" goes
        towards zero, "stochastic" goes up with the probability of the fraction (without bias to
        2^-24 of a step, where not clipped). Scales do not depend on it.
      key: for "stochastic", a jax.random key.
      scale: for a static format, positive float32: of `Int` and of `FP8` with a block the shape of
        x with its axis cut to the blocks (`scale_shape`; a scalar for "tensor"); of `NVFP4` the
        scalar tensor scale. Taken from x where None.
      zero_point: with the scale of `Int` that is not symmetric, int32, of the same shape: the code
        of the value zero.

    Returns:
      float32, of the shape of x.

    Raises:
      ValueError: an unknown format or rounding; a key without "stochastic" or the reverse; no such
        axis; a scale that does not fit the format or the shape.
    """
    x, format = jnp.asarray(x, jnp.float32), get_format(format)
    check_rounding(rounding, key)
    check_given(x.shape, format, axis, scale, zero_point)
    return _quantize(x, key, scale, zero_point, format=format, axis=axis, rounding=rounding)


def fake_quantize(
    x: jax.Array,
    format: str | Format,
    *,
    axis: int = -1,
    rounding: Rounding = "even",
    key: jax.Array | None = None,
    scale: jax.Array | None = None,
    zero_point: jax.Array | None = None,
    clip_gradient: bool = False,
) -> jax.Array:
    """`quantize` with the derivative of the identity: the straight-through estimator.

    Bengio et al., 2013. Scales and zero points get no gradient.

    Args:
      clip_gradient: where `clipped`, the derivative is zero. The others are those of `quantize`.
    """
    given = dict(axis=axis, scale=scale, zero_point=zero_point)
    fixed = jax.lax.stop_gradient(x)
    result = quantize(fixed, format, rounding=rounding, key=key, **given)
    passed = ~clipped(fixed, format, **given) if clip_gradient else None
    return _straight_through(jnp.asarray(x, jnp.float32), result, passed)


def clipped(
    x: jax.Array,
    format: str | Format,
    *,
    axis: int = -1,
    scale: jax.Array | None = None,
    zero_point: jax.Array | None = None,
) -> jax.Array:
    """bool: where |x| is above the greatest value that its block can take.

    Args and errors are those of `quantize`.
    """
    x, format = jnp.asarray(x, jnp.float32), get_format(format)
    check_given(x.shape, format, axis, scale, zero_point)
    return _clipped(x, scale, zero_point, format=format, axis=axis)


def block_scales(
    x: jax.Array, format: str | Format, *, axis: int = -1
) -> tuple[jax.Array, jax.Array | None]:
    """(scale, zero point) that `quantize` takes from x, to be given to it for other arrays.

    Returns:
      float32, and int32 or None; shapes as `quantize` says. For NVFP4 the tensor scale.

    Raises:
      ValueError: the format takes no scale.
    """
    format = get_format(format)
    _check_takes_scale(format)
    return _block_scales(jnp.asarray(x, jnp.float32), format=format, axis=axis)


@functools.partial(jax.jit, static_argnames=("format", "axis"))
def _block_scales(x, *, format: Format, axis: int):
    parts = parts_of(x, format, axis, None, None)
    if isinstance(format, NVFP4):
        return parts.scale.tensor_scale, None
    shape = scale_shape(parts.shape, format.block, axis)
    zero_point = parts.scale.zero_point
    return (
        to_float(parts.scale).reshape(shape),
        None if zero_point is None else zero_point.reshape(shape),
    )


class Parts(NamedTuple):
    """An array cut to blocks, with their scale (None: FP8 without one)."""

    blocks: jax.Array
    axes: tuple[int, ...]
    scale: Scale | None
    shape: tuple[int, ...]


def check_given(shape: tuple[int, ...], format: Format, axis: int, scale, zero_point) -> None:
    """Raises a ValueError where a scale or zero point does not fit the format or the shape."""
    if scale is None:
        if zero_point is not None:
            raise ValueError("zero_point without scale; give both or neither")
        return
    _check_takes_scale(format)
    asymmetric = isinstance(format, Int) and not format.symmetric
    if asymmetric != (zero_point is not None):
        needs = "needs a zero_point beside its scale" if asymmetric else "takes no zero_point"
        raise ValueError(f"{format} {needs}")
    wanted = () if isinstance(format, NVFP4) else scale_shape(shape, format.block, axis)
    for name, given in (("scale", scale), ("zero_point", zero_point)):
        if given is not None and np.shape(given) != wanted:
            raise ValueError(f"{name} of shape {np.shape(given)}; use {wanted}")
    if not isinstance(scale, jax.core.Tracer):
        host = np.asarray(scale, np.float32)
        if not (np.isfinite(host) & (host > 0)).all():
            raise ValueError("scale has entries that are not positive finite numbers; use such")


def parts_of(x: jax.Array, format: Format, axis: int, scale, zero_point) -> Parts:
    """float32 x in blocks, with the scales that are given, or else taken from it."""
    blocks, axes = split_blocks(x, format.block, axis)
    if isinstance(format, FP8) and format.block is None:
        return Parts(blocks, axes, None, x.shape)
    if scale is None:
        return Parts(blocks, axes, dynamic_scale(blocks, axes, format), x.shape)
    scale = jnp.asarray(scale, jnp.float32)
    if isinstance(format, NVFP4):
        largest = reduce_max(blocks, axes, magnitude_bits)
        return Parts(blocks, axes, nvfp4_scale(largest, scale), x.shape)
    kept = tuple(1 if a in axes else s for a, s in enumerate(blocks.shape))
    if zero_point is not None:
        zero_point = jnp.asarray(zero_point, jnp.int32).reshape(kept)
    return Parts(blocks, axes, from_float(scale.reshape(kept), zero_point), x.shape)


@functools.partial(jax.jit, static_argnames=("format", "axis", "rounding"))
def _quantize(x, key, scale, zero_point, *, format: Format, axis: int, rounding: Rounding):
    parts = parts_of(x, format, axis, scale, zero_point)
    noise = None if key is None else noise_of_blocks(key, parts, format, axis)
    magnitude, sign = elements(parts, format, rounding, noise)
    return join_blocks(values(magnitude, sign, format, parts.scale), parts.shape, axis)


@functools.partial(jax.jit, static_argnames=("format", "axis"))
def _clipped(x, scale, zero_point, *, format: Format, axis: int):
    parts = parts_of(x, format, axis, scale, zero_point)
    above = _lifted(parts) > _limit(bits_of(parts.blocks) < 0, format, parts.scale)
    return join_blocks(above, parts.shape, axis)


def elements(parts: Parts, format: Format, rounding: Rounding, noise) -> tuple:
    """(float32 magnitude of every element, int32 bits of its sign); of fixed point the integer."""
    bits = bits_of(parts.blocks)
    sign = bits & ~MAGNITUDE
    value = jnp.minimum(_lifted(parts), _limit(bits < 0, format, parts.scale))
    step = 1 if isinstance(format, Int) else step_of(value, format.element)
    magnitude = round_to_step(value, step, rounding, noise)
    if isinstance(format, Int):  # integers have one zero
        sign = jnp.where(magnitude == 0, 0, sign)
    return magnitude, sign


def values(magnitude: jax.Array, sign: jax.Array, format: Format, scale: Scale | None) -> jax.Array:
    """float32 of elements and their scale."""
    if scale is None:
        return float_of(bits_of(magnitude) | sign)
    if scale.significand is not None:
        magnitude = magnitude * scale.significand
    bits = lower(magnitude, scale.exponent, scale.nan)
    if isinstance(format, Int | FP8):  # scales are rounded: the greatest value may be infinite
        bits = jnp.where(bits == INFINITY, INFINITY - 1, bits)
    return float_of(bits | sign)


def _lifted(parts: Parts) -> jax.Array:
    """|x| / scale as float32."""
    bits = bits_of(parts.blocks) & MAGNITUDE
    if parts.scale is None:
        return float_of(bits)
    value = lift(bits, parts.scale.exponent)
    significand = parts.scale.significand
    return value if significand is None else divide(value, significand)


def _limit(negative: jax.Array, format: Format, scale: Scale | None) -> jax.Array | float:
    """The greatest magnitude of an element."""
    if isinstance(format, NVFP4):
        return jnp.where(scale.block_scale == 0, 0.0, format.element.largest)
    if not isinstance(format, Int):
        element = format.element
        return float(element.limit if isinstance(element, FixedElement) else element.largest)
    least, greatest = -(2 ** (format.bits - 1)), 2 ** (format.bits - 1) - 1
    if format.narrow:
        return float(greatest)
    if format.symmetric:
        return jnp.where(negative, float(-least), float(greatest))
    zero = scale.zero_point.astype(jnp.float32)
    return jnp.where(negative, zero - least, greatest - zero)


def noise_of_blocks(key: jax.Array, parts: Parts, format: Format, axis: int) -> jax.Array:
    """Drawn in the shape of x, so that it does not depend on blocks."""
    return split_blocks(noise_of(key, parts.shape), format.block, axis)[0]


def _check_takes_scale(format: Format) -> None:
    if isinstance(format, MX | HBFP) or (isinstance(format, FP8) and format.block is None):
        raise ValueError(f"{format} takes no scale; Int, FP8 with a block, and NVFP4 do")


@jax.custom_jvp
def _straight_through(x, result, passed):
    return result


@_straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    _, result, passed = primals
    tangent = tangents[0]
    return result, tangent if passed is None else jnp.where(passed, tangent, 0.0)
