"""Integers with a float32 scale, and with a zero point or without."""

import dataclasses
from typing import Annotated, Any, Self

import jax
import jax.numpy as jnp

from sparsity.numbers import exchange
from sparsity.numbers.blocks import Block
from sparsity.numbers.elements import FixedElement
from sparsity.numbers.format import Bits, ElementFormat, Format
from sparsity.numbers.rounding import INFINITY, Rounding, bits_of, divide, lift, power, split
from sparsity.numbers.scales import (
    Scale,
    divided,
    kept,
    magnitude_bits,
    negative_bits,
    positive_bits,
    present,
    ratio_scale,
)
from sparsity.ranges import Range, check_fields

ZERO_POINT = ("asymmetric", "asym")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int(ElementFormat):
    """Integers times a float32 scale, and less a zero point where not symmetric.

    Symmetric: scale = max |x| / (2^(bits-1) - 1/2), the codes -2^(bits-1) .. 2^(bits-1) - 1 (so do
    SparseGPT, Frantar & Alistarh, 2023, and the compressed-tensors format); with `narrow`, scale =
    max |x| / (2^(bits-1) - 1) and the least code is not used, so that the greatest value is held.
    Not symmetric: scale = (max(x, 0) - min(x, 0)) / (2^bits - 1) and zero point =
    round(-min(x, 0) / scale) - 2^(bits-1); the code of x is round(x / scale) + zero point. All of
    it in IEEE float32, the scale itself included; a block of zeros has scale 1.

    Attributes:
      bits: 2 to 8.
      block: how many consecutive entries along the axis share a scale: a number, "channel" for the
        whole axis, or "tensor" for the whole array.
    """

    bits: Annotated[int, Range(2, 8)] = 8
    block: Block = "channel"
    symmetric: bool = True
    narrow: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.narrow and not self.symmetric:
            raise ValueError("Int: narrow=True with symmetric=False; a zero point needs every code")

    @property
    def element(self) -> FixedElement:
        return FixedElement(bits=self.bits, fraction_bits=0)

    @property
    def takes_zero_point(self) -> bool:
        return not self.symmetric

    @property
    def extremes(self) -> tuple[Bits, ...]:
        return (magnitude_bits,) if self.symmetric else (positive_bits, negative_bits)

    @property
    def scale_bits(self) -> int:
        return 32 if self.symmetric else 40

    def scale(
        self, blocks: jax.Array, axes: tuple[int, ...], earlier: Scale | None = None
    ) -> Scale:
        if not self.symmetric:
            return self._asymmetric_scale(blocks, axes)
        denominator = (1, 2 ** (self.bits - 1) - 1) if self.narrow else (2, 2**self.bits - 1)
        return ratio_scale(self.largest(blocks, axes), *denominator)

    def _asymmetric_scale(self, blocks: jax.Array, axes: tuple[int, ...]) -> Scale:
        below = self.largest(blocks, axes, negative_bits)
        above = self.largest(blocks, axes, positive_bits)
        largest = jnp.maximum(below, above)
        zero = largest == 0
        at = split(largest)[1]  # with it the sum can be neither subnormal nor infinite
        below, above = lift(below, at), lift(above, at)
        span, carry = split(bits_of(below + above))
        significand, exponent = divided(span, at + carry, 1, 2**self.bits - 1)
        zero_point = jnp.round(divide(below, significand) * power(at - exponent))
        zero_point = jnp.where(zero, 0.0, jnp.minimum(zero_point, 2.0**self.bits - 1))
        return kept(
            Scale(
                jnp.where(zero, 0, exponent),
                jnp.where(zero, 1.0, significand),
                zero_point=zero_point.astype(jnp.int32) - 2 ** (self.bits - 1),
                nan=largest >= INFINITY,
            )
        )

    def limit(self, negative: jax.Array, scale: Scale | None) -> jax.Array | float:
        least, greatest = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        if self.narrow:
            return float(greatest)
        if self.symmetric:
            return jnp.where(negative, float(-least), float(greatest))
        zero = _zero_point(scale).astype(jnp.float32)
        return jnp.where(negative, zero - least, greatest - zero)

    def elements(
        self, blocks: jax.Array, scale: Scale | None, rounding: Rounding, noise: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        magnitude, sign = super().elements(blocks, scale, rounding, noise)
        return magnitude, jnp.where(magnitude == 0, 0, sign)  # integers have one zero

    def codes(self, magnitude: jax.Array, negative: jax.Array, scale: Scale | None) -> jax.Array:
        whole = super().codes(magnitude, negative, scale)
        return whole if self.symmetric else whole + _zero_point(scale)

    def magnitudes(self, codes: jax.Array, scale: Scale | None) -> tuple[jax.Array, jax.Array]:
        if self.symmetric:
            return super().magnitudes(codes, scale)
        half = 2 ** (self.bits - 1)
        whole = (codes ^ half) - half - _zero_point(scale)
        return jnp.abs(whole).astype(jnp.float32), whole < 0

    def native_dtype(self) -> Any:
        if isinstance(self.block, int):
            return super().native_dtype()
        if not self.symmetric:
            raise ValueError("takes no zero point")
        return jnp.int8

    def as_stored_inputs(self) -> dict[str, Any] | None:
        if self.bits != 8 or isinstance(self.block, int):
            return None
        return exchange.per_token(8, "int") | {"symmetric": self.symmetric}

    def as_stored_weights(self, inputs: dict[str, Any] | None) -> exchange.Layout | None:
        if inputs is not None and inputs["type"] != "int":
            return None
        block = self.block if isinstance(self.block, int) else None
        weights = exchange.weights(self.bits, "int", block)
        both = inputs is not None and self.bits == 8 and block is None
        name = "int-quantized" if both else "pack-quantized"
        return exchange.Layout(name, weights | {"symmetric": self.symmetric})

    def with_option(self, option: str) -> Self | None:
        if option in ZERO_POINT:
            return dataclasses.replace(self, symmetric=False)
        return super().with_option(option)

    def options(self, base: Format) -> list[str] | None:
        if self.symmetric:
            return super().options(base)
        options = dataclasses.replace(self, symmetric=True).options(base)
        return None if options is None else [*options, ZERO_POINT[0]]


def _zero_point(scale: Scale | None) -> jax.Array:
    return present("zero_point", present("blocks", scale).zero_point)
