"""N:M reached weight by weight."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from sparsity.algorithms.pruners import MagnitudePruning
from sparsity.mask_calculator import TopKFnType
from sparsity.masks import nm, topk
from sparsity.sparsity_types import NByM, SparsityType


def iterative_nm_mask(scores: jax.Array, sparsity: Any, sparsity_type: NByM) -> jax.Array:
    """The entries of the N:M mask first, then the largest others, up to a total sparsity.

    At sparsities below 1 - N/M the groups keep N or more entries, at 1 - N/M exactly N, and above
    it the mask is N:M with the lowest survivors gone as well.

    Raises:
      ValueError: as `nm.nm_mask`.
    """
    scores = jnp.minimum(scores.astype(jnp.float32), jnp.finfo(jnp.float32).max)
    kept = nm.nm_mask(scores, sparsity_type.n, sparsity_type.m, axis=sparsity_type.axis)
    size, groups = scores.size, scores.size // sparsity_type.m
    keep = topk.keep_count(size, sparsity)
    first = jnp.where(kept, jnp.inf, scores)
    within = jnp.where(kept, scores, -jnp.inf)
    below = keep < groups * sparsity_type.n
    return topk.topk_mask(jnp.where(below, within, first), keep)


@dataclasses.dataclass
class IterativeNMPruning(MagnitudePruning):
    """Magnitude pruning along a schedule whose end is N:M.

    The smallest weights beyond the N of each group go first, over the whole parameter; `NByM`
    under plain magnitude pruning goes the same way group by group. The target sparsity is to be
    1 - N/M. Other types are pruned as by magnitude.
    """

    def get_topk_fn(self, sparsity_type: SparsityType) -> TopKFnType:
        """Returns a function (scores, sparsity) -> mask; for N:M it is `iterative_nm_mask`."""
        if isinstance(sparsity_type, NByM):
            return functools.partial(iterative_nm_mask, sparsity_type=sparsity_type)
        return super().get_topk_fn(sparsity_type)


def add_to_jaxpruner() -> None:
    """Does nothing, since the algorithm is registered: JaxPruner's users call this."""
