"""A Pallas kernel of the FLAT tile (Kao et al., ASPLOS 2023): some rows of a head at a time.

On a TPU the keys and values of a head stay on chip while its tiles of rows go by. The logits of a
tile are made chunk by chunk into one buffer of whole rows, normalised there and used; chunks that
the mask empties are not made. On a GPU, whose cores have no room for whole rows, a chunk is made
again for its use. A CPU interprets the TPU's kernel, slowly. The backward pass is that of
`attention_rows`.

Letters in names: B batch, T rows, S columns, H heads, K key-value heads, D size of a head; tiles of
R rows, chunks of C columns.
"""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton

from pjit_train.attention.logits import Logits
from pjit_train.attention.masks import Mask
from pjit_train.attention.rows import LEAST, RowStats, backward, row_corrections, tiles_for
from pjit_train.errors import UserError
from topology.accelerator.accelerator import TPU_V4_CORE
from topology.accelerator.dataflow import best_tile

_CHUNK = 128  # lanes of a TPU's vector
_ROWS = 8  # and its sublanes
_GPU_LEAST = 16  # side of a product on tensor cores; there all sides are powers of two
_GPU_ROWS = 64  # of a tile, whose output and sums are to stay in registers


def attend_flat(
    q,
    k,
    v,
    segments,
    row_offset,
    mask: Mask,
    tile_rows: int | None = None,
    *,
    interpret: Literal["tpu", "gpu"] | None = None,
):
    """Attention as `attention.attention` documents it, on the arrays of one device.

    Args:
      tile_rows: rows of a tile; None for those of the fastest tile that fits a core of TPU v4, by
        the dataflow model (`topology.accelerator.dataflow.best_tile`), on a GPU for 64.
      interpret: the kernel to interpret; None to compile this device's, or a TPU's on a CPU.

    Raises:
      UserError: keys and values of a head, and a tile of eight rows, do not fit a core of TPU v4.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if device is None else device.platform
    if interpret is None and platform == "cpu":
        interpret = "tpu"
    target = interpret or ("tpu" if platform == "tpu" else "gpu")
    rows = min(tile_rows or (_GPU_ROWS if target == "gpu" else _predicted_rows(q, k)), q.shape[1])
    rows = _power(rows) if target == "gpu" else -(-rows // _ROWS) * _ROWS
    row_offset = jnp.asarray(row_offset, jnp.int32).reshape(1)
    return _attend(q, k, v, segments, row_offset, mask, rows, target, interpret is not None)


def _power(size: int) -> int:
    return max(_GPU_LEAST, 1 << (size - 1).bit_length())


def _predicted_rows(q, k) -> int:
    B, T, H, D = q.shape
    size = q.dtype.itemsize
    try:
        tile = best_tile(
            TPU_V4_CORE,
            batch=B,
            heads=H,
            rows=T,
            columns=k.shape[1],
            head_dim=D,
            bytes_per_element=size,
            row_multiple=_ROWS,
        )
    except ValueError as error:
        raise UserError(
            f"attention='flat' holds all {k.shape[1]} keys and values of a head on chip, which is "
            "more than a core of TPU v4 has; use 'splash' or 'rows'"
        ) from error
    return tile.rows


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def _attend(q, k, v, segments, row_offset, mask, rows, target, interpret):
    return _forward(q, k, v, segments, row_offset, mask, rows, target, interpret)[0]


def _fwd(q, k, v, segments, row_offset, mask, rows, target, interpret):
    out, stats = _forward(q, k, v, segments, row_offset, mask, rows, target, interpret)
    return out, (q, k, v, segments, row_offset, out, stats)


def _bwd(mask, rows, target, interpret, residuals, d_out):
    q, k, v, segments, row_offset, out, stats = residuals
    delta = row_corrections(out, d_out)
    tiles = tiles_for(q.shape[1], k.shape[1])
    of_rows = d_out, stats, delta, mask, tiles, Logits.of(q.shape[-1])
    gradients = backward(q, k, v, segments, row_offset[0], *of_rows)
    return *(d.astype(x.dtype) for d, x in zip(gradients, (q, k, v), strict=True)), None, None


_attend.defvjp(_fwd, _bwd)


def _forward(q, k, v, segments, row_offset, mask: Mask, R: int, target: str, interpret: bool):
    B, T, H, D = q.shape
    S, K = k.shape[1:3]
    n, m = -(-T // R), -(-S // _CHUNK)
    size = _power(D) if target == "gpu" else D

    def heads_first(x, length):  # [B, T, H, D] -> [B H, length, size]
        x = jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, size - D)))
        return x.transpose(0, 2, 1, 3).reshape(-1, length, size)

    rows_of_head = lambda x, i: (x, i, 0)
    all_of_group = lambda x, i: (x // (H // K), 0, 0)
    inputs = [row_offset, heads_first(q, n * R)]
    inputs += [heads_first(x, m * _CHUNK) for x in (k, v)]
    in_specs = [
        pl.BlockSpec((1,), lambda x, i: (0,))
        if target == "gpu"
        else pl.BlockSpec(memory_space=pltpu.SMEM),
        pl.BlockSpec((1, R, size), rows_of_head),
        pl.BlockSpec((1, m * _CHUNK, size), all_of_group),
        pl.BlockSpec((1, m * _CHUNK, size), all_of_group),
    ]
    if segments is not None:
        row_ids = jnp.pad(segments[0], ((0, 0), (0, n * R - T)))
        col_ids = jnp.pad(segments[1], ((0, 0), (0, m * _CHUNK - S)))
        inputs += [row_ids[:, :, None], col_ids[:, None, :]]
        in_specs += [
            pl.BlockSpec((1, R, 1), lambda x, i: (x // H, i, 0)),
            pl.BlockSpec((1, 1, m * _CHUNK), lambda x, i: (x // H, 0, 0)),
        ]
    kept = target == "tpu"
    out, stats = pl.pallas_call(
        functools.partial(
            _kernel, mask=mask, columns=S, chunks=m, scale=1 / math.sqrt(D), kept=kept
        ),
        grid=(B * H, n),
        in_specs=in_specs,
        out_specs=[
            pl.BlockSpec((1, R, size), rows_of_head),
            pl.BlockSpec((1, R, 2), rows_of_head),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((B * H, n * R, size), q.dtype),
            jax.ShapeDtypeStruct((B * H, n * R, 2), jnp.float32),
        ],
        scratch_shapes=[pltpu.VMEM((R, m * _CHUNK), jnp.float32)] if kept else [],
        compiler_params=None if kept else triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
    )(*inputs)
    out, stats = (x.reshape(B, H, n * R, -1).swapaxes(1, 2)[:, :T] for x in (out, stats))
    return out[..., :D], RowStats(stats[..., 0], stats[..., 1])


def _kernel(offset, q, k, v, *refs, mask: Mask, columns: int, chunks: int, scale: float, kept):
    """`kept`: whether whole rows of logits are held, in the last of the refs."""
    logits = refs[-1] if kept else None
    *ids, out, stats = refs[:-1] if kept else refs
    R = q.shape[1]
    top_row = offset[0] + pl.program_id(1) * R
    first, last = 0, chunks
    if mask.causal:
        last = jnp.clip((top_row + R + _CHUNK - 1) // _CHUNK, 1, last)
    if mask.window:
        first = jnp.clip((top_row - mask.window + 1) // _CHUNK, 0, last - 1)
    rows = top_row + jax.lax.broadcasted_iota(jnp.int32, (R, _CHUNK), 0)
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    dot = functools.partial(
        jax.lax.dot_general, precision=precision, preferred_element_type=jnp.float32
    )

    def make(j):
        chunk = pl.ds(j * _CHUNK, _CHUNK)
        made = dot(q[0], k[0, chunk, :], (((1,), (1,)), ((), ())))
        cols = j * _CHUNK + jax.lax.broadcasted_iota(jnp.int32, (R, _CHUNK), 1)
        pair = (ids[0][0], ids[1][0, :, chunk]) if ids else None
        return mask(made, rows, cols, pair, columns if columns % _CHUNK else None)

    def reach(j, top):
        made = make(j)
        if kept:
            logits[:, pl.ds(j * _CHUNK, _CHUNK)] = made
        return jnp.maximum(top, jnp.max(made, axis=-1, keepdims=True))

    # The floor keeps a row that sees nothing free of inf - inf.
    top = jax.lax.fori_loop(first, last, reach, jnp.full((R, 1), LEAST, jnp.float32))

    def use(j, sums):
        chunk = pl.ds(j * _CHUNK, _CHUNK)
        weights = jnp.exp(((logits[:, chunk] if kept else make(j)) - top) * scale)
        attended = dot(weights.astype(v.dtype), v[0, chunk, :], (((1,), (0,)), ((), ())))
        return sums[0] + attended, sums[1] + jnp.sum(weights, axis=-1, keepdims=True)

    zeros = jnp.zeros((R, q.shape[-1]), jnp.float32), jnp.zeros((R, 1), jnp.float32)
    attended, total = jax.lax.fori_loop(first, last, use, zeros)
    total = jnp.maximum(total, 1e-30)
    out[0] = (attended / total).astype(out.dtype)
    stats[0, :, 0:1], stats[0, :, 1:2] = top, jnp.log(total)
