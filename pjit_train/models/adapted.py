"""Frozen kernels with a low-rank part beside them that is trained (LoRA; Hu et al., 2021)."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from sparsity.recipes.kernels import Kernel, MaskedKernel, dense


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("frozen", "down", "up"),
    meta_fields=("inputs", "scale", "keep_zeros"),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptedKernel(Kernel):
    """A kernel W that is read as W + scale * down @ up, and where zeros are kept, 0 where W is 0.

    Attributes:
      frozen: W [..., inputs, outputs]: an array, or a kernel of a recipe, whose mask is then that
        of the sum.
      down: float32 [..., inputs, rank].
      up: float32 [..., rank, outputs].
      inputs: number of axes that the matmul sums over.
      keep_zeros: whether the sum is 0 wherever W is, so that a merged kernel is as sparse.
    """

    frozen: Any
    down: jax.Array
    up: jax.Array
    inputs: int
    scale: float
    keep_zeros: bool

    @property
    def separate(self) -> bool:
        """Tells whether a matmul may read W and the low-rank part one after the other.

        Then the gradient of the whole kernel is never made; under a mask it has to be.
        """
        return not self.keep_zeros and isinstance(self.frozen, jax.Array)

    def dense(self) -> jax.Array:
        """The kernel that is read, float32 where W is narrower."""
        frozen, added = self.frozen, self._product()
        if isinstance(frozen, MaskedKernel):
            return dataclasses.replace(frozen, weight=frozen.weight + added).dense()
        whole = dense(frozen)
        return whole + (jnp.where(whole != 0, added, 0) if self.keep_zeros else added)

    def _product(self) -> jax.Array:
        inputs = "abcd"[: self.inputs]
        outputs = "uvwx"[: self.up.ndim - self.down.ndim + self.inputs]
        equation = f"...{inputs}r,...r{outputs}->...{inputs}{outputs}"
        return self.scale * jnp.einsum(equation, self.down, self.up)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.frozen.shape

    @property
    def ndim(self) -> int:
        return self.frozen.ndim

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.promote_types(self.frozen.dtype, self.down.dtype)
