"""Pruning by Adam's second moments, a diagonal of the Fisher matrix."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from sparsity.base_updater import BaseUpdater, SparseState
from sparsity.utils import map_entries, name_of


def find_adamstates(state: Any) -> list[optax.ScaleByAdamState]:
    """Finds all of Adam's states within an optax state."""
    leaves = jax.tree.leaves(state, is_leaf=_is_adam)
    return [leaf for leaf in leaves if _is_adam(leaf)]


def find_adamstate(state: Any) -> optax.ScaleByAdamState | None:
    """The first of Adam's states within an optax state; None where there is none."""
    return next(iter(find_adamstates(state)), None)


def replace_adamstate(state: Any, replacement: optax.ScaleByAdamState) -> Any:
    """Returns an optax state with `replacement` in the place of Adam's."""
    return jax.tree.map(lambda x: replacement if _is_adam(x) else x, state, is_leaf=_is_adam)


@dataclasses.dataclass
class AdamBasedFisherPruning(BaseUpdater):
    """Keeps the largest w^2 * nu: WoodFisher's diagonal (Singh and Alistarh, 2020) from Adam's nu.

    Adam's moments before the update of the step count; at step 0 they are zero, and so are all
    scores.

    Attributes:
      reset_adam: zero Adam's moments at each update of the masks.
    """

    scores_training: ClassVar[bool] = True

    reset_adam: bool = False

    def calculate_scores(
        self, params: Any, sparse_state: SparseState | None = None, grads: Any = None, **kwargs: Any
    ) -> Any:
        """w^2 * nu; zero for a parameter that is not pruned and has no nu.

        Raises:
          ValueError: no state, or no second moment of a parameter to prune.
        """
        del grads, kwargs
        if sparse_state is None:
            raise ValueError(
                "sparse_state=None; adam-fisher reads Adam's moments: "
                "use instant_sparsify(params, sparse_state=state)"
            )
        moments = [state.nu for state in find_adamstates(sparse_state.inner_state)]

        def score(
            path: tuple[Any, ...], param: jax.Array, mask: jax.Array | None, *nus: Any
        ) -> jax.Array:
            nu = next((nu for nu in nus if isinstance(nu, jax.Array)), None)
            if nu is not None:
                return jnp.square(param) * nu
            if mask is None:
                return jnp.zeros_like(param)
            raise ValueError(
                f"{name_of(path)}: the optimizer has no Adam moments of it; "
                "use adam or adamw for it, or leave it out by filter_fn"
            )

        return map_entries(score, params, sparse_state.masks, *moments, what="moments")

    def wrap_optax(
        self, inner: optax.GradientTransformation
    ) -> optax.GradientTransformationExtraArgs:
        """Wraps as `BaseUpdater.wrap_optax`; fails at once if the optimizer has no moments to
        read."""
        wrapped = super().wrap_optax(inner)

        def init(params: Any) -> SparseState:
            state: SparseState = wrapped.init(params)
            self.calculate_scores(params, sparse_state=state)
            return state

        return optax.GradientTransformationExtraArgs(init, wrapped.update)

    def update_state(
        self, sparse_state: SparseState, params: Any, grads: Any, **kwargs: Any
    ) -> SparseState:
        """The state with new masks, and zero moments where `reset_adam`."""
        sparse_state = super().update_state(sparse_state, params, grads, **kwargs)
        if not self.reset_adam:
            return sparse_state

        def reset(x: Any) -> Any:
            if not _is_adam(x):
                return x
            mu, nu = jax.tree.map(jnp.zeros_like, (x.mu, x.nu))
            return x._replace(mu=mu, nu=nu)

        inner_state = jax.tree.map(reset, sparse_state.inner_state, is_leaf=_is_adam)
        return sparse_state._replace(inner_state=inner_state)


def add_to_jaxpruner() -> None:
    """Does nothing, since the algorithm is registered: JaxPruner's users call this."""


def _is_adam(x: Any) -> bool:
    return isinstance(x, optax.ScaleByAdamState)
