"""Kernels of others behind one door: JAX's splash attention on TPU, cuDNN's on GPU.

For each, what it fits; where it does not, it would be wrong, or refuse, or hold a mask of every
pair of positions.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from pjit_train.attention.masks import Mask

PLATFORMS = {"flat": ("tpu", "gpu", "cpu"), "splash": ("tpu",), "cudnn": ("gpu",)}
_BLOCK = 128  # what lengths must be a multiple of for splash


def splash_misfit(q, k, segments, mask: Mask) -> str | None:
    """Says why splash attention cannot take these inputs; None where it can."""
    rows, columns = q.shape[1], k.shape[1]
    if rows % _BLOCK or columns % _BLOCK:
        return f"needs lengths that {_BLOCK} divides, and has {rows} and {columns}"
    if mask.offset is None or (mask.causal and (mask.offset or rows != columns)):
        return "needs rows that begin at the first column"
    if mask.window is not None and not mask.causal:
        return "takes a window only of a causal mask"
    # Else a row could see nothing, and it has no zeros for that.
    if segments is not None and segments[0] is not segments[1]:
        return "needs the same segments for rows and columns"
    return None


def cudnn_misfit(q, k, segments, mask: Mask) -> str | None:
    """Says why cuDNN's attention cannot take these inputs; None where it can."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs bfloat16 or float16, and has {q.dtype}"
    if q.shape[3] % 8 or q.shape[3] > 128:
        return f"needs a head_dim up to 128 that 8 divides, and has {q.shape[3]}"
    if segments is not None:
        return "takes no segments"
    if mask.offset != 0 or (mask.causal and q.shape[1] != k.shape[1]):
        return "needs rows that begin at the first column"
    if mask.window is not None and not mask.causal:
        return "takes a window only of a causal mask"
    try:  # jax.nn knows which versions of cuDNN, and which devices, can
        like = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, k)]
        jax.eval_shape(lambda q, k, v: attend_cudnn(q, k, v, mask), *like)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return f"is refused by jax.nn: {str(error).splitlines()[0].rstrip('.')}"
    return None


def flat_misfit(q, k, segments, mask: Mask) -> str | None:
    """Returns None: Torsion's kernel takes all inputs, and pads lengths that do not suit it."""
    return None


FITS = {"flat": flat_misfit, "splash": splash_misfit, "cudnn": cudnn_misfit}


def attend_splash(q, k, v, segments, mask: Mask, *, interpret: bool = False):
    """JAX's splash attention (jax.experimental.pallas.ops.tpu), on one device's arrays."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    B, T, H, D = q.shape
    S, K = k.shape[1:3]
    if mask.window is not None:
        one = masks.LocalMask((T, S), (mask.window - 1, 0), 0)
    elif mask.causal:
        one = masks.CausalMask((T, S))
    else:
        one = masks.FullMask((T, S))
    q_side = next(b for b in (512, 256, 128) if T % b == 0)
    kv_side = next(b for b in (512, 256, 128) if S % b == 0)
    sides: dict[str, Any] = {f"block_q{suffix}": q_side for suffix in ("", "_dkv", "_dq")}
    for suffix in ("", "_compute", "_dkv", "_dkv_compute", "_dq"):
        sides[f"block_kv{suffix}"] = kv_side
    sizes = splash.BlockSizes(**sides)
    kernel = splash.make_splash_mqa_single_device(
        masks.MultiHeadMask([one] * (H // K)), block_sizes=sizes, interpret=interpret
    )
    q_BKGTD = (q * (1 / math.sqrt(D))).astype(q.dtype).reshape(B, T, K, H // K, D)
    q_BKGTD = q_BKGTD.transpose(0, 2, 3, 1, 4)
    k_BKSD, v_BKSD = (x.transpose(0, 2, 1, 3) for x in (k, v))
    ids = None if segments is None else splash.SegmentIds(*segments)
    over_heads = jax.vmap(kernel, in_axes=(0, 0, 0, None))
    out_BKGTD = jax.vmap(over_heads, in_axes=(0, 0, 0, 0 if ids else None))(
        q_BKGTD, k_BKSD, v_BKSD, ids
    )
    return out_BKGTD.transpose(0, 3, 1, 2, 4).reshape(B, T, H, D).astype(q.dtype)


def attend_cudnn(q, k, v, mask: Mask):
    """Computes attention by `jax.nn.dot_product_attention` with cuDNN, on one device's arrays."""
    window = None if mask.window is None else (mask.window - 1, 0)
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=mask.causal, local_window_size=window, implementation="cudnn"
    )
