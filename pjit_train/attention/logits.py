"""Logits of attention, made from the products of queries and keys: scaled, and capped softly."""

import dataclasses
import math

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Logits:
    """A logit is scale * product or, capped, softcap * tanh(scale * product / softcap) (Gemma 2).

    Where there is no cap the scale is left to the softmax, which multiplies differences by it.

    Attributes:
      scale: of the products.
      softcap: bound of a logit's magnitude; None for none.
    """

    scale: float
    softcap: float | None = None

    @classmethod
    def of(cls, head_dim: int, scale: float | None = None, softcap: float | None = None):
        """Logits of the scale, or 1 / sqrt(head_dim) where it is None."""
        return cls(1 / math.sqrt(head_dim) if scale is None else scale, softcap)

    @property
    def unit(self) -> float:
        """Factor from a difference of what a call gives to one of logits."""
        return self.scale if self.softcap is None else 1.0

    def __call__(self, products: jax.Array) -> jax.Array:
        """Capped logits; where there is no cap, the products."""
        if self.softcap is None:
            return products
        return self.softcap * jnp.tanh(products * (self.scale / self.softcap))

    def by_products(self, gradients: jax.Array, called: jax.Array) -> jax.Array:
        """Gradients by the products, less the factor `scale`, of those by the logits.

        Args:
          called: what a call gave, before it was masked.
        """
        if self.softcap is None:
            return gradients
        return gradients * (1 - (called / self.softcap) ** 2)
