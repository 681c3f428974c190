"""Entries of a batch sorted by row, and sums over them in an order that no device count changes.

An entry is one id of one bag. Its place is a number that is the same on any number of devices:
sample * 2^k + column, of the global sample and the column of the id among all features'. The
entries of a row are summed along a binary tree over places, whose node at level l covers 2^l of
them: first neighbours, then pairs, and so on, however many entries there are. A device does the
nodes that lie within its samples; one entry a row is left for each of the greatest of these, a
unit: one, where the samples of a device are a power of two, which is sent to the row's owner. The
owner goes on with the same tree, so the bits of the sum are those of one device with all samples.

S samples of a device, J columns of ids, K = S * J entries, D width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pjit_train.embeddings.layout import NOWHERE

_CHUNK = 256  # entries that are summed at once


class Units(NamedTuple):
    """The entries of a device sorted by row, and its units.

    Attributes:
      order: where each sorted entry is in [S * J], int32 [K].
      levels: at which level of the tree a sorted entry's node joins the one before it; `none` where
        a unit begins, int32 [K].
      first: of each unit, ascending by key, its first sorted entry; K past the last, int32 [K].
      key: of each unit; NOWHERE past the last, int32 [K].
      unit: of each entry in its order of [S * J], int32 [K]; K for an entry of no row.
    """

    order: jax.Array
    levels: jax.Array
    first: jax.Array
    key: jax.Array
    unit: jax.Array


class Places(NamedTuple):
    """Numbering of the places of a batch.

    Attributes:
      samples: of a device.
      devices: that share the batch.
      columns: J.
    """

    samples: int
    devices: int
    columns: int

    @property
    def bits(self) -> int:
        """k: of the column in a place."""
        return (self.columns - 1).bit_length()

    @property
    def levels(self) -> int:
        """Levels of the tree over all places."""
        return (self.samples * self.devices - 1).bit_length() + self.bits

    @property
    def aligned(self) -> bool:
        """Tells whether a device's samples are one node of the tree."""
        return self.devices == 1 or self.samples & (self.samples - 1) == 0

    @property
    def most_units(self) -> int:
        """Most units of one row on a device."""
        return 1 if self.aligned else 2 * self.samples.bit_length()


def units(keys_SJ: jax.Array, places: Places, device: jax.Array) -> Units:
    """Sorts the entries of a device by row and finds its units.

    Args:
      keys_SJ: see `layout.Stack.keys`.
      device: index of this one, int32 [].
    """
    count = keys_SJ.size
    index = jnp.arange(count, dtype=jnp.int32)
    key, order = jax.lax.sort((keys_SJ.reshape(-1), index), num_keys=1, is_stable=True)
    first_sample = device * places.samples
    sample, column = first_sample + order // places.columns, order % places.columns
    place = (sample << places.bits) | column
    levels = joins(key, place, places.levels)
    if not places.aligned:
        # A node joins here only if all of it lies within this device's samples.
        node = (place >> (levels + 1)) << (levels + 1)
        inside = node >= first_sample << places.bits
        end = node + (1 << (levels + 1))
        whole = (end <= (first_sample + places.samples) << places.bits) | (
            device == places.devices - 1
        )
        levels = jnp.where(inside & whole, levels, places.levels)
    begins = (levels == places.levels) & (key != NOWHERE)
    unit = jnp.cumsum(begins, dtype=jnp.int32) - 1
    first = jnp.full(count, count, jnp.int32)
    first = first.at[jnp.where(begins, unit, count)].set(index, mode="drop")
    unit = jnp.where(key == NOWHERE, count, unit)
    return Units(
        order,
        levels,
        first,
        jnp.take(key, first, mode="fill", fill_value=NOWHERE),
        jnp.zeros(count, jnp.int32).at[order].set(unit, unique_indices=True),
    )


def joins(key: jax.Array, place: jax.Array, none: int) -> jax.Array:
    """The level at which each sorted entry's node joins that of the entry before it.

    Args:
      key: ascending, int32 [K].
      place: of each entry, or of the first entry of the node that it stands for; ascending for
        each key.
      none: for the first entry of a key, and those of no row.
    """
    differs = place[1:] ^ place[:-1]
    level = 31 - jax.lax.clz(differs)
    same = (key[1:] == key[:-1]) & (key[1:] != NOWHERE)
    return jnp.concatenate([jnp.full(1, none, jnp.int32), jnp.where(same, level, none)])


def tree_sums(x_KD: jax.Array, levels: jax.Array, none: int) -> jax.Array:
    """Sums of sorted entries along the tree, each at the first entry of its node.

    Args:
      levels: of `joins`, from 0 to `none`, the number of levels, for entries that join nothing.

    Returns:
      [K, D], of use at the entries with level `none`.
    """
    if none == 0:
        return x_KD
    count = len(levels)
    size = min(_CHUNK, count)
    index = jnp.arange(count, dtype=jnp.int32)
    sorted_levels, by_level = jax.lax.sort((levels, index), num_keys=1, is_stable=True)
    starts = jnp.searchsorted(sorted_levels, jnp.arange(none + 1, dtype=jnp.int32))
    by_level = jnp.pad(by_level, (0, size))

    def level_sums(level, carry):
        x, node = carry  # node: the first entry of the node that each entry is in
        start, end = starts[level], starts[level + 1]

        def chunk(i, x):
            begin = start + i * size
            right = jax.lax.dynamic_slice_in_dim(by_level, begin, size)
            left = node[right - 1]
            left = jnp.where(begin + jnp.arange(size) < end, left, count)
            total = x.at[left].get(mode="fill", fill_value=0) + x[right]
            return x.at[left].set(total, mode="drop")

        x = jax.lax.fori_loop(0, (end - start + size - 1) // size, chunk, x)
        joined = levels[node] == level
        return x, jnp.where(joined, node[node - 1], node)

    return jax.lax.fori_loop(0, none, level_sums, (x_KD, index))[0]


def compact(begins: jax.Array) -> jax.Array:
    """Indices where `begins` holds, ascending, int32 of its length, its length past the last."""
    count = len(begins)
    rank = jnp.where(begins, jnp.cumsum(begins, dtype=jnp.int32) - 1, count)
    found = jnp.full(count, count, jnp.int32)
    return found.at[rank].set(np.arange(count, dtype=np.int32), mode="drop")
