"""Exact attention in memory linear in the sequence, by tiles of whole rows.

A tile of rows of the logits is made, normalised and used before the next one is begun (FLAT, Kao et
al., ASPLOS 2023, row granularity), so the [length, length] matrix never exists; the columns that
the causal mask or the window empties for a whole tile are not computed. The backward pass is
written by hand and makes each tile again from the saved row statistics (Dao et al., NeurIPS 2022,
algorithm 4, with whole rows in place of blocks).

Letters in names: B batch, T rows (query positions), S columns (key positions), K key-value heads,
G query heads that share one of them, D size of a head, n tiles, R rows and C columns of a tile.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from pjit_train.sharding import spec_axes, spec_of, varying, varying_axes

TILE_ROWS = 128
_MAX_GROUPS = 8  # tiles are scanned within at most so many groups, each with its own columns


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = False,
    window: int | None = None,
    segments: tuple[jax.Array, jax.Array] | None = None,
    row_offset: int | jax.Array = 0,
    tile_rows: int = TILE_ROWS,
) -> jax.Array:
    """softmax(q k^T / sqrt(head_dim)) v, exactly.

    Args:
      q: [batch, rows, heads, head_dim].
      k: [batch, columns, kv_heads, head_dim]; kv_heads divides heads, and consecutive query heads
        share one of them (grouped-query attention).
      v: as k.
      causal: row t sees columns up to t.
      window: row t sees columns from t - window + 1 on (and, without `causal`, all later ones).
      segments: (rows' segment ids [batch, rows], columns' segment ids [batch, columns]); a row sees
        only the columns of its own segment.
      row_offset: index, among the columns, of the first row: its position when k and v are a cache.
      tile_rows: the most rows of logits that are held at a time.

    Returns:
      [batch, rows, heads, head_dim], in the dtype of q. A row that sees nothing gives zeros.

    Arrays with sharded types (a mesh with explicit axes is set) may be split over batch, rows and
    heads; keys and values that are split over their columns are gathered first.

    Raises:
      ValueError: the shapes do not fit each other, or window < 1.
    """
    _check(q, k, v, window)
    spec = spec_of(q)
    local = functools.partial(_attention, causal=causal, window=window, tile_rows=tile_rows)
    if not any(spec):
        return local(q, k, v, segments, row_offset)

    batch, rows, heads, _ = spec
    q_spec = kv_spec = P(batch, rows, heads, None)
    segment_specs = (P(batch, rows), P(batch, None))
    k, v = (jax.sharding.reshard(x, kv_spec) for x in (k, v))
    if segments is not None:
        segments = tuple(map(jax.sharding.reshard, segments, segment_specs))

    axes = spec_axes(q_spec)

    def shard(q, k, v, segments, row_offset):
        if rows is not None:
            row_offset = row_offset + jax.lax.axis_index(rows) * q.shape[1]
            # In here, where the gradient is a reduce-scatter whatever stands before it.
            k, v = (jax.lax.all_gather(x, rows, axis=1, tiled=True) for x in (k, v))
        return local(q, *varying((k, v, segments), axes), row_offset)

    return jax.shard_map(
        shard,
        in_specs=(q_spec, kv_spec, kv_spec, segment_specs if segments is not None else P(), P()),
        out_specs=q_spec,
    )(q, k, v, segments, row_offset)


def _check(q, k, v, window):
    if k.shape != v.shape:
        raise ValueError(f"attention: k is {k.shape} and v is {v.shape}; they must be alike")
    fits = q.ndim == k.ndim == 4 and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3]
    if not fits or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"attention: q {q.shape} and k {k.shape} do not fit; both are [batch, length, heads, "
            "head_dim], with the heads of k dividing those of q"
        )
    if window is not None and window < 1:
        raise ValueError(f"attention: window={window}; a row sees at least itself, so use >= 1")


def _attention(q, k, v, segments, row_offset, *, causal, window, tile_rows):
    B, T, H, D = q.shape
    S, K = k.shape[1:3]
    n = -(-T // tile_rows)
    R = -(-T // n)  # tiles as equal as can be: fewer than n rows of padding

    def tiles(x):  # [batch, rows, ...] -> [tile, batch, R, ...]
        padded = jnp.pad(x, [(0, 0), (0, n * R - T)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(B, n, R, *x.shape[2:]), 1, 0)

    q_nBKGRD = tiles(q.reshape(B, T, K, H // K, D)).transpose(0, 1, 3, 4, 2, 5)
    k_BKSD, v_BKSD = (x.transpose(0, 2, 1, 3) for x in (k, v))
    if segments is not None:
        segments = tiles(segments[0]), segments[1]
    mask = _Mask(causal, window, row_offset if isinstance(row_offset, int) else None)
    groups = mask.groups(n, R, S)
    out_nBKGRD = _tiled(q_nBKGRD, k_BKSD, v_BKSD, segments, row_offset, mask, groups)
    return out_nBKGRD.transpose(1, 0, 4, 2, 3, 5).reshape(B, n * R, H, D)[:, :T]


@dataclasses.dataclass(frozen=True)
class _Mask:
    """Which columns a row sees, and the static bounds of that for a run of tiles."""

    causal: bool
    window: int | None
    offset: int | None  # of the first row, where it is known while tracing

    def groups(self, n: int, R: int, S: int) -> tuple[tuple[int, int, int, int], ...]:
        """Runs of tiles with columns in common: (first tile, last, first column, last column).

        Lasts are exclusive; columns outside are seen by no row of the run.
        """
        size = -(-n // _MAX_GROUPS)
        groups = []
        for first in range(0, n, size):
            last, low, high = min(first + size, n), 0, S
            if self.offset is not None and self.window:
                low = min(max(0, first * R + self.offset - self.window + 1), S - 1)
            if self.offset is not None and self.causal:
                high = max(min(S, last * R + self.offset), low + 1)
            groups.append((first, last, low, high))
        return tuple(groups)

    def __call__(self, logits, row, low, rows_BR, cols_BC):
        """Logits [..., R, C] of the rows from `row` and columns from `low`, -inf where masked."""
        rows = row + jax.lax.broadcasted_iota(jnp.int32, logits.shape[-2:], 0)
        cols = low + jax.lax.broadcasted_iota(jnp.int32, logits.shape[-2:], 1)
        seen = None
        if self.causal:
            seen = cols <= rows
        if self.window:
            near = cols > rows - self.window
            seen = near if seen is None else seen & near
        if rows_BR is not None:
            alike = (rows_BR[:, :, None] == cols_BC[:, None, :])[:, None, None]
            seen = alike if seen is None else seen & alike
        return logits if seen is None else jnp.where(seen, logits, -jnp.inf)


def _logits(q_BKGRD, k_BKCD, scale):
    logits = jnp.einsum("bkgrd,bkcd->bkgrc", q_BKGRD, k_BKCD, preferred_element_type=jnp.float32)
    return logits * scale


def _group(group, segments, row_offset, R, *tiled):
    """What to go over in a group: (first row, rows' segments, tiles...) of each of its tiles, and
    the segments of its columns."""
    first, last, low, high = group
    starts = row_offset + R * jnp.arange(first, last)
    rows, cols = (None, None) if segments is None else segments
    over = (starts, None if rows is None else rows[first:last], *(x[first:last] for x in tiled))
    return over, None if cols is None else cols[:, low:high]


def _over(function, carry, xs):
    """`jax.lax.scan`, or the function itself where there is one tile."""
    if len(xs[0]) > 1:
        return jax.lax.scan(function, carry, xs)
    carry, out = function(carry, jax.tree.map(lambda x: x[0], xs))
    return carry, jax.tree.map(lambda x: x[None], out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _tiled(q, k, v, segments, row_offset, mask, groups):
    return _tiled_fwd(q, k, v, segments, row_offset, mask, groups)[0]


def _tiled_fwd(q, k, v, segments, row_offset, mask, groups):
    scale, R = 1 / math.sqrt(q.shape[-1]), q.shape[-2]
    outs, stats = [], []
    for group in groups:
        low, high = group[2:]
        k_BKCD, v_BKCD = k[:, :, low:high], v[:, :, low:high]
        xs, cols = _group(group, segments, row_offset, R, q)

        def tile(_, x, k=k_BKCD, v=v_BKCD, low=low, cols=cols):
            row, rows, q_BKGRD = x
            logits = mask(_logits(q_BKGRD, k, scale), row, low, rows, cols)
            # The floor keeps a row that sees nothing free of inf - inf.
            top = jnp.maximum(jnp.max(logits, axis=-1, keepdims=True), -1e30)
            weights = jnp.exp(logits - top)
            total = jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-30)
            out = jnp.einsum("bkgrc,bkcd->bkgrd", weights.astype(v.dtype), v) / total
            return None, (out.astype(q_BKGRD.dtype), top + jnp.log(total))

        _, (out, stat) = _over(tile, None, xs)
        outs.append(out)
        stats.append(stat)
    out, stats = jnp.concatenate(outs), jnp.concatenate(stats)
    return out, (q, k, v, segments, row_offset, out, stats)


def _tiled_bwd(mask, groups, residuals, d_out):
    q, k, v, segments, row_offset, out, stats = residuals
    scale, R = 1 / math.sqrt(q.shape[-1]), q.shape[-2]
    d_k, d_v = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    d_qs = []
    for group in groups:
        low, high = group[2:]
        k_BKCD, v_BKCD = k[:, :, low:high], v[:, :, low:high]
        xs, cols = _group(group, segments, row_offset, R, q, out, stats, d_out)

        def tile(sums, x, k=k_BKCD, v=v_BKCD, low=low, cols=cols):
            row, rows, q_BKGRD, out_BKGRD, stats_BKGR1, d_out_BKGRD = x
            logits = mask(_logits(q_BKGRD, k, scale), row, low, rows, cols)
            weights = jnp.exp(logits - stats_BKGR1)
            d_weights = _logits(d_out_BKGRD, v, 1.0)
            # The softmax's own correction: the row sums of weights * d_weights.
            products = d_out_BKGRD.astype(jnp.float32) * out_BKGRD.astype(jnp.float32)
            d_logits = weights * (d_weights - jnp.sum(products, axis=-1, keepdims=True)) * scale
            d_logits, weights = d_logits.astype(q.dtype), weights.astype(d_out.dtype)
            d_q = jnp.einsum("bkgrc,bkcd->bkgrd", d_logits, k)
            d_k = jnp.einsum("bkgrc,bkgrd->bkcd", d_logits, q_BKGRD)
            d_v = jnp.einsum("bkgrc,bkgrd->bkcd", weights, d_out_BKGRD)
            return (sums[0] + d_k, sums[1] + d_v), d_q

        zeros = varying([jnp.zeros(k_BKCD.shape, jnp.float32)] * 2, varying_axes(k))
        (d_k_group, d_v_group), d_q = _over(tile, tuple(zeros), xs)
        d_qs.append(d_q)
        d_k = d_k.at[:, :, low:high].add(d_k_group)
        d_v = d_v.at[:, :, low:high].add(d_v_group)
    return jnp.concatenate(d_qs), d_k.astype(k.dtype), d_v.astype(v.dtype), None, None


_tiled.defvjp(_tiled_fwd, _tiled_bwd)
