"""Masks as bits, eight entries to a byte."""

import jax
import jax.numpy as jnp

from sparsity.masks.axes import positive, shards


def pack_bits(mask: jax.Array, *, axis: int = -1) -> jax.Array:
    """uint8: entry 8 i + j of the axis is bit j (the least significant first) of byte i.

    Args:
      mask: bool, or integers of which the lowest bit counts. An axis of a size that 8 does not
        divide is filled up with zeros; the other axes, and so their sharding, stay as they are.

    Raises:
      ValueError: there is no such axis, or a shard of it cuts a byte.
    """
    mask = jnp.asarray(mask)
    axis = positive(axis, mask.ndim)
    size, ways = mask.shape[axis], shards(mask, axis)
    if ways > 1 and size // ways % 8:
        raise ValueError(
            f"axis {axis} of {mask.shape}: {ways} shards of {size // ways} entries cut bytes of 8; "
            "use fewer shards, or another axis"
        )
    if size % 8:
        mask = jnp.pad(mask, [(0, -size % 8 * (a == axis)) for a in range(mask.ndim)])
    shape = (*mask.shape[:axis], -(-size // 8), 8, *mask.shape[axis + 1 :])
    bits = mask.reshape(shape).astype(jnp.uint8) & 1
    return jnp.sum(bits << _places(axis + 1, len(shape)), axis=axis + 1, dtype=jnp.uint8)


def unpack_bits(bits: jax.Array, size: int, *, axis: int = -1) -> jax.Array:
    """The bool mask of which `pack_bits` made the bytes; `size` is that of its axis."""
    axis = positive(axis, bits.ndim)
    mask = jnp.expand_dims(bits, axis + 1) >> _places(axis + 1, bits.ndim + 1) & 1
    mask = mask.astype(bool).reshape(
        *bits.shape[:axis], 8 * bits.shape[axis], *bits.shape[axis + 1 :]
    )
    return jax.lax.slice_in_dim(mask, 0, size, axis=axis)


def _places(axis: int, ndim: int) -> jax.Array:
    shape = [1] * ndim
    shape[axis] = 8
    return jax.lax.broadcasted_iota(jnp.uint8, shape, axis)
