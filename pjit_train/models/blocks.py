"""The parts that every model is made of: norms, projections, attention, feed-forward, the stack.

Parameters of a stack of layers are created stacked, [layers, ...], and stay so in state and
checkpoints; `run_layers` scans over them or takes them apart, with the same numbers either way.

Letters in names: B batch, T tokens, D model width, H heads, K key-value heads, F feed-forward.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pjit_train.attention.dispatch import attention
from pjit_train.models.block_config import BlockConfig
from pjit_train.models.parameters import Initializer, gathered
from pjit_train.models.projection import Dense
from pjit_train.models.roles import Role
from pjit_train.sharding import Axes, fan_out


class Norm(nnx.Module):
    """RMSNorm (Zhang and Sennrich, 2019) or LayerNorm (Ba et al., 2016), computed in float32.

    Args:
      shape: of the features that are normalised together, the last of the activations; None for
        [d_model].
      axes: logical axes of these.
    """

    def __init__(
        self,
        config: BlockConfig,
        init: Initializer,
        shape: tuple[int, ...] | None = None,
        axes: Axes = (None,),
    ):
        self.config, self.rules = config, init.rules
        shape, offset = shape or (config.d_model,), float(config.norm_unit_offset)
        self.scale = init.constant(shape, axes, Role(kind="norm", offset=offset), 1.0 - offset)
        bias = shape, axes, Role(kind="norm")
        self.bias = init.constant(*bias, 0.0) if config.norm == "layernorm" else None
        self.over = tuple(range(-len(shape), 0))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x = x_BTD.astype(jnp.float32)
        mean = functools.partial(jnp.mean, axis=self.over, keepdims=True)
        if self.bias is not None:
            x -= mean(x)
        x *= jax.lax.rsqrt(mean(x * x) + self.config.norm_epsilon)
        scale = gathered(self.scale, self.rules)
        x *= 1 + scale.astype(jnp.float32) if self.config.norm_unit_offset else scale
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
            std=c.init_std,
            config=c,
            init=init,
            norm=_pre(c, "attention_norm"),
            attends=True,
            bias=c.use_bias or c.qkv_bias,
        )
        self.query = Dense("btd,dhk->bthk", *q, **reads)
        self.key = Dense("btd,dhk->bthk", *kv, **reads)
        self.value = Dense("btd,dhk->bthk", *kv, **reads)
        out = (H, d, D), ("heads", None, "embed")
        self.out = Dense("bthk,hkd->btd", *out, std=c.residual_std, config=c, init=init)

        def norm(heads: int, axis: str) -> Norm | None:
            if c.qk_norm == "none":
                return None
            return (
                Norm(c, init, (d,))
                if c.qk_norm == "head"
                else Norm(c, init, (heads, d), (axis, None))
            )

        self.query_norm, self.key_norm = norm(H, "heads"), norm(K, "kv_heads")

    def __call__(self, x_BTD, *, causal, window=None, angles=None, segments=None, cache=None):
        """Attention of every token over the others it may see.

        Args:
          x_BTD: [batch, tokens, d_model].
          causal: whether a token sees only those before it, and of these only the last `window`
            with itself, where that is not None.
          angles: (cosines, sines) of the rotary embedding, [tokens, half of what is rotated of a
            head], or the same of each row of the batch; or None.
          segments: int [batch, tokens]; tokens see only their own segment. With a cache a pair: of
            the tokens, and of the columns of the cache [batch, max_tokens].
          cache: (keys, values, position): keys and values of earlier tokens [batch, max_tokens,
            kv_heads, head_dim], and how many there are; the tokens are appended to them.

        Returns:
          [batch, tokens, d_model], and the (keys, values) used, the whole cache where there is one.
        """
        x_BTD = fan_out(x_BTD, self.query.rules.heads)
        q, k, v = self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)
        if self.query_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        q, k, v = self.query.as_operand(q), self.key.as_operand(k), self.value.as_operand(v)
        position = 0
        if cache is not None:
            keys, values, position = cache
            update = jax.lax.dynamic_update_slice_in_dim
            k, v = update(keys, k, position, axis=1), update(values, v, position, axis=1)
        if segments is not None and not isinstance(segments, tuple):
            segments = segments, segments
        c = self.config
        out = attention(
            q,
            k,
            v,
            causal=causal,
            window=window,
            scale=c.attention_scale,
            softcap=c.attention_softcap,
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
    positions: jax.Array,
    head_dim: int,
    theta: float,
    scaling: tuple[float] | tuple[float, float, float, int] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [..., head_dim / 2] of the rotary embedding (Su et al., 2021).

    Args:
      positions: of tokens, [...].
      head_dim: of the part of a head that is rotated.
      scaling: (factor,), by which all frequencies are divided (Chen et al., 2023); or (factor, low,
        high, original length) of Llama 3.1 (Grattafiori et al., 2024): frequencies that turn more
        than `high` times in the original length stay; those that turn less than `low` times are
        divided by `factor`; those between are interpolated. None for neither.
    """
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is not None and len(scaling) == 1:
        frequencies /= scaling[0]
    elif scaling is not None:
        factor, low, high, original = scaling
        turns = original * frequencies / (2 * math.pi)
        stay = jnp.clip((turns - low) / (high - low), 0, 1)
        frequencies *= stay + (1 - stay) / factor
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTHd: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates pairs (i, i + n) of the first 2 n dimensions of each head by n angles.

    Of a whole head that is Llama's layout of two halves; what is beyond is left (GPT-NeoX, Phi).
    """
    cos, sin = (a[None, :, None, :] if a.ndim == 2 else a[:, :, None, :] for a in angles)
    x, size = x_BTHd.astype(jnp.float32), 2 * cos.shape[-1]
    beyond = [x[..., size:]] if size < x.shape[-1] else []
    first, second = jnp.split(x[..., :size] if beyond else x, 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin, *beyond)
    return jnp.concatenate(rotated, axis=-1).astype(x_BTHd.dtype)


class FeedForward(nnx.Module):
    """Two matmuls with an activation between them, or three with a gate."""

    def __init__(self, config: BlockConfig, init: Initializer):
        c = self.config = config
        wide, narrow = (c.d_model, c.d_ff), (c.d_ff, c.d_model)
        norm = _pre(c, "feed_forward_norm")
        reads: dict[str, Any] = dict(std=c.init_std, config=c, init=init, norm=norm)
        self.up = Dense("btd,df->btf", wide, ("embed", "mlp"), **reads)
        self.gate = Dense("btd,df->btf", wide, ("embed", "mlp"), **reads) if c.gated else None
        down = narrow, ("mlp", "embed")
        self.down = Dense("btf,fd->btd", *down, std=c.residual_std, config=c, init=init)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x_BTD = fan_out(x_BTD, self.up.rules.mlp)
        hidden = self.up(x_BTD)
        match self.config.activation:
            case "swiglu":
                hidden = jax.nn.silu(self.gate(x_BTD)) * hidden
            case "geglu":
                hidden = jax.checkpoint(jax.nn.gelu)(self.gate(x_BTD)) * hidden
            case "relu":
                hidden = jax.nn.relu(hidden)
            case kind:
                hidden = jax.checkpoint(
                    functools.partial(jax.nn.gelu, approximate=kind == "gelu_tanh")
                )(hidden)
        return self.down(hidden)


def _pre(config: BlockConfig, norm: str) -> str | None:
    """Name of the norm whose output a matmul reads; None where norms come after."""
    return None if config.norm_placement == "post" else norm


class Block(nnx.Module):
    """Transformer block: x + attention(norm(x)), then x + feed_forward(norm(x)).

    Where `norm_placement` has norms come after, too, x + post_norm(attention(norm(x))), and so on.
    """

    def __init__(self, config: BlockConfig, init: Initializer):
        def norm(of: str):
            return Norm(config, init) if config.norm_placement in (of, "both") else None

        self.attention_norm = norm("pre")
        self.attention = Attention(config, init)
        self.attention_post_norm = norm("post")
        self.feed_forward_norm = norm("pre")
        self.feed_forward = FeedForward(config, init)
        self.feed_forward_post_norm = norm("post")

    def __call__(self, x_BTD, **attention_inputs):
        def normed(norm, x):
            return x if norm is None else norm(x)

        read = normed(self.attention_norm, x_BTD)
        attended, keys_values = self.attention(read, **attention_inputs)
        x_BTD = x_BTD + normed(self.attention_post_norm, attended)
        made = self.feed_forward(normed(self.feed_forward_norm, x_BTD))
        return x_BTD + normed(self.feed_forward_post_norm, made), keys_values


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layers:
    """An array [layers, ...] in parts, one of each layer, so that to read one copies nothing."""

    parts: tuple[jax.Array, ...]


def apart(stacked):
    """Takes a tree of arrays [layers, ...] apart into `Layers`; donate it, and one copy is held."""
    return jax.tree.map(lambda x: Layers(tuple(x[i] for i in range(x.shape[0]))), stacked)


def is_apart(blocks: "Block") -> bool:
    """Tells whether the parameters of a stack of blocks are `Layers`."""
    leaves = jax.tree.leaves(nnx.state(blocks), is_leaf=_is_layers)
    return any(map(_is_layers, leaves))


def _is_layers(x: Any) -> bool:
    return isinstance(x, Layers)


def run_layers(
    blocks: Block,
    x_BTD,
    config: BlockConfig,
    inputs: Sequence[Mapping[str, Any]],
    *,
    cache=None,
    position=0,
    collect: bool = False,
):
    """Applies a stack of blocks.

    Args:
      blocks: a block whose parameters have a leading axis of layers, or are `Layers`.
      inputs: what `Attention` takes besides, of the first layers; those of the layers after them
        are the same again, and so on. So a pattern of layers is said by one period of it.
      cache: (keys, values), each [layers, batch, max_tokens, kv_heads, head_dim], or `Layers` as
        the parameters; or None.
      position: tokens that the cache holds already.
      collect: gives, in place of a cache, what each layer gives: [layers, batch, tokens, d_model].

    Returns:
      [batch, tokens, d_model], and the updated cache (None where there was none).
    """
    graph, stacked = nnx.split(blocks)

    def layer(of_kind, x_BTD, of_layer):
        params, cache = of_layer
        cached = None if cache is None else (*cache, position)
        x_BTD, keys_values = nnx.merge(graph, params)(x_BTD, cache=cached, **of_kind)
        if collect:
            return x_BTD, x_BTD
        return x_BTD, None if cache is None else keys_values

    layers = [_remat(functools.partial(layer, of_kind), config.remat) for of_kind in inputs]
    if is_apart(blocks):
        join = lambda *xs: Layers(xs)
        return _go_through(layers, x_BTD, (stacked, cache), config.num_layers, join)
    if config.layers == "scan":
        return scan_layers(layers, x_BTD, (stacked, cache), config.num_layers)
    return _go_through(layers, x_BTD, (stacked, cache), config.num_layers)


def scan_layers(layers: Sequence[Callable], carry, stacked, count: int):
    """`jax.lax.scan` over a stack of layers, of which each period is of several kinds.

    One period is compiled, whatever their number; layers after the last whole one are compiled by
    themselves, and so are all where the pattern does not repeat: then it is as long as unrolled.

    Args:
      layers: (carry, of_layer) -> (carry, output), the functions of one period.
      stacked: what the layers get; arrays [count, ...].

    Returns:
      The carry, and the outputs, stacked.
    """
    period = len(layers)
    if period == 1:
        return jax.lax.scan(layers[0], carry, stacked)
    turns = count // period
    if turns < 2:
        return _go_through(layers, carry, stacked, count)
    whole = turns * period
    sizes = [whole, count - whole] if count > whole else [whole]
    head, *rest = _parts(stacked, lambda x: jax.lax.split(x, sizes), len(sizes))
    grouped = jax.tree.map(lambda x: x.reshape(turns, period, *x.shape[1:]), head)
    turn = lambda carry, of_turn: _go_through(layers, carry, of_turn, period)
    carry, outputs = jax.lax.scan(turn, carry, grouped)
    outputs = jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), outputs)
    if not rest:
        return carry, outputs
    carry, last = _go_through(layers, carry, rest[0], count - whole)
    return carry, jax.tree.map(lambda *xs: jnp.concatenate(xs), outputs, last)


def _stacked(*xs: jax.Array) -> jax.Array:
    return jnp.stack(xs)


def _go_through(layers: Sequence[Callable], carry, stacked, count: int, join: Callable = _stacked):
    """Applies a stack of layers as `scan_layers` does, each compiled by itself.

    Args:
      join: makes an output of those of all layers.
    """
    outputs = []
    for i, of_layer in enumerate(_unstack(stacked, count)):
        carry, output = layers[i % len(layers)](carry, of_layer)
        outputs.append(output)
    return carry, jax.tree.map(join, *outputs)


def _unstack(tree, layers: int):
    """The layers of stacked arrays."""
    split = lambda x: [part[0] for part in jax.lax.split(x, [1] * layers)]
    return _parts(tree, lambda x: x.parts if isinstance(x, Layers) else split(x), layers)


def _parts(tree, cut: Callable[[Any], Sequence[jax.Array]], count: int):
    """Trees of what `cut` makes of each array.

    By `jax.lax.split`, whose transpose is a concatenation, not a sum of padded parts.
    """
    leaves, structure = jax.tree.flatten(tree, is_leaf=_is_layers)
    cuts = [cut(x) for x in leaves]
    return [jax.tree.unflatten(structure, [parts[i] for parts in cuts]) for i in range(count)]


def _remat(layer, policy: str):
    """Wraps a layer so that its backward pass recomputes what the policy says, besides kernels."""
    if policy == "full":
        return jax.checkpoint(layer)
    if policy == "dots":
        dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        return jax.checkpoint(layer, policy=dots)
    return layer
