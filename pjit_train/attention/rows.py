"""Exact attention in memory linear in the sequence, by tiles of whole rows, in plain JAX.

A tile of some heads' rows of the logits is made, normalised and used before the next one is begun
(FLAT, Kao et al., ASPLOS 2023, row granularity), so the [length, length] matrix never exists.
The backward pass is written by hand and makes the logits again from the saved row statistics (Dao
et al., NeurIPS 2022, algorithm 4). It needs no whole rows, so it goes over square blocks, and only
over those that the mask leaves anything of. Blocks that the mask leaves whole are not masked.

What the shapes are for, on a CPU: a tile fits the second-level cache; every product has its sum
over the last axis of the left operand, since XLA:CPU turns any other left operand around, slowly;
so the backward pass holds its blocks transposed.

Letters in names: B batch, T rows (query positions), S columns (key positions), K key-value heads,
G query heads that share one of them, D size of a head; n tiles of R rows, m blocks of C columns,
M = G R; x chunks of h pairs of a batch and a key-value head.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pjit_train.attention.logits import Logits
from pjit_train.attention.masks import Mask
from pjit_train.sharding import varying, varying_axes

LEAST = float(jnp.finfo(jnp.float32).min)  # of the largest logit of a row


class RowStats(NamedTuple):
    """Statistics of a row, which give its weights: exp((logit - top) * unit - log_total).

    In two, since of a large top their sum would keep nothing of the other. A logit is here what
    `Logits` gives, and the unit its `unit`.

    Attributes:
      top: [B, T, H], the largest logit, before scaling; LEAST of a row that sees nothing.
      log_total: [B, T, H], the log of the row's sum of exponentials, of logits less the top.
    """

    top: jax.Array
    log_total: jax.Array


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Shapes of the tiles: at most so many rows, columns and logits of one.

    Attributes:
      rows: of a head in a tile of the forward pass, which has all columns.
      logits: of a tile of the forward pass, for as many heads as it may hold (at least one).
      block: rows and columns of a head in a block of the backward pass.
      block_logits: of a block of the backward pass.
    """

    rows: int
    logits: int
    block: int
    block_logits: int


def tiles_for(rows: int, columns: int, tile_rows: int | None = None) -> Tiles:
    """Tiles for these lengths: measured on a CPU, see docs/attention.md.

    Args:
      tile_rows: rows of a head in a tile and in a block, where they are given.
    """
    if tile_rows is not None:
        return Tiles(tile_rows, 2**19, tile_rows, 2**18)
    if min(rows, columns) < 1024:
        return Tiles(128, 2**18, 128, 2**17)
    return Tiles(128, 2**19, 256, 2**18)


def attend_rows(
    q, k, v, segments, row_offset, mask: Mask, tiles: Tiles, logits: Logits | None = None
):
    """Attention as `attention.attention` documents it, on the arrays of one device."""
    logits = logits or Logits.of(q.shape[-1])
    return _attend(q, k, v, segments, row_offset, mask, tiles, logits)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attend(q, k, v, segments, row_offset, mask, tiles, logits):
    return forward(q, k, v, segments, row_offset, mask, tiles, logits)[0].astype(q.dtype)


def _fwd(q, k, v, segments, row_offset, mask, tiles, logits):
    out, stats = forward(q, k, v, segments, row_offset, mask, tiles, logits)
    out = out.astype(q.dtype)
    return out, (q, k, v, segments, row_offset, out, stats)


def _bwd(mask, tiles, logits, residuals, d_out):
    q, k, v, segments, row_offset, out, stats = residuals
    delta = row_corrections(out, d_out)
    gradients = backward(q, k, v, segments, row_offset, d_out, stats, delta, mask, tiles, logits)
    return *(d.astype(x.dtype) for d, x in zip(gradients, (q, k, v), strict=True)), None, None


_attend.defvjp(_fwd, _bwd)


def forward(q, k, v, segments, row_offset, mask: Mask, tiles: Tiles, logits: Logits):
    """The output [B, T, H, D], and the statistics of its rows; float32."""
    B, T, H, D = q.shape
    S, K = k.shape[1:3]
    R, n = _split(T, tiles.rows)
    G, scale = H // K, logits.unit
    width, groups = mask.row_groups(n, R, S)
    widths = mask.widths(n, S)
    h = _chunk(B * K, tiles.logits // (G * R * width))

    q_xnhMD = _row_tiles(q, n, R, K, h)
    kT_xhDS = k.transpose(0, 2, 3, 1).reshape(-1, h, D, S)
    v_xhSD = v.transpose(0, 2, 1, 3).reshape(-1, h, S, D)
    row_ids, col_ids = _segment_tiles(segments, n, R, K, G, h)
    within = jnp.tile(jnp.arange(R), G)  # row of each of the M in its tile

    def chunk(x):
        q_nhMD, kT_hDS, v_hSD, row_ids_nhM, col_ids_hS = x

        def tile(x, pieces):
            i, q_hMD, row_ids_hM = x
            rows_M = row_offset + i * R + within
            made = []
            for piece in pieces:
                low, high, masked = piece
                if mask.slides:
                    low = jnp.clip(row_offset + i * R - mask.window + 1, 0, S - width)
                kT, cols = _columns(kT_hDS, low, high, 2), low + jnp.arange(high)
                s = jnp.einsum("hmd,hdc->hmc", q_hMD, kT, preferred_element_type=jnp.float32)
                s = logits(s)
                if masked:
                    ids = None
                    if segments is not None:
                        ids = row_ids_hM[:, :, None], _columns(col_ids_hS, low, high, 1)[:, None]
                    s = mask(s, rows_M[:, None], cols, ids)
                made.append((s, low, high))
            tops = [jnp.max(s, axis=-1, keepdims=True) for s, _, _ in made]
            # The floor keeps a row that sees nothing free of inf - inf.
            top = jnp.maximum(functools.reduce(jnp.maximum, tops), LEAST)
            out, total = 0, 0
            for s, low, high in made:
                # Not s * scale - top, which a compiler may round once or twice: a mask would change
                # the bits of rows that it leaves alone.
                weights = jnp.exp((s - top) * scale)
                total += jnp.sum(weights, axis=-1, keepdims=True)
                out += jnp.einsum(
                    "hmc,hcd->hmd",
                    weights.astype(v.dtype),
                    _columns(v_hSD, low, high, 1),
                    preferred_element_type=jnp.float32,
                )
            total = jnp.maximum(total, 1e-30)
            return out / total, RowStats(top, jnp.log(total))

        def narrowest(x):
            """The tile, of no more columns than its last row may see."""
            which = jnp.searchsorted(jnp.array(widths[:-1]), row_offset + (x[0] + 1) * R)
            return jax.lax.switch(
                which, [functools.partial(tile, pieces=[(0, w, True)]) for w in widths], x
            )

        parts = []
        for first, last, pieces in groups:
            some = slice(first, last)
            ids = None if segments is None else row_ids_nhM[some]
            xs = jnp.arange(first, last), q_nhMD[some], ids
            one = functools.partial(tile, pieces=pieces) if len(widths) == 1 else narrowest
            parts.append(_map(one, xs, last - first))
        return jax.tree.map(lambda *p: jnp.concatenate(p), *parts)

    xs = q_xnhMD, kT_xhDS, v_xhSD, row_ids, col_ids
    out_xnhMD, stats_xnhM1 = _map(chunk, xs, len(q_xnhMD))
    stats = jax.tree.map(lambda x: _from_rows(x, B, T, K, R)[..., 0], stats_xnhM1)
    return _from_rows(out_xnhMD, B, T, K, R), stats


def row_corrections(out, d_out):
    """The softmax's correction of each row, the sum of weights * d_weights: float32 [B, T, H]."""
    return jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)


def backward(
    q,
    k,
    v,
    segments,
    row_offset,
    d_out,
    stats: RowStats,
    delta,
    mask: Mask,
    tiles: Tiles,
    logits: Logits,
):
    """Gradients of q, k and v, float32, from the statistics of `forward` and row corrections.

    Args:
      d_out: the cotangent of the output, [B, T, H, D].
      stats: over all columns that a row sees.
      delta: what `row_corrections` gives, [B, T, H].
    """
    B, T, H, D = q.shape
    S, K = k.shape[1:3]
    (R, n), (C, m) = _split(T, tiles.block), _split(S, tiles.block)
    G, scale = H // K, logits.unit
    h = _chunk(B * K, tiles.block_logits // (G * R * C))
    d_out = jnp.asarray(d_out)  # a cotangent may come from numpy

    q_xnhMD, d_out_xnhMD = _row_tiles(q, n, R, K, h), _row_tiles(d_out, n, R, K, h)
    stats_xnhM, delta_xnhM = jax.tree.map(
        lambda x: _row_tiles(x[..., None], n, R, K, h)[..., 0], (stats, delta)
    )
    k_xmhCD, v_xmhCD = _row_tiles(k, m, C, K, h), _row_tiles(v, m, C, K, h)
    row_ids, col_ids = _segment_tiles(segments, n, R, K, G, h)
    if segments is not None:
        col_ids = jnp.pad(col_ids, ((0, 0), (0, 0), (0, m * C - S)))
        col_ids = col_ids.reshape(-1, h, m, C).swapaxes(1, 2)
    within = jnp.tile(jnp.arange(R), G)
    pairs, whole, cut = mask.blocks(
        n, R, m, C, S, row_offset if mask.offset is None else mask.offset
    )

    def chunk(x):
        q_nhMD, d_out_nhMD, stats_nhM, delta_nhM, k_mhCD, kT_mhDC, v_mhCD, row_ids, col_ids = x

        def block(sums, pair, masked):
            i, j = pair
            dqT_nhDM, dk_mhCD, dv_mhCD = sums
            q_hMD, d_out_hMD, k_hCD = q_nhMD[i], d_out_nhMD[i], k_mhCD[j]
            product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
            logits_hCM = called_hCM = logits(product("hcd,hmd->hcm", k_hCD, q_hMD))
            if masked:
                cols_C1 = j * C + jnp.arange(C)[:, None]
                ids = None if segments is None else (row_ids[i][:, None], col_ids[j][:, :, None])
                rows_M, padded = row_offset + i * R + within, m * C > S
                logits_hCM = mask(logits_hCM, rows_M, cols_C1, ids, S if padded else None)
            top_hM, log_total_hM = stats_nhM.top[i], stats_nhM.log_total[i]
            # Made again, a logit beyond a million may round to one above the top.
            below_hCM = jnp.minimum(logits_hCM - top_hM[:, None], 0)
            weights_hCM = jnp.exp(below_hCM * scale - log_total_hM[:, None])
            d_weights_hCM = product("hcd,hmd->hcm", v_mhCD[j], d_out_hMD)
            d_logits_hCM = weights_hCM * (d_weights_hCM - delta_nhM[i][:, None])
            d_logits_hCM = logits.by_products(d_logits_hCM, called_hCM).astype(q.dtype)
            weights_hCM = weights_hCM.astype(d_out.dtype)
            dqT_nhDM = dqT_nhDM.at[i].add(product("hdc,hcm->hdm", kT_mhDC[j], d_logits_hCM))
            dk_mhCD = dk_mhCD.at[j].add(product("hcm,hmd->hcd", d_logits_hCM, q_hMD))
            dv_mhCD = dv_mhCD.at[j].add(product("hcm,hmd->hcd", weights_hCM, d_out_hMD))
            return dqT_nhDM, dk_mhCD, dv_mhCD

        shapes = (n, h, D, G * R), (m, h, C, D), (m, h, C, D)
        axes = frozenset().union(*map(varying_axes, jax.tree.leaves(x)))
        sums = varying(tuple(jnp.zeros(s, jnp.float32) for s in shapes), axes)
        for some, masked in ((whole, False), (cut, True)):
            sums = _go_over(functools.partial(block, masked=masked), sums, pairs, some)
        return sums

    xs = q_xnhMD, d_out_xnhMD, stats_xnhM, delta_xnhM, k_xmhCD
    xs = *xs, k_xmhCD.swapaxes(-1, -2), v_xmhCD, row_ids, col_ids
    dqT_xnhDM, dk_xmhCD, dv_xmhCD = _map(chunk, xs, len(q_xnhMD))
    dq = _from_rows(dqT_xnhDM.swapaxes(-1, -2), B, T, K, R) * logits.scale
    return dq, _from_rows(dk_xmhCD, B, S, K, C) * logits.scale, _from_rows(dv_xmhCD, B, S, K, C)


def _go_over(step, sums, pairs, some):
    """`sums` after the steps of some of the pairs, of which may be known only while running."""
    if isinstance(some, np.ndarray):
        pairs = pairs[some].T
        if pairs.size:
            sums, _ = jax.lax.scan(lambda sums, pair: (step(sums, pair), None), sums, tuple(pairs))
        return sums
    order = jnp.asarray(pairs)[jnp.argsort(~some)]
    return jax.lax.fori_loop(0, jnp.sum(some), lambda p, sums: step(sums, order[p]), sums)


def _split(length: int, most: int) -> tuple[int, int]:
    """Size and number of parts of at most `most`, as equal as can be: little padding."""
    parts = -(-length // most)
    return -(-length // parts), parts


def _chunk(heads: int, most: int) -> int:
    """The largest divisor of `heads` that is at most `most`, or 1."""
    return max(h for h in range(1, heads + 1) if heads % h == 0 and h <= max(1, most))


def _row_tiles(x, n, R, K, h):
    """[B, T, H, D] -> [x, n, h, M, D], padded with zeros."""
    B, T, H, D = x.shape
    x = jnp.pad(x, ((0, 0), (0, n * R - T), (0, 0), (0, 0))) if n * R > T else x
    x = x.reshape(B, n, R, K, H // K, D).transpose(0, 3, 1, 4, 2, 5)
    return x.reshape(-1, h, n, H // K * R, D).swapaxes(1, 2)


def _from_rows(x, B, T, K, R):
    """[x, n, h, M, D] -> [B, T, H, D]"""
    _, n, _, M, D = x.shape
    x = x.swapaxes(1, 2).reshape(B, K, n, M // R, R, D).transpose(0, 2, 4, 1, 3, 5)
    return x.reshape(B, n * R, K * M // R, D)[:, :T]


def _segment_tiles(segments, n, R, K, G, h):
    """Ids of the rows [x, n, h, M] and of the columns [x, h, S], or (None, None)."""
    if segments is None:
        return None, None
    rows, cols = segments
    B = len(rows)
    rows = jnp.broadcast_to(rows[:, :, None, None], (*rows.shape, K * G, 1))
    cols = jnp.broadcast_to(cols[:, None], (B, K, cols.shape[1])).reshape(-1, h, cols.shape[1])
    return _row_tiles(rows, n, R, K, h)[..., 0], cols


def _columns(x, low, size: int, axis: int):
    """Slices `size` columns of x from `low`, static or traced."""
    if isinstance(low, int):
        return jax.lax.slice_in_dim(x, low, low + size, axis=axis)
    return jax.lax.dynamic_slice_in_dim(x, low, size, axis)


def _map(function, xs, length: int):
    """`jax.lax.map`, or the function itself where there is one step."""
    if length > 1:
        return jax.lax.map(function, xs)
    return jax.tree.map(lambda x: x[None], function(jax.tree.map(lambda x: x[0], xs)))
