"""AC/DC: phases of sparse and of dense training in turn (Peste et al., 2021)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from sparsity.algorithms.pruners import MagnitudePruning
from sparsity.base_updater import SparseState
from sparsity.ranges import Whole
from sparsity.sparsity_schedules import NoUpdateSchedule


@dataclasses.dataclass(frozen=True)
class CycleSchedule(NoUpdateSchedule):
    """Phases that begin sparse and end sparse; see `ACDC` for the fields."""

    init_dense_steps_end: int
    final_sparse_steps_start: int
    cycle_sparse_steps: int
    cycle_dense_steps: int

    def begins_sparse(self, step: Any) -> Any:
        """Tells whether a sparse phase begins at a step."""
        return self._within(step, 0) | (step == self.final_sparse_steps_start)

    def is_mask_update_iter(self, step: Any) -> Any:
        """Tells whether a phase, sparse or dense, begins at a step."""
        return self.begins_sparse(step) | self._within(step, self.cycle_sparse_steps)

    def _within(self, step: Any, offset: int) -> Any:
        """Tells whether a step of the cycles is `offset` steps after the beginning of a cycle."""
        cycle = max(self.cycle_sparse_steps + self.cycle_dense_steps, 1)
        begun = (step >= self.init_dense_steps_end) & (step < self.final_sparse_steps_start)
        return begun & ((step - self.init_dense_steps_end) % cycle == offset)


@dataclasses.dataclass
class ACDC(MagnitudePruning):
    """Magnitude masks at the beginning of each sparse phase, none in the dense phases.

    Dense, then sparse and dense phases in turn, then sparse to the end. A weight that was pruned
    begins the next dense phase at zero.

    Attributes:
      init_dense_steps_end: step of the first sparse phase.
      final_sparse_steps_start: step from which all is sparse, with a mask made there.
      cycle_sparse_steps: length of a sparse phase.
      cycle_dense_steps: length of a dense phase.
      reset_optimizer: zero all moments of the inner optimizer at each change of phase; counts stay.

    Raises:
      ValueError: phases that do not follow one another.
    """

    init_dense_steps_end: Whole = 0
    final_sparse_steps_start: Whole = 0
    cycle_sparse_steps: Whole = 0
    cycle_dense_steps: Whole = 0
    reset_optimizer: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        begin, end = self.init_dense_steps_end, self.final_sparse_steps_start
        if end < begin:
            raise ValueError(
                f"final_sparse_steps_start={end} is before init_dense_steps_end={begin}; "
                f"use {begin} or more"
            )
        if end > begin and min(self.cycle_sparse_steps, self.cycle_dense_steps) < 1:
            raise ValueError(
                f"cycle_sparse_steps={self.cycle_sparse_steps}, "
                f"cycle_dense_steps={self.cycle_dense_steps}; use 1 or more of each"
            )
        self.scheduler = CycleSchedule(begin, end, self.cycle_sparse_steps, self.cycle_dense_steps)

    def update_state(
        self, sparse_state: SparseState, params: Any, grads: Any, **kwargs: Any
    ) -> SparseState:
        """The state with the masks of the phase that begins."""

        def sparse() -> Any:
            scores = self.calculate_scores(params, sparse_state=sparse_state, grads=grads, **kwargs)
            return self.pack(self.create_masks(scores, sparse_state.target_sparsities))

        def dense() -> Any:
            return self.pack(self.get_initial_masks(params, sparse_state.target_sparsities))

        begins_sparse = self.scheduler.begins_sparse(sparse_state.count)
        sparse_state = sparse_state._replace(masks=jax.lax.cond(begins_sparse, sparse, dense))
        if self.reset_optimizer:
            inner_state = reset_optimizer(sparse_state.inner_state)
            sparse_state = sparse_state._replace(inner_state=inner_state)
        return sparse_state


def reset_optimizer(state: Any) -> Any:
    """Zeros for the arrays of an optax state; scalars (counts, hyperparameters) stay."""

    def reset(x: Any) -> Any:
        moment = jnp.ndim(x) > 0 and jnp.issubdtype(jnp.result_type(x), jnp.inexact)
        return jnp.zeros_like(x) if moment else x

    return jax.tree.map(reset, state)


def add_to_jaxpruner() -> None:
    """Does nothing, since the algorithm is registered: JaxPruner's users call this."""
