"""The elements of formats: small numbers, their neighbours and their codes."""

import dataclasses
import math
from typing import Annotated

import jax
import jax.numpy as jnp

from sparsity.numbers.rounding import INFINITY, bits_of, float_of
from sparsity.ranges import Positive, Range, Whole, check_fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class FloatElement:
    """A small floating-point number with a sign, subnormals and the bias 2^(exponent_bits-1) - 1.

    Attributes:
      exponent_bits, mantissa_bits: widths of the fields; with the sign they make `bits`.
      largest: the greatest finite value.
      nan: the code of the positive NaN, or None where the element has none.

    Raises:
      ValueError: the fields have no such value as the greatest.
    """

    exponent_bits: Annotated[int, Range(1, 8)]
    mantissa_bits: Annotated[int, Range(0, 15)]
    largest: Positive
    nan: Whole | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        step = 2.0 ** (max(self.emax, self.emin) - self.mantissa_bits)
        if self.largest % step or self.emax > 2**self.exponent_bits - 1 - self.bias:
            raise ValueError(
                f"FloatElement.largest={self.largest}: no value of {self.exponent_bits} exponent "
                f"and {self.mantissa_bits} mantissa bits"
            )

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        return (1 << self.exponent_bits - 1) - 1

    @property
    def emin(self) -> int:
        """The exponent of the least normal value; subnormals share it."""
        return 1 - self.bias

    @property
    def emax(self) -> int:
        """The exponent of the greatest value."""
        return math.frexp(self.largest)[1] - 1

    @property
    def fraction_bits(self) -> int:
        """Number of fraction bits: 0, magnitudes are counted in units of one."""
        return 0

    @property
    def limit(self) -> float:
        return self.largest

    def step(self, value: jax.Array) -> jax.Array:
        """The distance of neighbours at a float32 value >= 0."""
        binade = float_of(jnp.maximum(bits_of(value) & INFINITY, (self.emin + 127) << 23))
        return binade * 2.0**-self.mantissa_bits

    def codes(self, magnitude: jax.Array, negative: jax.Array) -> jax.Array:
        """int32 codes of float32 magnitudes that the element has; NaN where it has that."""
        width = self.mantissa_bits
        normal = (bits_of(magnitude) >> (23 - width)) - ((127 - self.bias) << width)
        least = magnitude * 2.0 ** (width - self.emin)
        code = jnp.where(magnitude < 2.0**self.emin, least.astype(jnp.int32), normal)
        if self.nan is not None:
            code = jnp.where(jnp.isnan(magnitude), self.nan, code)
        return code | negative.astype(jnp.int32) << (self.bits - 1)

    def values(self, codes: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Decodes codes to (float32 magnitude, bool negative)."""
        width = self.mantissa_bits
        code = codes & (2 ** (self.bits - 1) - 1)
        normal = float_of((code << (23 - width)) + ((127 - self.bias) << 23))
        magnitude = jnp.where(
            code < 2**width, code.astype(jnp.float32) * 2.0 ** (self.emin - width), normal
        )
        if self.nan is not None:
            # Infinity: of E5M2 alone.
            special = jnp.where(code & (2**width - 1) == 0, jnp.inf, jnp.nan)
            magnitude = jnp.where(magnitude > self.largest, special, magnitude)
        return magnitude, codes >> (self.bits - 1) & 1 == 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class FixedElement:
    """A fixed-point number n / 2^fraction_bits, where -2^(bits-1) < n < 2^(bits-1).

    Its magnitudes are the integers |n|, and its codes two's complement.
    """

    bits: Annotated[int, Range(2, 16)]
    fraction_bits: Annotated[int, Range(0, 16)]

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def limit(self) -> int:
        return (1 << self.bits - 1) - 1

    @property
    def emax(self) -> int:
        """The exponent of the greatest value."""
        return self.bits - 2 - self.fraction_bits

    @property
    def nan(self) -> None:
        """Code of NaN: None, since fixed-point elements have no NaN."""
        return None

    def step(self, value: jax.Array) -> int:
        """The distance of neighbours: 1."""
        return 1

    def codes(self, magnitude: jax.Array, negative: jax.Array) -> jax.Array:
        """int32 codes of float32 magnitudes that the element has, in whole int32."""
        whole = magnitude.astype(jnp.int32)
        return jnp.where(negative, -whole, whole)

    def values(self, codes: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(float32 magnitude, bool negative) of codes of `bits` bits."""
        half = 2 ** (self.bits - 1)
        whole = (codes ^ half) - half  # the sign bit carried up
        return jnp.abs(whole).astype(jnp.float32), whole < 0


Element = FloatElement | FixedElement

E4M3 = FloatElement(exponent_bits=4, mantissa_bits=3, largest=448.0, nan=0x7F)  # no infinity
E5M2 = FloatElement(exponent_bits=5, mantissa_bits=2, largest=57344.0, nan=0x7E)
E3M2 = FloatElement(exponent_bits=3, mantissa_bits=2, largest=28.0)
E2M3 = FloatElement(exponent_bits=2, mantissa_bits=3, largest=7.5)
E2M1 = FloatElement(exponent_bits=2, mantissa_bits=1, largest=6.0)
INT8 = FixedElement(bits=8, fraction_bits=6)
