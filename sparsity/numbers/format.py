"""The contract of a number format: the class that every format is made from.

A format is an element and the rule by which a block of elements gets its scale; a number takes the
value scale * element. The functions of `quantization` and `encoding`, matmuls, one-shot methods and
exports know a format by these methods alone. BUILD.md says how to add one.
"""

import abc
import dataclasses
import re
from collections.abc import Callable
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from sparsity.numbers.blocks import Block, join_blocks, scale_shape, split_blocks
from sparsity.numbers.elements import Element
from sparsity.numbers.exchange import Layout
from sparsity.numbers.rounding import (
    INFINITY,
    MAGNITUDE,
    Rounding,
    bits_of,
    divide,
    float_of,
    lift,
    lower,
    round_to_step,
)
from sparsity.numbers.scales import Scale, from_float, magnitude_bits, present, reduce_max, to_float

Bits = Callable[[jax.Array], jax.Array]
NO_NATIVE = "needs an integer or an 8-bit float with one scale to an output or a token"


class Format(abc.ABC):
    """A number format. A subclass is a frozen dataclass of its parameters.

    Letters: x in blocks is float32 [.., blocks, block, ..], as `split` gives it; a scale is a
    `Scale` of arrays [.., blocks, 1, ..] which are broadcast to that; magnitudes are float32 in
    units of the scale, and of fixed point integers.

    Attributes:
      block: how many entries along the axis share a scale: a number, "channel" for the whole axis,
        "tensor" for the whole array; None for no scale.
      output_block: how many entries across the axis share a scale.
      rounded_scales: whether products with a scale may be rounded up to infinity; they are the
        greatest float32 then.
      array_bits: of what is stored once for an array.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    block: Block | None
    output_block: int = 1
    rounded_scales: ClassVar[bool] = True
    array_bits: ClassVar[int] = 0

    # What a format must have.

    @property
    @abc.abstractmethod
    def element_bits(self) -> int:
        """Bits of the code of one element."""

    @abc.abstractmethod
    def scale(
        self, blocks: jax.Array, axes: tuple[int, ...], earlier: Scale | None = None
    ) -> Scale | None:
        """The scales that are taken from x in blocks; None for a format without.

        Args:
          axes: those of one block.
          earlier: scales of the whole array, of which these blocks are a part that has changed:
            what is stored once for an array stays.
        """

    @abc.abstractmethod
    def limit(self, negative: jax.Array, scale: Scale | None) -> jax.Array | float:
        """The greatest magnitude of an element, where it is negative and where it is not."""

    @abc.abstractmethod
    def elements(
        self, blocks: jax.Array, scale: Scale | None, rounding: Rounding, noise: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """(magnitude of every element, int32 bits of its sign) that x in blocks is rounded to."""

    @abc.abstractmethod
    def codes(self, magnitude: jax.Array, negative: jax.Array, scale: Scale | None) -> jax.Array:
        """int32 codes of elements, in their low `element_bits`."""

    @abc.abstractmethod
    def magnitudes(self, codes: jax.Array, scale: Scale | None) -> tuple[jax.Array, jax.Array]:
        """Decodes codes to (magnitude, bool negative), the inverse of `codes`."""

    # Blocks and scales: float32 ones of one block each, unless a format has others.

    @property
    def takes_scale(self) -> bool:
        """Tells whether `quantize` may be given a scale for x."""
        return self.block is not None

    @property
    def takes_zero_point(self) -> bool:
        """Tells whether a scale that is given needs a zero point beside it."""
        return False

    @property
    def mixes(self) -> bool:
        """Tells whether a scale is shared across the axis, so that arrays must be sharded by
        hand."""
        return self.block == "tensor" or self.output_block > 1 or self.array_bits > 0

    @property
    def extremes(self) -> tuple[Bits, ...]:
        """The functions of the bits of entries whose maxima decide the scale of a block."""
        return (magnitude_bits,)

    @property
    def scale_bits(self) -> int:
        """Bits of what is stored for each scale, zero point included."""
        return 0 if self.block is None else 32

    def split(self, x: jax.Array, axis: int) -> tuple[jax.Array, tuple[int, ...]]:
        """x with blocks along the axis, and the axes of one; see `blocks.split_blocks`."""
        return split_blocks(x, self.block, axis)

    def join(self, blocks: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
        """The array of that shape which `split` made the blocks of."""
        return join_blocks(blocks, shape, axis)

    def largest(
        self, blocks: jax.Array, axes: tuple[int, ...], of: Bits = magnitude_bits
    ) -> jax.Array:
        """int32: the maximum, over all that share a scale, of `of` of the bits of each."""
        return reduce_max(blocks, axes, of)

    def scale_shape(self, shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
        """The shape of scales as they are given and stored, of an array of a shape."""
        return scale_shape(shape, self.block, axis)

    def given_scale_shape(self, shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
        """The shape of the scale that `quantize` may be given."""
        return self.scale_shape(shape, axis)

    def given_scale(
        self,
        blocks: jax.Array,
        axes: tuple[int, ...],
        scale: jax.Array,
        zero_point: jax.Array | None,
    ) -> Scale:
        """The scales of x in blocks, by what `quantize` is given."""
        if zero_point is not None:
            zero_point = self.spread(jnp.asarray(zero_point, jnp.int32), blocks, axes)
        return from_float(self.spread(scale, blocks, axes), zero_point)

    def spread(self, stored: jax.Array, blocks: jax.Array, axes: tuple[int, ...]) -> jax.Array:
        """Reshapes what is stored for each scale so that it broadcasts to x in blocks."""
        return stored.reshape(tuple(1 if a in axes else s for a, s in enumerate(blocks.shape)))

    def scale_to_give(self, scale: Scale, axes: tuple[int, ...]) -> jax.Array:
        """float32: what `quantize` would have to be given for these scales."""
        return self.multipliers(scale, axes)

    def multipliers(self, scale: Scale, axes: tuple[int, ...]) -> jax.Array:
        """float32: what the elements are multiplied by, one for each scale that is stored."""
        return to_float(scale)

    def stored(self, scale: Scale, axes: tuple[int, ...]) -> jax.Array:
        """The scales in the type in which they are stored."""
        return self.multipliers(scale, axes)

    def loaded(
        self,
        stored: jax.Array,
        zero_point: jax.Array | None,
        array_scale: jax.Array | None,
        blocks: jax.Array,
        axes: tuple[int, ...],
    ) -> Scale:
        """The scales that were `stored`, for codes in blocks; undoes it."""
        scale = self.given_scale(blocks, axes, stored, zero_point)
        return scale._replace(nan=jnp.isnan(self.spread(stored, blocks, axes)))

    def raised(self, x: jax.Array, axis: int) -> int:
        """Number of blocks so small, beside the greatest entry of the array, that they are given
        the least scale there is, where rounding would give 0."""
        return 0

    def for_weights(self) -> "Format":
        """The format that is meant where weights are to be stored in this one."""
        return self

    # Values.

    def lifted(self, blocks: jax.Array, scale: Scale | None) -> jax.Array:
        """Divides |x| by the scale of its block, in float32."""
        bits = bits_of(blocks) & MAGNITUDE
        if scale is None:
            return float_of(bits)
        value = lift(bits, scale.exponent)
        return value if scale.significand is None else divide(value, scale.significand)

    def values(self, magnitude: jax.Array, sign: jax.Array, scale: Scale | None) -> jax.Array:
        """Multiplies elements by their scale, float32."""
        if scale is None:
            return float_of(bits_of(magnitude) | sign)
        if scale.significand is not None:
            magnitude = magnitude * scale.significand
        bits = lower(magnitude, scale.exponent, scale.nan)
        if self.rounded_scales:
            bits = jnp.where(bits == INFINITY, INFINITY - 1, bits)
        return float_of(bits | sign)

    @property
    def has_nan(self) -> bool:
        """Tells whether the stored bytes of an array can say that a number is NaN."""
        return False

    # Other programs and hardware.

    def native_dtype(self) -> Any:
        """The type, int8 or a float8, in which hardware multiplies the codes.

        Raises:
          ValueError: there is none; the message goes on from "matmul='native'".
        """
        raise ValueError(NO_NATIVE)

    def as_stored_inputs(self) -> dict[str, Any] | None:
        """The arguments of compressed-tensors for activations in this format; None for none."""
        return None

    def as_stored_weights(self, inputs: dict[str, Any] | None) -> Layout | None:
        """Layout in which compressed-tensors stores weights of this format, by that of activations.

        Args:
          inputs: what `as_stored_inputs` of their format is, or None for plain activations.

        Returns:
          None where it has no name for that.
        """
        return None

    # Texts.

    def with_option(self, option: str) -> Self | None:
        """The format with what a text says after a colon; None where that is no option of it.

        Raises:
          ValueError: an option whose number has no meaning.
        """
        if re.fullmatch(r"[0-9]{1,10}", option):
            return dataclasses.replace(self, block=int(option))
        return dataclasses.replace(self, block=option) if option in ("channel", "tensor") else None

    def options(self, base: "Format") -> list[str] | None:
        """Lists the options after the name of `base` that name this format; None where none do."""
        if type(self) is not type(base) or dataclasses.replace(self, block=base.block) != base:
            return None
        return [] if self.block == base.block else [str(self.block)]


class ElementFormat(Format):
    """Format whose elements are those of an `Element`: small floats or fixed-point numbers."""

    @property
    @abc.abstractmethod
    def element(self) -> Element:
        """Element of the format: its values, limits and codes."""

    @property
    def element_bits(self) -> int:
        return self.element.bits

    def limit(self, negative: jax.Array, scale: Scale | None) -> jax.Array | float:
        return float(self.element.limit)

    def elements(
        self, blocks: jax.Array, scale: Scale | None, rounding: Rounding, noise: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        bits = bits_of(blocks)
        sign = bits & ~MAGNITUDE
        value = jnp.minimum(self.lifted(blocks, scale), self.limit(bits < 0, scale))
        magnitude = round_to_step(value, self.element.step(value), rounding, noise)
        return magnitude, sign

    def codes(self, magnitude: jax.Array, negative: jax.Array, scale: Scale | None) -> jax.Array:
        return self.element.codes(magnitude, negative)

    def magnitudes(self, codes: jax.Array, scale: Scale | None) -> tuple[jax.Array, jax.Array]:
        return self.element.values(codes)


class PowerOfTwoFormat(ElementFormat):
    """An `ElementFormat` whose scales are powers of two, stored as one byte of an exponent + 127.

    Attributes:
      nan_code: the byte of a block that is NaN.
    """

    rounded_scales: ClassVar[bool] = False
    nan_code: ClassVar[int]

    @property
    def takes_scale(self) -> bool:
        return False

    @property
    def scale_bits(self) -> int:
        return 8

    def multipliers(self, scale: Scale, axes: tuple[int, ...]) -> jax.Array:
        return to_float(scale._replace(exponent=scale.exponent + self.element.fraction_bits))

    def stored(self, scale: Scale, axes: tuple[int, ...]) -> jax.Array:
        code = scale.exponent + self.element.fraction_bits + 127
        return jnp.where(present("nan", scale.nan), self.nan_code, code).astype(jnp.uint8)

    def loaded(
        self,
        stored: jax.Array,
        zero_point: jax.Array | None,
        array_scale: jax.Array | None,
        blocks: jax.Array,
        axes: tuple[int, ...],
    ) -> Scale:
        stored = self.spread(stored, blocks, axes)
        exponent = stored.astype(jnp.int32) - 127 - self.element.fraction_bits
        return Scale(exponent, nan=stored == self.nan_code)
