"""N:M sparsity: n entries kept of every m consecutive ones along an axis."""

import functools
import math
import operator
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from sparsity.masks.axes import positive, shards
from sparsity.masks.topk import order_key

Axis = int | tuple[int, ...]


def nm_mask(
    scores: jax.Array,
    n: int | jax.Array,
    m: int,
    *,
    axis: Axis = -1,
    ties: Literal["first", "last"] = "first",
) -> jax.Array:
    """The mask of the n largest of every m consecutive scores.

    -0 equals +0, and NaN is less than all else. An array sharded so that no group is cut is masked
    without communication.

    Args:
      scores: floating, integer or bool.
      n: int, or an int32 scalar from 0 to m that may be traced (an int is faster above m = 64).
      m: the size of a group.
      axis: the axis that is cut into groups; or adjacent axes, in increasing order, that are cut as
        if they were one.
      ties: which of equal scores are kept.

    Returns:
      bool, of the shape of the scores.

    Raises:
      ValueError: n is not in 1 .. m, m does not divide the axis, or the axes are not adjacent.
    """
    scores = jnp.asarray(scores)
    groups, at = split_groups(scores, m, axis, n=n)
    mask: jax.Array
    if isinstance(n, jax.Array):
        mask = _mask_of_traced(groups, n, at, ties)
    else:
        mask = _mask(groups, operator.index(n), at, ties)
    return join_groups(mask, scores)


def nm_violations(weights: jax.Array, n: int | jax.Array, m: int, *, axis: Axis = -1) -> jax.Array:
    """int32 scalar: how many groups of m along the axis have more than n nonzero weights.

    Args and errors are those of `nm_mask`.
    """
    groups, at = split_groups(jnp.asarray(weights), m, axis, n=n)
    return jnp.sum(jnp.sum(groups != 0, axis=at, dtype=jnp.int32) > n, dtype=jnp.int32)


def check_nm(n: int | jax.Array, m: int, size: int, *, ways: int = 1, name: str = "") -> None:
    """Raises a ValueError, beginning with the name, where n:m does not fit an axis.

    Args:
      n: not checked where it is traced.
      size: of the axis.
      ways: the number of equal shards that the axis is cut into; no shard may cut a group.
    """
    start = f"{name}: " if name else ""
    for what, number in (("N", n), ("M", m)):
        if not isinstance(number, int | np.integer | jax.Array):
            raise ValueError(f"{start}{what}={number!r}; use an int")
    if m < 1:
        raise ValueError(f"{start}M={m}; groups have 1 entry or more")
    if not isinstance(n, jax.Array) and not 1 <= n <= m:
        raise ValueError(f"{start}{n}:{m} keeps {n} of every {m}; N goes from 1 to M={m}")
    if size % m:
        raise ValueError(
            f"{start}{size} entries are not cut into groups of {m}; "
            f"use an M that divides {size}, such as {_nearest_divisor(size, m)}"
        )
    if size % ways or size // ways % m:
        entries = f"{size // ways} entries" if size % ways == 0 else f"{size}/{ways} entries"
        raise ValueError(
            f"{start}{ways} shards of {entries} cut groups of {m}; "
            f"use M that divides {size // ways}, or fewer shards"
        )


def split_groups(
    x: jax.Array, m: int, axis: Axis, *, n: int | jax.Array = 1
) -> tuple[jax.Array, int]:
    """x with the axis in two, [.., groups, m, ..], and the number of the axis of m."""
    axes = tuple(positive(a, x.ndim) for a in (axis if isinstance(axis, tuple) else (axis,)))
    if not axes or axes != tuple(range(axes[0], axes[-1] + 1)):
        raise ValueError(f"axis={axis} of {x.ndim} axes; use one, or adjacent increasing ones")
    if isinstance(m, int) and m > 0 and x.shape[axes[-1]] % m == 0:
        axes = axes[-1:]  # no group leaves the last of the axes
    size = math.prod(x.shape[a] for a in axes)
    check_nm(n, m, size, ways=shards(x, axes[0]), name=f"axis {axis} of {x.shape}")
    shape = (*x.shape[: axes[0]], size // m, m, *x.shape[axes[-1] + 1 :])
    spec = _spec(x)  # groups of several axes lie as the first of them: no group is cut
    if spec is not None:
        spec = P(*spec[: axes[0] + 1], None, *spec[axes[-1] + 1 :])
    return _reshape(x, shape, spec), axes[0] + 1


def join_groups(groups: jax.Array, x: jax.Array) -> jax.Array:
    """Groups of x, of any dtype, in the shape and sharding of x."""
    return _reshape(groups, x.shape, _spec(x))


def _spec(x: jax.Array) -> P | None:
    """Sharding of an array, an entry for each axis; None where its type has none."""
    spec = jax.typeof(x).sharding.spec
    return P(*spec, *[None] * (x.ndim - len(spec))) if any(spec) else None


def _reshape(x: jax.Array, shape: tuple[int, ...], spec: P | None) -> jax.Array:
    return x.reshape(shape) if spec is None else x.reshape(shape, out_sharding=spec)


def _nm_mask(groups: jax.Array, n: int | jax.Array, at: int, ties: str) -> jax.Array:
    """The mask of the n largest along axis `at`, which is one group.

    A threshold for each group is found by a sorting network over its entries as m separate arrays,
    of which XLA makes one fused loop: on a CPU, a tenth of the time of bisection.
    """
    m = groups.shape[at]
    place = iota(m, at, groups.ndim)
    order = range(m) if ties == "first" else range(m)[::-1]
    met: Any = 0  # ties met so far
    if m <= 32:
        entries = _entries(groups, at)
        threshold = _largest(entries, n)
        wanted = n - _total(key > threshold for key in entries)
        pruned: Any = 0  # bits
        for j in order:
            tie = entries[j] == threshold
            met += tie.astype(jnp.int32)
            kept = (entries[j] > threshold) | (tie & (met <= wanted))
            pruned |= jnp.where(kept, np.uint32(0), np.uint32(1 << j))
        code = jnp.uint8 if m <= 8 else jnp.uint16 if m <= 16 else jnp.uint32
        pruned = computed_once(pruned.astype(code))  # all ones, its greatest, only where n is 0
        kept = (pruned >> place.astype(code)) & 1 == 0
        return jnp.asarray(kept & (n > 0))
    # Larger networks would take too long to compile.
    if (m <= 64 or (m <= 128 and isinstance(n, int))) and jnp.issubdtype(
        groups.dtype, jnp.floating
    ):
        threshold = computed_once(_largest(_entries(groups, at), n))
    else:
        threshold = _bisected(groups, n, at)
    # The barrier has XLA slice the scores anew, in place of keeping m slices for the next loop.
    again, threshold = jax.lax.optimization_barrier((groups, threshold))
    entries = _entries(again, at)
    wanted = n - _total(key > threshold for key in entries)
    last: Any = 0  # how far in the last tie stands that is wanted
    for j in order:
        met += (entries[j] == threshold).astype(jnp.int32)
        last += (met < wanted).astype(jnp.int32)
    last = computed_once(last)
    first_ties = (place <= last) if ties == "first" else (place >= m - 1 - last)
    keys = _key(groups)
    mask = (keys > threshold) | ((keys == threshold) & first_ties)
    return jnp.asarray(mask & (n > 0))


_mask = jax.jit(_nm_mask, static_argnums=(1, 2, 3))
_mask_of_traced = jax.jit(_nm_mask, static_argnums=(2, 3))


def _largest(entries: list[jax.Array], n: int | jax.Array) -> jax.Array:
    """The n-th largest of the entries, elementwise; the largest where n is 0."""
    entries = list(entries)
    for i, j in _network(len(entries)):
        entries[i], entries[j] = (
            jnp.maximum(entries[i], entries[j]),
            jnp.minimum(entries[i], entries[j]),
        )
    if isinstance(n, int):
        return entries[n - 1]
    index = jnp.maximum(n - 1, 0)
    while len(entries) > 1:
        pairs = zip(entries[::2], [*entries[1::2], entries[-1]], strict=False)
        entries = [jnp.where(index & 1 == 1, b, a) for a, b in pairs]
        index >>= 1
    return entries[0]


def _network(size: int) -> Iterator[tuple[int, int]]:
    """The comparators of a sorting network: merge exchange (Knuth, vol. 3, algorithm 5.2.2M)."""
    top = 1 << max(0, (size - 1).bit_length() - 1)
    p = top
    while p and size > 1:
        q, r, d = top, 0, p
        while True:
            yield from ((i, i + d) for i in range(size - d) if i & p == r)
            if q == p:
                break
            q, r, d = q >> 1, p, q - p
        p >>= 1


def _bisected(groups: jax.Array, n: int | jax.Array, at: int) -> jax.Array:
    """Finds each group's n-th largest key as `_largest` does, bit by bit, by counting."""
    first = _entries(groups, at)[0]
    bits = 8 * first.dtype.itemsize

    def body(i: jax.Array, found: jax.Array) -> jax.Array:
        # The barrier has XLA slice the scores in every pass, in place of keeping m slices.
        groups_now, found = jax.lax.optimization_barrier((groups, found))
        tried = found + (jnp.ones((), found.dtype) << (bits - 1 - i).astype(found.dtype))
        count = _total(key >= tried for key in _entries(groups_now, at))
        return jnp.where(count >= jnp.maximum(n, 1), tried, found)

    lowest = jnp.full_like(first, jnp.iinfo(first.dtype).min)
    found: jax.Array = jax.lax.fori_loop(0, bits, body, lowest)
    return found


def computed_once(x: jax.Array) -> jax.Array:
    """x, an integer less than the greatest of its dtype in magnitude.

    XLA's CPU backend repeats a cheap producer for each entry that it is broadcast to, so the whole
    network m times; but it counts a remainder as dear, and ends the fused loop there.
    """
    return jax.lax.rem(x, jnp.full_like(x, jnp.iinfo(x.dtype).max))


def _entries(groups: jax.Array, axis: int) -> list[jax.Array]:
    """The keys of the slices of size 1 along an axis."""
    # Sliced first: keys of the whole array would be written to memory.
    slices = (jax.lax.slice_in_dim(groups, j, j + 1, axis=axis) for j in range(groups.shape[axis]))
    return [_key(part) for part in slices]


def _key(scores: jax.Array) -> jax.Array:
    key = order_key(scores)
    # One width throughout is what XLA's CPU backend vectorizes.
    return key.astype(jnp.int32) if key.dtype.itemsize < 4 else key


def _total(masks: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(operator.add, (mask.astype(jnp.int32) for mask in masks))


def iota(size: int, axis: int, ndim: int) -> jax.Array:
    shape = [1] * ndim
    shape[axis] = size
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _nearest_divisor(size: int, m: int) -> int:
    near = (d for gap in range(m) for d in (m - gap, m + gap))
    return next(d for d in near if size % d == 0)
