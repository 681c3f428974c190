"""8-bit floats, with a float32 scale or without."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from sparsity.numbers import exchange
from sparsity.numbers.blocks import Block
from sparsity.numbers.elements import E4M3, E5M2, FloatElement
from sparsity.numbers.format import ElementFormat
from sparsity.numbers.scales import Scale, ratio_scale
from sparsity.ranges import check_fields

_NATIVE = {E4M3: jnp.float8_e4m3fn, E5M2: jnp.float8_e5m2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FP8(ElementFormat):
    """8-bit floats (OFP8): a saturating cast, or with a float32 scale = max |x| / largest.

    What is greater than the greatest value, infinity included, becomes that value; NaN stays NaN.
    With a scale taken from the data, a block with NaN or infinity is NaN. A subnormal product of
    element and scale is rounded twice: to 24 bits, then to a multiple of 2^-149.

    Attributes:
      element: E4M3 or E5M2; any FloatElement will do, with a scale one of values below 2^24.
      block: None for no scale; else as in `Int`.
    """

    element: FloatElement = E4M3
    block: Block | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.block is not None and self.element.largest >= 2**24:
            raise ValueError(
                f"{type(self).__name__}.element.largest={self.element.largest}: a scale is made "
                "for elements below 2^24; use block=None or fewer exponent bits"
            )

    def scale(
        self, blocks: jax.Array, axes: tuple[int, ...], earlier: Scale | None = None
    ) -> Scale | None:
        if self.block is None:
            return None
        denominator, numerator = self.element.largest.as_integer_ratio()
        return ratio_scale(self.largest(blocks, axes), numerator, denominator)

    @property
    def has_nan(self) -> bool:
        return self.element.nan is not None

    def for_weights(self) -> "FP8":
        """Returns the format with a scale per output: without one a cast loses what is small."""
        return self if self.block is not None else dataclasses.replace(self, block="channel")

    def native_dtype(self) -> Any:
        if isinstance(self.block, int):
            return super().native_dtype()
        if self.element not in _NATIVE:
            raise ValueError("takes E4M3 and E5M2")
        return _NATIVE[self.element]

    def as_stored_inputs(self) -> dict[str, Any] | None:
        if self.element != E4M3 or self.block is None:
            return None
        if isinstance(self.block, int):
            return exchange.weights(8, "float", self.block) | {"dynamic": True}
        return exchange.per_token(8, "float")

    def as_stored_weights(self, inputs: dict[str, Any] | None) -> exchange.Layout | None:
        if self.element != E4M3 or isinstance(self.block, int):
            return None
        if inputs is None:
            return exchange.Layout("naive-quantized", exchange.weights(8, "float"))
        if (inputs["type"], inputs["strategy"]) == ("float", "token"):
            return exchange.Layout("float-quantized", exchange.weights(8, "float"))
        return None
