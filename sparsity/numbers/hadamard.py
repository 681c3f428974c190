"""Block Hadamard transforms, which spread outliers over a block before it is rounded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sparsity.masks.axes import positive, shards
from sparsity.numbers.blocks import check_block


def hadamard(
    x: jax.Array, size: int, axis: int = -1, signs: jax.Array | np.ndarray | None = None
) -> jax.Array:
    """The orthonormal Hadamard transform of every `size` consecutive entries along an axis.

    Block by block, y = H D x, D being the signs and H Sylvester's matrix (H_1 = 1,
    H_2k = [[H_k, H_k], [H_k, -H_k]]) over sqrt(size). H is symmetric and its own inverse, so that
    without signs the transform is too; with signs the inverse is
    `signs * hadamard(y, size, axis)`. The transform of both operands of a matmul along their
    contraction, by the same signs, leaves their product (Ashkboos et al., "QuaRot", 2024; Tseng
    et al., "Training LLMs with MXFP4", 2025).

    Args:
      x: floating.
      size: of a block: 1, 2, 4, 8, ..., a divisor of the axis.
      axis: the axis that is cut into blocks.
      signs: +1 and -1, one for each place of a block [size], or of the whole axis; None for all +1.

    Returns:
      Of the shape and dtype of x; sums are in float32 at least.

    Raises:
      ValueError: the size is no power of two, or does not divide the axis or a shard of it, the
        signs have another shape, or x is not floating.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x of {x.dtype}: the transform is of a floating array")
    axis = positive(axis, x.ndim)
    if not isinstance(size, int | np.integer) or size < 1 or size & (size - 1):
        raise ValueError(f"size={size!r}: Sylvester's matrices have 1, 2, 4, 8, ... rows")
    size, length = int(size), x.shape[axis]
    check_block(size, length, ways=shards(x, axis), name=f"axis {axis} of {x.shape}")
    if signs is not None:
        signs = jnp.asarray(signs, x.dtype)
        if signs.shape not in ((size,), (length,)):
            raise ValueError(f"signs of shape {signs.shape}; use one of ({size},) or ({length},)")
        if signs.shape != (length,):
            signs = jnp.tile(signs, length // size)
        x = x * jnp.expand_dims(signs, [a for a in range(x.ndim) if a != axis])
    found: jax.Array = _transform(x, size, axis)
    return found


@functools.partial(jax.jit, static_argnums=(1, 2))
def _transform(x: jax.Array, size: int, axis: int) -> jax.Array:
    blocks = x.reshape(*x.shape[:axis], x.shape[axis] // size, size, *x.shape[axis + 1 :])
    wide = jnp.promote_types(x.dtype, jnp.float32)
    y = jax.lax.dot_general(  # [.., blocks, .., size]
        blocks.astype(wide),
        jnp.asarray(_matrix(size), wide),
        (((axis + 1,), (0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
    )
    return jnp.moveaxis(y, -1, axis + 1).astype(x.dtype).reshape(x.shape)


def _matrix(size: int) -> np.ndarray:
    """Sylvester's matrix over the root of its size, float64 [size, size]."""
    h = np.ones((1, 1))
    while len(h) < size:
        h = np.block([[h, h], [h, -h]])
    scaled: np.ndarray = h / np.sqrt(size)
    return scaled
