"""N:M masks along two axes at once, for a kernel that the backward pass reads transposed."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsity.masks.axes import positive, shards
from sparsity.masks.nm import check_nm, computed_once, iota, split_groups
from sparsity.numbers.rounding import INFINITY, MAGNITUDE, bits_of, lift, split

_Kept = tuple[jax.Array, jax.Array, Any]
"""(rank, sum, bits of the pattern) of what a pattern keeps; see `_two_of_four`."""

_PAIRS = [(i, j) for i in range(4) for j in range(i + 1, 4)]

_TEMPERATURE = 0.01  # of the entropy, in the greatest score of a block
_SWEEPS = 150  # of rows, columns and bounds


def transposable_mask(
    scores: jax.Array, n: int = 2, m: int = 4, *, axes: tuple[int, int] = (-2, -1)
) -> jax.Array:
    """N:M along both axes at once: n entries of every row and column of every m x m block.

    For 2:4, of the 90 patterns the one with the greatest sum of scores, in float32 (Hubara et al.,
    2021, "transposable masks"). Of a block that holds NaN or infinities, one that keeps the fewest
    NaN; of these, the fewest -inf, then the most +inf, then the greatest sum of the others. A power
    of two that multiplies a block changes nothing.

    For other n and m, TSENOR (Meng, Makni and Mazumder, 2025, arXiv:2505.23949): the sum plus an
    entropy is made greatest over matrices of rows and columns of sum n with entries in 0 .. 1, by
    Dykstra's projections; the entries are then taken greedily, and what rows and columns still lack
    is filled by swaps. The sum of |scores| of random kernels is within 1 % of the greatest. NaN
    counts as the least score, and infinities as the greatest finite ones.

    Args:
      scores: floating or integer, [.., m * A, .., m * B, ..].
      n: entries kept of a row or column of a block, 1 to m.
      m: rows and columns of a block.
      axes: the two axes.

    Returns:
      bool, of the shape of the scores.

    Raises:
      ValueError: n is not in 1 .. m, an axis is not divisible by m, or the axes are one.
    """
    scores = jnp.asarray(scores)
    row, column = sorted(positive(a, scores.ndim) for a in axes)
    if row == column:
        raise ValueError(f"axes={axes} are one axis; use two")
    for axis in (row, column):
        ways = shards(scores, axis)
        check_nm(n, m, scores.shape[axis], ways=ways, name=f"axis {axis} of {scores.shape}")
    if (n, m) == (2, 4):
        best: jax.Array = _two_of_four(scores, row, column)
        return best
    mask: jax.Array = _n_of_m(scores, n, m, row, column)
    return mask


def _joined(mask: jax.Array, row: int, column: int) -> jax.Array:
    """The mask [.., A, m, .., B, m, ..] as [.., m * A, .., m * B, ..]."""
    for axis in (column, row):  # one by one, which explicit shardings follow
        at = axis + (axis == column)
        shape = (*mask.shape[:at], mask.shape[at] * mask.shape[at + 1], *mask.shape[at + 2 :])
        mask = mask.reshape(shape)
    return mask


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _n_of_m(scores: jax.Array, n: int, m: int, row: int, column: int) -> jax.Array:
    blocks, j = split_groups(scores, m, column)
    blocks, i = split_groups(blocks, m, row)
    j += 1
    most = jnp.finfo(jnp.float32).max / 4
    x = jnp.clip(blocks.astype(jnp.float32), -most, most)
    x = jnp.where(jnp.isnan(x), -most, x)
    x = jnp.moveaxis(x, (i, j), (-2, -1))  # [.., m, m]
    low, high = (f(x, axis=(-2, -1), keepdims=True) for f in (jnp.min, jnp.max))
    # A constant added to a block changes no choice: every pattern keeps n * m entries.
    x = (x - low) / jnp.where(high > low, high - low, 1)
    mask = _filled(_greedy(_relaxed(x, n), n), x, n)
    return _joined(jnp.moveaxis(mask, (-2, -1), (i, j)), row, column)


def _relaxed(x: jax.Array, n: int) -> jax.Array:
    """log of the matrix of row and column sums n and entries up to 1, nearest to exp(x / T)."""
    log_n = np.float32(np.log(n))

    def sweep(_: int, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        p, dual = found
        for axis in (-1, -2):
            p = p + (log_n - jax.nn.logsumexp(p, axis=axis, keepdims=True))
        bounded = jnp.minimum(p + dual, 0)
        return bounded, p + dual - bounded

    found = (x / _TEMPERATURE, jnp.zeros_like(x))
    relaxed: jax.Array = jax.lax.fori_loop(0, _SWEEPS, sweep, found)[0]
    return relaxed


def _greedy(p: jax.Array, n: int) -> jax.Array:
    """Takes the entries [.., m, m] from the greatest on, where row and column still have room."""
    m = p.shape[-1]
    order = jnp.argsort(p.reshape(*p.shape[:-2], m * m), axis=-1, descending=True, stable=True)
    lines = jnp.arange(m)

    def take(t: int, mask: jax.Array) -> jax.Array:
        place = jax.lax.dynamic_index_in_dim(order, t, axis=-1)  # [.., 1]
        here = (lines == place // m)[..., :, None] & (lines == place % m)[..., None, :]
        room = (_rows(mask) < n) & (_columns(mask) < n)
        taken: jax.Array = mask | (here & room)
        return taken

    mask: jax.Array = jax.lax.fori_loop(0, m * m, take, jnp.zeros_like(p, bool))
    return mask


def _filled(mask: jax.Array, x: jax.Array, n: int) -> jax.Array:
    """The greedy mask with n in every row and column: swaps that cost the least score.

    Where row i and column j lack an entry, and the mask has theirs, an entry (k, l) is given up for
    (i, l) and (k, j). There always is one: were there none, row k and column l, whose entry
    the greedy choice then would have taken, would lack one too.
    """
    m = mask.shape[-1]

    def lacking(mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _rows(mask) < n, _columns(mask) < n  # [.., m, 1], [.., 1, m]

    def swap(mask: jax.Array) -> jax.Array:
        short_rows, short_columns = lacking(mask)
        i = jnp.argmax(short_rows, axis=-2, keepdims=True)  # [.., 1, 1]
        j = jnp.argmax(short_columns, axis=-1, keepdims=True)
        lines = jnp.arange(m)
        at_i, at_j = lines[:, None] == i, lines == j
        of_row = jnp.any(mask & at_i, axis=-2, keepdims=True)  # [.., 1, m]: row i of the mask
        of_column = jnp.any(mask & at_j, axis=-1, keepdims=True)
        x_row = jnp.sum(jnp.where(at_i, x, 0), axis=-2, keepdims=True)
        x_column = jnp.sum(jnp.where(at_j, x, 0), axis=-1, keepdims=True)
        gain = jnp.where(mask & ~of_row & ~of_column, x_row + x_column - x, -jnp.inf)
        flat = jnp.argmax(gain.reshape(*gain.shape[:-2], m * m), axis=-1)[..., None, None]
        at_k, at_l = lines[:, None] == flat // m, lines == flat % m
        swapped = (mask & ~(at_k & at_l)) | (at_i & at_l) | (at_k & at_j)
        return jnp.where(jnp.any(short_rows, axis=-2, keepdims=True), swapped, mask)

    whole: jax.Array = jax.lax.while_loop(lambda mask: jnp.any(lacking(mask)[0]), swap, mask)
    return whole


def _rows(mask: jax.Array) -> jax.Array:
    return jnp.sum(mask, axis=-1, keepdims=True, dtype=jnp.int32)


def _columns(mask: jax.Array) -> jax.Array:
    return jnp.sum(mask, axis=-2, keepdims=True, dtype=jnp.int32)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _two_of_four(scores: jax.Array, row: int, column: int) -> jax.Array:
    blocks, j = split_groups(scores, 4, column)
    blocks, i = split_groups(blocks, 4, row)
    j += 1

    def entry(a: int, b: int) -> jax.Array:
        x = jax.lax.slice_in_dim(jax.lax.slice_in_dim(blocks, a, a + 1, axis=i), b, b + 1, axis=j)
        return x.astype(jnp.float32)

    entries = [[entry(a, b) for b in range(4)] for a in range(4)]
    greatest = functools.reduce(jnp.maximum, (_finite_bits(x) for row in entries for x in row))
    exponent = computed_once(split(jnp.maximum(greatest, 1))[1])
    pairs = [  # of each row: (rank, sum, bits of the pattern) of what a pair of columns keeps
        {
            (b, c): (
                _rank(row[b]) + _rank(row[c]),
                _scaled(row[b], exponent) + _scaled(row[c], exponent),
                np.int32(1 << (4 * a + b) | 1 << (4 * a + c)),
            )
            for b, c in _PAIRS
        }
        for a, row in enumerate(entries)
    ]
    upper, lower = _best_of_two(*pairs[:2]), _best_of_two(*pairs[2:])
    wholes = [_together(upper[c], lower[tuple(2 - k for k in c)]) for c in upper]
    place = 4 * iota(4, i, blocks.ndim) + iota(4, j, blocks.ndim)
    mask = computed_once(_best(wholes)[2]) >> place & 1 == 1
    return _joined(mask, row, column)


def _finite_bits(x: jax.Array) -> jax.Array:
    """The bits of |x|; 0 of NaN and infinities."""
    bits = bits_of(x) & MAGNITUDE
    return jnp.where(bits < INFINITY, bits, 0)


def _scaled(x: jax.Array, exponent: jax.Array) -> jax.Array:
    """x / 2^exponent, subnormals too; 0 of NaN and infinities."""
    value = lift(_finite_bits(x), exponent)
    return jnp.where(bits_of(x) < 0, -value, value)


def _rank(x: jax.Array) -> jax.Array:
    """int32, of which a sum of eight tells first how many NaN, then how many -inf and +inf."""
    bits = bits_of(x)
    of_infinity = jnp.where(bits < 0, -9, 1)
    magnitude = bits & MAGNITUDE
    return jnp.where(magnitude > INFINITY, -81, jnp.where(magnitude == INFINITY, of_infinity, 0))


def _best_of_two(
    first: dict[tuple[int, int], _Kept], second: dict[tuple[int, int], _Kept]
) -> dict[tuple[int, ...], _Kept]:
    """The best of two rows by how many each column keeps, of which the other two rows depend."""
    found: dict[tuple[int, ...], list[_Kept]] = {}
    for p, q in itertools.product(_PAIRS, _PAIRS):
        counts = tuple((k in p) + (k in q) for k in range(4))
        found.setdefault(counts, []).append(_together(first[p], second[q]))
    return {counts: _best(each) for counts, each in found.items()}


def _together(x: _Kept, y: _Kept) -> _Kept:
    return x[0] + y[0], x[1] + y[1], x[2] | y[2]


def _best(found: list[_Kept]) -> _Kept:
    """The greatest (rank, sum, code) by rank, then by sum; of equal ones the first."""
    while len(found) > 1:
        last = found[len(found) // 2 * 2 :]
        found = [_better(x, y) for x, y in zip(found[::2], found[1::2], strict=False)] + last
    return found[0]


def _better(x: _Kept, y: _Kept) -> _Kept:
    second = (y[0] > x[0]) | ((y[0] == x[0]) & (y[1] > x[1]))
    rank, total, code = (jnp.where(second, b, a) for a, b in zip(x, y, strict=True))
    return rank, total, code
