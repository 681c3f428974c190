"""OCP microscaling."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from sparsity.numbers import exchange
from sparsity.numbers.blocks import Block
from sparsity.numbers.elements import E2M1, E2M3, E4M3, FixedElement, FloatElement
from sparsity.numbers.format import PowerOfTwoFormat
from sparsity.numbers.rounding import INFINITY
from sparsity.numbers.scales import Scale
from sparsity.ranges import check_fields

_LAYOUTS = {E4M3: "mxfp8-quantized", E2M3: "mxfp6-pack-quantized", E2M1: "mxfp4-pack-quantized"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MX(PowerOfTwoFormat):
    """OCP microscaling: elements that share a power of two, stored as one byte (E8M0).

    scale = 2^(floor(log2(max |x|)) - emax of the element), from 2^-127 to 2^127 (MX v1.0, section
    6.3); elements above the greatest value are clipped to it. Where a block holds NaN or infinity
    its scale is NaN, and so is the whole block.

    Attributes:
      element: a FloatElement, or INT8.
      block: entries along the axis that share a scale, "channel" or "tensor".
    """

    element: FloatElement | FixedElement = E4M3
    block: Block = 32

    nan_code: ClassVar[int] = 255

    def __post_init__(self) -> None:
        check_fields(self)

    def scale(
        self, blocks: jax.Array, axes: tuple[int, ...], earlier: Scale | None = None
    ) -> Scale:
        largest = self.largest(blocks, axes)
        exponent = jnp.clip((largest >> 23) - 127 - self.element.emax, -127, 127)
        exponent = exponent - self.element.fraction_bits
        return Scale(exponent, nan=largest >= INFINITY)

    @property
    def has_nan(self) -> bool:
        return True

    def as_stored_inputs(self) -> dict[str, Any] | None:
        if self.block != 32 or self.element not in (E4M3, E2M1):
            return None
        return _arguments(self.element.bits) | {"dynamic": True}

    def as_stored_weights(self, inputs: dict[str, Any] | None) -> exchange.Layout | None:
        if self.block != 32 or self.element not in _LAYOUTS:
            return None
        weights = _arguments(self.element.bits)
        # Activations are in the same, and those of E2M3 in E4M3.
        other = {"dynamic": True} | ({"num_bits": 8} if self.element == E2M3 else {})
        if inputs not in (None, weights | other):
            return None
        return exchange.Layout(_LAYOUTS[self.element], weights)


def _arguments(bits: int) -> dict[str, Any]:
    return exchange.weights(bits, "float", 32) | {"scale_dtype": "torch.uint8"}
