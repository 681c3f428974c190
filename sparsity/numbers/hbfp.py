"""Hybrid block floating point."""

import dataclasses
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp

from sparsity.numbers.blocks import Block
from sparsity.numbers.elements import FixedElement
from sparsity.numbers.format import PowerOfTwoFormat
from sparsity.numbers.rounding import INFINITY, bits_of, float_of
from sparsity.numbers.scales import Scale
from sparsity.ranges import NonNegative, Range, check_fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class HBFP(PowerOfTwoFormat):
    """Hybrid block floating point: integers that share an exponent.

    exponent e = ceil(log2(max |x|)), and at least -126; values n * 2^(e - mantissa_bits) with
    |n| <= 2^mantissa_bits - 1. The logarithm is exact. The code that came with Harma et al. adds
    1e-8 to the maximum before a float32 logarithm; with `epsilon` = 1e-8 so does this, in float32.

    Attributes:
      mantissa_bits: without the sign: HBFP8 has 7; 1 to 15.
      block: entries along the axis that share an exponent, "channel" or "tensor".
      epsilon: added to the maximum of the block.
    """

    mantissa_bits: Annotated[int, Range(1, 15)] = 7
    block: Block = 64
    epsilon: NonNegative = 0.0

    nan_code: ClassVar[int] = 0

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def element(self) -> FixedElement:
        return FixedElement(bits=self.mantissa_bits + 1, fraction_bits=self.mantissa_bits)

    def scale(
        self, blocks: jax.Array, axes: tuple[int, ...], earlier: Scale | None = None
    ) -> Scale:
        largest = self.largest(blocks, axes)
        nan = largest >= INFINITY
        if self.epsilon:
            largest = bits_of(float_of(largest) + jnp.float32(self.epsilon))
        exponent = (largest + 0x007FFFFF >> 23) - 127  # up to the next power of two
        return Scale(jnp.maximum(exponent, -126) - self.mantissa_bits, nan=nan)

    def codes(self, magnitude: jax.Array, negative: jax.Array, scale: Scale | None) -> jax.Array:
        """Encodes elements as a sign bit and a magnitude."""
        return magnitude.astype(jnp.int32) | negative.astype(jnp.int32) << self.mantissa_bits

    def magnitudes(self, codes: jax.Array, scale: Scale | None) -> tuple[jax.Array, jax.Array]:
        limit = self.element.limit
        return (codes & limit).astype(jnp.float32), codes > limit
