"""Arrays in the bytes of their format: packed codes and scales, and back to their values."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from sparsity.masks.axes import positive, shards
from sparsity.masks.bits import pack_bits, unpack_bits
from sparsity.numbers.formats import (
    E4M3,
    FP8,
    HBFP,
    MX,
    NVFP4,
    FixedElement,
    FloatElement,
    Format,
    Int,
    element_bits,
    get_format,
)
from sparsity.numbers.quantization import check_given, elements, noise_of_blocks, parts_of, values
from sparsity.numbers.rounding import Rounding, bits_of, check_rounding, float_of
from sparsity.numbers.scales import (
    Scale,
    from_float,
    from_nvfp4,
    join_blocks,
    scale_shape,
    split_blocks,
    to_float,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoded:
    """An array in a format.

    Attributes:
      codes: uint8 [.., bytes], the blocked axis last: its codes one after the other, the least
        significant bit first (so the first of two 4-bit codes is the low half of its byte), and
        zeros up to a whole byte. Floating-point elements: sign, exponent, mantissa; `Int` and INT8:
        two's complement; HBFP: sign and magnitude.
      scales: by block, the shape of x with its axis cut to the blocks. MX: uint8, exponent + 127,
        255 for NaN (E8M0). HBFP: uint8, exponent + 127, 0 for NaN. NVFP4: uint8, E4M3. `Int`, and
        FP8 with a block: float32. FP8 alone: None.
      zero_points: int8 like the scales, for `Int` that is not symmetric.
      tensor_scale: float32 scalar, for NVFP4: a value is code * (scale / tensor scale).
      format, shape, axis: of the array.
    """

    codes: jax.Array
    scales: jax.Array | None
    zero_points: jax.Array | None
    tensor_scale: jax.Array | None
    format: Format = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    axis: int = dataclasses.field(metadata={"static": True})

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


def encode(
    x: jax.Array,
    format: str | Format,
    *,
    axis: int = -1,
    rounding: Rounding = "even",
    key: jax.Array | None = None,
    scale: jax.Array | None = None,
    zero_point: jax.Array | None = None,
) -> Encoded:
    """x in the codes and scales of a format; `decode` gives the values that `quantize` gives.

    They are the same float32 but for zeros of MXINT8, whose codes have one zero and not two.

    Args are those of `quantize`.

    Raises:
      ValueError: as `quantize`; or NaN or infinity among numbers for a format that has none (Int
        and HBFP), where x is not traced.
    """
    x, format = jnp.asarray(x, jnp.float32), get_format(format)
    check_rounding(rounding, key)
    check_given(x.shape, format, axis, scale, zero_point)
    _check_finite(x, format)
    return _encode(x, key, scale, zero_point, format=format, axis=axis, rounding=rounding)


@functools.partial(jax.jit, static_argnames=("format", "axis", "rounding"))
def _encode(x, key, scale, zero_point, *, format: Format, axis: int, rounding: Rounding) -> Encoded:
    parts = parts_of(x, format, axis, scale, zero_point)
    noise = None if key is None else noise_of_blocks(key, parts, format, axis)
    magnitude, sign = elements(parts, format, rounding, noise)
    _check_bytes(x, format, axis)
    codes = _codes(magnitude, sign < 0, format, parts.scale)
    codes = jnp.moveaxis(join_blocks(codes, parts.shape, axis), axis, -1)
    shape = scale_shape(parts.shape, format.block, axis)
    scales = _stored(parts.scale, format)
    zero_points = None if parts.scale is None else parts.scale.zero_point
    return Encoded(
        codes=_pack(codes, element_bits(format)),
        scales=None if scales is None else scales.reshape(shape),
        zero_points=None if zero_points is None else zero_points.astype(jnp.int8).reshape(shape),
        tensor_scale=parts.scale.tensor_scale if isinstance(format, NVFP4) else None,
        format=format,
        shape=parts.shape,
        axis=axis % len(parts.shape),
    )


@jax.jit
def decode(encoded: Encoded) -> jax.Array:
    """The float32 values, of the shape of the array that was encoded."""
    format, shape, axis = encoded.format, encoded.shape, encoded.axis
    codes = _unpack(encoded.codes, element_bits(format), shape[axis])
    blocks, axes = split_blocks(jnp.moveaxis(codes, -1, axis), format.block, axis)
    kept = tuple(1 if a in axes else s for a, s in enumerate(blocks.shape))
    scale = _loaded(encoded, format, kept)
    magnitude, negative = _elements_of(blocks, format, scale)
    sign = jnp.where(negative, jnp.int32(-(2**31)), 0)
    return join_blocks(values(magnitude, sign, format, scale), shape, axis)


def bits_per_element(format: str | Format, shape: tuple[int, ...], *, axis: int = -1) -> float:
    """Bits of codes, scales and zero points of an array of that shape, by its number of entries.

    What fills up the last byte of codes is not counted.

    Raises:
      ValueError: an unknown format, a shape without entries, or no such axis.
    """
    format = get_format(format)
    if not (size := math.prod(shape)):
        raise ValueError(f"shape={shape} has no entries; use a shape of one or more")
    scales = math.prod(scale_shape(shape, format.block, axis))
    if isinstance(format, Int):
        each, once = 32 if format.symmetric else 40, 0
    elif isinstance(format, FP8):
        each, once = 0 if format.block is None else 32, 0
    else:
        each, once = 8, 32 * isinstance(format, NVFP4)
    return element_bits(format) + (scales * each + once) / size


def float_codes(magnitude: jax.Array, negative: jax.Array, element: FloatElement) -> jax.Array:
    """int32 codes of float32 magnitudes that an element has; NaN where it has that."""
    width = element.mantissa_bits
    normal = (bits_of(magnitude) >> (23 - width)) - ((127 - element.bias) << width)
    least = magnitude * 2.0 ** (width - element.emin)
    code = jnp.where(magnitude < 2.0**element.emin, least.astype(jnp.int32), normal)
    if element.nan is not None:
        code = jnp.where(jnp.isnan(magnitude), element.nan, code)
    return code | negative.astype(jnp.int32) << (element.bits - 1)


def float_values(codes: jax.Array, element: FloatElement) -> tuple[jax.Array, jax.Array]:
    """(float32 magnitude, bool negative) of codes."""
    width = element.mantissa_bits
    code = codes & (2 ** (element.bits - 1) - 1)
    normal = float_of((code << (23 - width)) + ((127 - element.bias) << 23))
    magnitude = jnp.where(
        code < 2**width, code.astype(jnp.float32) * 2.0 ** (element.emin - width), normal
    )
    if element.nan is not None:
        special = jnp.where(code & (2**width - 1) == 0, jnp.inf, jnp.nan)  # infinity: E5M2 alone
        magnitude = jnp.where(magnitude > element.largest, special, magnitude)
    return magnitude, codes >> (element.bits - 1) & 1 == 1


def _codes(magnitude, negative, format: Format, scale: Scale | None) -> jax.Array:
    if not isinstance(format, Int) and isinstance(format.element, FloatElement):
        return float_codes(magnitude, negative, format.element)
    whole = magnitude.astype(jnp.int32)
    if isinstance(format, HBFP):
        return whole | negative.astype(jnp.int32) << format.mantissa_bits
    whole = jnp.where(negative, -whole, whole)
    return whole if not _shifted(format) else whole + scale.zero_point


def _elements_of(codes, format: Format, scale: Scale | None) -> tuple[jax.Array, jax.Array]:
    """(magnitude, negative): the inverse of `_codes`."""
    if not isinstance(format, Int) and isinstance(format.element, FloatElement):
        return float_values(codes, format.element)
    if isinstance(format, HBFP):
        limit = format.element.limit
        return (codes & limit).astype(jnp.float32), codes > limit
    half = 2 ** (element_bits(format) - 1)
    whole = (codes ^ half) - half  # the sign bit carried up
    whole = whole if not _shifted(format) else whole - scale.zero_point
    return jnp.abs(whole).astype(jnp.float32), whole < 0


def _stored(scale: Scale | None, format: Format) -> jax.Array | None:
    if scale is None:
        return None
    if isinstance(format, MX | HBFP):
        fraction = format.element.fraction_bits if isinstance(format.element, FixedElement) else 0
        code = scale.exponent + fraction + 127
        return jnp.where(scale.nan, 255 if isinstance(format, MX) else 0, code).astype(jnp.uint8)
    if isinstance(format, NVFP4):
        block_scale = jnp.where(scale.nan, jnp.nan, scale.block_scale)
        return float_codes(block_scale, jnp.zeros(scale.nan.shape, bool), E4M3).astype(jnp.uint8)
    return to_float(scale)


def _loaded(encoded: Encoded, format: Format, kept: tuple[int, ...]) -> Scale | None:
    if encoded.scales is None:
        return None
    stored = encoded.scales.reshape(kept)
    if isinstance(format, MX | HBFP):
        fraction = format.element.fraction_bits if isinstance(format.element, FixedElement) else 0
        nan = stored == (255 if isinstance(format, MX) else 0)
        return Scale(stored.astype(jnp.int32) - 127 - fraction, nan=nan)
    if isinstance(format, NVFP4):
        block_scale, _ = float_values(stored.astype(jnp.int32), E4M3)
        return from_nvfp4(block_scale, encoded.tensor_scale, jnp.isnan(block_scale))
    zero = encoded.zero_points
    zero = None if zero is None else zero.astype(jnp.int32).reshape(kept)
    return from_float(stored, zero)._replace(nan=jnp.isnan(stored))


def _pack(codes: jax.Array, bits: int) -> jax.Array:
    if bits == 8:
        return (codes & 255).astype(jnp.uint8)
    planes = codes[..., None] >> jnp.arange(bits) & 1
    return pack_bits(planes.reshape(*codes.shape[:-1], codes.shape[-1] * bits))


def _unpack(packed: jax.Array, bits: int, size: int) -> jax.Array:
    if bits == 8:
        return packed.astype(jnp.int32)
    planes = unpack_bits(packed, size * bits).reshape(*packed.shape[:-1], size, bits)
    return jnp.sum(planes.astype(jnp.int32) << jnp.arange(bits), axis=-1)


def _shifted(format: Format) -> bool:
    return isinstance(format, Int) and not format.symmetric


def _check_bytes(x, format: Format, axis: int) -> None:
    """Raises a ValueError where a shard ends within a byte of codes."""
    bits, ways = element_bits(format), shards(x, positive(axis, x.ndim))
    size = x.shape[axis] // ways
    if ways > 1 and size * bits % 8:
        raise ValueError(
            f"axis {axis} of {x.shape}: {ways} shards of {size} codes of {bits} bits cut bytes; "
            "use fewer shards"
        )


def _check_finite(x, format: Format) -> None:
    has_nan = isinstance(format, MX | NVFP4) or (
        isinstance(format, FP8) and format.element.nan is not None
    )
    if has_nan or isinstance(x, jax.core.Tracer):
        return
    bad = int((~np.isfinite(np.asarray(x, np.float32))).sum())
    if bad:
        raise ValueError(f"{bad} of {np.size(x)} entries are NaN or infinite; {format} has neither")
