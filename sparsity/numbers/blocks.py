"""Blocks of entries along an axis, which share a scale."""

import math
from typing import Literal

import jax
import jax.numpy as jnp

from sparsity.masks.axes import positive, shards
from sparsity.ranges import Count

Block = Count | Literal["channel", "tensor"]


def check_block(block: int, size: int, *, ways: int = 1, name: str = "") -> None:
    """Raises a ValueError, beginning with the name, where blocks do not divide an axis.

    Args:
      size: of the axis that is cut into blocks.
      ways: the number of equal shards that the axis is cut into; no shard may cut a block.
    """
    start = f"{name}: " if name else ""
    if size % block:
        raise ValueError(
            f"{start}{size} entries are not cut into blocks of {block}; "
            f"use a block that divides {size}, such as {math.gcd(size, block)}"
        )
    if size % ways or size // ways % block:
        raise ValueError(
            f"{start}{ways} shards of {size} entries cut blocks of {block}; "
            f"use a block that divides the shard, or fewer shards"
        )


def split_blocks(x: jax.Array, block: Block | None, axis: int) -> tuple[jax.Array, tuple[int, ...]]:
    """x with the blocks along the axis as [.., blocks, block, ..], and the axes of one block.

    Zeros fill the last block up. Where one block holds the whole axis, or array, x stays as it is.

    Raises:
      ValueError: x has no such axis, or a shard of it cuts a block.
    """
    axis = positive(axis, x.ndim)
    if block is None or block == "tensor":
        return x, tuple(range(x.ndim))
    size = x.shape[axis]
    if block == "channel" or block >= size:
        return x, (axis,)
    if (ways := shards(x, axis)) > 1:
        check_block(block, size, ways=ways, name=f"axis {axis} of {x.shape}")
    if size % block:
        x = jnp.pad(x, [(0, -size % block * (a == axis)) for a in range(x.ndim)])
    count = x.shape[axis] // block
    return x.reshape(*x.shape[:axis], count, block, *x.shape[axis + 1 :]), (axis + 1,)


def join_blocks(blocks: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    """The array of that shape which `split_blocks` made the blocks of."""
    if blocks.shape == shape:
        return blocks
    axis %= len(shape)
    size = blocks.shape[axis] * blocks.shape[axis + 1]
    joined = blocks.reshape(*shape[:axis], size, *shape[axis + 1 :])
    return jax.lax.slice_in_dim(joined, 0, shape[axis], axis=axis)


def scale_shape(shape: tuple[int, ...], block: Block | None, axis: int) -> tuple[int, ...]:
    """Shape of an array's scales, given or stored: that of x, its axis cut to the blocks."""
    if block is None or block == "tensor":
        return ()
    axis = positive(axis, len(shape))
    count = 1 if block == "channel" else max(1, -(-shape[axis] // block))
    return (*shape[:axis], count, *shape[axis + 1 :])
