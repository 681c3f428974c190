"""NVFP4: scales of scales."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from sparsity.numbers import exchange
from sparsity.numbers.elements import E2M1, E4M3, FloatElement
from sparsity.numbers.format import ElementFormat
from sparsity.numbers.rounding import INFINITY, bits_of, divide, float_of, round_to_step, split
from sparsity.numbers.scales import Scale, present
from sparsity.ranges import Count, check_fields

_TENSOR_SCALE_LIMIT = 2.0**100  # with it every product of the two scales is normal
_LEAST_BLOCK_SCALE = 2.0**-9  # of E4M3
_LARGEST_SIXTH = float.fromhex("0x1.555554p125")  # a sixth of the greatest float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class NVFP4(ElementFormat):
    """E2M1 elements with an E4M3 scale to a block and one float32 scale to the array.

    tensor scale g = 448 * 6 / max |array|, and at most 2^100; block scale s = E4M3(max |x| / 6 *
    g), to nearest even; values = E2M1(x / (s / g)) * (s / g); each step in float32 (so does
    compressed-tensors, which stores s and g). A block that is not all zeros has at least the least
    E4M3 number, 2^-9, for s: where rounding gives 0 all of the block would vanish, and with that
    number no element is further from its value. A block with NaN or infinity is NaN, and does not
    count for g.

    Attributes:
      block: entries along the axis that share a block scale.
    """

    block: Count = 16

    rounded_scales: ClassVar[bool] = False
    array_bits: ClassVar[int] = 32
    scale_bits: ClassVar[int] = 8
    has_nan: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def element(self) -> FloatElement:
        return E2M1

    def scale(
        self, blocks: jax.Array, axes: tuple[int, ...], earlier: Scale | None = None
    ) -> Scale:
        tensor_scale = None if earlier is None else earlier.tensor_scale
        return _scale(self.largest(blocks, axes), tensor_scale)

    def given_scale_shape(self, shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
        """Shape of the scale that may be given, that of the whole tensor: ()."""
        return ()

    def given_scale(
        self,
        blocks: jax.Array,
        axes: tuple[int, ...],
        scale: jax.Array,
        zero_point: jax.Array | None,
    ) -> Scale:
        return _scale(self.largest(blocks, axes), scale)

    def scale_to_give(self, scale: Scale, axes: tuple[int, ...]) -> jax.Array:
        return present("tensor_scale", scale.tensor_scale)

    def multipliers(self, scale: Scale, axes: tuple[int, ...]) -> jax.Array:
        """Block scales, before they are divided by the tensor scale."""
        return present("block_scale", scale.block_scale)

    def stored(self, scale: Scale, axes: tuple[int, ...]) -> jax.Array:
        nan = present("nan", scale.nan)
        block_scale = jnp.where(nan, jnp.nan, present("block_scale", scale.block_scale))
        return E4M3.codes(block_scale, jnp.zeros(nan.shape, bool)).astype(jnp.uint8)

    def loaded(
        self,
        stored: jax.Array,
        zero_point: jax.Array | None,
        array_scale: jax.Array | None,
        blocks: jax.Array,
        axes: tuple[int, ...],
    ) -> Scale:
        codes = self.spread(stored, blocks, axes).astype(jnp.int32)
        block_scale, _ = E4M3.values(codes)
        return _joined(block_scale, present("tensor_scale", array_scale), jnp.isnan(block_scale))

    def limit(self, negative: jax.Array, scale: Scale | None) -> jax.Array:
        block_scale = present("block_scale", present("blocks", scale).block_scale)
        return jnp.where(block_scale == 0, 0.0, self.element.largest)

    def raised(self, x: jax.Array, axis: int) -> int:
        blocks, axes = self.split(x, axis)
        size = float_of(self.largest(blocks, axes))
        wanted = divide(size, 6.0) * divide(jnp.float32(448 * 6), jnp.max(size, initial=0.0))
        return int(jnp.sum((size > 0) & (wanted <= _LEAST_BLOCK_SCALE / 2)))

    def as_stored_inputs(self) -> dict[str, Any] | None:
        # The tensor scale is given: see `compressed_tensors_codes.input_scales`.
        return None if self.block != 16 else _arguments() | {"dynamic": "local"}

    def as_stored_weights(self, inputs: dict[str, Any] | None) -> exchange.Layout | None:
        if self.block != 16 or inputs not in (None, _arguments() | {"dynamic": "local"}):
            return None
        return exchange.Layout("nvfp4-pack-quantized", _arguments())


def _arguments() -> dict[str, Any]:
    blocks = {"strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"}
    return exchange.weights(4, "float", 16) | blocks


def _scale(largest: jax.Array, tensor_scale: jax.Array | None) -> Scale:
    """Computes the scales of blocks and of the whole tensor.

    Args:
      largest: int32, the bits of max |x| of every block.
      tensor_scale: positive float32 scalar, else taken from the data.
    """
    nan = largest >= INFINITY
    size = float_of(jnp.where(nan, 0, largest))
    if tensor_scale is None:
        greatest = jnp.max(size, initial=0.0)
        tensor_scale = jnp.minimum(divide(jnp.float32(448 * 6), greatest), _TENSOR_SCALE_LIMIT)
    wanted = jnp.minimum(divide(size, 6.0) * tensor_scale, E4M3.largest)
    block_scale = round_to_step(wanted, E4M3.step(wanted), "even")
    block_scale = jnp.where(size > 0, jnp.maximum(block_scale, _LEAST_BLOCK_SCALE), block_scale)
    return _joined(block_scale, tensor_scale, nan)


def _joined(block_scale: jax.Array, tensor_scale: jax.Array, nan: jax.Array) -> Scale:
    """The Scale of the stored ones: E4M3 as float32, and float32."""
    product = jnp.minimum(divide(block_scale, tensor_scale), _LARGEST_SIXTH)
    significand, exponent = split(bits_of(product))
    zero = block_scale == 0
    return Scale(
        jnp.where(zero, 0, exponent),
        jnp.where(zero, 1.0, significand),
        nan=nan,
        block_scale=block_scale,
        tensor_scale=tensor_scale,
    )
