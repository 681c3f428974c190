"""The Hessian X^T X of a layer's inputs: its sums, its checks, and the factor of its inverse.

What is computed here has the same bits whatever the number of cores: sums whose order would depend
on it are done in a fixed one. Letters in names: T tokens, I inputs, O outputs.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from sparsity.numbers.rounding import MAGNITUDE, bits_of, float_of, lift, power, split
from sparsity.ranges import Count, NonNegative, check_number

# BLAS divides the rows and columns of a product among threads. Where it cuts a tile of its kernel,
# other instructions sum what is left of it; of whole numbers of these sides it cuts none.
_TILE = 64


def transposed_product(a_TI: jax.Array, b_TO: jax.Array) -> jax.Array:
    """A^T B, float32 [I, O], in one order of its sums.

    Where the left operand of a matmul is read transposed in place, XLA's CPU backend divides the
    sum by the number of threads; a copy of it that is transposed is multiplied in a fixed order.
    """
    a_IT = jax.lax.optimization_barrier(a_TI.T)
    return jnp.matmul(a_IT, b_TO, precision=jax.lax.Precision.HIGHEST)


def gram(x_TI: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(float32 [I, I], int32 e): X^T X / 4^e, with 2^e near the greatest |x|, so nothing overflows.

    Args:
      x_TI: rows [..., I].
    """
    x_TI = x_TI.reshape(-1, x_TI.shape[-1]).astype(jnp.float32)
    x_TI, exponent = to_unit(x_TI)
    return transposed_product(x_TI, x_TI), exponent


def add_grams(
    a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """The sum of two of `gram`, as it gives them."""
    exponent = jnp.maximum(a[1], b[1])
    first, second = (x * power(2 * (e - exponent)) for x, e in (a, b))
    return first + second, exponent


def from_gram(found: tuple[jax.Array, jax.Array]) -> np.ndarray:
    """X^T X, float64 [I, I], of what `gram` or `add_grams` gives."""
    products_II, exponent = jax.device_get(found)
    return _scaled(products_II, int(exponent))


def _scaled(products_II: np.ndarray, exponent: int) -> np.ndarray:
    whole = products_II.astype(np.float64)
    np.ldexp(whole, 2 * exponent, out=whole)
    return whole


class Hessian:
    """X^T X of one set of inputs, in float32, with the factor of its inverse, made once.

    So kernels that are given the same inputs, and one that is pruned and then quantized, share it.
    `numpy.asarray` gives the products in float64, which are held only as long as they are used.
    """

    def __init__(self, found: tuple[jax.Array, jax.Array]):
        """Takes over what `gram` or `add_grams` gives."""
        products_II, exponent = jax.device_get(found)
        self.unit_II, self.exponent = np.asarray(products_II), int(exponent)
        self._factors: dict[float, tuple[np.ndarray, np.ndarray]] = {}

    @classmethod
    def of(cls, products_II: npt.ArrayLike) -> "Hessian":
        """The Hessian of X^T X, of any finite scale."""
        products = np.asarray(products_II, np.float64)
        exponent = int(np.frexp(np.abs(products).max(initial=0))[1]) // 2
        unit = np.ldexp(products, -2 * exponent).astype(np.float32)
        return cls((jnp.asarray(unit), jnp.int32(exponent)))

    def __len__(self) -> int:
        return len(self.unit_II)

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return _scaled(self.unit_II, self.exponent).astype(dtype or np.float64, copy=False)

    @property
    def diagonal(self) -> np.ndarray:
        """The diagonal, float64 [I]."""
        return _scaled(np.diagonal(self.unit_II), self.exponent)

    def factor(self, damping: float) -> tuple[np.ndarray, np.ndarray]:
        """The result of `inverse_factor`; ValueErrors as it and `check_hessian`."""
        if damping not in self._factors:
            hessian = check_hessian(self, len(self))
            self._factors = {damping: inverse_factor(hessian, damping)}
        return self._factors[damping]


def factored(
    hessian_II: npt.ArrayLike | Hessian, inputs: int, damping: float
) -> tuple[np.ndarray, np.ndarray]:
    """The result of `inverse_factor` of X^T X, which is checked; of a `Hessian` the one it has.

    Raises:
      ValueError: as `check_hessian` and `inverse_factor`.
    """
    if isinstance(hessian_II, Hessian) and len(hessian_II) == inputs:
        return hessian_II.factor(damping)
    return inverse_factor(check_hessian(hessian_II, inputs), damping)


def to_unit(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(x / 2^e, int32 e), the greatest finite magnitude in [1, 2): exact, of subnormals too.

    What is below 2^-126 of the greatest becomes 0.
    """
    bits = bits_of(x)
    magnitude = bits & MAGNITUDE
    greatest = jnp.max(jnp.where(jnp.isfinite(x), magnitude, 0), initial=0)
    exponent = jnp.where(greatest == 0, 0, split(greatest)[1])
    value = lift(magnitude, exponent)
    return float_of(bits_of(value) | (bits & ~MAGNITUDE)), exponent


def check_finite(name: str, x: npt.ArrayLike) -> None:
    """Raises a ValueError, naming the first place, where a concrete array is not finite."""
    if isinstance(x, jax.core.Tracer):
        return
    finite = np.isfinite(np.asarray(x, np.float32))
    if not finite.all():
        place = tuple(int(i) for i in np.argwhere(~finite)[0])
        value = float(np.asarray(x, np.float32)[place])
        raise ValueError(f"{name}: entry {list(place)} is {value}; use finite numbers")


def check_kernel(kernel_IO: npt.ArrayLike) -> None:
    """Raises a ValueError where a kernel is no finite matrix of numbers."""
    if np.ndim(kernel_IO) != 2:
        raise ValueError(f"kernel_IO: shape {np.shape(kernel_IO)}; use [inputs, outputs]")
    check_finite("kernel_IO", kernel_IO)


def check_norms(name: str, norms_I: npt.ArrayLike, inputs: int) -> None:
    """Raises a ValueError where numbers are not one to an input, finite and from 0."""
    if np.shape(norms_I) != (inputs,):
        raise ValueError(f"{name}: shape {np.shape(norms_I)}; use one to each of {inputs} inputs")
    check_finite(name, norms_I)
    if not isinstance(norms_I, jax.core.Tracer) and np.min(norms_I, initial=0) < 0:
        raise ValueError(f"{name}: {float(np.min(norms_I)):.3g} is below 0; use 0 and more")


def check_hessian(hessian_II: npt.ArrayLike, inputs: int) -> np.ndarray:
    """Checks a Hessian, and returns it as float64.

    Raises:
      ValueError: it is not [inputs, inputs], finite and symmetric, or has a negative diagonal.
    """
    hessian = np.array(hessian_II, np.float64)
    if hessian.shape != (inputs, inputs):
        raise ValueError(
            f"hessian_II: shape {hessian.shape}; use X^T X of the {inputs} inputs, "
            f"{(inputs, inputs)}"
        )
    if not np.isfinite(hessian).all():
        place = [int(i) for i in np.argwhere(~np.isfinite(hessian))[0]]
        raise ValueError(f"hessian_II: entry {place} is not finite; use X^T X of finite inputs")
    diagonal = np.diagonal(hessian)
    if inputs and diagonal.min() < 0:
        raise ValueError(
            f"hessian_II: entry {[int(diagonal.argmin())] * 2} is {diagonal.min():.3g}; the "
            "diagonal of X^T X is not negative"
        )
    most = 1e-3 * max(abs(hessian.max(initial=0)), abs(hessian.min(initial=0)))
    for first in range(0, inputs, 512):  # rows at a time, not to hold a second matrix
        rows = slice(first, first + 512)
        difference = np.abs(hessian[rows] - hessian[:, rows].T)
        if difference.max(initial=0) > most:
            place = [int(i) for i in np.unravel_index(difference.argmax(), difference.shape)]
            place[0] += first
            raise ValueError(f"hessian_II: entry {place} is not that of its transpose; use X^T X")
    return hessian


def check_damping(damping: float) -> None:
    """Raises a ValueError where a damping is no finite number from 0."""
    check_number("damping", damping, NonNegative)


def check_block_size(block_size: int) -> None:
    """Raises a ValueError where a number of inputs is no int from 1."""
    check_number("block_size", block_size, Count)


def inverse_factor(hessian: np.ndarray, damping: float) -> tuple[np.ndarray, np.ndarray]:
    """U, upper triangular with U^T U = c (H + damping * mean(diag H))^-1, and the dead inputs.

    c is the power of two that brings the greatest entry of the diagonal to [1/2, 1), so that a
    scale of the inputs changes no bit of U. Inputs that were always 0 stand by themselves (the
    programs of SparseGPT and GPTQ put 1 on their diagonal before they take the mean for the
    damping, which then depends on the scale).

    Computed in float64: in float32, all that a TPU has, the Hessian of many correlated inputs is
    often not positive definite, and its inverse has few right digits.

    Args:
      hessian: of `check_hessian`.

    Returns:
      float32 [inputs, inputs], bool [inputs].

    Raises:
      ValueError: the damped Hessian is not positive definite.
    """
    check_damping(damping)
    inputs = len(hessian)
    _, exponent = np.frexp(np.diagonal(hessian).max(initial=0))
    # H = R R^T with R upper triangular, by Cholesky's factor of H read backwards; then U = R^-1.
    whole = np.eye(-(-inputs // _TILE) * _TILE)  # what fills it up stands by itself
    last = len(whole) - inputs
    np.ldexp(hessian[::-1, ::-1], -int(exponent), out=whole[last:, last:])
    diagonal = np.einsum("ii->i", whole[last:, last:])  # a view
    dead = diagonal == 0
    mean = diagonal[::-1].mean() if inputs else 0.0
    whole[last:, last:][dead] = 0
    whole[last:, last:][:, dead] = 0
    diagonal[dead] = 1
    diagonal += damping * mean
    least = 4 * max(inputs, 1) * np.finfo(np.float64).eps * diagonal
    lower = _cholesky(whole)
    pivots = np.diagonal(lower)[last:] ** 2 > least
    if not pivots.all():  # NaN among them
        raise ValueError(
            f"hessian_II: not positive definite with damping={damping}; "
            "use X^T X, and more damping, such as 0.01"
        )
    upper = np.ascontiguousarray(lower[::-1, ::-1])
    del whole, lower
    return _invert(upper)[:inputs, :inputs].astype(np.float32), dead[::-1].copy()


def _cholesky(a: np.ndarray, panel: int = 4 * _TILE) -> np.ndarray:
    """The lower triangular factor of a symmetric matrix, in its place; NaN where it is not positive
    definite."""
    if len(a) <= _TILE:
        try:
            a[...] = np.linalg.cholesky(a)
        except np.linalg.LinAlgError:
            a[...] = np.nan
        return a
    for start in range(0, len(a), panel):
        end = start + panel
        here = slice(start, end)
        _cholesky(a[here, here], _TILE)
        a[here, end:] = 0
        a[end:, here] = a[end:, here] @ _invert(a[here, here].T.copy())
        for first in range(end, len(a), 8 * _TILE):
            columns = slice(first, first + 8 * _TILE)
            a[first:, columns] -= a[first:, here] @ a[columns, here].T
    return a


def _invert(upper: np.ndarray) -> np.ndarray:
    """The inverse of an upper triangular matrix, in its place, by halves: numpy's own inverts any
    matrix."""
    if len(upper) <= _TILE:
        upper[...] = np.linalg.inv(upper)
        return upper
    h = -(-len(upper) // (2 * _TILE)) * _TILE
    first, last = _invert(upper[:h, :h]), _invert(upper[h:, h:])
    upper[:h, h:] = -(first @ upper[:h, h:]) @ last
    return upper
