"""Schedules of masks: when they are updated, and how sparse they are then.

A schedule says `is_mask_update_iter(step)`, and `get_sparsity_at_step(target_sparsities, step)`: a
tree like the targets, with None where they have None. Steps count from 0 and may be traced.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from sparsity.ranges import Count, Whole, check_fields


@dataclasses.dataclass(frozen=True)
class NoUpdateSchedule:
    """Masks stay as they were made at initialization."""

    def get_sparsity_at_step(self, target_sparsities: Any, step: Any) -> Any:
        """Returns the target sparsities as they are."""
        del step
        return target_sparsities

    def is_mask_update_iter(self, step: Any) -> Any:
        """Returns False: masks are never updated."""
        del step
        return False


@dataclasses.dataclass(frozen=True)
class OneShotSchedule(NoUpdateSchedule):
    """Schedule of a single update, to the target sparsities, at `target_step`."""

    target_step: Whole

    def __post_init__(self) -> None:
        check_fields(self)

    def is_mask_update_iter(self, step: Any) -> Any:
        """Tells whether `step` is `target_step`."""
        return step == self.target_step


@dataclasses.dataclass(frozen=True)
class PeriodicSchedule(NoUpdateSchedule):
    """Updates at the target sparsities, at the multiples of a number of steps.

    Attributes:
      update_freq: steps between updates.
      update_start_step: the first step of updates.
      update_end_step: the last one; None for no end.

    Raises:
      ValueError: an update frequency below 1, or an end before the start.
    """

    update_freq: Count
    update_start_step: Whole
    update_end_step: Whole | None

    def __post_init__(self) -> None:
        check_fields(self)
        start, end = self.update_start_step, self.update_end_step
        if end is not None and end < start:
            raise ValueError(
                f"update_end_step={end} is before update_start_step={start}; use {start} or more"
            )

    def is_mask_update_iter(self, step: Any) -> Any:
        """True at multiples of `update_freq` from the start to the end; False for no step."""
        if step is None:
            return False
        due = jnp.logical_and(step % self.update_freq == 0, step >= self.update_start_step)
        if self.update_end_step is None:
            return due
        return jnp.logical_and(due, step <= self.update_end_step)


@dataclasses.dataclass(frozen=True)
class PolynomialSchedule(PeriodicSchedule):
    """A sparsity that rises from zero to the target between start and end.

    s(t) = target * (1 - (1 - p)^power), p = clip(t + 1 - start, 0, end - start) / (end - start)
    (Zhu and Gupta, 2017, To prune, or not to prune, equation 1, with an initial sparsity of zero).
    The end is a step of update even where it is no multiple of `update_freq`: without that one the
    target would never be reached.
    """

    update_end_step: Whole
    power: Count = 3

    def __post_init__(self) -> None:
        if self.update_end_step is None:
            raise ValueError(
                "update_end_step=None; a polynomial schedule needs the step of its end"
            )
        super().__post_init__()

    def is_mask_update_iter(self, step: Any) -> Any:
        """True at multiples of `update_freq` from the start to the end, and at the end."""
        if step is None:
            return False
        return jnp.logical_or(super().is_mask_update_iter(step), step == self.update_end_step)

    def get_sparsity_at_step(self, target_sparsities: Any, step: Any) -> Any:
        """Multiplies the target sparsities by the rise at `step`."""
        length = self.update_end_step - self.update_start_step
        if length:
            done = jnp.clip(step + 1 - self.update_start_step, 0, length)
            progress = jnp.float32(done) / length
        else:
            progress = 1.0
        rise = 1.0 - (1.0 - progress) ** self.power
        return jax.tree.map(lambda target: target * rise, target_sparsities)
