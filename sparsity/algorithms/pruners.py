"""Dense to sparse: train, and prune what scores lowest, at once or along a schedule."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from sparsity.base_updater import BaseUpdater, SparseState
from sparsity.utils import map_entries


@dataclasses.dataclass
class MagnitudePruning(BaseUpdater):
    """Keeps the largest |w| (Zhu and Gupta, 2017)."""

    def calculate_scores(
        self, params: Any, sparse_state: SparseState | None = None, grads: Any = None, **kwargs: Any
    ) -> Any:
        """Scores parameters by |w|."""
        del sparse_state, grads, kwargs
        return jax.tree.map(jnp.abs, params)


@dataclasses.dataclass
class SaliencyPruning(BaseUpdater):
    """Keeps the largest |w * g|, the first-order change of the loss (Molchanov et al., 2016)."""

    scores_training: ClassVar[bool] = True

    def calculate_scores(
        self, params: Any, sparse_state: SparseState | None = None, grads: Any = None, **kwargs: Any
    ) -> Any:
        """Scores parameters by |w * g|, with g their gradients."""
        del sparse_state, kwargs
        if grads is None:
            raise ValueError("grads=None; saliency is |w * g|: give the gradients")
        return jax.tree.map(lambda p, g: jnp.abs(p * g), params, grads)


def generate_random_scores(params: Any, rng_seed: Any) -> Any:
    """float32 numbers uniform in [0, 1), of the parameters' shapes.

    Args:
      rng_seed: an integer or a key; each leaf has the key `fold_in(key, index of the leaf)`.
    """
    key = as_key(rng_seed)
    structure: Any
    leaves, structure = jax.tree.flatten(params)
    # float32 whatever the parameters are: bfloat16 has 256 numbers in [0.5, 1), mostly ties.
    return structure.unflatten(
        [
            jax.random.uniform(jax.random.fold_in(key, index), leaf.shape, jnp.float32)
            for index, leaf in enumerate(leaves)
        ]
    )


def as_key(rng_seed: Any) -> jax.Array:
    """The key of an integer; a key itself."""
    return jax.random.key(rng_seed) if isinstance(rng_seed, int) else rng_seed


@dataclasses.dataclass
class RandomPruning(BaseUpdater):
    """Keeps weights at random; what is pruned stays pruned."""

    def calculate_scores(
        self, params: Any, sparse_state: SparseState | None = None, grads: Any = None, **kwargs: Any
    ) -> Any:
        """Random numbers in [0, 1), another draw at each step; -1 for what is pruned."""
        del grads, kwargs
        if sparse_state is None:
            return generate_random_scores(params, self.rng_seed)
        key = jax.random.fold_in(as_key(self.rng_seed), sparse_state.count)
        scores = generate_random_scores(params, key)
        masks = self.unpack(sparse_state.masks, params)
        return map_entries(
            lambda path, score, mask: score if mask is None else jnp.where(mask == 1, score, -1),
            scores,
            masks,
        )
