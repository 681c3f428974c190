"""Interplay of sparsity and quantization: errors of each, of both orders, and the bound.

After Harma et al., "Effective Interplay between Sparsity and Quantization", ICLR 2025. The error of
a map f is f(x) - x. Definition 3.4: f then g are orthogonal where the norm of the error of both is
at most the sum of the norms of the errors of each. Theorem 3.5: magnitude sparsity, then a format
whose scales come from the greatest |x| of a block, is: a kept number takes the value it would have
taken in the dense array, as long as the greatest of its block is kept, and a pruned one stays zero.
So in any norm p >= 1 the error of both, to the power p, is at most the sum of those of each.
Theorems 3.6 and 3.7: the other order is not orthogonal, and passes the bound by what grows with the
number of elements and the step. In the norm p = 1 that is at most the sum of |error of
quantization| over what the mask of x prunes, since the mask of the quantized array prunes the least
of that array. Theorem 3.9: for dot
products neither order is orthogonal.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparsity.numbers.formats import Format, get_format
from sparsity.numbers.quantization import quantize
from sparsity.numbers.rounding import Rounding

MaskOf = Callable[[jax.Array], jax.Array]


class LostMaxima(NamedTuple):
    """Test of the premise of Theorem 3.5: fractions of blocks that lose their maximum, or all.

    Attributes:
      lost: the fraction of blocks that keep something, but not their greatest magnitude (or, where
        `Int` is not symmetric, not both extremes; for NVFP4, every such block where the greatest of
        the array is lost). The premise holds where this is 0.
      empty: the fraction of blocks that keep nothing; they are zero in either order.
    """

    lost: jax.Array
    empty: jax.Array


class TensorInterplay(NamedTuple):
    """Norms of errors of one array, float32 scalars.

    Attributes:
      sparsity, quantization: of each alone.
      sparsify_then_quantize, quantize_then_sparsify: of both, in each order.
      bound: sparsity + quantization (Definition 3.4).
      lost: see LostMaxima.
    """

    sparsity: jax.Array
    quantization: jax.Array
    sparsify_then_quantize: jax.Array
    quantize_then_sparsify: jax.Array
    bound: jax.Array
    lost: jax.Array

    @property
    def excess(self) -> dict[str, jax.Array]:
        """Excess of the error over the bound, by order; at least 0."""
        return _excess(self)


class DotInterplay(NamedTuple):
    """Errors of dot products: root mean squares, and how many pass the additive bound.

    Attributes:
      sparsity: of weights sparse. quantization: of both operands quantized.
      sparsify_then_quantize, quantize_then_sparsify: of both operands quantized and weights sparse.
      bound: the root mean square of |error of sparsity| + |error of quantization|.
      violations, mean_excess: by order (sparsify_then_quantize first), float32 [2]: the fraction
        of dot products whose |error| passes the sum of the two for that very product; and by how
        much, on the average of those.
    """

    sparsity: jax.Array
    quantization: jax.Array
    sparsify_then_quantize: jax.Array
    quantize_then_sparsify: jax.Array
    bound: jax.Array
    violations: jax.Array
    mean_excess: jax.Array


def lost_maxima(
    x: jax.Array, mask: jax.Array, format: str | Format, *, axis: int = -1
) -> LostMaxima:
    """Counts the blocks of a format that lose their greatest element to a mask.

    Args:
      mask: bool like x, True = kept.
      axis: of the blocks.
    """
    format = get_format(format)
    blocks, axes = format.split(jnp.asarray(x, jnp.float32), axis)
    kept, _ = format.split(jnp.asarray(mask).astype(jnp.float32), axis)
    lost = jnp.zeros((), bool)
    for of in format.extremes:
        before = format.largest(blocks, axes, of)
        after = format.largest(jnp.where(kept > 0, blocks, 0.0), axes, of)
        lost = lost | (after < before)
        if format.array_bits:
            lost = lost | (jnp.max(after, initial=0) < jnp.max(before, initial=0))
    empty = format.largest(kept, axes) == 0
    return LostMaxima(jnp.mean(lost & ~empty), jnp.mean(empty))


def tensor_interplay(
    x: jax.Array,
    mask_of: MaskOf,
    format: str | Format,
    *,
    axis: int = -1,
    order: float = 2,
    rounding: Rounding = "even",
) -> TensorInterplay:
    """The errors of one array under sparsity, quantization and both (Definition 3.4).

    Args:
      x: float32.
      mask_of: the mask of an array (True = kept), such as that of its magnitudes; of x, and for
        the second order of x quantized.
      axis: of the blocks of the format.
      order: the p of the norm of the flattened error, from 1; inf is the greatest.
      rounding: not stochastic.
    """
    x = jnp.asarray(x, jnp.float32)
    format = get_format(format)
    arrays, mask = _arrays(x, mask_of, format, axis, rounding)
    one, other, *both = (jnp.linalg.norm((y - x).ravel(), ord=order) for y in arrays)
    lost = lost_maxima(x, mask, format, axis=axis).lost
    return TensorInterplay._make([one, other, *both, one + other, lost])


def dot_interplay(
    x: jax.Array,
    weights: jax.Array,
    mask_of: MaskOf,
    format: str | Format,
    *,
    x_format: str | Format | None = None,
    rounding: Rounding = "even",
) -> DotInterplay:
    """The errors of x @ weights, each of its entries a dot product (Theorem 3.9).

    Blocks of both operands lie along the contracted axis.

    Args:
      x: float32 [.., K].
      weights: float32 [K, N].
      mask_of: the mask of weights.
      x_format: of x where it is not that of the weights.
    """
    x, weights = jnp.asarray(x, jnp.float32), jnp.asarray(weights, jnp.float32)
    format = get_format(format)
    arrays, _ = _arrays(weights, mask_of, format, 0, rounding)
    quantized = quantize(x, format if x_format is None else x_format, rounding=rounding)
    exact = _dot(x, weights)
    sparsity = _dot(x, arrays[0]) - exact
    quantization, first, second = (_dot(quantized, y) - exact for y in arrays[1:])
    bound = jnp.abs(sparsity) + jnp.abs(quantization)
    over = [jnp.maximum(jnp.abs(error) - bound, 0.0) for error in (first, second)]
    counts = [jnp.sum(e > 0) for e in over]
    excess = [jnp.sum(e) / jnp.maximum(n, 1) for e, n in zip(over, counts, strict=True)]
    errors = (_rms(e) for e in (sparsity, quantization, first, second, bound))
    violations = jnp.stack([n / bound.size for n in counts])
    return DotInterplay._make([*errors, violations, jnp.stack(excess)])


def _arrays(
    x: jax.Array, mask_of: MaskOf, format: Format, axis: int, rounding: Rounding
) -> tuple[list[jax.Array], jax.Array]:
    """x sparse, quantized, sparse then quantized, quantized then sparse; and the mask of x."""
    mask = mask_of(x)
    sparse = jnp.where(mask, x, 0.0)
    quantized = quantize(x, format, axis=axis, rounding=rounding)
    both = quantize(sparse, format, axis=axis, rounding=rounding)
    return [sparse, quantized, both, jnp.where(mask_of(quantized), quantized, 0.0)], mask


def _excess(errors: TensorInterplay) -> dict[str, jax.Array]:
    orders = ("sparsify_then_quantize", "quantize_then_sparsify")
    return {name: jnp.maximum(getattr(errors, name) - errors.bound, 0.0) for name in orders}


def _dot(x: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.matmul(x, weights, precision=jax.lax.Precision.HIGHEST)


def _rms(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(x * x))
