"""Matmuls of activations with a kernel: plain, sparse or quantized, and their gradients."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from pjit_train.models.adapted import AdaptedKernel
from pjit_train.models.block_config import BlockConfig
from pjit_train.models.parameters import (
    Dtype,
    Initializer,
    gathered,
    gathered_codes,
    gathered_value,
    is_native,
)
from pjit_train.models.roles import Role
from pjit_train.sharding import (
    Axes,
    Rules,
    fan_out,
    out_sharding,
    reshard,
    spec_axes,
    spec_of,
)
from sparsity.numbers.quantized_kernels import Losses, QuantizedKernel


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("stored",),
    meta_fields=("rules", "axes", "dtype"),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredKernel:
    """Kernel of a matmul as it is stored, with what the matmul reads of it.

    Attributes:
      stored: one shard of an array, or a sparse or quantized kernel of `sparsity`.
      rules: and axes, by which it is sharded; what is read is whole along `fsdp`.
      dtype: of what is read; None for that which is stored.
    """

    stored: Any
    rules: Rules
    axes: Axes
    dtype: Dtype | None

    @property
    def quantized(self) -> QuantizedKernel | None:
        """The stored kernel, where it says how activations and gradients are quantized; or None."""
        return self.stored if isinstance(self.stored, QuantizedKernel) else None

    @property
    def quantizes_gradients(self) -> bool:
        """True where the products of the backward pass are quantized too."""
        return self.quantized is not None and self.quantized.formats.gradients is not None

    @property
    def native(self) -> bool:
        """True where the forward pass multiplies `codes`."""
        return is_native(self.stored)

    def value(self) -> jax.Array:
        """The kernel that the forward pass reads; differentiable in what is stored."""
        return self._gathered(self.stored)

    def transposed_value(self) -> jax.Array:
        """The kernel, in the same layout, that the product with the outputs' gradients reads.

        Its blocks lie along its outputs, over which that product sums. For `quantizes_gradients`.
        """
        return self._gathered(self.stored.turned())

    def codes(self) -> list[tuple[jax.Array, jax.Array]]:
        """(codes, scales), scales like the kernel with 1 for each input axis; for `native`.

        What is read is the sum of their products.
        """
        gathered = functools.partial(gathered_codes, rules=self.rules, axes=self.axes)
        return [(gathered(codes), gathered(scales)) for codes, scales in self.stored.codes()]

    def _gathered(self, stored) -> jax.Array:
        return gathered_value(stored, self.rules, self.axes, self.dtype, tokens=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def project(
    equation: str, x: jax.Array, kernel: StoredKernel, out_spec: PartitionSpec | None
) -> jax.Array:
    """An einsum of activations and a kernel, with gradients that XLA:CPU computes at full speed.

    Args:
      equation: batch and tokens lead in the activations and in the output.
      x: activations; where the kernel is quantized, they and the gradients are, as it says.
      kernel: the backward pass reads it anew instead of keeping what was read.
      out_spec: partition of the output, or None where no mesh is set.
    """
    return _project_fwd(equation, x, kernel, out_spec)[0]


def _project_fwd(equation, x, kernel: StoredKernel, out_spec):
    read, quantized = x, kernel.quantized
    if quantized is not None and kernel.native:
        codes, scale = quantized.input_codes(_plain(x))
        y = _native(equation, codes, scale, kernel.codes(), out_spec).astype(x.dtype)
        return y, (x if kernel.quantizes_gradients else (_like(x, codes), scale), kernel)
    if quantized is not None:
        read = _like(x, quantized.inputs(_plain(x)))
    y = jnp.einsum(equation, read, kernel.value(), out_sharding=out_spec)
    # What the backward pass reads is kept, and quantized once.
    return y, (x if kernel.quantizes_gradients else read, kernel)


def _project_bwd(equation, out_spec, residuals, d_y):
    x, stored = residuals
    if isinstance(x, tuple):  # codes
        codes, scale = x
        x = _like(codes, (_plain(codes).astype(jnp.float32) * scale).astype(d_y.dtype))
    if not isinstance(stored.stored, jax.Array) or spec_axes(spec_of(stored.stored)):
        # Or XLA would find the forward pass's kernel equal to this one, and keep it until here.
        stored, d_y = jax.lax.optimization_barrier((stored, d_y))
    kernel, pull_back = jax.vjp(StoredKernel.value, stored)
    if stored.native:  # the same numbers, gathered as bytes
        parts = [codes.astype(jnp.float32) * scale for codes, scale in stored.codes()]
        kernel = _like(kernel, sum(parts).astype(kernel.dtype))
    x_axes, kernel_axes, y_axes = re.split(",|->", equation)

    def like(primal, order=None):
        """The cotangent's sharding: what the primal holds reduced is in parts still."""
        if out_spec is None:
            return None
        spec = spec_of(primal)
        parts = spec.partitions if order is None else [spec.partitions[i] for i in order]
        return PartitionSpec(*parts, unreduced=spec.reduced)

    if not stored.quantizes_gradients:
        d_y_by_outputs = d_y
    else:
        kernel, quantized = stored.transposed_value(), stored.quantized
        plain = _plain(d_y)
        d_y_by_outputs = _like(d_y, quantized.gradients(plain))
        d_y = _like(d_y, quantized.gradients_by_tokens(plain))
        x = _like(x, quantized.inputs_by_tokens(_plain(x)))
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


def _plain(x: jax.Array) -> jax.Array:
    """x with a type that says nothing of what its cotangents are; for what has no derivative."""
    return reshard(x, PartitionSpec(*spec_of(x).partitions))


def _like(x: jax.Array, y: jax.Array) -> jax.Array:
    """Gives y the sharding of x."""
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
        shape: tuple[int, ...],
        axes: Axes,
        *,
        std: float,
        config: BlockConfig,
        init: Initializer,
        norm: str | None = None,
        attends: bool = False,
        bias: bool | None = None,
    ):
        """Makes the kernel, and a bias where there is to be one.

        Args:
          equation: "btd,df->btf": batch (b) and tokens (t) lead in the activations and in the
            output, the axes that are summed over lead in the kernel.
          shape: of the kernel.
          axes: logical axes of the kernel. Those of the activations' features are the same, save
            "embed", over which activations are whole.
          std: of the normal distribution of a new kernel.
          norm: see `Role`; `attends` too.
          bias: whether there is one; None for what the configuration says of all.
        """
        _, kernel_letters, y_letters = re.split(",|->", equation)
        features = tuple(None if axis == "embed" else axis for axis in axes)
        count = sum(letter not in y_letters for letter in kernel_letters)
        role = Role(
            kind="kernel",
            inputs=tuple(range(-len(shape), count - len(shape))),
            matmul=True,
            input_axes=features[:count],
            output_axes=features[count:],
            norm=norm,
            attends=attends,
        )
        leading = ("batch", "length")[: len(y_letters) - len(shape) + count]
        self.equation, self.config, self.rules = equation, config, init.rules
        self.out_axes = (*leading, *role.output_axes)
        self.kernel = init.normal(shape, axes, role, std)
        made = shape[count:], role.output_axes, Role(kind="bias")
        biased = config.use_bias if bias is None else bias
        self.bias = init.constant(*made, 0.0) if biased else None

    def __call__(self, x: jax.Array) -> jax.Array:
        stored = self.kernel.get_value()
        if isinstance(stored, AdaptedKernel) and stored.separate:
            y = self._product(x, stored.frozen) + self._low_rank(x, stored)
        else:
            y = self._product(x, stored)
        return y if self.bias is None else y + gathered(self.bias, self.rules, self.config.dtype)

    def _product(self, x: jax.Array, stored) -> jax.Array:
        axes = self.kernel.get_metadata("axes")
        return self._project(self.equation, x, stored, axes, self.out_axes)

    def _low_rank(self, x: jax.Array, stored: AdaptedKernel) -> jax.Array:
        """The trained part of the outputs, whose matmuls are those of its rank only."""
        x_letters, letters, y_letters = re.split(",|->", self.equation)
        count, leading = stored.inputs, x_letters[: -stored.inputs]
        axes = self.kernel.get_metadata("axes")[-len(letters) :]
        inner = (*self.out_axes[: len(leading)], None)
        x = _plain(x)  # `down` is not split over the axes that the outputs are
        down, up = letters[:count] + "r", "r" + letters[count:]
        equation = f"{x_letters},{down}->{leading}r"
        h = self._project(equation, x, stored.down, (*axes[:count], None), inner)
        equation = f"{leading}r,{up}->{y_letters}"
        split = spec_axes(self.rules.spec(self.out_axes[len(leading) :]))
        h = fan_out(h * jnp.asarray(stored.scale, h.dtype), split)
        return self._project(equation, h, stored.up, (None, *axes[count:]), self.out_axes)

    def _project(self, equation: str, x: jax.Array, stored, axes: Axes, out_axes) -> jax.Array:
        rules = self.rules
        kernel = StoredKernel(stored=stored, rules=rules, axes=axes, dtype=self.config.dtype)
        return project(equation, x, kernel, out_sharding(rules.spec(out_axes)))

    def as_operand(self, y: jax.Array) -> jax.Array:
        """The outputs as an attention product reads them, [batch, tokens, heads, head_dim]."""
        stored = self.kernel.get_value()
        return stored.product_operand(y) if isinstance(stored, QuantizedKernel) else y


class WatchedDense:
    """Stands in for a Dense: computes the same, and notes what is lost where it quantizes.

    Args:
      note: called with what was read and its `quantized_kernels.Losses`: "activations", and
        "operands" of attention, that its outputs are.
      probe: its gradient is the `Losses` of the gradients of the outputs; None to leave these.
    """

    def __init__(
        self, dense: Dense, note: Callable[[str, Losses], None], probe: Losses | None = None
    ):
        self.dense, self.note, self.probe = dense, note, probe
        self.stored = dense.kernel.get_value()

    def __getattr__(self, name: str):
        return getattr(self.dense, name)

    def __call__(self, x: jax.Array) -> jax.Array:
        note_input_losses(self.stored, x, self.note)
        y = self.dense(x)
        if self.probe is None:
            return y
        # Of how it quantizes only; arrays would have to be arguments.
        formats = dataclasses.replace(self.stored, kernel=None, key=None)
        return _probed(formats.gradient_losses, y, self.probe)

    def as_operand(self, y: jax.Array) -> jax.Array:
        if isinstance(self.stored, QuantizedKernel) and self.stored.products is not None:
            self.note("operands", self.stored.product_losses(_plain(y)))
        return self.dense.as_operand(y)


def note_input_losses(stored, x: jax.Array, note: Callable[[str, Losses], None]) -> None:
    """Notes the "activations" of a matmul, where what is stored for its kernel quantizes them."""
    if isinstance(stored, QuantizedKernel) and stored.formats.activations is not None:
        note("activations", stored.input_losses(_plain(x)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _probed(losses, y: jax.Array, probe: Losses) -> jax.Array:
    """y; the gradient of the probe is made of that of y."""
    return y


def _probed_fwd(losses, y, probe):
    return y, None


def _probed_bwd(losses, residuals, d_y):
    return d_y, losses(_plain(d_y))


_probed.defvjp(_probed_fwd, _probed_bwd)
