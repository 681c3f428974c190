"""Exact attention: one function, sharded, with several implementations.

Every implementation makes, normalises and uses whole rows of logits, or blocks of them joined
exactly, and holds no [length, length] matrix; docs/attention.md says which is taken when and how
fast it is.
"""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from pjit_train.attention.kernels import FITS, PLATFORMS, attend_cudnn, attend_splash
from pjit_train.attention.logits import Logits
from pjit_train.attention.masks import Mask
from pjit_train.attention.ring import attend_ring
from pjit_train.attention.rows import attend_rows, tiles_for
from pjit_train.errors import UserError
from pjit_train.sharding import spec_axes, spec_of, varying
from sparsity.ranges import check_choice

Way = Literal["auto", "rows", "flat", "splash", "cudnn"]


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    segments: tuple[jax.Array, jax.Array] | None = None,
    row_offset: int | jax.Array = 0,
    tile_rows: int | None = None,
    measured: bool = False,
    way: Way = "auto",
    sequence: Literal["gather", "ring"] = "gather",
) -> jax.Array:
    """Computes softmax(q k^T / sqrt(head_dim)) v, exactly; with another scale, or capped, if asked.

    Args:
      q: [batch, rows, heads, head_dim].
      k: [batch, columns, kv_heads, head_dim]; kv_heads divides heads, and consecutive query heads
        share one of them (grouped-query attention).
      v: as k.
      causal: row t sees columns up to t.
      window: row t sees columns from t - window + 1 on (and, without `causal`, all later ones).
      scale: of the products q k^T; None for 1 / sqrt(head_dim).
      softcap: caps logits softly, as softcap * tanh(logit / softcap); None for no cap.
      segments: (rows' segment ids [batch, rows], columns' segment ids [batch, columns]); a row sees
        only the columns of its own segment. Padding is a segment of its own.
      row_offset: index, among the columns, of the first row: its position when k and v are a cache.
      tile_rows: the most rows of a head whose logits are held at a time; None for what suits the
        lengths. More than there are rows are as good as all of them.
      measured: on a CPU, take the tiles that were fastest here (`attention_tuning`) for None.
      way: the implementation. "rows" is `rows.attend_rows` (anywhere), "flat" Torsion's kernel of a
        FLAT tile (TPU, GPU; on a CPU interpreted, slowly), "splash" JAX's kernel (TPU), "cudnn"
        that of `jax.nn.dot_product_attention` (GPU); "auto" takes splash or cudnn where it runs and
        fits, else rows. Only rows, and the ring, cap logits.
      sequence: keys and values split over their columns are gathered, or passed round a ring with
        causal work balanced (`ring.attend_ring`).

    Returns:
      [batch, rows, heads, head_dim], in the dtype of q. A row that sees nothing gives zeros.

    Arrays with sharded types (a mesh with explicit axes is set) may be split over batch, rows and
    heads.

    Raises:
      ValueError: the shapes do not fit each other, window or tile_rows < 1, or scale or softcap
        is not above 0.
      UserError: the implementation asked for does not run on this device, or not for these inputs.
    """
    _check(q, k, v, window, tile_rows, scale, softcap)
    q, k, v = map(jnp.asarray, (q, k, v))
    spec = spec_of(q)
    batch, rows, heads, _ = spec if any(spec) else [None] * 4
    offset = row_offset if isinstance(row_offset, int) and rows is None else None
    mask = Mask(causal, window, offset, segments is not None)
    logits = Logits.of(q.shape[3], scale, softcap)
    way = _choose(way, q, k, segments, mask, logits)
    ring = rows is not None and sequence == "ring"
    local = functools.partial(_local, way, tile_rows, measured, mask, logits)
    if ring:
        if not isinstance(row_offset, int) or row_offset or q.shape[1] != k.shape[1]:
            raise UserError("attention: sequence='ring' is for self-attention from the first token")
        how = {"axis": rows, "mask": mask, "tile_rows": tile_rows, "logits": logits}
        local = functools.partial(attend_ring, **how)
    if not any(spec):
        return local(q, k, v, segments, row_offset)

    q_spec, kv_spec = P(batch, rows, heads, None), P(batch, rows, heads, None)
    segment_specs = (P(batch, rows), P(batch, rows if ring else None))
    k, v = (jax.sharding.reshard(x, kv_spec) for x in (k, v))
    if segments is not None:
        segments = tuple(map(jax.sharding.reshard, segments, segment_specs))

    axes = spec_axes(q_spec)

    def shard(q, k, v, segments, row_offset):
        if rows is not None and not ring:
            row_offset = row_offset + jax.lax.axis_index(rows) * q.shape[1]
            # In here, where the gradient is a reduce-scatter whatever stands before it.
            k, v = (jax.lax.all_gather(x, rows, axis=1, tiled=True) for x in (k, v))
        if way != "rows":  # kernels do not say along which axes their results differ
            return local(q, k, v, segments, row_offset)
        return local(q, *varying((k, v, segments), axes), row_offset)

    return jax.shard_map(
        shard,
        in_specs=(q_spec, kv_spec, kv_spec, segment_specs if segments is not None else P(), P()),
        out_specs=q_spec,
        check_vma=way == "rows",
    )(q, k, v, segments, row_offset)


def check_way(way: str, platform: str) -> None:
    """Raises a UserError where an implementation does not run on the devices of a platform."""
    if way in ("auto", "rows"):
        return
    check_choice("attention", way, ("auto", "rows", *PLATFORMS), UserError)
    if _family(platform) not in PLATFORMS[way]:
        places = " or ".join(PLATFORMS[way])
        raise UserError(
            f"attention={way!r} runs on {places} and this is {platform}; use 'rows' or 'auto'"
        )


def _check(q, k, v, window, tile_rows, scale, softcap):
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
    if tile_rows is not None and tile_rows < 1:
        raise ValueError(f"attention: tile_rows={tile_rows}; a tile has at least one row")
    for name, value in (("scale", scale), ("softcap", softcap)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"attention: {name}={value}; use a number above 0, or None")


def _choose(way: str, q, k, segments, mask: Mask, logits: Logits) -> str:
    """The implementation to use: the one asked for, or the best that runs here and fits.

    Raises:
      UserError: the one asked for does not run here, or does not fit the inputs.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = _family(jax.default_backend() if device is None else device.platform)
    if way == "auto":
        best = {"tpu": "splash", "gpu": "cudnn"}.get(platform, "rows")
        return best if best == "rows" or not _misfit(best, q, k, segments, mask, logits) else "rows"
    if way == "rows":
        return way
    check_way(way, platform)
    if reason := _misfit(way, q, k, segments, mask, logits):
        raise UserError(f"attention={way!r} {reason}; use 'rows' or 'auto'")
    return way


def _misfit(way: str, q, k, segments, mask: Mask, logits: Logits) -> str | None:
    """Says why a kernel cannot take these inputs; None where it can."""
    if logits.softcap is not None:
        return f"does not cap logits, and has softcap={logits.softcap}"
    return FITS[way](q, k, segments, mask)


def _family(platform: str) -> str:
    return "gpu" if platform in ("cuda", "rocm") else platform


def _local(way, tile_rows, measured, mask, logits, q, k, v, segments, row_offset):
    if way != "rows" and logits != Logits.of(q.shape[3]):  # kernels have the usual scale
        q = (q * (logits.scale * math.sqrt(q.shape[3]))).astype(q.dtype)
    if way == "splash":
        return attend_splash(q, k, v, segments, mask)
    if way == "cudnn":
        return attend_cudnn(q, k, v, mask)
    if way == "flat":
        from pjit_train.attention.flat import attend_flat  # Pallas, which takes a while to import

        return attend_flat(q, k, v, segments, row_offset, mask, tile_rows)
    tiles = tiles_for(q.shape[1], k.shape[1], tile_rows)
    if measured and tile_rows is None and jax.default_backend() == "cpu":
        from pjit_train.attention.tuning import fastest_tiles

        tiles = fastest_tiles(q.shape, k.shape, q.dtype, mask, tiles)
    return attend_rows(q, k, v, segments, row_offset, mask, tiles, logits)
