"""The float32 values that an array takes in a number format, and training through them."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from sparsity.numbers.formats import Format, get_format
from sparsity.numbers.rounding import Rounding, bits_of, check_rounding, noise_of
from sparsity.numbers.scales import Scale, present


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
    values: jax.Array = _quantize(
        x, key, scale, zero_point, format=format, axis=axis, rounding=rounding
    )
    return values


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
    given: dict[str, Any] = dict(axis=axis, scale=scale, zero_point=zero_point)
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
    above: jax.Array = _clipped(x, scale, zero_point, format=format, axis=axis)
    return above


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
    found: tuple[jax.Array, jax.Array | None]
    found = _block_scales(jnp.asarray(x, jnp.float32), format=format, axis=axis)
    return found


@functools.partial(jax.jit, static_argnames=("format", "axis"))
def _block_scales(x: jax.Array, *, format: Format, axis: int) -> tuple[jax.Array, jax.Array | None]:
    parts = parts_of(x, format, axis, None, None)
    shape = format.given_scale_shape(parts.shape, axis)
    scale = present("blocks", parts.scale)
    zero_point = scale.zero_point
    return (
        format.scale_to_give(scale, parts.axes).reshape(shape),
        None if zero_point is None else zero_point.reshape(shape),
    )


class Parts(NamedTuple):
    """An array cut to blocks, with their scale (None: FP8 without one)."""

    blocks: jax.Array
    axes: tuple[int, ...]
    scale: Scale | None
    shape: tuple[int, ...]


def check_given(
    shape: tuple[int, ...],
    format: Format,
    axis: int,
    scale: npt.ArrayLike | None,
    zero_point: npt.ArrayLike | None,
) -> None:
    """Raises a ValueError where a scale or zero point does not fit the format or the shape."""
    if scale is None:
        if zero_point is not None:
            raise ValueError("zero_point without scale; give both or neither")
        return
    _check_takes_scale(format)
    if format.takes_zero_point != (zero_point is not None):
        if zero_point is None:
            raise ValueError(f"{format} needs a zero_point beside its scale")
        raise ValueError(f"{format} takes no zero_point")
    wanted = format.given_scale_shape(shape, axis)
    for name, given in (("scale", scale), ("zero_point", zero_point)):
        if given is not None and np.shape(given) != wanted:
            raise ValueError(f"{name} of shape {np.shape(given)}; use {wanted}")
    if not isinstance(scale, jax.core.Tracer):
        host = np.asarray(scale, np.float32)
        if not (np.isfinite(host) & (host > 0)).all():
            raise ValueError("scale has entries that are not positive finite numbers; use such")


def parts_of(
    x: jax.Array, format: Format, axis: int, scale: jax.Array | None, zero_point: jax.Array | None
) -> Parts:
    """float32 x in blocks, with the scales that are given, or else taken from it."""
    blocks, axes = format.split(x, axis)
    if scale is None:
        return Parts(blocks, axes, format.scale(blocks, axes), x.shape)
    scale = jnp.asarray(scale, jnp.float32)
    return Parts(blocks, axes, format.given_scale(blocks, axes, scale, zero_point), x.shape)


@functools.partial(jax.jit, static_argnames=("format", "axis", "rounding"))
def _quantize(
    x: jax.Array,
    key: jax.Array | None,
    scale: jax.Array | None,
    zero_point: jax.Array | None,
    *,
    format: Format,
    axis: int,
    rounding: Rounding,
) -> jax.Array:
    parts = parts_of(x, format, axis, scale, zero_point)
    noise = None if key is None else noise_of_blocks(key, parts, format, axis)
    magnitude, sign = format.elements(parts.blocks, parts.scale, rounding, noise)
    return format.join(format.values(magnitude, sign, parts.scale), parts.shape, axis)


@functools.partial(jax.jit, static_argnames=("format", "axis"))
def _clipped(
    x: jax.Array,
    scale: jax.Array | None,
    zero_point: jax.Array | None,
    *,
    format: Format,
    axis: int,
) -> jax.Array:
    parts = parts_of(x, format, axis, scale, zero_point)
    value = format.lifted(parts.blocks, parts.scale)
    above = value > format.limit(bits_of(parts.blocks) < 0, parts.scale)
    return format.join(above, parts.shape, axis)


def noise_of_blocks(key: jax.Array, parts: Parts, format: Format, axis: int) -> jax.Array:
    """Uniform noise for `parts`, drawn in the shape of x so that it does not depend on blocks."""
    return format.split(noise_of(key, parts.shape), axis)[0]


def _check_takes_scale(format: Format) -> None:
    if not format.takes_scale:
        raise ValueError(f"{format} takes no scale; Int, FP8 with a block, and NVFP4 do")


@jax.custom_jvp
def _straight_through(x: jax.Array, result: jax.Array, passed: jax.Array | None) -> jax.Array:
    return result


@_straight_through.defjvp
def _straight_through_jvp(
    primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[jax.Array, jax.Array]:
    _, result, passed = primals
    tangent = tangents[0]
    return result, tangent if passed is None else jnp.where(passed, tangent, 0.0)
