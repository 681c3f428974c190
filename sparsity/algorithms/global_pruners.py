"""Global pruning: the scores of all parameters in one order, so layers may get any sparsity."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sparsity.algorithms.pruners import MagnitudePruning, SaliencyPruning
from sparsity.base_updater import BaseUpdater
from sparsity.mask_calculator import MASK_DTYPE
from sparsity.masks import topk
from sparsity.post_training.hessian import to_unit
from sparsity.ranges import Decay, NonNegative
from sparsity.sparsity_distributions import (
    NOT_DIM_ONE_FILTER_FN,
    FilterFnType,
    Stacked,
)
from sparsity.sparsity_types import Unstructured
from sparsity.utils import key_of

_global_topk_masks = jax.jit(topk.global_topk_masks)


@dataclasses.dataclass
class GlobalPruningMixin(BaseUpdater):
    """Prunes all parameters by one threshold, found by counting: no score leaves its device.

    Attributes:
      custom_sparsity_map: sparsities of single parameters by keys, which stay out of the order.
      filter_fn: which parameters are pruned; of a stack it sees one layer.
      use_normalization: divide the scores of each layer by their l2 norm. The power of two that
        brings the greatest of a layer to [1, 2) is taken out before: no scale changes a mask.
      normalization_eps: added to the norms of what is left (JaxPruner adds it to those of the
        scores themselves, and so weighs layers of tiny ones less).
      sparsity: fraction of zeros in all pruned parameters together, in [0, 1).

    Raises:
      ValueError: a sparsity outside [0, 1), or a structured type.
    """

    custom_sparsity_map: Mapping[tuple[Any, ...], Decay | None] | None = None
    filter_fn: FilterFnType = NOT_DIM_ONE_FILTER_FN
    normalization_eps: NonNegative = 1e-8
    use_normalization: bool = True
    sparsity: Decay = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.sparsity_type, Unstructured):
            raise ValueError(
                f"sparsity_type={self.sparsity_type}; global pruning is unstructured only: "
                "use 'magnitude' or 'saliency' for a structured type"
            )

    def distribute(self, params: Any) -> float:
        """Returns the target sparsity of all parameters together."""
        del params
        return self.sparsity

    def get_initial_masks(self, params: Any, target_sparsities: Any) -> Any:
        """Returns masks of ones, and None for parameters that are not pruned."""
        del target_sparsities

        def ones(path: tuple[Any, ...], param: Any) -> jax.Array | None:
            sparsity = (self.custom_sparsity_map or {}).get(key_of(path), self._pruned(path, param))
            return jnp.ones(param.shape, MASK_DTYPE) if sparsity else None

        return jax.tree.map_with_path(ones, params)

    def create_masks(self, scores: Any, target_sparsity: Any) -> Any:
        """Masks that keep the largest normalized scores of all parameters.

        Args:
          scores: a tree like the parameters.
          target_sparsity: one number; may be traced.
        """
        structure: Any
        named, structure = jax.tree_util.tree_flatten_with_path(scores)
        custom = self.custom_sparsity_map or {}
        pooled, masks = [], []
        for path, score in named:
            stacked, sparsity = self.stacked(path, score), custom.get(key_of(path))
            pooled.append(self._normalized(score, stacked) if self._pruned(path, score) else None)
            masks.append(None if sparsity is None else self._layers_mask(path, score, sparsity))
        size = sum(score.size for score in pooled if score is not None)
        if size:
            kept = _global_topk_masks(pooled, topk.keep_count(size, target_sparsity))
            masks = [
                mask if own is None else own.astype(MASK_DTYPE)
                for mask, own in zip(masks, kept, strict=True)
            ]
        return structure.unflatten(masks)

    def _pruned(self, path: tuple[Any, ...], param: Any) -> bool:
        """Tells whether a parameter is in the common order."""
        key, stacked = key_of(path), self.stacked(path, param)
        if stacked:
            copies = math.prod(param.shape[:stacked])
            param = Stacked(param.shape[stacked:], param.dtype, copies)
        return key not in (self.custom_sparsity_map or {}) and self.filter_fn(key, param)

    def _normalized(self, score: jax.Array, stacked: int) -> jax.Array:
        if not self.use_normalization:
            return score
        layer = self._normalized_layer
        for _ in range(stacked):
            layer = jax.vmap(layer)
        return layer(score.astype(jnp.float32))

    def _normalized_layer(self, score: jax.Array) -> jax.Array:
        unit, _ = to_unit(score)  # of which no square overflows
        norm = jnp.sqrt(jnp.sum(jnp.square(unit)))
        return unit / jnp.where(norm > 0, norm + self.normalization_eps, 1)


@dataclasses.dataclass
class GlobalMagnitudePruning(GlobalPruningMixin, MagnitudePruning):
    """Keeps the largest |w| of all parameters together."""


@dataclasses.dataclass
class GlobalSaliencyPruning(GlobalPruningMixin, SaliencyPruning):
    """Keeps the largest |w * g| of all parameters."""
