"""The largest entries of an array, or of all arrays of a tree, as masks: exact, and without a sort.

A threshold is bisected on the bits of the scores, so that only counts are reduced: of a sharded
array, every device counts its own entries, and the counts alone go over the network.
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsity.ranges import Fraction, check_number


def order_key(scores: jax.Array) -> jax.Array:
    """Integers that stand in the order of the scores: -0 = +0, and NaN is less than all else.

    Args:
      scores: of any floating or integer dtype, or bool.

    Returns:
      Signed integers as wide as the scores, less in magnitude than the greatest of these; integer
      scores as they are, bool as int8.
    """
    scores = jnp.asarray(scores)
    if scores.dtype == jnp.bool:
        return scores.astype(jnp.int8)
    if jnp.issubdtype(scores.dtype, jnp.integer):
        return scores
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        raise ValueError(f"scores of {scores.dtype}; use floating or integer numbers, or bool")
    if scores.dtype.itemsize == 1:
        scores = scores.astype(jnp.float32)
    integer = jnp.dtype(f"int{8 * scores.dtype.itemsize}")
    limits = jnp.iinfo(integer)
    bits = jax.lax.bitcast_convert_type(scores, integer)
    key = jnp.where(bits < 0, -(bits & limits.max), bits)  # sign and magnitude to two's complement
    return jnp.where(jnp.isnan(scores), 1 - limits.max, key)


def topk_mask(scores: jax.Array, keep: int | jax.Array, *, stacked: int = 0) -> jax.Array:
    """The mask of the `keep` largest scores; of equal ones the first in row-major order.

    -0 equals +0, and NaN is less than all else.

    Args:
      scores: floating, integer or bool; fewer than 2^31 are compared.
      keep: int, or an int32 scalar that may be traced; at least as many as there are keeps all.
      stacked: the first `stacked` axes number arrays that are masked one by one.

    Returns:
      bool, of the shape of the scores.

    Raises:
      ValueError: `stacked` is more than the axes, or the entries compared are 2^31 or more.
    """
    scores = jnp.asarray(scores)
    if not 0 <= stacked <= scores.ndim:
        raise ValueError(f"stacked={stacked} of {scores.ndim} axes; use 0 to {scores.ndim}")
    mask: jax.Array = _topk([scores], _int32(keep), stacked)[0]
    return mask


def global_topk_masks(scores: Any, keep: int | jax.Array) -> Any:
    """The masks of the `keep` largest scores of all leaves together.

    Of equal scores those of the first leaf are kept first, and within it the first in row-major
    order. Scores of different dtypes are compared as float32.

    Args:
      scores: a tree of arrays; None leaves stay None. Fewer than 2^31 entries in all.
      keep: int, or an int32 scalar that may be traced.

    Returns:
      A tree of bool arrays.

    Raises:
      ValueError: the tree has 2^31 entries or more.
    """
    leaves, structure = jax.tree.flatten(scores)
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    if len({leaf.dtype for leaf in leaves}) > 1:
        leaves = [leaf.astype(jnp.float32) for leaf in leaves]
    return jax.tree.unflatten(structure, _topk(leaves, _int32(keep), 0) if leaves else [])


def keep_count(size: int, sparsity: Any) -> Any:
    """Number of entries of `size` that a sparsity keeps: max(1, round(size * (1 - sparsity))).

    Args:
      size: below 2^31.
      sparsity: 0 to 1. A Python number is computed with in float64, and the result is an int. A
        traced float32 s gives an int32 scalar that is within 1 of that formula on the value of s:
        s * 2^32 is an integer, and its product with `size` is made of 16-bit parts (float32
        itself would be off by up to 128).

    Raises:
      ValueError: the size is 2^31 or more, or a Python sparsity is outside 0 to 1.
    """
    if size >= 1 << 31:
        raise ValueError(f"size={size} entries; fewer than 2^31 can be counted together")
    if not isinstance(sparsity, jax.Array):
        check_number("sparsity", sparsity, Fraction)
        return max(1, round(size * (1 - float(sparsity))))
    sparsity = sparsity.astype(jnp.float32)
    fraction = jnp.round(sparsity * 2.0**32)
    fraction = jnp.where(sparsity < 1, fraction, 0).astype(jnp.uint32)
    size_high, size_low = np.uint32(size >> 16), np.uint32(size & 0xFFFF)
    high, low = fraction >> 16, fraction & 0xFFFF
    middle = size_high * low + (size_low * low >> 16)
    middle, carry = size_low * high + (middle & 0xFFFF), middle >> 16
    pruned = size_high * high + carry + (middle >> 16) + (middle >> 15 & 1)  # half is rounded up
    pruned = jnp.where(sparsity < 1, pruned, np.uint32(size)).astype(jnp.int32)
    return jnp.maximum(1, size - pruned)


@functools.partial(jax.jit, static_argnums=2)
def _topk(leaves: list[jax.Array], keep: int | jax.Array, stacked: int) -> list[jax.Array]:
    sizes = [math.prod(leaf.shape[stacked:]) for leaf in leaves]
    if sum(sizes) >= 1 << 31:
        raise ValueError(f"{sum(sizes)} scores; fewer than 2^31 can be compared with one another")
    stack = leaves[0].shape[:stacked]
    keys = [order_key(leaf) for leaf in leaves]
    firsts = np.cumsum([0, *sizes[:-1]])
    keep = jnp.minimum(keep, sum(sizes))

    def count(holds: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """int32 [*stack]: of how many keys `holds` is True."""
        counts = (_count(lambda arrays: holds(*arrays), [key], stacked) for key in keys)
        return functools.reduce(operator.add, counts)

    lowest = jnp.full(stack, jnp.iinfo(keys[0].dtype).min, keys[0].dtype)
    threshold = _bisect(
        lambda tried: count(lambda key: key >= _spread(tried, key)) >= keep,
        lowest,
        8 * lowest.dtype.itemsize,
    )
    wanted = keep - count(lambda key: key > _spread(threshold, key))  # of those equal to it
    ties = count(lambda key: key == _spread(threshold, key))

    def place_after_wanted() -> jax.Array:
        def before(tried: jax.Array) -> jax.Array:
            def holds(arrays: list[jax.Array]) -> jax.Array:
                key, place = arrays
                return (key == _spread(threshold, key)) & (place < _spread(tried, place))

            counts = (
                _count(holds, [key, _places(key.shape, stacked, first)], stacked)
                for key, first in zip(keys, firsts, strict=True)
            )
            return functools.reduce(operator.add, counts)

        return _bisect(lambda tried: before(tried) <= wanted, jnp.zeros(stack, jnp.int32), 31)

    end = jax.lax.cond(
        jnp.any(ties > wanted), place_after_wanted, lambda: jnp.full(stack, (1 << 31) - 1)
    )

    def mask(key: jax.Array, first: int) -> jax.Array:
        first_ties = _places(key.shape, stacked, first) < _spread(end, key)
        limit = _spread(threshold, key)
        return (key > limit) | ((key == limit) & first_ties)

    return [mask(key, first) for key, first in zip(keys, firsts, strict=True)]


def _int32(keep: int | jax.Array) -> int | jax.Array:
    if not isinstance(keep, jax.Array) and (not isinstance(keep, int | np.integer) or keep < 0):
        raise ValueError(f"keep={keep!r}; use an int from 0")
    return keep if isinstance(keep, jax.Array) else min(keep, (1 << 31) - 1)


def _bisect(holds: Callable[[jax.Array], jax.Array], lowest: jax.Array, bits: int) -> jax.Array:
    """The greatest lowest + [0, 2^bits) that `holds`, as the lowest does and none above it."""

    def body(i: jax.Array, found: jax.Array) -> jax.Array:
        tried = found + (jnp.ones((), found.dtype) << (bits - 1 - i).astype(found.dtype))
        return jnp.where(holds(tried), tried, found)

    found: jax.Array = jax.lax.fori_loop(0, bits, body, lowest)
    return found


def _count(
    holds: Callable[[list[jax.Array]], jax.Array], arrays: list[jax.Array], stacked: int
) -> jax.Array:
    """int32 [*stack]: of how many entries of the arrays `holds` is True.

    XLA's CPU backend vectorizes a sum of slices, but no reduction of comparisons.
    """
    axis, parts = _slices(arrays[0].shape, stacked)
    at = axis + 1
    if parts > 1:
        arrays = [
            x.reshape(*x.shape[:axis], x.shape[axis] // parts, parts, *x.shape[at:]) for x in arrays
        ]
    else:
        arrays, at = [x[None] for x in arrays], 0

    def part(i: int) -> jax.Array:
        return holds([jax.lax.index_in_dim(x, i, at, keepdims=False) for x in arrays])

    hits = functools.reduce(operator.add, (part(i).astype(jnp.int32) for i in range(parts)))
    return jnp.sum(hits, axis=tuple(range(stacked, hits.ndim)))


def _slices(shape: tuple[int, ...], stacked: int) -> tuple[int, int]:
    """An axis and the number, 1 to 16, of slices that it is to be cut into.

    Each has a multiple of 64 entries, so that up to 64 shards of the axis are those of a slice.
    """
    twos = [(size & -size).bit_length() - 1 for size in shape[stacked:]]
    if not twos:
        return 0, 1
    axis = int(np.argmax(twos))
    return stacked + axis, 1 << max(0, min(4, twos[axis] - 6))


def _places(shape: tuple[int, ...], stacked: int, first: int) -> jax.Array:
    """int32 [1, ..., *shape[stacked:]]: row-major indices in one of the stack, from `first` on."""
    shape = (1,) * stacked + shape[stacked:]
    place = jnp.full(shape, first, jnp.int32)
    for axis in range(stacked, len(shape)):
        stride = math.prod(shape[axis + 1 :])
        place += jax.lax.broadcasted_iota(jnp.int32, shape, axis) * stride
    return place


def _spread(value: jax.Array, like: jax.Array) -> jax.Array:
    """[*stack] -> [*stack, 1, ...], to stand against an array."""
    return value.reshape(value.shape + (1,) * (like.ndim - value.ndim))
