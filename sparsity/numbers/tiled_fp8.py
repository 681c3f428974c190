"""8-bit floats with a scale to a tile of inputs and outputs."""

import dataclasses
import math
import re
from typing import Any, Self

import jax
import jax.numpy as jnp

from sparsity.masks.axes import positive
from sparsity.numbers import exchange
from sparsity.numbers.blocks import join_blocks, split_blocks
from sparsity.numbers.elements import E4M3, FloatElement
from sparsity.numbers.format import Bits, Format
from sparsity.numbers.fp8 import FP8
from sparsity.numbers.scales import Scale, magnitude_bits
from sparsity.ranges import Count


@dataclasses.dataclass(frozen=True, kw_only=True)
class TiledFP8(FP8):
    """`FP8` with a float32 scale = max |x| / largest to a tile of inputs and outputs.

    So are the weights of DeepSeek-V3 (arXiv 2412.19437, section 3.3): E4M3, tiles of 128 x 128. The
    axis that a matmul sums over is cut to blocks, and all other axes, taken as one, as well; the
    last tiles may be smaller. Activations have a scale to a block of the features of one token,
    tiles of 1 x 128 in the paper. Stored scales are [blocks, blocks across], transposed where the
    axis is the last. A stack of kernels is quantized under `jax.vmap`.

    Attributes:
      element: E4M3 or another FloatElement.
      block: how many entries along the axis a tile has.
      output_block: how many across it.
    """

    element: FloatElement = E4M3
    block: Count = 128
    output_block: Count = 128

    def split(self, x: jax.Array, axis: int) -> tuple[jax.Array, tuple[int, ...]]:
        """Splits x as [.., blocks, block, ..], also where there is but one block."""
        axis = positive(axis, x.ndim)
        blocks, _ = super().split(x, axis)
        return (blocks if blocks.ndim > x.ndim else jnp.expand_dims(x, axis)), (axis + 1,)

    def largest(
        self, blocks: jax.Array, axes: tuple[int, ...], of: Bits = magnitude_bits
    ) -> jax.Array:
        rows = _rows(super().largest(blocks, axes, of), axes)
        tiles, tile = split_blocks(rows, self.output_block, 1)
        tiles = jnp.broadcast_to(jnp.max(tiles, tile, keepdims=True, initial=0), tiles.shape)
        largest = _unrows(join_blocks(tiles, rows.shape, 1), blocks.shape, axes)
        # Without it XLA:CPU moves reshapes of one lone tile back and forth until it gives up.
        barred: jax.Array = jax.lax.optimization_barrier(largest)
        return barred

    def scale_shape(self, shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
        axis = positive(axis, len(shape))
        along = max(1, -(-shape[axis] // self.block))
        if len(shape) == 1:
            return (along,)
        across = -(-math.prod((*shape[:axis], *shape[axis + 1 :])) // self.output_block)
        return (across, along) if axis == len(shape) - 1 else (along, across)

    def multipliers(self, scale: Scale, axes: tuple[int, ...]) -> jax.Array:
        numbers = super().multipliers(scale, axes)
        tiles = _rows(numbers, axes)[:, :: self.output_block]
        return tiles.T if _last(numbers, axes) else tiles

    def spread(self, stored: jax.Array, blocks: jax.Array, axes: tuple[int, ...]) -> jax.Array:
        count = math.prod(_across(blocks.shape, axes))
        tiles = stored.T if _last(blocks, axes) else stored.reshape(blocks.shape[axes[0] - 1], -1)
        rows = jnp.repeat(tiles, self.output_block, axis=1)[:, :count]
        return _unrows(rows, blocks.shape, axes)

    def as_stored_weights(self, inputs: dict[str, Any] | None) -> exchange.Layout | None:
        blocks = exchange.weights(8, "float", self.block) | {"dynamic": True}
        if self.element != E4M3 or inputs not in (None, blocks):
            return None
        weights = exchange.tiles(8, "float", self.output_block, self.block)
        return exchange.Layout("naive-quantized" if inputs is None else "float-quantized", weights)

    def with_option(self, option: str) -> Self | None:
        sizes = re.fullmatch(r"([0-9]{1,10})x([0-9]{1,10})", option)
        if sizes is None:
            return None
        return dataclasses.replace(self, block=int(sizes[1]), output_block=int(sizes[2]))

    def options(self, base: Format) -> list[str] | None:
        if type(self) is not type(base) or self.element != base.element:
            return None
        return [] if self == base else [f"{self.block}x{self.output_block}"]


def _rows(numbers: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """[blocks, entries across] of numbers [.., blocks, 1, ..], one to each entry across."""
    along = axes[0] - 1
    numbers = jnp.moveaxis(numbers.squeeze(along + 1), along, 0)
    return numbers.reshape(len(numbers), -1)


def _unrows(rows: jax.Array, shape: tuple[int, ...], axes: tuple[int, ...]) -> jax.Array:
    """Undoes `_rows`: x in blocks of a shape, from its rows."""
    numbers = rows.reshape(len(rows), *_across(shape, axes))
    return jnp.expand_dims(jnp.moveaxis(numbers, 0, axes[0] - 1), axes[0])


def _across(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape across the axis, of x in blocks of a shape."""
    return (*shape[: axes[0] - 1], *shape[axes[0] + 1 :])


def _last(numbers: jax.Array, axes: tuple[int, ...]) -> bool:
    """Tells whether the blocks' axis is the last of several."""
    return numbers.ndim > 2 and axes[0] == numbers.ndim - 1
