"""The largest entries of an array, or of all arrays of a tree, as masks: exact, and without a sort.

A threshold is bisected on the bits of the scores, so that only counts are reduced: of a sharded
array, every device counts its own entries, and the counts alone go over the network.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

DIGIT = 3  # bits of the threshold found in a pass over the scores, by counting 2^DIGIT - 1 times


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
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        return scores
    if scores.dtype.itemsize == 1:
        scores = scores.astype(jnp.float32)
    integer = jnp.dtype(f"int{8 * scores.dtype.itemsize}")
    limits = jnp.iinfo(integer)
    bits = jax.lax.bitcast_convert_type(scores, integer)
    key = jnp.where(bits < 0, -(bits & limits.max), bits)  # sign and magnitude to two's complement
    return jnp.where(jnp.isnan(scores), 1 - limits.max, key)


def topk_mask(scores: jax.Array, keep, *, stacked: int = 0) -> jax.Array:
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
    return _topk([scores], keep, stacked)[0]


def global_topk_masks(scores: Any, keep) -> Any:
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
    return jax.tree.unflatten(structure, _topk(leaves, keep, 0) if leaves else [])


def keep_count(size: int, sparsity) -> Any:
    """How many of `size` entries a sparsity keeps: max(1, round(size * (1 - sparsity))).

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
        if not 0 <= sparsity <= 1:
            raise ValueError(f"sparsity={sparsity}; use a fraction from 0 to 1")
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


def _topk(leaves: list[jax.Array], keep, stacked: int) -> list[jax.Array]:
    sizes = [math.prod(leaf.shape[stacked:]) for leaf in leaves]
    if sum(sizes) >= 1 << 31:
        raise ValueError(f"{sum(sizes)} scores; fewer than 2^31 can be compared with one another")
    keys = [order_key(leaf) for leaf in leaves]
    stack = leaves[0].shape[:stacked]
    keep = jnp.minimum(jnp.asarray(keep, jnp.int32), sum(sizes))

    def total(hits):
        """[leaves][thresholds] bool arrays -> int32 [thresholds, *stack]."""
        return sum(jnp.stack([_count(hit, stacked) for hit in leaf]) for leaf in hits)

    # The greatest threshold that `keep` scores or more reach.
    threshold = _bisect(
        lambda tried: total([[key >= _spread(t, key) for t in tried] for key in keys]) >= keep,
        jnp.full(stack, jnp.iinfo(keys[0].dtype).min, keys[0].dtype),
        8 * keys[0].dtype.itemsize,
    )
    above = [key > _spread(threshold, key) for key in keys]
    equal = [key == _spread(threshold, key) for key in keys]
    wanted = keep - total([[mask] for mask in above])[0]
    places = []
    for key, first in zip(keys, np.cumsum([0, *sizes[:-1]]), strict=True):
        shape = (1,) * stacked + key.shape[stacked:]
        place = jnp.full(shape, first, jnp.int32)
        for axis in range(stacked, key.ndim):
            stride = math.prod(key.shape[axis + 1 :])
            place += jax.lax.broadcasted_iota(jnp.int32, shape, axis) * stride
        places.append(place)

    def first_ties():
        """The greatest index such that no more than the wanted ties stand before it."""
        return _bisect(
            lambda tried: (
                total(
                    [
                        [mask & (place < _spread(t, mask)) for t in tried]
                        for mask, place in zip(equal, places, strict=True)
                    ]
                )
                <= wanted
            ),
            jnp.zeros(stack, jnp.int32),
            31,
        )

    surplus = jnp.any(total([[mask] for mask in equal])[0] > wanted)
    end = jax.lax.cond(surplus, first_ties, lambda: jnp.full(stack, (1 << 31) - 1, jnp.int32))
    return [
        more | (tie & (place < _spread(end, tie)))
        for more, tie, place in zip(above, equal, places, strict=True)
    ]


def _bisect(reached, lowest, bits: int):
    """The greatest lowest + [0, 2^bits) that `reached` holds of; it holds of the lowest.

    `reached` maps a list of values to a bool array [values, ...].
    """

    def digit(width, shift, found):
        tried = [
            found + (jnp.asarray(i, found.dtype) << shift.astype(found.dtype))
            for i in range(1, 1 << width)
        ]
        steps = jnp.sum(reached(tried), axis=0, dtype=found.dtype)
        return found + (steps << shift.astype(found.dtype))

    def body(i, found):
        return digit(DIGIT, bits - DIGIT * (i + 1), found)

    found = jax.lax.fori_loop(0, bits // DIGIT, body, lowest)
    return digit(bits % DIGIT, jnp.zeros((), jnp.int32), found) if bits % DIGIT else found


def _spread(value, like):
    """[*stack] -> [*stack, 1, ...], to stand against an array."""
    return value.reshape(value.shape + (1,) * (like.ndim - value.ndim))


def _count(mask, stacked: int):
    """int32 [*stack]: how many are True in each array of the stack."""
    # The last axis first: XLA's CPU backend runs a reduction in parallel over what it leaves.
    last = mask.ndim - 1
    rows = jnp.sum(mask, axis=last, dtype=jnp.int32) if last >= stacked else mask.astype(jnp.int32)
    return jnp.sum(rows, axis=tuple(range(stacked, rows.ndim)), dtype=jnp.int32)
