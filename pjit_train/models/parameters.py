"""Parameters of a model: made sharded, and as the forward pass uses them, cast and gathered."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from pjit_train.errors import UserError
from pjit_train.models.roles import Role
from pjit_train.sharding import (
    Axes,
    Rules,
    fan_out,
    has_mesh,
    out_sharding,
    reshard,
)
from sparsity.numbers.quantized_kernels import QuantizedKernel, unquantized
from sparsity.recipes.kernels import dense

Dtype = Literal["float32", "bfloat16", "float16"]


class Initializer:
    """Makes parameters sharded by the rules, each from its own stream of random bits.

    Their metadata say what they are: logical `axes`, and the `role`.
    """

    def __init__(self, key: jax.Array, rules: Rules, param_dtype: Dtype, stack: int | None = None):
        self.rules, self.dtype, self.stack = rules, param_dtype, stack
        self._keys = iter(jax.random.split(key, 64))

    def stacked(self, layers: int) -> "Initializer":
        """An initializer of parameters with a leading axis of layers."""
        return Initializer(next(self._keys), self.rules, self.dtype, layers)

    def _param(self, make, shape: tuple[int, ...], axes: Axes, role: Role) -> nnx.Param:
        if self.stack:
            shape, axes = (self.stack, *shape), (None, *axes)
            role = dataclasses.replace(role, stacked=True)
        spec = out_sharding(self.rules.spec(axes))
        return nnx.Param(make(shape, self.dtype, out_sharding=spec), axes=axes, role=role)

    def normal(self, shape: tuple[int, ...], axes: Axes, role: Role, std: float) -> nnx.Param:
        draw = functools.partial(jax.random.normal, next(self._keys))
        make = lambda *a, **k: draw(*a, **k) * jnp.asarray(std, self.dtype)
        return self._param(make, shape, axes, role)

    def constant(self, shape: tuple[int, ...], axes: Axes, role: Role, value: float) -> nnx.Param:
        return self._param(lambda s, d, **k: jnp.full(s, value, d, **k), shape, axes, role)


def gathered(param: nnx.Param, rules: Rules, dtype: Dtype | None = None) -> jax.Array:
    """A parameter as the forward pass uses it: cast, then gathered from its `fsdp` shards."""
    return gathered_value(param.get_value(), rules, param.get_metadata("axes"), dtype)


def gathered_for_tokens(
    param: nnx.Param, rules: Rules, dtype: Dtype, *, exact: bool = False
) -> jax.Array:
    """Gathers a parameter that meets tokens: its gradient is summed over the axes that split them.

    Over `fsdp` with each device keeping its shard, and only of that shard over the other axes.

    Args:
      exact: of a quantized kernel, what it is made of.

    Raises:
      UserError: of a quantized kernel, its matmul is to be native; that is for `Dense`.
    """
    value = param.get_value()
    if is_native(value):
        raise UserError(
            "quantization: layers: the head has no native matmul; give it "
            "matmul='emulated', by a pattern before the one that matches it"
        )
    value = unquantized(value) if exact else value
    return gathered_value(value, rules, param.get_metadata("axes"), dtype, tokens=True)


def gathered_value(value, rules: Rules, axes: Axes, dtype: Dtype | None, tokens=False) -> jax.Array:
    """Gathers what stands in a parameter's place: an array, or a kernel of `sparsity`."""
    value = dense(value)
    value = value if dtype is None else value.astype(dtype)
    spec = rules.spec(axes[-value.ndim :], gathered=True)
    if tokens and has_mesh():
        over = (*rules.batch, *rules.length)
        value = fan_out(value, over)  # the axes that the parameter is not split over
        mesh = jax.sharding.get_abstract_mesh()
        spec = PartitionSpec(*spec, reduced={axis for axis in over if mesh.shape[axis] > 1})
    return reshard(value, spec)


def gathered_codes(x: jax.Array, rules: Rules, axes: Axes) -> jax.Array:
    """Gathers codes or scales, which nothing is differentiated by, whole along axes of size 1."""
    spec = rules.spec(axes[-x.ndim :], gathered=True)
    parts = [part if size > 1 else None for part, size in zip(spec, x.shape, strict=True)]
    return reshard(x, PartitionSpec(*parts))


def is_native(stored) -> bool:
    """Tells whether a kernel is read as codes, by a matmul of the hardware."""
    return isinstance(stored, QuantizedKernel) and stored.native
