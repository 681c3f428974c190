"""Check by counting zeros that a kernel is as sparse as it is said to be."""

import math
from typing import Any, NamedTuple

import jax

from sparsity.masks.layers import names
from sparsity.masks.nm import nm_violations


class Validity(NamedTuple):
    """Counts of the zeros of one kernel, all of its layers together.

    Attributes:
      pattern: what it is said to have: "2:4", or the fraction of zeros, such as "0.8".
      sparsity: fraction of zeros.
      groups: how many groups of M there are; None for a fraction.
      violations: how many of them have more than N nonzeros; None for a fraction.
    """

    pattern: str
    sparsity: float
    groups: int | None = None
    violations: int | None = None

    @property
    def holds(self) -> bool:
        """Tells whether every group holds N:M; of a fraction, whether it is short by at most
        0.001."""
        if self.violations is not None:
            return self.violations == 0
        return self.sparsity >= float(self.pattern) - 1e-3


def nm_validity(kernel: jax.Array, n: int, m: int, axis: int | tuple[int, ...]) -> Validity:
    """Counts the groups of a kernel along the axis (or adjacent axes, taken as one)."""
    violations = int(nm_violations(kernel, n, m, axis=axis))
    return Validity(f"{n}:{m}", zeros(kernel), math.prod(kernel.shape) // m, violations)


def zeros(kernel: jax.Array) -> float:
    """Fraction of a kernel's entries that are 0; 0 of a kernel without entries."""
    return int((kernel == 0).sum()) / max(kernel.size, 1)


def by_name(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by the names of `layers.names`."""
    return dict(zip(jax.tree.leaves(names(tree)), jax.tree.leaves(tree), strict=True))
