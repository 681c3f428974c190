"""Masked in the forward pass only: gradients reach all weights (Bengio et al., 2013)."""

import dataclasses
from typing import Any

import jax

from sparsity.algorithms.pruners import MagnitudePruning, RandomPruning
from sparsity.base_updater import BaseUpdater, SparseState, straight_through
from sparsity.utils import map_entries


class SteMixin(BaseUpdater):
    """Masks made anew at every forward pass; the parameters that are kept stay dense.

    The masked parameters are the dense ones to a gradient: the same comes of differentiating with
    respect to what `pre_forward_update` returns, and through it. For evaluation, and at the end,
    `pre_forward_update` or `instant_sparsify` gives sparse parameters.
    """

    def pre_forward_update(self, params: Any, opt_state: SparseState) -> Any:
        """The parameters, masked at the sparsity of the step."""
        sparsities = self.scheduler.get_sparsity_at_step(
            opt_state.target_sparsities, opt_state.count
        )
        fixed = jax.lax.stop_gradient(params)
        scores = self.calculate_scores(self.scored(fixed), sparse_state=opt_state)
        masks = self.create_masks(scores, sparsities)
        return map_entries(lambda path, param, mask: straight_through(param, mask), params, masks)

    def get_initial_masks(self, params: Any, target_sparsities: Any) -> Any:
        """Returns None for every parameter: the state holds no masks."""
        del target_sparsities
        return jax.tree.map(lambda _: None, params)

    def update_state(
        self, sparse_state: SparseState, params: Any, grads: Any, **kwargs: Any
    ) -> SparseState:
        """Returns the sparse state unchanged: it holds no masks."""
        del params, grads, kwargs
        return sparse_state

    def post_gradient_update(self, params: Any, opt_state: SparseState) -> Any:
        """Returns the parameters unchanged: they stay dense."""
        del opt_state
        return params


@dataclasses.dataclass
class SteMagnitudePruning(SteMixin, MagnitudePruning):
    """Keeps all weights and has the forward pass read those of the largest |w|."""


@dataclasses.dataclass
class SteRandomPruning(SteMixin, RandomPruning):
    """Keeps all weights and has the forward pass read some at random, others at each step."""
