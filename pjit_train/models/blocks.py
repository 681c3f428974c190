"""The parts that every model is made of: norms, projections, attention, feed-forward, the stack.

Parameters of a stack of layers are created stacked, [layers, ...], and stay so in state and
checkpoints; `run_layers` scans over them or takes them apart, with the same numbers either way.

Letters in names: B batch, T tokens, D model width, H heads, K key-value heads, F feed-forward.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pjit_train.attention.dispatch import attention
from pjit_train.models.block_config import BlockConfig
from pjit_train.models.parameters import Initializer, gathered
from pjit_train.models.projection import Dense
from pjit_train.models.roles import Role
from pjit_train.sharding import fan_out


class Norm(nnx.Module):
    """RMSNorm (Zhang and Sennrich, 2019) or LayerNorm (Ba et al., 2016), computed in float32."""

    def __init__(self, config: BlockConfig, init: Initializer):
        self.config, self.rules = config, init.rules
        vector = (config.d_model,), (None,), Role(kind="norm")
        self.scale = init.constant(*vector, 1.0)
        self.bias = init.constant(*vector, 0.0) if config.norm == "layernorm" else None

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x = x_BTD.astype(jnp.float32)
        if self.bias is not None:
            x -= jnp.mean(x, axis=-1, keepdims=True)
        x *= jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.config.norm_epsilon)
        x *= gathered(self.scale, self.rules)
        if self.bias is not None:
            x += gathered(self.bias, self.rules)
        return x.astype(x_BTD.dtype)


class Attention(nnx.Module):
    """Multi-head or grouped-query self-attention, with rotary positions where angles are given."""

    def __init__(self, config: BlockConfig, init: Initializer):
        c = self.config = config
        D, H, K, d = c.d_model, c.num_heads, c.num_kv_heads, c.head_dim
        q, kv = ((D, H, d), ("embed", "heads", None)), ((D, K, d), ("embed", "kv_heads", None))
        reads: dict[str, Any] = dict(
            std=c.init_std, config=c, init=init, norm="attention_norm", attends=True
        )
        self.query = Dense("btd,dhk->bthk", *q, **reads)
        self.key = Dense("btd,dhk->bthk", *kv, **reads)
        self.value = Dense("btd,dhk->bthk", *kv, **reads)
        out = (H, d, D), ("heads", None, "embed")
        self.out = Dense("bthk,hkd->btd", *out, std=c.residual_std, config=c, init=init)

    def __call__(self, x_BTD, *, causal, angles=None, segments=None, cache=None):
        """Attention of every token over the others it may see.

        Args:
          x_BTD: [batch, tokens, d_model].
          causal: whether a token sees only those before it.
          angles: (cosines, sines) [tokens, head_dim / 2] of the rotary embedding, or None.
          segments: int [batch, tokens]; tokens see only their own segment.
          cache: (keys, values, position): keys and values of earlier tokens [batch, max_tokens,
            kv_heads, head_dim], and how many there are; the tokens are appended to them.

        Returns:
          [batch, tokens, d_model], and the (keys, values) used, the whole cache where there is one.
        """
        x_BTD = fan_out(x_BTD, self.query.rules.heads)
        q, k, v = self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        q, k, v = self.query.as_operand(q), self.key.as_operand(k), self.value.as_operand(v)
        position = 0
        if cache is not None:
            keys, values, position = cache
            update = jax.lax.dynamic_update_slice_in_dim
            k, v = update(keys, k, position, axis=1), update(values, v, position, axis=1)
        segments = None if segments is None else (segments, segments)
        c = self.config
        out = attention(
            q,
            k,
            v,
            causal=causal,
            segments=segments,
            row_offset=position,
            tile_rows=c.attention_tile_rows,
            measured=c.attention_measured,
            # The kernels are for whole sequences, not for a token and a cache.
            way=c.attention if cache is None else "rows",
            sequence=c.attention_sequence,
        )
        return self.out(out), (k, v)


def rotary_angles(
    positions_T: jax.Array,
    head_dim: int,
    theta: float,
    scaling: tuple[float, float, float, int] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [tokens, head_dim / 2] of the rotary embedding (Su et al., 2021).

    Args:
      scaling: (factor, low, high, original length) of Llama 3.1 (Grattafiori et al., 2024), or
        None. Frequencies that turn more than `high` times in the original length stay; those that
        turn less than `low` times are divided by `factor`; those between are interpolated.
    """
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is not None:
        factor, low, high, original = scaling
        turns = original * frequencies / (2 * math.pi)
        stay = jnp.clip((turns - low) / (high - low), 0, 1)
        frequencies *= stay + (1 - stay) / factor
    angles = positions_T[:, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTHd: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the pairs (i, i + head_dim / 2) of each head: Llama's layout of the two halves."""
    cos, sin = (a[None, :, None, :] for a in angles)
    first, second = jnp.split(x_BTHd.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x_BTHd.dtype)


class FeedForward(nnx.Module):
    """Two matmuls with an activation between them, or three with a gate."""

    def __init__(self, config: BlockConfig, init: Initializer):
        c = self.config = config
        wide, narrow = (c.d_model, c.d_ff), (c.d_ff, c.d_model)
        reads: dict[str, Any] = dict(std=c.init_std, config=c, init=init, norm="feed_forward_norm")
        gated = c.activation == "swiglu"
        self.up = Dense("btd,df->btf", wide, ("embed", "mlp"), **reads)
        self.gate = Dense("btd,df->btf", wide, ("embed", "mlp"), **reads) if gated else None
        down = narrow, ("mlp", "embed")
        self.down = Dense("btf,fd->btd", *down, std=c.residual_std, config=c, init=init)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x_BTD = fan_out(x_BTD, self.up.rules.mlp)
        hidden = self.up(x_BTD)
        match self.config.activation:
            case "swiglu":
                hidden = jax.nn.silu(self.gate(x_BTD)) * hidden
            case "relu":
                hidden = jax.nn.relu(hidden)
            case kind:
                hidden = jax.checkpoint(
                    functools.partial(jax.nn.gelu, approximate=kind == "gelu_tanh")
                )(hidden)
        return self.down(hidden)


class Block(nnx.Module):
    """Transformer block: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: BlockConfig, init: Initializer):
        self.attention_norm = Norm(config, init)
        self.attention = Attention(config, init)
        self.feed_forward_norm = Norm(config, init)
        self.feed_forward = FeedForward(config, init)

    def __call__(self, x_BTD, **attention_inputs):
        attended, keys_values = self.attention(self.attention_norm(x_BTD), **attention_inputs)
        x_BTD = x_BTD + attended
        return x_BTD + self.feed_forward(self.feed_forward_norm(x_BTD)), keys_values


def run_layers(blocks: Block, x_BTD, config: BlockConfig, *, cache=None, position=0, **inputs):
    """Applies a stack of blocks.

    Args:
      blocks: a block whose parameters have a leading axis of layers.
      cache: (keys, values), each [layers, batch, max_tokens, kv_heads, head_dim], or None.
      position: tokens that the cache holds already.
      inputs: what `Attention` takes besides, alike for every layer.

    Returns:
      [batch, tokens, d_model], and the updated cache (None where there was none).
    """
    graph, stacked = nnx.split(blocks)

    def layer(x_BTD, params, cache):
        cached = None if cache is None else (*cache, position)
        x_BTD, keys_values = nnx.merge(graph, params)(x_BTD, cache=cached, **inputs)
        return x_BTD, None if cache is None else keys_values

    layer = _remat(layer, config.remat)
    if config.layers == "scan":
        return jax.lax.scan(lambda x, p: layer(x, *p), x_BTD, (stacked, cache))
    caches = []
    for params, cached in _unstack((stacked, cache), config.num_layers):
        x_BTD, new = layer(x_BTD, params, cached)
        caches.append(new)
    return x_BTD, None if cache is None else jax.tree.map(lambda *xs: jnp.stack(xs), *caches)


def _unstack(tree, layers: int):
    """The layers of stacked arrays; the transpose is a concatenation, not a sum of padded ones."""
    parts = jax.tree.map(lambda x: [p[0] for p in jax.lax.split(x, [1] * layers)], tree)
    is_parts = lambda x: isinstance(x, list)
    return [jax.tree.map(lambda p, i=i: p[i], parts, is_leaf=is_parts) for i in range(layers)]


def _remat(layer, policy: str):
    """Wraps a layer so that its backward pass recomputes what the policy says, besides kernels."""
    if policy == "full":
        return jax.checkpoint(layer)
    if policy == "dots":
        dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        return jax.checkpoint(layer, policy=dots)
    return layer
