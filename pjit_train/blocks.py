"""The parts that every model is made of: norms, projections, attention, feed-forward, the stack.

Parameters of a stack of layers are created stacked, [layers, ...], and stay so in state and
checkpoints; `run_layers` scans over them or takes them apart, with the same numbers either way.

Letters in names: B batch, T tokens, D model width, H heads, K key-value heads, F feed-forward.
"""

import dataclasses
import functools
import math
import re
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from pjit_train.attention import Way, attention
from pjit_train.errors import UserError
from pjit_train.sharding import (
    Axes,
    Rules,
    fan_out,
    has_mesh,
    out_sharding,
    reshard,
    spec_axes,
    spec_of,
)
from sparsity.kernels import dense
from sparsity.quantized_kernels import QuantizedKernel, unquantized

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """Shape of a block and of the stack of them; every model's configuration adds to it.

    Attributes:
      num_kv_heads: None for as many as there are query heads.
      head_dim: None for d_model / num_heads.
      norm: scale only by the root mean square, or subtract the mean and add a bias as well.
      activation: "swiglu" gates silu(x W_gate) with x W_up; "gelu" is exact, "gelu_tanh" GPT-2's.
      init_std: standard deviation of kernels and embeddings.
      scale_residual_init: divide the std of kernels that write to the residual stream by
        sqrt(2 num_layers) (GPT-2 and Megatron).
      layers: "scan" compiles one block and loops; "unroll" compiles each, faster on CPU. The
        parameters are the same.
      remat: what the backward pass makes again: nothing but gathered parameters, all but the
        outputs of matmuls with parameters ("dots"), or the whole block ("full").
      attention: the way to run it, its tile_rows, measured and sequence, of `attention.attention`.
      dtype: of activations and matmuls; param_dtype: of parameters and so of optimizer state.
    """

    d_model: int
    num_layers: int
    num_heads: int
    d_ff: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_epsilon: float = 1e-5
    activation: Literal["swiglu", "gelu", "gelu_tanh", "relu"] = "swiglu"
    use_bias: bool = False
    init_std: float = 0.02
    scale_residual_init: bool = False
    layers: Literal["scan", "unroll"] = "scan"
    remat: Literal["none", "dots", "full"] = "none"
    attention: Way = "auto"
    attention_tile_rows: int | None = None
    attention_measured: bool = False
    attention_sequence: Literal["gather", "ring"] = "gather"
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"

    def __post_init__(self):
        sizes = ("d_model", "num_layers", "num_heads", "d_ff", "num_kv_heads", "head_dim")
        for name in (*sizes, "attention_tile_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"model: {name}={value}; use a positive number")
        kv_heads = self.num_kv_heads or self.num_heads
        if self.num_heads % kv_heads:
            raise UserError(
                f"model: num_kv_heads={kv_heads} does not divide num_heads={self.num_heads}; "
                f"use a divisor of {self.num_heads}"
            )
        if self.head_dim is None and self.d_model % self.num_heads:
            raise UserError(
                f"model: num_heads={self.num_heads} does not divide d_model={self.d_model}; "
                "use a divisor, or say head_dim"
            )
        object.__setattr__(self, "num_kv_heads", kv_heads)
        object.__setattr__(self, "head_dim", self.head_dim or self.d_model // self.num_heads)
        choices = {
            "norm": ("rmsnorm", "layernorm"),
            "activation": ("swiglu", "gelu", "gelu_tanh", "relu"),
            "layers": ("scan", "unroll"),
            "remat": ("none", "dots", "full"),
            "attention": ("auto", "rows", "flat", "splash", "cudnn"),
            "attention_sequence": ("gather", "ring"),
            "dtype": ("float32", "bfloat16", "float16"),
            "param_dtype": ("float32", "bfloat16", "float16"),
        }
        for name, values in choices.items():
            if getattr(self, name) not in values:
                raise UserError(
                    f"model: {name}={getattr(self, name)!r} is unknown; use {', '.join(values)}"
                )

    @property
    def residual_std(self) -> float:
        return self.init_std / (math.sqrt(2 * self.num_layers) if self.scale_residual_init else 1)


class Initializer:
    """Makes parameters sharded by the rules, each from its own stream of random bits."""

    def __init__(self, key: jax.Array, rules: Rules, param_dtype: Dtype, stack: int | None = None):
        self.rules, self.dtype, self.stack = rules, param_dtype, stack
        self._keys = iter(jax.random.split(key, 64))

    def stacked(self, layers: int) -> "Initializer":
        """An initializer of parameters with a leading axis of layers."""
        return Initializer(next(self._keys), self.rules, self.dtype, layers)

    def _param(self, make, shape: tuple[int, ...], axes: Axes) -> nnx.Param:
        if self.stack:
            shape, axes = (self.stack, *shape), (None, *axes)
        spec = out_sharding(self.rules.spec(axes))
        return nnx.Param(make(shape, self.dtype, out_sharding=spec), axes=axes)

    def normal(self, shape: tuple[int, ...], axes: Axes, std: float) -> nnx.Param:
        draw = functools.partial(jax.random.normal, next(self._keys))
        return self._param(
            lambda *a, **k: draw(*a, **k) * jnp.asarray(std, self.dtype), shape, axes
        )

    def constant(self, shape: tuple[int, ...], axes: Axes, value: float) -> nnx.Param:
        return self._param(lambda s, d, **k: jnp.full(s, value, d, **k), shape, axes)


def gathered(param: nnx.Param, rules: Rules, dtype: Dtype | None = None) -> jax.Array:
    """A parameter as the forward pass uses it: cast, then gathered from its `fsdp` shards."""
    return _gathered(param.get_value(), rules, param.get_metadata("axes"), dtype)


def gathered_for_tokens(
    param: nnx.Param, rules: Rules, dtype: Dtype, *, exact: bool = False
) -> jax.Array:
    """The same for one that meets tokens: its gradient is summed where they are split.

    Over `fsdp` with each device keeping its shard, and only of that shard over the other axes.

    Args:
      exact: of a quantized kernel, what it is made of.

    Raises:
      UserError: of a quantized kernel, its matmul is to be native; that is for `Dense`.
    """
    value = param.get_value()
    if _is_native(value):
        raise UserError(
            "quantization: layers: the head has no native matmul; give it "
            "matmul='emulated', by a pattern before the one that matches it"
        )
    value = unquantized(value) if exact else value
    return _gathered(value, rules, param.get_metadata("axes"), dtype, tokens=True)


def _gathered(value, rules: Rules, axes: Axes, dtype: Dtype | None, tokens=False) -> jax.Array:
    value = dense(value)
    value = value if dtype is None else value.astype(dtype)
    spec = rules.spec(axes[-value.ndim :], gathered=True)
    if tokens and has_mesh():
        over = (*rules.batch, *rules.length)
        value = fan_out(value, over)  # the axes that the parameter is not split over
        mesh = jax.sharding.get_abstract_mesh()
        spec = PartitionSpec(*spec, reduced={axis for axis in over if mesh.shape[axis] > 1})
    return reshard(value, spec)


def _gathered_plain(x: jax.Array, rules: Rules, axes: Axes) -> jax.Array:
    """What nothing is differentiated by: codes, or scales, whole along axes of size 1."""
    spec = rules.spec(axes[-x.ndim :], gathered=True)
    parts = [part if size > 1 else None for part, size in zip(spec, x.shape, strict=True)]
    return reshard(x, PartitionSpec(*parts))


class Norm(nnx.Module):
    """RMSNorm (Zhang and Sennrich, 2019) or LayerNorm (Ba et al., 2016), computed in float32."""

    def __init__(self, config: BlockConfig, init: Initializer):
        self.config, self.rules = config, init.rules
        self.scale = init.constant((config.d_model,), (None,), 1.0)
        self.bias = (
            init.constant((config.d_model,), (None,), 0.0) if config.norm == "layernorm" else None
        )

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x = x_BTD.astype(jnp.float32)
        if self.bias is not None:
            x -= jnp.mean(x, axis=-1, keepdims=True)
        x *= jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.config.norm_epsilon)
        x *= gathered(self.scale, self.rules)
        if self.bias is not None:
            x += gathered(self.bias, self.rules)
        return x.astype(x_BTD.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 4))
def project(equation: str, prepare, x: jax.Array, stored, out_spec) -> jax.Array:
    """An einsum of activations and a kernel, with gradients that XLA:CPU computes at full speed.

    Args:
      equation: batch and tokens lead in the activations and in the output.
      prepare: makes the kernel of what is stored for it (one shard of an array, a sparse kernel,
        a quantized one), with blocks along outputs where `turned`; the backward pass makes it
        again instead of keeping it. With `native`, a list of (codes, scales), scales like the
        kernel with 1 for each input axis.
      stored: where it is a `QuantizedKernel`, activations and gradients are quantized as it says.
      out_spec: partition of the output, or None where no mesh is set.
    """
    return _project_fwd(equation, prepare, x, stored, out_spec)[0]


def _project_fwd(equation, prepare, x, stored, out_spec):
    read = x
    if _is_native(stored):
        codes, scale = stored.input_codes(_plain(x))
        y = _native(equation, codes, scale, prepare(stored, native=True), out_spec).astype(x.dtype)
        return y, (x if _quantizes_gradients(stored) else (_like(x, codes), scale), stored)
    if isinstance(stored, QuantizedKernel):
        read = _like(x, stored.inputs(_plain(x)))
    y = jnp.einsum(equation, read, prepare(stored), out_sharding=out_spec)
    # What the backward pass reads is kept, and quantized once.
    return y, (x if _quantizes_gradients(stored) else read, stored)


def _project_bwd(equation, prepare, out_spec, residuals, d_y):
    x, stored = residuals
    if isinstance(x, tuple):  # codes
        codes, scale = x
        x = _like(codes, (_plain(codes).astype(jnp.float32) * scale).astype(d_y.dtype))
    if not isinstance(stored, jax.Array) or spec_axes(spec_of(stored)):
        # Or XLA would find the forward pass's kernel equal to this one, and keep it until here.
        stored, d_y = jax.lax.optimization_barrier((stored, d_y))
    kernel, pull_back = jax.vjp(prepare, stored)
    if _is_native(stored):  # the same numbers, gathered as bytes
        parts = [codes.astype(jnp.float32) * scale for codes, scale in prepare(stored, native=True)]
        kernel = _like(kernel, sum(parts).astype(kernel.dtype))
    x_axes, kernel_axes, y_axes = re.split(",|->", equation)

    def like(primal, order=None):
        """The cotangent's sharding: what the primal holds reduced is in parts still."""
        if out_spec is None:
            return None
        spec = spec_of(primal)
        parts = spec.partitions if order is None else [spec.partitions[i] for i in order]
        return PartitionSpec(*parts, unreduced=spec.reduced)

    if not _quantizes_gradients(stored):
        d_y_by_outputs = d_y
    else:
        kernel = prepare(stored, turned=True)
        plain = _plain(d_y)
        d_y_by_outputs = _like(d_y, stored.gradients(plain))
        d_y = _like(d_y, stored.gradients_by_tokens(plain))
        x = _like(x, stored.inputs_by_tokens(_plain(x)))
    d_x = jnp.einsum(
        f"{y_axes},{kernel_axes}->{x_axes}", d_y_by_outputs, kernel, out_sharding=like(x)
    )
    # XLA:CPU copies the left operand of a sum over tokens into its transpose, slowly: the narrower
    # one goes there, and what is turned afterwards is the small result, behind a barrier that keeps
    # XLA from swapping the operands back.
    if x.size <= d_y.size:
        out = like(kernel)
        d_kernel = jnp.einsum(f"{x_axes},{y_axes}->{kernel_axes}", x, d_y, out_sharding=out)
    else:
        inputs = len(x_axes) - 2
        turned = kernel_axes[inputs:] + kernel_axes[:inputs]
        out = like(kernel, [kernel_axes.index(axis) for axis in turned])
        d_kernel = jnp.einsum(f"{y_axes},{x_axes}->{turned}", d_y, x, out_sharding=out)
        d_kernel = jax.lax.optimization_barrier(d_kernel)
        d_kernel = d_kernel.transpose([turned.index(axis) for axis in kernel_axes])
    return d_x, *pull_back(d_kernel)


project.defvjp(_project_fwd, _project_bwd)


def _native(equation, codes, scale, kernels, out_spec) -> jax.Array:
    """float32: the einsum of codes of activations and of kernels, scaled; a sum over kernels."""
    integers = codes.dtype == jnp.int8
    of = jnp.int32 if integers else jnp.float32

    def product(kernel, kernel_scale):
        y = jnp.einsum(equation, codes, kernel, preferred_element_type=of, out_sharding=out_spec)
        # [batch, tokens, inputs...] and [inputs..., outputs...], with 1 for each input
        inputs, outputs = codes.ndim - 2, y.ndim - 2
        rows = scale.reshape(*scale.shape[:2], *(1,) * outputs)
        return y.astype(jnp.float32) * rows * kernel_scale.reshape(kernel_scale.shape[inputs:])

    (kernel, kernel_scale), *others = kernels
    y = product(kernel, kernel_scale)
    for kernel, kernel_scale in others:  # pruned weights, most often read as zero
        read = jnp.any(kernel_scale != 0)
        y = jax.lax.cond(
            read, lambda y, *k: y + product(*k), lambda y, *k: y, y, kernel, kernel_scale
        )
    return y


def _is_native(stored) -> bool:
    return isinstance(stored, QuantizedKernel) and stored.native


def _quantizes_gradients(stored) -> bool:
    return isinstance(stored, QuantizedKernel) and stored.formats.gradients is not None


def _plain(x: jax.Array) -> jax.Array:
    """x with a type that says nothing of what its cotangents are; for what has no derivative."""
    return reshard(x, PartitionSpec(*spec_of(x).partitions))


def _like(x: jax.Array, y: jax.Array) -> jax.Array:
    """y with the sharding of x."""
    return reshard(y, spec_of(x))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def straight_through(function, x: jax.Array) -> jax.Array:
    """function(x), elementwise, with the derivative of the identity; on any kind of sharding."""
    return _like(x, function(_plain(x)))


def _straight_through_fwd(function, x):
    return straight_through(function, x), None


def _straight_through_bwd(function, residuals, d_y):
    return (d_y,)


straight_through.defvjp(_straight_through_fwd, _straight_through_bwd)


class Dense(nnx.Module):
    """An einsum with a kernel: every matmul of the models that has a parameter."""

    def __init__(
        self,
        equation: str,
        kernel: tuple[tuple[int, ...], Axes],
        bias: tuple[tuple[int, ...], Axes] | None,
        out_axes: Axes,
        std: float,
        config: BlockConfig,
        init: Initializer,
    ):
        self.equation, self.out_axes, self.config, self.rules = (
            equation,
            out_axes,
            config,
            init.rules,
        )
        self.kernel = init.normal(*kernel, std)
        self.bias = init.constant(*bias, 0.0) if bias and config.use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        rules, axes, dtype = self.rules, self.kernel.get_metadata("axes"), self.config.dtype

        def prepare(stored, turned=False, native=False):
            if native:
                return [
                    tuple(_gathered_plain(x, rules, axes) for x in pair) for pair in stored.codes()
                ]
            stored = stored.turned() if turned else stored
            return _gathered(stored, rules, axes, dtype, tokens=True)

        spec = out_sharding(rules.spec(self.out_axes))
        y = project(self.equation, prepare, x, self.kernel.get_value(), spec)
        return y if self.bias is None else y + gathered(self.bias, rules, self.config.dtype)

    def as_operand(self, y: jax.Array) -> jax.Array:
        """The outputs as an attention product reads them, [batch, tokens, heads, head_dim]."""
        stored = self.kernel.get_value()
        return stored.product_operand(y) if isinstance(stored, QuantizedKernel) else y


def contraction_axes(name: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The axes of a kernel that its matmul sums over, counted from the end (stacked or not).

    None for what no matmul sums over: scales of norms and biases.

    Args:
      name: of the parameter, such as "blocks/attention/query/kernel".
      shape: of it.
    """
    *_, layer, parameter = ("", *name.split("/"))
    if parameter in ("scale", "bias"):
        return None
    if name == "embedding":  # [vocabulary, d_model]: the head, transposed
        return (-1,)
    if layer == "out":  # [heads, head_dim, d_model]
        return (-3, -2)
    if layer in ("query", "key", "value"):  # [d_model, heads, head_dim]
        return (-3,)
    return (-2,)


class Attention(nnx.Module):
    """Multi-head or grouped-query self-attention, with rotary positions where angles are given."""

    def __init__(self, config: BlockConfig, init: Initializer):
        c = self.config = config
        D, H, K, d = c.d_model, c.num_heads, c.num_kv_heads, c.head_dim
        q, kv = ((D, H, d), ("embed", "heads", None)), ((D, K, d), ("embed", "kv_heads", None))
        out = ("batch", "length", "heads", None)
        kv_out = ("batch", "length", "kv_heads", None)
        q_bias, kv_bias = ((H, d), ("heads", None)), ((K, d), ("kv_heads", None))
        self.query = Dense("btd,dhk->bthk", q, q_bias, out, c.init_std, c, init)
        self.key = Dense("btd,dhk->bthk", kv, kv_bias, kv_out, c.init_std, c, init)
        self.value = Dense("btd,dhk->bthk", kv, kv_bias, kv_out, c.init_std, c, init)
        self.out = Dense(
            "bthk,hkd->btd",
            ((H, d, D), ("heads", None, "embed")),
            ((D,), (None,)),
            ("batch", "length", None),
            c.residual_std,
            c,
            init,
        )

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
        wide = (
            ((c.d_model, c.d_ff), ("embed", "mlp")),
            ((c.d_ff,), ("mlp",)),
            ("batch", "length", "mlp"),
        )
        self.up = Dense("btd,df->btf", *wide, c.init_std, c, init)
        self.gate = (
            Dense("btd,df->btf", *wide, c.init_std, c, init) if c.activation == "swiglu" else None
        )
        self.down = Dense(
            "btf,fd->btd",
            ((c.d_ff, c.d_model), ("mlp", "embed")),
            ((c.d_model,), (None,)),
            ("batch", "length", None),
            c.residual_std,
            c,
            init,
        )

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
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

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
    is_parts = lambda x: isinstance(x, list)  # noqa: E731
    return [jax.tree.map(lambda p, i=i: p[i], parts, is_leaf=is_parts) for i in range(layers)]


def _remat(layer, policy: str):
    """What the backward pass makes again, besides the kernels that `project` makes again."""
    if policy == "full":
        return jax.checkpoint(layer)
    if policy == "dots":
        dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        return jax.checkpoint(layer, policy=dots)
    return layer
