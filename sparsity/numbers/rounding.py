"""Exact float32 arithmetic under compilers that flush subnormals, and rounding to a step.

XLA's CPU code treats float32 subnormals as zero. So powers of two multiply in two normal halves,
and subnormals enter and leave as integers, by way of their bits: with the exponent field of 2^23
the low bits of a float32 count ones.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from sparsity.ranges import check_choice

Rounding = Literal["even", "away", "floor", "stochastic"]
ROUNDINGS = ("even", "away", "floor", "stochastic")

MAGNITUDE = 0x7FFFFFFF
INFINITY = 0x7F800000
_LEAST_NORMAL = 0x00800000
_FRACTION = 0x007FFFFF
_ONE = 0x3F800000
_TWO_23 = 0x4B000000  # 2^23


def bits_of(x: jax.Array) -> jax.Array:
    """The bits of float32, as int32."""
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def float_of(bits: jax.Array) -> jax.Array:
    """The float32 number that int32 bits stand for."""
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def power(exponent: jax.Array) -> jax.Array:
    """float32 2^exponent, for int32 up to 127; 0 below 2^-126."""
    bits = (jnp.clip(exponent, -127, 127) + 127) << 23
    return float_of(bits)  # the field 0 is zero


def split(bits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(significand in [1, 2), int32 exponent) of positive float32 given as bits."""
    subnormal = bits < _LEAST_NORMAL
    bits = jnp.where(subnormal, bits_of(_count(bits)), bits)
    exponent = (bits >> 23) - jnp.where(subnormal, 127 + 149, 127)
    return float_of(bits & _FRACTION | _ONE), exponent


def lift(bits: jax.Array, exponent: jax.Array) -> jax.Array:
    """float32 of value * 2^-exponent, the value >= 0 given as bits; exact, or 0 below 2^-126.

    Args:
      bits: int32, of float32 without the sign.
      exponent: int32 from -250 to 250, broadcast.
    """
    half = exponent >> 1
    rest = exponent - half
    subnormal = bits < _LEAST_NORMAL
    value = jnp.where(subnormal, _count(bits), float_of(bits))
    factor = jnp.where(subnormal, power(-149 - rest), power(-rest))
    return value * power(-half) * factor


def lower(value: jax.Array, exponent: jax.Array, nan: jax.Array | None = None) -> jax.Array:
    """The bits of float32 value * 2^exponent, where that is a multiple of 2^-149.

    Args:
      value: float32, 0 or from 2^-50 to 2^50.
      exponent: int32 from -250 to 250, broadcast.
      nan: bool, broadcast: where the result is NaN.
    """
    half = exponent >> 1
    rest = exponent - half
    first = power(half) if nan is None else jnp.where(nan, jnp.nan, power(half))
    value = value * first
    result = value * power(rest)
    count = bits_of(value * power(rest + 149) + 2.0**23) - _TWO_23
    return jnp.where(result < 2.0**-126, count, bits_of(result))


def divide(value: jax.Array, by: jax.Array | float) -> jax.Array:
    """float32 value / by for value >= 0, rounded once, where neither is subnormal.

    XLA multiplies by the reciprocal where the divisor is broadcast or constant. So the (always
    zero) sign bit of `value` is OR-ed into the divisor here, which XLA then cannot hoist.
    """
    no_sign = jax.lax.shift_right_logical(bits_of(value) & MAGNITUDE, 31)
    return value / float_of(bits_of(jnp.float32(by)) | no_sign)


def round_to_step(
    value: jax.Array, step: jax.Array | int, rounding: Rounding, noise: jax.Array | None = None
) -> jax.Array:
    """The multiple of the step that a value takes, each operation exact.

    Args:
      value: float32 >= 0, less than 2^22 steps.
      step: a power of two, or the int 1.
      rounding: "even" and "away" (from zero) say where ties go; "floor" goes towards zero;
        "stochastic" goes up with the probability of the fraction of the step.
      noise: for "stochastic", uniform on [0, 1).
    """
    if isinstance(step, int):
        nearest = jnp.round(value)
    else:  # of the sum no bits are left below a step (XLA would cancel a constant)
        magic = step * (1.5 * 2.0**23)
        nearest = (value + magic) - magic
    if rounding == "even":
        return nearest
    below = nearest - jnp.where(nearest > value, step, 0)
    if rounding == "floor":
        return below
    if rounding == "away":
        return below + jnp.where(value - below >= 0.5 * step, step, 0)
    if noise is None:
        raise ValueError(f"rounding={rounding!r} needs noise")
    return below + jnp.where(value - below > noise * step, step, 0)


def noise_of(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """float32 multiples of 2^-24, uniform on [0, 1)."""
    return (jax.random.bits(key, shape, jnp.uint32) >> 8).astype(jnp.float32) * 2.0**-24


def check_rounding(rounding: str, key: jax.Array | None) -> None:
    """Raises a ValueError where there is no such rounding, or none without a key, or with it."""
    check_choice("rounding", rounding, ROUNDINGS)
    if (rounding == "stochastic") != (key is not None):
        with_key = "with no key; give it key=" if key is None else "with a key; only stochastic has"
        raise ValueError(f"rounding={rounding!r} {with_key} a jax.random key")


def _count(bits: jax.Array) -> jax.Array:
    """float32 of the integer that the bits of a subnormal are."""
    return float_of(bits | _TWO_23) - 2.0**23
