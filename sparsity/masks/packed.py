"""N:M arrays as their kept values and the places of these within their groups.

Entries are selected by comparing indices (where groups are small: larger ones gather), which fuses,
stays within a shard that cuts no group, and keeps every bit of a value (-0, subnormals).
"""

from typing import Any

import jax
import jax.numpy as jnp

from sparsity.masks.axes import positive
from sparsity.masks.bits import pack_bits, unpack_bits
from sparsity.masks.nm import split_groups


def pack_nm(x: jax.Array, mask: jax.Array, n: int, m: int, *, axis: int) -> jax.Array:
    """The entries that a mask keeps, [.., groups * n, ..], in their order along the axis.

    Args:
      x: [.., groups * m, ..].
      mask: bool, in the shape of x; keeps exactly n of every m (this is not checked).
      axis: of the groups.
    """
    return gather_nm(x, nm_indices(mask, n, m, axis=axis), n, m, axis=axis)


def nm_indices(mask: jax.Array, n: int, m: int, *, axis: int) -> jax.Array:
    """uint8 [.., groups * n, ..]: the places, 0 to m - 1, of a mask's kept entries in their groups.

    Args:
      mask: bool [.., groups * m, ..]; keeps exactly n of every m (this is not checked).
      m: 256 at most.
      axis: of the groups.
    """
    groups, at = split_groups(jnp.asarray(mask), m, axis, n=n)
    # Entry r is as far in as there are entries with r or fewer kept ones up to and with them.
    r = _iota(n, at, groups.ndim)
    kept: Any = 0
    index: Any = 0
    for j in range(m):
        kept += jax.lax.slice_in_dim(groups, j, j + 1, axis=at).astype(jnp.int32)
        index += (kept <= r).astype(jnp.int32)
    return _join(index.astype(jnp.uint8), at)


def gather_nm(x: jax.Array, indices: jax.Array, n: int, m: int, *, axis: int) -> jax.Array:
    """The entries of x [.., groups * m, ..] at the indices uint8 [.., groups * n, ..]."""
    groups, at = split_groups(x, m, axis, n=n)
    indices, _ = split_groups(indices, n, axis)
    if m > 16:  # m selections take longer than a gather
        values = jnp.take_along_axis(
            groups, indices.astype(jnp.int32), axis=at, mode="promise_in_bounds"
        )
        return _join(values, at)
    values = jnp.broadcast_to(jax.lax.slice_in_dim(groups, 0, 1, axis=at), indices.shape)
    for j in range(1, m):
        values = jnp.where(indices == j, jax.lax.slice_in_dim(groups, j, j + 1, axis=at), values)
    return _join(values, at)


def unpack_nm(values: jax.Array, indices: jax.Array, n: int, m: int, *, axis: int) -> jax.Array:
    """Zeros [.., groups * m, ..] with the values [.., groups * n, ..] at their indices."""
    groups, at = split_groups(values, n, axis)
    indices, _ = split_groups(indices, n, axis)
    place = _iota(m, at, groups.ndim)
    x = jnp.zeros((), values.dtype)
    for r in range(n):
        here = jax.lax.slice_in_dim(indices, r, r + 1, axis=at) == place
        x = jnp.where(here, jax.lax.slice_in_dim(groups, r, r + 1, axis=at), x)
    return _join(x, at)


def encode_indices(indices: jax.Array, m: int, *, axis: int) -> jax.Array:
    """uint8 [ceil(log2 m), ...]: the bit planes of indices below m, each `bits.pack_bits`'d.

    2:4 takes 1 bit for each dense entry, 1:8 takes 3/8 of a bit.
    """
    axis = positive(axis, indices.ndim)
    planes = [pack_bits(indices >> b, axis=axis) for b in range((m - 1).bit_length())]
    if not planes:  # of m = 1 every index is 0
        return jnp.zeros((0, *pack_bits(indices, axis=axis).shape), jnp.uint8)
    return jnp.stack(planes)


def decode_indices(code: jax.Array, m: int, size: int, *, axis: int) -> jax.Array:
    """The uint8 indices of which `encode_indices` made the code.

    Args:
      size: of the indices' axis `axis`.
      axis: of the indices; a negative number, or counted without the axis of planes.
    """
    axis = positive(axis, code.ndim - 1)
    shape = list(code.shape[1:])
    shape[axis] = size
    indices = jnp.zeros(shape, jnp.uint8)
    for b in range((m - 1).bit_length()):
        indices |= unpack_bits(code[b], size, axis=axis).astype(jnp.uint8) << b
    return indices


def _join(groups: jax.Array, at: int) -> jax.Array:
    """[.., groups, m, ..] -> [.., groups * m, ..]."""
    size = groups.shape[at - 1] * groups.shape[at]
    return groups.reshape(*groups.shape[: at - 1], size, *groups.shape[at + 1 :])


def _iota(size: int, axis: int, ndim: int) -> jax.Array:
    shape = [1] * ndim
    shape[axis] = size
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)
