"""Top-KAST: sparse forward and backward passes over dense parameters (Jayakumar et al., 2020)."""

import dataclasses
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import optax

from sparsity.algorithms.pruners import MagnitudePruning
from sparsity.base_updater import SparseState, straight_through
from sparsity.ranges import Fraction, NonNegative
from sparsity.sparsity_schedules import PeriodicSchedule
from sparsity.utils import map_entries


@dataclasses.dataclass
class TopKAST(MagnitudePruning):
    """The forward pass reads the set A of the largest |w|, and the larger set B is trained.

    A is the top D of each layer (D = 1 - sparsity), B the top D + M; weights outside B do not move
    until a refresh of the sets brings them in. The parameters stay dense, and those of
    `pre_forward_update` have zeros outside A; they pass their gradient straight through. Add
    `regularization` to the loss, or give `alpha`: it lets other weights overtake those of A.

        def total(params):
            return loss(updater.pre_forward_update(params, state)) + updater.regularization(
                params, state, 1e-4)

    Attributes:
      scheduler: its updates refresh the sets; every 100 steps.
      backward_extra_density: M; 0.3, with a sparsity of 0.8, is the paper's 80 % forward and 50 %
        backward.
      alpha: `wrap_optax` adds the gradient of `regularization` with this factor; 0 does not.
    """

    scheduler: Any = PeriodicSchedule(100, 0, None)  # noqa: RUF009 (frozen)
    is_sparse_gradients: bool = True
    backward_extra_density: Fraction = 0.3
    alpha: NonNegative = 0.0

    def init_state(self, params: Any) -> SparseState:
        """The state with the sets of the initial parameters."""
        targets = self.distribute(params)
        return self._with_sets(
            SparseState(masks=None, target_sparsities=targets, count=jnp.zeros([], jnp.int32)),
            self.scored(params),
            targets,
        )

    def update_state(
        self, sparse_state: SparseState, params: Any, grads: Any, **kwargs: Any
    ) -> SparseState:
        """The state with the sets of the parameters as they are."""
        sparsities = self.scheduler.get_sparsity_at_step(
            sparse_state.target_sparsities, sparse_state.count
        )
        return self._with_sets(sparse_state, params, sparsities, grads=grads, **kwargs)

    def _with_sets(
        self, sparse_state: SparseState, params: Any, sparsities: Any, **kwargs: Any
    ) -> SparseState:
        scores = self.calculate_scores(params, **kwargs)

        def beyond(sparsity: Any) -> Any:
            if isinstance(sparsity, float):
                return max(sparsity - self.backward_extra_density, 0.0)
            return jnp.maximum(sparsity - self.backward_extra_density, 0.0)

        forward = self.create_masks(scores, sparsities)
        backward = self.create_masks(scores, jax.tree.map(beyond, sparsities))
        return sparse_state._replace(masks=self.pack(forward), backward_masks=self.pack(backward))

    def gradient_masks(self, sparse_state: SparseState) -> Any:
        """Masks of the gradient: B, which keeps more weights than the forward masks."""
        return sparse_state.backward_masks

    def wrap_optax(
        self, inner: optax.GradientTransformation
    ) -> optax.GradientTransformationExtraArgs:
        """Wraps as `BaseUpdater.wrap_optax`; weights outside the backward masks do not move."""
        masked = super().wrap_optax(inner)

        def update(
            updates: Any, state: SparseState, params: Any = None, **extra: Any
        ) -> tuple[Any, SparseState]:
            if self.alpha and params is not None:
                penalty = jax.grad(self.regularization)(params, state, self.alpha)
                updates = jax.tree.map(jnp.add, updates, penalty)
            updates, state = masked.update(updates, state, params, **extra)
            # Momentum and weight decay would move them.
            return self.apply_masks(updates, state.backward_masks, is_packed=None), state

        return optax.GradientTransformationExtraArgs(masked.init, update)

    def pre_forward_update(self, params: Any, opt_state: SparseState) -> Any:
        """Returns the parameters with zeros outside the forward masks A."""
        masks = self.unpack(opt_state.masks, params)
        return map_entries(lambda path, param, mask: straight_through(param, mask), params, masks)

    def post_gradient_update(self, params: Any, sparse_state: SparseState) -> Any:
        """Returns the parameters unchanged: they stay dense."""
        del sparse_state
        return params

    def regularization(
        self,
        params: Any,
        opt_state: SparseState,
        alpha: float,
        variant: Literal["paper", "code"] = "paper",
    ) -> jax.Array:
        """alpha * (|w_A|^2 + |w_{B without A}|^2 / D), summed over the pruned layers.

        Args:
          params: dense.
          variant: "paper" has squared l2 norms; "code", as ports of it have, the norms themselves.

        Returns:
          A float32 scalar. D is the density of A in each parameter.
        """
        if variant not in ("paper", "code"):
            raise ValueError(f"variant={variant!r}; use 'paper' or 'code'")

        def term(
            path: tuple[Any, ...], param: jax.Array, forward: jax.Array | None, backward: jax.Array
        ) -> jax.Array:
            if forward is None:
                return jnp.zeros(())
            axes = tuple(range(self.stacked(path, param), param.ndim))
            squares = jnp.square(param.astype(jnp.float32))

            def norm(kept: jax.Array) -> jax.Array:
                total = jnp.sum(jnp.where(kept, squares, 0), axis=axes)
                if variant == "paper":
                    return jnp.sum(total)
                # Of zeros, a norm has the gradient zero.
                some = total > 0
                return jnp.sum(jnp.where(some, jnp.sqrt(jnp.where(some, total, 1)), 0))

            density = jnp.mean(forward == 1, dtype=jnp.float32)
            return norm(forward == 1) + norm((backward == 1) & (forward == 0)) / density

        terms = map_entries(
            term,
            params,
            self.unpack(opt_state.masks, params),
            self.unpack(opt_state.backward_masks, params),
        )
        return alpha * cast(jax.Array, sum(jax.tree.leaves(terms)))
