"""Kernels that a matmul reads in place of arrays: masked, or stored as values and indices.

All are pytrees that stand as leaves in a tree of parameters. Where layers are stacked, every field
has the axis of layers in front, so that `jax.lax.scan` and `jax.tree.map` slice them like arrays.
"""

import abc
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from sparsity.masks.bits import unpack_bits
from sparsity.masks.packed import decode_indices, gather_nm, unpack_nm


class Kernel(abc.ABC):
    """Base of what stands for a kernel in a tree of parameters."""

    @abc.abstractmethod
    def dense(self) -> jax.Array:
        """The array that a matmul reads."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("weight", "bits", "decay", "gradient"),
    meta_fields=("axis",),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedKernel(Kernel):
    """A kernel whose pruned weights W are read as decay * W.

    Attributes:
      weight: float [...].
      bits: uint8, `bits.pack_bits` of the mask along `axis`; 1 where a weight is kept.
      decay: float32, the leading axes of `weight` or none: 0 prunes, 1 reads the weight itself.
      gradient: float32, as `decay`: what the gradients of pruned weights are multiplied by. 1 is
        the straight-through estimator (Bengio et al., 2013), `decay` the true derivative, and 0
        holds pruned weights where they are.
      axis: of the packing, a negative number.
    """

    weight: jax.Array
    bits: jax.Array
    decay: jax.Array
    gradient: jax.Array
    axis: int

    def dense(self) -> jax.Array:
        """The kernel that is read, [...] in the dtype of `weight`.

        Differentiable in `weight` only; the backward pass keeps the bits and nothing else.
        """
        read: jax.Array = _masked(self.weight, self.bits, self.decay, self.gradient, self.axis)
        return read

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def ndim(self) -> int:
        return self.weight.ndim

    @property
    def dtype(self) -> jnp.dtype:
        return self.weight.dtype


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "code"),
    meta_fields=("n", "m", "axis", "code_axis"),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedKernel(Kernel):
    """An N:M kernel of which only the kept weights are stored.

    Attributes:
      values: float [..., groups * n, ...], the kept weights in their order along `axis`.
      code: uint8, `packed.encode_indices` of their places within the groups of m, packed along
        `code_axis`; the bit planes stand before the axis `axis`.
      axis: of the groups, a negative number.
      code_axis: a negative number.
    """

    values: jax.Array
    code: jax.Array
    n: int
    m: int
    axis: int
    code_axis: int

    def dense(self) -> jax.Array:
        """The kernel [..., groups * m, ...], zero where pruned. Differentiable in `values`."""
        n, m, axis, code_axis = self.n, self.m, self.axis, self.code_axis
        read: jax.Array = _unpacked(self.values, self.code, n, m, axis, code_axis)
        return read

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.values.shape)
        shape[self.axis] = shape[self.axis] // self.n * self.m
        return tuple(shape)

    @property
    def ndim(self) -> int:
        return self.values.ndim

    @property
    def dtype(self) -> jnp.dtype:
        return self.values.dtype


def dense(leaf: Any) -> jax.Array:
    """The array that a matmul reads of a leaf: `leaf.dense()`, or the array itself."""
    read: jax.Array = leaf.dense() if isinstance(leaf, Kernel) else leaf
    return read


def dense_tree(tree: Any) -> Any:
    """A tree of parameters with arrays in place of its kernels of any kind."""
    return jax.tree.map(dense, tree, is_leaf=lambda x: isinstance(x, Kernel))


def scale_pruned(mask: jax.Array, x: jax.Array, scale: jax.Array) -> jax.Array:
    """x where the mask keeps it, scale * x elsewhere: +0 where scale is 0, and x where it is 1.

    Args:
      scale: the leading axes of x, or none.
    """
    scale = scale.astype(x.dtype).reshape(scale.shape + (1,) * (x.ndim - scale.ndim))
    return jnp.where(mask | (scale == 1), x, jnp.where(scale == 0, 0, scale * x))


def indices_of(
    code: jax.Array, values_shape: tuple[int, ...], m: int, axis: int, code_axis: int
) -> jax.Array:
    """uint8 places within the groups, in the shape of the values, of a `PackedKernel.code`."""
    planes = jnp.moveaxis(code, axis - 1, 0)
    return decode_indices(planes, m, values_shape[code_axis], axis=code_axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _masked(
    weight: jax.Array, bits: jax.Array, decay: jax.Array, gradient: jax.Array, axis: int
) -> jax.Array:
    return scale_pruned(unpack_bits(bits, weight.shape[axis], axis=axis), weight, decay)


def _masked_fwd(
    weight: jax.Array, bits: jax.Array, decay: jax.Array, gradient: jax.Array, axis: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _masked(weight, bits, decay, gradient, axis), (bits, gradient)


def _masked_bwd(
    axis: int, residuals: tuple[jax.Array, jax.Array], d_out: jax.Array
) -> tuple[jax.Array, None, jax.Array, jax.Array]:
    bits, gradient = residuals
    mask = unpack_bits(bits, d_out.shape[axis], axis=axis)
    zeros = jnp.zeros_like(gradient)
    return scale_pruned(mask, d_out, gradient), None, zeros, zeros


_masked.defvjp(_masked_fwd, _masked_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _unpacked(
    values: jax.Array, code: jax.Array, n: int, m: int, axis: int, code_axis: int
) -> jax.Array:
    indices = indices_of(code, values.shape, m, axis, code_axis)
    return unpack_nm(values, indices, n, m, axis=axis)


def _unpacked_fwd(
    values: jax.Array, code: jax.Array, n: int, m: int, axis: int, code_axis: int
) -> tuple[jax.Array, jax.Array]:
    return _unpacked(values, code, n, m, axis, code_axis), code


def _unpacked_bwd(
    n: int, m: int, axis: int, code_axis: int, code: jax.Array, d_out: jax.Array
) -> tuple[jax.Array, None]:
    shape = list(d_out.shape)
    shape[axis] = shape[axis] // m * n
    indices = indices_of(code, tuple(shape), m, axis, code_axis)
    return gather_nm(d_out, indices, n, m, axis=axis), None


_unpacked.defvjp(_unpacked_fwd, _unpacked_bwd)
