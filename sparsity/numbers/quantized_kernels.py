"""A kernel whose matmul reads numbers of a format: its weights, its inputs, and their gradients.

It stands as a leaf in a tree of parameters, as the kernels of `sparsity.recipes.kernels` do, and
holds one of them or an array. What is read is made anew wherever it is read, and kept nowhere.
"""

import dataclasses
import enum
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from sparsity.numbers.formats import Format, format_name
from sparsity.numbers.native import Matmul, check_formats, codes_of
from sparsity.numbers.quantization import clipped, fake_quantize
from sparsity.numbers.rounding import Rounding
from sparsity.recipes.kernels import Kernel, MaskedKernel, dense

Order = Literal["sparsify_then_quantize", "quantize_then_sparsify"]
Axes = tuple[int, ...]
Losses = jax.Array
"""float32 [4] of an array x that is read as q(x): |q(x) - x|^2, |x|^2, the number of entries above
the greatest value of their block, and the number of all. A sum of some is that of all of them."""


class _Purpose(enum.IntEnum):
    """Purpose for which an array is read; in a step each draws random bits of its own."""

    WEIGHTS = 0
    TURNED = 1
    INPUTS = 2
    INPUTS_BY_TOKENS = 3
    GRADIENTS = 4
    GRADIENTS_BY_TOKENS = 5
    PRODUCTS = 6

    @property
    def of_gradient(self) -> bool:
        return self in (_Purpose.GRADIENTS, _Purpose.GRADIENTS_BY_TOKENS)

    @property
    def by_tokens(self) -> bool:
        return self in (_Purpose.INPUTS_BY_TOKENS, _Purpose.GRADIENTS_BY_TOKENS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Formats:
    """Number formats of a matmul's operands; see `quantized.MatmulFormats` for the fields."""

    weights: Format | None = None
    activations: Format | None = None
    gradients: Format | None = None
    rounding: Rounding = "even"
    gradient_rounding: Rounding = "even"
    matmul: Matmul = "emulated"

    @property
    def random(self) -> bool:
        """Tells whether any operand is rounded stochastically."""
        of_gradients = self.gradient_rounding if self.gradients is not None else None
        return "stochastic" in (self.rounding, of_gradients)

    def __str__(self) -> str:
        shown = [
            f"{name} {format_name(format)}" + (f" ({rounding})" if rounding != "even" else "")
            for name, format, rounding in (
                ("weights", self.weights, self.rounding),
                ("activations", self.activations, self.rounding),
                ("gradients", self.gradients, self.gradient_rounding),
            )
            if format is not None
        ]
        return ", ".join(shown) + (" (native matmul)" if self.matmul == "native" else "")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("kernel", "key"),
    meta_fields=("formats", "axes", "rank", "order", "products"),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedKernel(Kernel):
    """A kernel and the formats of its matmul, whose inputs are [batch, tokens, inputs].

    All gradients are straight-through ones (Bengio et al., 2013): those with respect to what is
    read, given to what it was made of.

    Attributes:
      kernel: an array, a `MaskedKernel` or a `PackedKernel`.
      key: uint32 [stacked layers, 2], data of the key of stochastic rounding; None rounds to
        nearest even instead, which is for evaluation.
      formats: of the operands, and how they are rounded.
      axes: that the matmul sums over, adjacent and negative; taken as one.
      rank: number of axes of one layer's kernel; those before it stack layers.
      order: whether the mask is applied before quantizing, or after it.
      products: format of what the matmul gives, where an attention product reads that.
    """

    kernel: Any
    key: jax.Array | None
    formats: Formats
    axes: Axes
    rank: int
    order: Order
    products: Format | None

    def dense(self) -> jax.Array:
        """The kernel that is read, [...] in its dtype: blocks along the inputs."""
        return self._weights(self.axes, _Purpose.WEIGHTS)

    def turned(self) -> jax.Array:
        """The kernel with blocks along its outputs, as the gradient of the inputs reads it."""
        return self._weights(self._output_axes, _Purpose.TURNED)

    def inputs(self, x: jax.Array) -> jax.Array:
        """The activations that are read, blocks along their features: [batch, tokens, features...].

        A scale belongs to one token, also in a format with one scale for a whole array: it would
        tell a token of those after it.
        """
        return self._read(x, _Purpose.INPUTS)

    @property
    def native(self) -> bool:
        """Tells whether the forward pass multiplies codes instead of the values they stand for."""
        return self.formats.matmul == "native"

    def codes(self) -> list[tuple[jax.Array, jax.Array]]:
        """(codes, scales) as of `native.codes_of`, of one layer; the sum of their products is read.

        One pair; or that of the kept weights and that of the pruned ones, whose scale is 0 where
        they are read as 0, where the mask is applied to the codes.
        """
        inner, axes = self.kernel, self.axes
        format, _ = self._native_formats
        rounding = self._rounding(_Purpose.WEIGHTS)
        if self.order == "sparsify_then_quantize" or not isinstance(inner, MaskedKernel):
            return [codes_of(dense(inner), format, axes, *rounding)]
        codes, scale = codes_of(inner.weight, format, axes, *rounding)
        zero = jnp.zeros_like(inner.decay)
        kept = dataclasses.replace(inner, weight=codes, decay=zero).dense()
        # Of floats a difference would make another sign of zero, and a select does as well.
        pruned = jnp.where(kept == codes, jnp.zeros_like(codes), codes)
        return [(kept, scale), (pruned, scale * inner.decay)]

    def input_codes(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(codes, scales) of the activations [batch, tokens, features...], a scale to a token."""
        _, format = self._native_formats
        if format.block == "tensor":
            format = dataclasses.replace(format, block="channel")
        axes, rounding = tuple(range(2 - x.ndim, 0)), self._rounding(_Purpose.INPUTS)
        found: tuple[jax.Array, jax.Array] = codes_of(x, format, axes, *rounding)
        return found

    @property
    def _native_formats(self) -> tuple[Format, Format]:
        """The formats of weights and activations, whose codes are multiplied."""
        return check_formats(self.formats.weights, self.formats.activations)

    def inputs_by_tokens(self, x: jax.Array) -> jax.Array:
        """The activations with blocks along the tokens of a sequence, for the kernel's gradient."""
        return self._read(x, _Purpose.INPUTS_BY_TOKENS)

    def gradients(self, d_y: jax.Array) -> jax.Array:
        """The outputs' gradients with blocks along the outputs, for the gradient of the inputs."""
        return self._read(d_y, _Purpose.GRADIENTS)

    def gradients_by_tokens(self, d_y: jax.Array) -> jax.Array:
        """The outputs' gradients with blocks along tokens, for the kernel's gradient."""
        return self._read(d_y, _Purpose.GRADIENTS_BY_TOKENS)

    def product_operand(self, y: jax.Array) -> jax.Array:
        """Quantizes an operand [batch, tokens, heads, head_dim] of an attention product.

        Blocks and scales are those of one token and head, along head_dim. The second product sums
        values over tokens: blocks along those would tell a token of those after it.
        """
        return self._read(y, _Purpose.PRODUCTS)

    def input_losses(self, x: jax.Array) -> Losses | None:
        """`Losses` of what `inputs` makes of x; None where it leaves x as it is."""
        return self._losses(x, _Purpose.INPUTS)

    def gradient_losses(self, d_y: jax.Array) -> Losses | None:
        """Measures the `Losses` of d_y when `gradients` quantizes it."""
        return self._losses(d_y, _Purpose.GRADIENTS)

    def product_losses(self, y: jax.Array) -> Losses | None:
        """Measures the `Losses` of y when `product_operand` quantizes it."""
        return self._losses(y, _Purpose.PRODUCTS)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.kernel.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        return self.kernel.dtype

    @property
    def _output_axes(self) -> Axes:
        return tuple(axis for axis in range(-self.rank, 0) if axis not in self.axes)

    def _weights(self, axes: Axes, purpose: _Purpose) -> jax.Array:
        format, inner = self.formats.weights, self.kernel
        if format is None:
            return dense(inner)

        def read(w: jax.Array, key: jax.Array | None) -> jax.Array:
            return _quantized(w, format, axes, *self._rounding(purpose, key))

        for _ in range(self.ndim - self.rank):
            read = jax.vmap(read, (0, None if self.key is None else 0))
        if self.order == "quantize_then_sparsify" and isinstance(inner, MaskedKernel):
            return dataclasses.replace(inner, weight=read(inner.weight, self.key)).dense()
        return read(dense(inner), self.key)

    def _blocks(self, purpose: _Purpose, ndim: int) -> tuple[Format | None, Axes, int]:
        """Returns the format, the axes of a block and the `rows` of an array [batch, tokens,
        ...]."""
        f = self.formats
        if purpose == _Purpose.PRODUCTS:
            return self.products, (-1,), 3
        format = f.gradients if purpose.of_gradient else f.activations
        if purpose.by_tokens:
            return format, (1 - ndim,), 1
        return format, tuple(range(2 - ndim, 0)), 2

    def _read(self, x: jax.Array, purpose: _Purpose) -> jax.Array:
        format, axes, rows = self._blocks(purpose, x.ndim)
        if format is None:
            return x
        return _quantized(x, format, axes, *self._rounding(purpose), rows=rows)

    def _losses(self, x: jax.Array, purpose: _Purpose) -> Losses | None:
        format, axes, rows = self._blocks(purpose, x.ndim)
        if format is None:
            return None
        return losses(x, self._read(x, purpose), _clipped(x, format, axes, rows))

    def _rounding(
        self, purpose: _Purpose, key: jax.Array | None = None
    ) -> tuple[Rounding, jax.Array | None]:
        """Returns (rounding, random key or None) for a purpose."""
        formats = self.formats
        rounding = formats.gradient_rounding if purpose.of_gradient else formats.rounding
        if rounding != "stochastic":
            return rounding, None
        key = self.key if key is None else key
        if key is None:
            return "even", None
        return rounding, jax.random.fold_in(jax.random.wrap_key_data(key), purpose)


def unquantized(leaf: Any) -> Any:
    """Returns the kernel inside a `QuantizedKernel`; any other leaf as it is."""
    return leaf.kernel if isinstance(leaf, QuantizedKernel) else leaf


def losses(x: jax.Array, read: jax.Array, over: jax.Array) -> Losses:
    """`Losses` of x that is read as another array; over: bool, which entries are clipped."""
    x, read = x.astype(jnp.float32), read.astype(jnp.float32)
    found = jnp.sum((read - x) ** 2), jnp.sum(x * x), jnp.sum(over, dtype=jnp.float32)
    return jnp.stack([*found, jnp.float32(x.size)])


def figures(losses: Losses) -> tuple[jax.Array, jax.Array]:
    """(|q(x) - x| / |x|, the share of entries that are clipped), of `Losses` or a sum of some."""
    lost, whole, over, count = losses
    return jnp.sqrt(lost / jnp.maximum(whole, jnp.finfo(jnp.float32).tiny)), over / count


def _quantized(
    x: jax.Array,
    format: Format,
    axes: Axes,
    rounding: Rounding,
    key: jax.Array | None,
    rows: int = 0,
) -> jax.Array:
    """x in a format, with blocks along adjacent axes taken as one; its gradient passes straight.

    Args:
      rows: number of leading axes whose entries share no scale.
    """

    def read(x: jax.Array, key: jax.Array | None, axis: int) -> jax.Array:
        y = fake_quantize(x, format, axis=axis, rounding=rounding, key=key)
        return y.astype(x.dtype)

    return _by_blocks(read, x, key, format, axes, rows)


def _clipped(x: jax.Array, format: Format, axes: Axes, rows: int) -> jax.Array:
    """Tells where `_quantized` clips x, bool like x."""
    return _by_blocks(
        lambda x, key, axis: clipped(x, format, axis=axis), x, None, format, axes, rows
    )


def _by_blocks(
    function: Callable[[jax.Array, jax.Array | None, int], jax.Array],
    x: jax.Array,
    key: jax.Array | None,
    format: Format,
    axes: Axes,
    rows: int,
) -> jax.Array:
    """function(x, key, axis), elementwise, with the blocks of `_quantized` along one axis."""
    if rows and format.mixes:
        keys = None if key is None else jax.random.split(key, x.shape[:rows])

        def one(x: jax.Array, key: jax.Array | None) -> jax.Array:
            return _by_blocks(function, x, key, format, axes, 0)

        for _ in range(rows):
            one = jax.vmap(one, (0, None if keys is None else 0))
        return one(x, keys)
    whole = isinstance(format.block, int) and x.shape[axes[-1]] % format.block == 0
    if whole and format.output_block == 1:
        axes = axes[-1:]  # the same blocks
    if len(axes) == 1:
        return function(x, key, axes[0])
    first, last = axes[0] + x.ndim, axes[-1] + x.ndim
    flat = x.reshape(*x.shape[:first], -1, *x.shape[last + 1 :])
    return function(flat, key, first).reshape(x.shape)
