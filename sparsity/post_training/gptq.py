"""Quantizing a trained kernel: round to nearest, and GPTQ (Frantar et al., 2023).

A kernel is seen as a matrix [inputs, outputs], y = x W; the blocks of a format run along its
inputs. Either keeps the zeros of a mask.

Letters in names: I inputs, O outputs, G blocks along the inputs.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from sparsity.numbers.formats import Format, check_blocks, get_format
from sparsity.numbers.scales import Scale
from sparsity.post_training.hessian import (
    Hessian,
    check_block_size,
    check_hessian,
    check_kernel,
    factored,
    inverse_factor,
    transposed_product,
)


class Scales(NamedTuple):
    """Scales of a kernel: numbers that its elements are multiplied by.

    Attributes:
      scale: float32 [blocks, outputs], or [1, 1] of a format with one scale, [blocks, blocks of
        outputs] of tiles; of NVFP4 the block
        scales before they are divided by the tensor scale. None for FP8 without a scale.
      zero_point: int32, in the shape of `scale`: the code of the value 0, or None.
      tensor_scale: float32 [], of NVFP4; or None.
    """

    scale: np.ndarray | None
    zero_point: np.ndarray | None = None
    tensor_scale: np.ndarray | None = None


class Quantized(NamedTuple):
    """Quantized kernel, as `rtn` and `gptq` return it.

    Attributes:
      values: float32 [inputs, outputs].
      scales: of its blocks.
    """

    values: jax.Array
    scales: Scales


def rtn(kernel_IO: jax.Array, format: str | Format) -> Quantized:
    """The kernel rounded to nearest, ties to even; zeros stay zeros.

    Raises:
      ValueError: an unknown format, a block that does not divide the inputs, or a kernel that is
        no finite matrix.
    """
    format = _checked(kernel_IO, format)
    found, scale = _rtn(jnp.asarray(kernel_IO, jnp.float32), format)
    return Quantized(found, _host(scale, format))


def gptq(
    kernel_IO: jax.Array,
    hessian_II: jax.Array | Hessian,
    format: str | Format,
    *,
    mask_IO: jax.Array | None = None,
    block_size: int = 128,
    damping: float = 0.01,
    order: bool = False,
) -> Quantized:
    """The kernel quantized input by input, what comes later moved to make up for each error.

    Input j takes its rounded value q_j, and the later ones move by -U_j,: (w_j - q_j) / U_jj, U the
    upper Cholesky factor of H^-1 (Frantar et al., 2023, algorithm 1). The scale of a block is taken
    from its weights when it is begun; one of a whole column or array from the kernel as it is
    given, and so is the tensor scale of NVFP4.

    Args:
      hessian_II: X^T X over the calibration text, up to a factor. Weights of inputs that were
        always 0 become 0 before any scale is taken, as in the authors' program: they cost nothing,
        and would make the steps of the others in their block larger.
      mask_IO: bool, True = kept; the others become 0, and their loss is made up for as well. None
        keeps the zeros that the kernel has.
      block_size: inputs whose updates are gathered before they are applied to the inputs after
        them, a matter of speed alone; it is rounded to a multiple of the format's block.
      damping: times the mean of the Hessian's diagonal, added to it.
      order: goes through the inputs by decreasing diagonal of the Hessian instead, with all scales
        taken from the kernel as it is given.

    Raises:
      ValueError: as `rtn`, the mask has another shape, or the Hessian is not finite, symmetric and
        of the inputs, or not positive definite when damped.
    """
    format = _checked(kernel_IO, format)
    check_block_size(block_size)
    inputs = kernel_IO.shape[0]
    kernel_IO = jnp.asarray(kernel_IO, jnp.float32)
    mask_IO = kernel_IO != 0 if mask_IO is None else jnp.asarray(mask_IO, bool)
    if mask_IO.shape != kernel_IO.shape:
        raise ValueError(f"mask_IO: shape {mask_IO.shape}; use the kernel's, {kernel_IO.shape}")
    visited = np.arange(inputs)
    if order:
        hessian = check_hessian(hessian_II, inputs)
        visited = np.argsort(-np.diagonal(hessian), kind="stable")
        factor_II, dead_I = inverse_factor(hessian[np.ix_(visited, visited)], damping)
    else:
        factor_II, dead_I = factored(hessian_II, inputs, damping)
    mask_IO = mask_IO.at[visited[dead_I]].set(False)
    length = format.block if isinstance(format.block, int) else 1
    size = max(block_size // length, 1) * length
    found, scale = _gptq(kernel_IO, mask_IO, factor_II, visited, format, size, order)
    return Quantized(found, _host(scale, format))


QUANTIZERS = ("rtn", "gptq")


def _checked(kernel_IO: jax.Array, format: str | Format) -> Format:
    format = get_format(format)
    check_kernel(kernel_IO)
    check_blocks(format, kernel_IO.shape[0])
    return format


@functools.partial(jax.jit, static_argnames="format")
def _rtn(kernel_IO: jax.Array, format: Format) -> tuple[jax.Array, Scale | None]:
    scale = _scales(kernel_IO, format)
    blocks = format.split(kernel_IO, 0)[0]
    return _rounded(blocks, scale, format).reshape(kernel_IO.shape), scale


@functools.partial(jax.jit, static_argnames=("format", "size", "order"))
def _gptq(
    kernel_IO: jax.Array,
    mask_IO: jax.Array,
    factor_II: jax.Array,
    visited_I: jax.Array,
    format: Format,
    size: int,
    order: bool,
) -> tuple[jax.Array, Scale | None]:
    inputs = kernel_IO.shape[0]
    kernel_IO = jnp.where(mask_IO, kernel_IO, 0)
    scales = _scales(kernel_IO, format)
    length = format.block if isinstance(format.block, int) else inputs
    group_I = visited_I // length if length < inputs else jnp.zeros_like(visited_I)
    weights, mask_IO = kernel_IO[visited_I], mask_IO[visited_I]
    refresh = length if length < inputs and not order else None

    def block(start: int | jax.Array, size: int, carry: Any) -> Any:
        weights, scales = carry
        return _block(weights, scales, mask_IO, factor_II, group_I, start, size, format, refresh)

    whole, rest = divmod(inputs, size)
    carry = weights, scales
    if whole:
        carry = jax.lax.fori_loop(0, whole, lambda b, c: block(b * size, size, c), carry)
    if rest:
        carry = block(whole * size, rest, carry)
    weights, scales = carry
    return jnp.zeros_like(weights).at[visited_I].set(weights), scales


def _block(
    weights_IO: jax.Array,
    scales: Scale | None,
    mask_IO: jax.Array,
    factor_II: jax.Array,
    group_I: jax.Array,
    start: int | jax.Array,
    size: int,
    format: Format,
    refresh: int | None,
) -> tuple[jax.Array, Scale | None]:
    """Quantizes `size` inputs from `start` on, and moves the weights of all after them.

    Args:
      refresh: inputs of a block whose scales are taken when it is begun; None: they are as given.
    """
    inputs, outputs = weights_IO.shape
    block = jax.lax.dynamic_slice(weights_IO, (start, 0), (size, outputs))
    mask = jax.lax.dynamic_slice(mask_IO, (start, 0), (size, outputs))
    rows = jax.lax.dynamic_slice(factor_II, (start, 0), (size, inputs))
    local = jax.lax.dynamic_slice(rows, (0, start), (size, size))
    group = jax.lax.dynamic_slice(group_I, (start,), (size,))

    def quantize_input(j: jax.Array, carry: Any) -> Any:
        block, errors, scales = carry
        scale = jax.tree.map(lambda x: x[group[j]] if x.ndim else x, scales)
        new = jnp.where(mask[j], _rounded(block[j][None], scale, format)[0], 0)
        error = (block[j] - new) / local[j, j]
        block -= local[j][:, None] * error  # the factor is 0 for inputs before j
        return block.at[j].set(new), errors.at[j].set(error), scales

    def quantize_group(g: jax.Array, carry: Any, length: int) -> Any:
        block, errors, scales = carry
        first = g * length
        w = jax.lax.dynamic_slice(block, (first, 0), (length, outputs))
        kept = jax.lax.dynamic_slice(mask, (first, 0), (length, outputs))
        new = _scales(jnp.where(kept, w, 0), format, scales)
        # `w` is one block: its scale has an axis of blocks only where there are several.
        new = jax.tree.map(lambda x: x.reshape(-1, outputs) if x.ndim else x, new)
        place = lambda old, x: old.at[group[first]].set(x) if x.ndim else old
        carry = block, errors, jax.tree.map(place, scales, new)
        return jax.lax.fori_loop(first, first + length, quantize_input, carry)

    carry = block, jnp.zeros_like(block), scales
    if refresh is not None:
        each = functools.partial(quantize_group, length=refresh)
        carry = jax.lax.fori_loop(0, size // refresh, each, carry)
    else:
        carry = jax.lax.fori_loop(0, size, quantize_input, carry)
    block, errors, scales = carry
    after = jnp.arange(inputs) >= start + size
    moved = transposed_product(jnp.where(after, rows, 0), errors)
    return jax.lax.dynamic_update_slice(weights_IO - moved, block, (start, 0)), scales


def _scales(kernel_IO: jax.Array, format: Format, earlier: Scale | None = None) -> Scale | None:
    """Computes the scale of every block, [blocks, 1, outputs], or [1, outputs] or [1, 1] where
    there is but one."""
    return format.scale(*format.split(kernel_IO, 0), earlier)


def _rounded(blocks: jax.Array, scale: Scale | None, format: Format) -> jax.Array:
    return format.values(*format.elements(blocks, scale, "even", None), scale)


def _host(scale: Scale | None, format: Format) -> Scales:
    """Converts scales to the numpy arrays that are stored."""
    if scale is None:
        return Scales(None)

    def matrix(x: jax.Array) -> npt.NDArray[Any]:
        return np.asarray(x).reshape(-1, x.shape[-1])

    zero_point = None if scale.zero_point is None else matrix(scale.zero_point)
    tensor_scale = None if scale.tensor_scale is None else np.asarray(scale.tensor_scale)
    return Scales(
        matrix(format.multipliers(scale, (scale.exponent.ndim - 2,))), zero_point, tensor_scale
    )
