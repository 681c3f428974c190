"""Attention over a split sequence whose keys and values go round a ring (Liu et al., ICLR 2024).

Each device computes its rows against the columns it holds, and passes those on; the parts are
joined by the sums of exponentials, exactly. Where attention is causal, a device holds two pieces of
the 2 P that P devices share, piece r and piece 2 P - 1 - r (zigzag): in every round it has then two
whole pairs of pieces to do, and no device waits for another. The pieces are brought into that order
first, and back afterwards.

Letters in names: B batch, t rows of a device, H heads, D size of a head.
"""

import functools

import jax
import jax.numpy as jnp

from pjit_train.attention.logits import Logits
from pjit_train.attention.masks import Mask
from pjit_train.attention.rows import LEAST, RowStats, backward, forward, row_corrections, tiles_for
from pjit_train.sharding import varying, varying_axes


def attend_ring(
    q,
    k,
    v,
    segments,
    row_offset,
    *,
    axis,
    mask: Mask,
    tile_rows: int | None = None,
    logits: Logits | None = None,
):
    """Self-attention of the rows of this device over the columns of all, within a `shard_map`.

    Args:
      q, k, v, segments: this device's part of consecutive tokens, as `attention` takes the whole.
      row_offset: 0; the devices' own are counted from here.
      axis: mesh axis that the tokens are split over.
    """
    del row_offset
    zigzag = mask.causal and mask.window is None and q.shape[1] % 2 == 0
    if segments is None:
        segments = ()
    if zigzag:
        q, k, v, *segments = (_zigzag(x, axis) for x in (q, k, v, *segments))
    how = axis, mask.causal, mask.window, zigzag, tile_rows, logits or Logits.of(q.shape[-1])
    out = _ring(q, k, v, tuple(segments), *how)
    return _zigzag(out, axis, back=True) if zigzag else out


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7, 8, 9))
def _ring(q, k, v, segments, axis, causal, window, zigzag, tile_rows, logits):
    return _ring_fwd(q, k, v, segments, axis, causal, window, zigzag, tile_rows, logits)[0]


def _ring_fwd(q, k, v, segments, axis, causal, window, zigzag, tile_rows, logits):
    pairs = functools.partial(_pairs, causal=causal, window=window, zigzag=zigzag)
    columns = (k, v, segments[1:])
    rows, size = (q, segments[:1]), jax.lax.axis_size(axis)
    nothing = RowStats(jnp.full(q.shape[:3], LEAST), jnp.full(q.shape[:3], -jnp.inf))
    total = jnp.zeros(q.shape, jnp.float32), nothing
    total = varying(total, varying_axes(q))
    join = functools.partial(_join, unit=logits.unit)

    def add(total, rows, columns, turn):
        for (q, ids), (k, v, col_ids), offset, mask, put in pairs(rows, columns, axis, turn):
            some = (*ids, *col_ids) or None
            tiles = tiles_for(q.shape[1], k.shape[1], tile_rows)
            total = put(join, total, forward(q, k, v, some, offset, mask, tiles, logits))
        return total

    def turn(carry, i):
        total, columns = carry
        columns = _pass_on(columns, axis)
        return (add(total, rows, columns, i), columns), None

    total = add(total, rows, columns, None)
    (total, _), _ = jax.lax.scan(turn, (total, columns), jnp.arange(1, size))
    out = total[0].astype(q.dtype)
    return out, (q, k, v, segments, out, total[1])


def _ring_bwd(axis, causal, window, zigzag, tile_rows, logits, residuals, d_out):
    q, k, v, segments, out, stats = residuals
    pairs = functools.partial(_pairs, causal=causal, window=window, zigzag=zigzag)
    rows = (q, d_out, stats, row_corrections(out, d_out), segments[:1])
    size = jax.lax.axis_size(axis)
    zeros = lambda x: varying(jnp.zeros(x.shape, jnp.float32), varying_axes(q))

    def add(d_q, d_columns, columns, turn):
        for some_rows, some_columns, offset, mask, put, put_columns in pairs(
            rows, columns, axis, turn, both=True
        ):
            (q, d_out, stats, delta, ids), (k, v, col_ids) = some_rows, some_columns
            some = (*ids, *col_ids) or None
            tiles = tiles_for(q.shape[1], k.shape[1], tile_rows)
            parts = backward(q, k, v, some, offset, d_out, stats, delta, mask, tiles, logits)
            d_q = put(_sum, d_q, parts[0])
            d_columns = put_columns(_sum, d_columns, parts[1:])
        return d_q, d_columns

    def turn(carry, i):
        d_q, d_columns, columns = carry
        columns, d_columns = _pass_on((columns, d_columns), axis)
        return (*add(d_q, d_columns, columns, i), columns), None

    columns = (k, v, segments[1:])
    carry = (*add(zeros(q), (zeros(k), zeros(v)), columns, None), columns)
    (d_q, d_columns, _), _ = jax.lax.scan(turn, carry, jnp.arange(1, size))
    d_k, d_v = _pass_on(d_columns, axis)  # home
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_ring.defvjp(_ring_fwd, _ring_bwd)


def _sum(a, b):
    return jax.tree.map(jnp.add, a, b)


def _join(one, other, unit: float):
    """Attention over two sets of columns, of (output, row statistics) of each."""
    top = jnp.maximum(one[1].top, other[1].top)
    logs = [stats.log_total + (stats.top - top) * unit for _, stats in (one, other)]
    log_total = jnp.logaddexp(*logs)
    shares = [jnp.exp(log - log_total)[..., None] for log in logs]
    return one[0] * shares[0] + other[0] * shares[1], RowStats(top, log_total)


def _pass_on(tree, axis):
    size = jax.lax.axis_size(axis)
    ring = [(i, (i + 1) % size) for i in range(size)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis, ring), tree)


def _pairs(rows, columns, axis, turn, *, causal, window, zigzag, both=False):
    """Lists what to compute in a turn: (rows, columns, row offset, mask, put, put for columns)s.

    Args:
      rows, columns: trees of arrays with the tokens along axis 1.
      turn: how far the columns have come; None for those of the device itself.
      both: give the last of each.

    `put(function, whole, part)` replaces the rows (or columns) of `whole` that the part is of by
    `function` of them and the part.
    """
    own = turn is None
    me, size = jax.lax.axis_index(axis), jax.lax.axis_size(axis)
    source = me if own else (me - turn) % size
    length = jax.tree.leaves(rows)[0].shape[1]
    segmented = bool(rows[-1])
    if not zigzag:
        offset = 0 if own else (me - source) * length
        mask = Mask(causal, window, 0 if own else None, segmented)
        if not (causal or window):
            mask, offset = Mask(False, None, 0, segmented), 0
        found = [((0, length), (0, length), offset, mask)]
    else:
        half = length // 2
        whole, diagonal = (Mask(c, None, 0, segmented) for c in (False, True))
        low, high = (0, half), (half, half)
        if own:
            found = [(low, low, 0, diagonal), (high, high, 0, diagonal), (high, low, 0, whole)]
        else:
            # Earlier columns: their low piece for all rows. Later ones: both for the high rows.
            side = (jnp.where(source < me, 0, half), half)
            found = [(high, low, 0, whole), (side, side, 0, whole)]

    def cut(tree, part):
        if part[1] == length:
            return tree
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, *part, axis=1), tree)

    def put(part):
        def replace(function, whole, new):
            if part[1] == length:
                return function(whole, new)
            new = function(cut(whole, part), new)
            update = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=1)
            return jax.tree.map(lambda x, n: update(x, n, part[0]), whole, new)

        return replace

    for row_part, column_part, offset, mask in found:
        result = cut(rows, row_part), cut(columns, column_part), offset, mask, put(row_part)
        yield (*result, put(column_part)) if both else result


def _zigzag(x, axis, *, back: bool = False):
    """Moves tokens from consecutive pieces to pieces r and 2 P - 1 - r on device r, or back."""
    size = jax.lax.axis_size(axis)
    me = jax.lax.axis_index(axis)
    place = lambda piece: min(piece, 2 * size - 1 - piece)
    halves = jnp.split(x, 2, axis=1)
    # Of the pieces 2 r and 2 r + 1 of a device one goes to the first half, the other to the second:
    # which, is decided by whether the piece is of the first P.
    routes = [[(r, place(2 * r + i)) for r in range(size)] for i in range(2)]
    if back:
        # Device d keeps piece d in its first half: an even piece travels the even route.
        even = (me % 2 == 0).astype(jnp.int32)
        pieces = [jnp.where(even == 1, halves[0], halves[1])]
        pieces += [jnp.where(even == 1, halves[1], halves[0])]
        routes = [[(b, a) for a, b in route] for route in routes]
        return jnp.concatenate(
            [jax.lax.ppermute(p, axis, r) for p, r in zip(pieces, routes, strict=True)], axis=1
        )
    even, odd = (jax.lax.ppermute(h, axis, r) for h, r in zip(halves, routes, strict=True))
    # Device d holds pieces d and 2 P - 1 - d: one even, one odd.
    first = me % 2 == 0
    return jnp.concatenate([jnp.where(first, even, odd), jnp.where(first, odd, even)], axis=1)
