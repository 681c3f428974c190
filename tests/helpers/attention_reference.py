"""Attention and its gradients by the definition, in float64, and random inputs for both."""

import jax
import jax.numpy as jnp
import numpy as np


def random(seed, *shapes, scale=1.0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=s) * scale, jnp.float32) for s in shapes]


def gradients(function, *args):
    """Gradients of a fixed random projection of the output, and the output."""
    out, vjp = jax.vjp(function, *args)
    (d_out,) = random(99, out.shape)
    return out, vjp(d_out.astype(out.dtype))


def seen_by(shape, segments=None, *, causal=False, window=None, row_offset=0):
    """bool [B, T, S]: which columns a row sees."""
    rows = row_offset + np.arange(shape[1])[:, None]
    cols = np.arange(shape[2])[None, :]
    seen = np.ones(shape, bool)
    if causal:
        seen &= cols <= rows
    if window is not None:
        seen &= cols > rows - window
    if segments is not None:
        seen &= segments[0][:, :, None] == segments[1][:, None, :]
    return seen


def weights_of(q, k, seen, scale=None, softcap=None):
    """Softmax of the logits [B, H, T, S]; zeros in rows that see nothing."""
    logits = np.einsum("bthd,bshd->bhts", q, k) * (scale or 1 / np.sqrt(q.shape[-1]))
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
    logits = np.where(seen[:, None], logits, -np.inf)
    top = np.max(logits, axis=-1, keepdims=True)
    weights = np.exp(logits - np.where(np.isfinite(top), top, 0))
    total = weights.sum(-1, keepdims=True)
    return np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)


def wide(q, k, v):
    """In float64, with keys and values for every query head."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    return q, np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)


def reference(q, k, v, scale=None, softcap=None, **options):
    """[B, T, H, D] by the definition, in float64."""
    q, k, v = wide(q, k, v)
    seen = seen_by((len(q), q.shape[1], k.shape[1]), **options)
    weights = weights_of(q, k, seen, scale, softcap)
    return np.einsum("bhts,bshd->bthd", weights, v)


def reference_gradients(q, k, v, d_out, **options):
    """By the softmax's Jacobian diag(w) - w w', over whole rows, in float64."""
    kv_shape = k.shape
    (q, k, v), d_out = wide(q, k, v), np.asarray(d_out, np.float64)
    w = weights_of(q, k, seen_by((len(q), q.shape[1], k.shape[1]), **options))
    d_weights = np.einsum("bthd,bshd->bhts", d_out, v)
    d_logits = w * d_weights - w * np.sum(w * d_weights, axis=-1, keepdims=True)
    d_logits /= np.sqrt(q.shape[-1])
    d_q = np.einsum("bhts,bshd->bthd", d_logits, k)
    d_k = np.einsum("bhts,bthd->bshd", d_logits, q)
    d_v = np.einsum("bhts,bthd->bshd", w, d_out)
    of_heads = (*kv_shape[:2], kv_shape[2], -1, kv_shape[3])
    return d_q, *(x.reshape(of_heads).sum(axis=3) for x in (d_k, d_v))
