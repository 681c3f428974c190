"""Arrays in the bytes of their format: packed codes and scales, and back to their values."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from sparsity.masks.axes import positive, shards
from sparsity.masks.bits import pack_bits, unpack_bits
from sparsity.numbers.formats import Format, get_format
from sparsity.numbers.quantization import check_given, noise_of_blocks, parts_of
from sparsity.numbers.rounding import Rounding, check_rounding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoded:
    """Array in the bytes of a format.

    Attributes:
      codes: uint8 [.., bytes], the blocked axis last: its codes one after the other, the least
        significant bit first (so the first of two 4-bit codes is the low half of its byte), and
        zeros up to a whole byte. Floating-point elements: sign, exponent, mantissa; `Int` and INT8:
        two's complement; HBFP: sign and magnitude; NF4: the place of the value.
      scales: by block, the shape of x with its axis cut to the blocks. MX: uint8, exponent + 127,
        255 for NaN (E8M0). HBFP: uint8, exponent + 127, 0 for NaN. NVFP4: uint8, E4M3. `Int`, NF4,
        and FP8 with a block: float32; of tiles one to each (`TiledFP8`). FP8 alone: None.
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
        """Number of bytes of codes, scales and zero points together."""
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
    encoded: Encoded = _encode(
        x, key, scale, zero_point, format=format, axis=axis, rounding=rounding
    )
    return encoded


@functools.partial(jax.jit, static_argnames=("format", "axis", "rounding"))
def _encode(
    x: jax.Array,
    key: jax.Array | None,
    scale: jax.Array | None,
    zero_point: jax.Array | None,
    *,
    format: Format,
    axis: int,
    rounding: Rounding,
) -> Encoded:
    parts = parts_of(x, format, axis, scale, zero_point)
    noise = None if key is None else noise_of_blocks(key, parts, format, axis)
    magnitude, sign = format.elements(parts.blocks, parts.scale, rounding, noise)
    _check_bytes(x, format, axis)
    codes = format.codes(magnitude, sign < 0, parts.scale)
    codes = jnp.moveaxis(format.join(codes, parts.shape, axis), axis, -1)
    packed = _pack(codes, format.element_bits)
    axis = axis % len(parts.shape)
    if parts.scale is None:
        return Encoded(
            codes=packed,
            scales=None,
            zero_points=None,
            tensor_scale=None,
            format=format,
            shape=parts.shape,
            axis=axis,
        )
    shape = format.scale_shape(parts.shape, axis)
    zero_points = parts.scale.zero_point
    return Encoded(
        codes=packed,
        scales=format.stored(parts.scale, parts.axes).reshape(shape),
        zero_points=None if zero_points is None else zero_points.astype(jnp.int8).reshape(shape),
        tensor_scale=parts.scale.tensor_scale,
        format=format,
        shape=parts.shape,
        axis=axis,
    )


@jax.jit
def decode(encoded: Encoded) -> jax.Array:
    """The float32 values, of the shape of the array that was encoded."""
    format, shape, axis = encoded.format, encoded.shape, encoded.axis
    codes = _unpack(encoded.codes, format.element_bits, shape[axis])
    blocks, axes = format.split(jnp.moveaxis(codes, -1, axis), axis)
    scale = None
    if encoded.scales is not None:
        zero = encoded.zero_points
        zero = None if zero is None else zero.astype(jnp.int32)
        scale = format.loaded(encoded.scales, zero, encoded.tensor_scale, blocks, axes)
    magnitude, negative = format.magnitudes(blocks, scale)
    sign = jnp.where(negative, jnp.int32(-(2**31)), 0)
    return format.join(format.values(magnitude, sign, scale), shape, axis)


def bits_per_element(format: str | Format, shape: tuple[int, ...], *, axis: int = -1) -> float:
    """Bits of codes, scales and zero points of an array of that shape, by its number of entries.

    What fills up the last byte of codes is not counted.

    Raises:
      ValueError: an unknown format, a shape without entries, or no such axis.
    """
    format = get_format(format)
    if not (size := math.prod(shape)):
        raise ValueError(f"shape={shape} has no entries; use a shape of one or more")
    return format.element_bits + scale_bits(format, shape, axis) / size


def scale_bits(format: Format, shape: tuple[int, ...], axis: int) -> int:
    """Bits of all scales and zero points of an array of a shape."""
    return math.prod(format.scale_shape(shape, axis)) * format.scale_bits + format.array_bits


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


def _check_bytes(x: jax.Array, format: Format, axis: int) -> None:
    """Raises a ValueError where a shard ends within a byte of codes."""
    bits, ways = format.element_bits, shards(x, positive(axis, x.ndim))
    size = x.shape[axis] // ways
    if ways > 1 and size * bits % 8:
        raise ValueError(
            f"axis {axis} of {x.shape}: {ways} shards of {size} codes of {bits} bits cut bytes; "
            "use fewer shards"
        )


def _check_finite(x: jax.Array, format: Format) -> None:
    if format.has_nan or isinstance(x, jax.core.Tracer):
        return
    bad = int((~np.isfinite(np.asarray(x, np.float32))).sum())
    if bad:
        raise ValueError(f"{bad} of {np.size(x)} entries are NaN or infinite; {format} has neither")
