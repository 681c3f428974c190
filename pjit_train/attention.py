"""Exact attention in memory linear in the sequence, by tiles of whole rows.

A tile of rows of the logits is made, normalised and used before the next one is begun (FLAT, Kao et
al., ASPLOS 2023, row granularity), so the [length, length] matrix never exists; the columns that
the causal mask or the window empties for a whole tile are not computed. The backward pass is
written by hand and makes each tile again from the saved row statistics (Dao et al., NeurIPS 2022,
algorithm 4, with whole rows in place of blocks).

Letters in names: B batch, T rows (query positions), S columns (key positions), K key-value heads,
G query heads that share one of them, D size of a head, R rows of a tile.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from pjit_train.sharding import spec_axes, varying, varying_axes

TILE_ROWS = 128
_MAX_GROUPS = 8  # tiles are scanned within this many groups, each with its own static columns


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
      tile_rows: rows of logits that are held at a time.

    Returns:
      [batch, rows, heads, head_dim], in the dtype of q. A row that sees nothing gives zeros.

    Arrays with sharded types (a mesh with explicit axes is set) may be split over batch, rows and
    heads; keys and values that are split over their columns are gathered first.

    Raises:
      ValueError: the shapes do not fit each other, or window < 1.
    """
    _check(q, k, v, window)
    spec = jax.typeof(q).sharding.spec
    local = functools.partial(_attention, causal=causal, window=window, tile_rows=tile_rows)
    if not any(spec):
        return local(q, k, v, segments, row_offset)

    batch, rows, heads, _ = spec
    q_spec, kv_spec = P(batch, rows, heads, None), P(batch, None, heads, None)
    segment_specs = (P(batch, rows), P(batch, None))
    k, v = (jax.sharding.reshard(x, kv_spec) for x in (k, v))
    if segments is not None:
        segments = tuple(map(jax.sharding.reshard, segments, segment_specs))

    axes = spec_axes(q_spec)

    def shard(q, k, v, segments, row_offset):
        if rows is not None:
            row_offset = row_offset + jax.lax.axis_index(rows) * q.shape[1]
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
    q_BKGTD = q.reshape(B, T, K, H // K, D).transpose(0, 2, 3, 1, 4)
    k_BKSD, v_BKSD = (x.transpose(0, 2, 1, 3) for x in (k, v))
    mask = _Mask(causal, window, row_offset if isinstance(row_offset, int) else None)
    groups = mask.groups(T, S, tile_rows)
    out_BKGTD = _tiled(q_BKGTD, k_BKSD, v_BKSD, segments, row_offset, mask, groups)
    return out_BKGTD.transpose(0, 3, 1, 2, 4).reshape(B, T, H, D)


class _Mask:
    """Which columns a row sees, and the static bounds of that for a run of rows."""

    def __init__(self, causal: bool, window: int | None, offset: int | None):
        self.causal, self.window, self.offset = causal, window, offset

    def __eq__(self, other):
        return vars(self) == vars(other)

    def __hash__(self):
        return hash(tuple(vars(self).values()))

    def columns(self, begin: int, end: int, S: int) -> tuple[int, int]:
        """First and last (exclusive) column that any of the rows begin .. end - 1 sees."""
        if self.offset is None:
            return 0, S
        low = max(0, begin + self.offset - self.window + 1) if self.window else 0
        high = min(S, end + self.offset) if self.causal else S
        return min(low, S - 1), max(high, min(low, S - 1) + 1)

    def groups(self, T: int, S: int, R: int) -> tuple[tuple[int, int, int, int, int], ...]:
        """Rows in groups of equal tiles: (first row, tiles, rows of a tile, first, last column)."""
        groups = []
        per_group = -(-(T // R) // _MAX_GROUPS)
        row = 0
        while row < T:
            tiles = min(per_group, (T - row) // R)
            rows = R if tiles else T - row
            end = row + max(tiles, 1) * rows
            groups.append((row, max(tiles, 1), rows, *self.columns(row, end, S)))
            row = end
        return tuple(groups)

    def __call__(self, logits, row, low, row_offset, segments_tile):
        """Logits [..., R, C] of the rows from `row` and columns from `low`, -inf where masked."""
        R, C = logits.shape[-2:]
        rows = row + row_offset + jax.lax.broadcasted_iota(jnp.int32, (R, C), 0)
        cols = low + jax.lax.broadcasted_iota(jnp.int32, (R, C), 1)
        seen = True
        if self.causal:
            seen = cols <= rows
        if self.window:
            seen &= cols > rows - self.window
        if segments_tile is not None:
            rows_BR, cols_BC = segments_tile
            seen &= (rows_BR[:, :, None] == cols_BC[:, None, :])[:, None, None]
        return logits if seen is True else jnp.where(seen, logits, -jnp.inf)


def _tile(q_BKGTD, segments, row, R, low, high):
    """The rows of one tile, and the segment ids of its rows and columns."""
    rows = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=row, slice_size=R)
    if segments is not None:
        segments = rows(segments[0], axis=1), segments[1][:, low:high]
    return rows(q_BKGTD, axis=3), segments


def _logits(q_BKGRD, k_BKCD, scale):
    return (
        jnp.einsum("bkgrd,bkcd->bkgrc", q_BKGRD, k_BKCD, preferred_element_type=jnp.float32) * scale
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _tiled(q, k, v, segments, row_offset, mask, groups):
    return _forward(q, k, v, segments, row_offset, mask, groups)[0]


def _forward(q, k, v, segments, row_offset, mask, groups):
    scale = 1 / math.sqrt(q.shape[-1])

    def tile(row, R, low, high):
        q_BKGRD, tile_segments = _tile(q, segments, row, R, low, high)
        logits = _logits(q_BKGRD, k[:, :, low:high], scale)
        logits = mask(logits, row, low, row_offset, tile_segments)
        # The floor keeps a row that sees nothing free of inf - inf.
        top = jnp.maximum(jnp.max(logits, axis=-1, keepdims=True), -1e30)
        weights = jnp.exp(logits - top)
        total = jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-30)
        out = jnp.einsum("bkgrc,bkcd->bkgrd", weights.astype(v.dtype), v[:, :, low:high])
        return (out / total).astype(q.dtype), (top + jnp.log(total))[..., 0]

    outs, stats = [], []
    for row, tiles, R, low, high in groups:
        if tiles == 1:
            out, stat = tile(row, R, low, high)
        else:
            starts = row + R * jnp.arange(tiles)
            out, stat = jax.lax.map(lambda r, R=R, lo=low, hi=high: tile(r, R, lo, hi), starts)
            out, stat = _join(out, 3), _join(stat, 3)
        outs.append(out)
        stats.append(stat)
    return jnp.concatenate(outs, axis=3), jnp.concatenate(stats, axis=3)


def _join(x, axis):
    """[tiles, ..., R, ...] with R at `axis` of a tile -> [..., tiles * R, ...]."""
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _tiled_fwd(q, k, v, segments, row_offset, mask, groups):
    out, stats = _forward(q, k, v, segments, row_offset, mask, groups)
    return out, (q, k, v, segments, row_offset, out, stats)


def _tiled_bwd(mask, groups, residuals, d_out):
    q, k, v, segments, row_offset, out, stats = residuals
    scale = 1 / math.sqrt(q.shape[-1])
    # Row sums of d_weights * weights (the softmax's own correction), without making either.
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)

    def tile(row, R, low, high):
        rows = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=row, slice_size=R, axis=3
        )
        q_BKGRD, tile_segments = _tile(q, segments, row, R, low, high)
        k_BKCD, v_BKCD, d_out_BKGRD = k[:, :, low:high], v[:, :, low:high], rows(d_out)
        logits = mask(_logits(q_BKGRD, k_BKCD, scale), row, low, row_offset, tile_segments)
        weights = jnp.exp(logits - rows(stats)[..., None])
        d_weights = _logits(d_out_BKGRD, v_BKCD, 1.0)
        d_logits = (weights * (d_weights - rows(delta)) * scale).astype(q.dtype)
        d_v = jnp.einsum("bkgrc,bkgrd->bkcd", weights.astype(d_out.dtype), d_out_BKGRD)
        d_k = jnp.einsum("bkgrc,bkgrd->bkcd", d_logits, q_BKGRD)
        d_q = jnp.einsum("bkgrc,bkcd->bkgrd", d_logits, k_BKCD)
        return d_q, d_k, d_v

    d_qs, d_k, d_v = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for row, tiles, R, low, high in groups:
        if tiles == 1:
            d_q, d_k_tile, d_v_tile = tile(row, R, low, high)
        else:

            def body(sums, start, R=R, low=low, high=high):
                d_q, *d_kv = tile(start, R, low, high)
                return [a + b for a, b in zip(sums, d_kv, strict=True)], d_q

            zeros = varying([jnp.zeros(k[:, :, low:high].shape, jnp.float32)] * 2, varying_axes(k))
            (d_k_tile, d_v_tile), d_q = jax.lax.scan(body, zeros, row + R * jnp.arange(tiles))
            d_q = _join(d_q, 3)
        d_qs.append(d_q)
        d_k = d_k.at[:, :, low:high].add(d_k_tile)
        d_v = d_v.at[:, :, low:high].add(d_v_tile)
    return jnp.concatenate(d_qs, axis=3), d_k.astype(k.dtype), d_v.astype(v.dtype), None, None


_tiled.defvjp(_tiled_fwd, _tiled_bwd)
