"""STEP: Adam whose second moments are frozen before the masks are learned (Lu et al., 2023).

Sparse training feeds Adam's second moments with the noise of changing masks. STEP trains densely
until they have settled, keeps them as they are from there on, and learns the masks with the first
moments alone.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from sparsity.ranges import Count, Fraction, Positive, check_choice, check_fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoSwitch:
    """Switch to the sparse phase when second moments have settled (AutoSwitch, Lu et al., 2023).

    Z_t is the mean over all coordinates of |v_t - v_{t-1}|. The switch comes after the first update
    t for which the mean of the last `window` of them is below `threshold` and t > T_min, or for
    which t > T_max.

    Attributes:
      option: "arithmetic" mean (option I), or "geometric" (option II). The geometric mean is over
        the coordinates that changed: one unchanged coordinate would make that of all of them 0.
      threshold: None for Adam's epsilon.
      window: updates; None for floor(1 / (1 - b2)). Nothing is decided before it is full.
      min_fraction: T_min as a fraction of the run.
      max_fraction: T_max as a fraction of the run.
      clip: whether T_min and T_max count. Without them a run that does not settle stays dense until
        its fine-tuning phase.
    """

    option: Literal["arithmetic", "geometric"] = "arithmetic"
    threshold: Positive | None = None
    window: Count | None = None
    min_fraction: Fraction = 0.1
    max_fraction: Fraction = 0.5
    clip: bool = True

    def __post_init__(self) -> None:
        check_choice("AutoSwitch: option", self.option, ("arithmetic", "geometric"))
        check_fields(self)
        if self.min_fraction > self.max_fraction:
            raise ValueError(
                f"AutoSwitch: min_fraction={self.min_fraction} and max_fraction="
                f"{self.max_fraction}; use min_fraction <= max_fraction"
            )

    def bounds(self, steps: int) -> tuple[int, int]:
        """(T_min, T_max) of a run of `steps` updates."""
        return math.floor(self.min_fraction * steps), math.floor(self.max_fraction * steps)


class StepAdamState(NamedTuple):
    """Adam's state, with what the switch is decided by.

    Attributes:
      count: int32 [], updates done.
      mu: first moments, as the parameters.
      nu: second moments, as the parameters; no longer changed after the switch.
      z: float32 [window], the last Z_t; that of update t stands at (t - 1) mod window.
      switched_at: int32 [], the update after which nu was frozen; -1 before.
    """

    count: jax.Array  # type: ignore[assignment]  # in place of tuple's method
    mu: optax.Updates
    nu: optax.Updates
    z: jax.Array
    switched_at: jax.Array


def scale_by_step_adam(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    switch: AutoSwitch = AutoSwitch(),
    steps: int,
) -> optax.GradientTransformation:
    """`optax.scale_by_adam` up to the switch; the same with v frozen after it.

    The denominator is Adam's, sqrt(v / (1 - b2^t)) + eps. After a switch at t0 both v and that t
    stay at t0; the first moments go on, with their own bias correction.

    Args:
      steps: of the run, of which the fractions of `switch` are taken.
    """
    # 1 / (1 - 0.999) is 999.9999999999991 in floating point.
    window = switch.window or max(math.floor(1 / (1 - b2) + 1e-6), 1)
    threshold = eps if switch.threshold is None else switch.threshold
    first, last = switch.bounds(steps)

    def init(params: Any) -> StepAdamState:
        zeros = optax.tree.zeros_like(params)
        return StepAdamState(
            count=jnp.zeros((), jnp.int32),
            mu=zeros,
            nu=zeros,
            z=jnp.zeros(window, jnp.float32),
            switched_at=jnp.full((), -1, jnp.int32),
        )

    def update(updates: Any, state: StepAdamState, params: Any = None) -> tuple[Any, StepAdamState]:
        del params
        count = optax.safe_increment(state.count)
        switched = state.switched_at >= 0
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
        z = state.z.at[(count - 1) % window].set(_mean_change(nu, state.nu, switch.option))
        settled = (count >= window) & (jnp.mean(z) < threshold)
        if switch.clip:
            settled = (settled & (count > first)) | (count > last)
        nu = jax.tree.map(lambda new, old: jnp.where(switched, old, new), nu, state.nu)
        switched_at = jnp.where(~switched & settled, count, state.switched_at)
        mu_hat = optax.tree.bias_correction(mu, b1, count)
        nu_hat = optax.tree.bias_correction(nu, b2, jnp.where(switched, state.switched_at, count))
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu_hat, nu_hat)
        return updates, StepAdamState(count, mu, nu, z, switched_at)

    return optax.GradientTransformation(init, update)


def _mean_change(new: Any, old: Any, option: str) -> jax.Array:
    """Z_t: the mean over all coordinates of |new - old|, a float32 scalar."""
    changes = [
        jnp.abs(a - b).astype(jnp.float32)
        for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
    ]
    if option == "arithmetic":
        return cast(jax.Array, sum(map(jnp.sum, changes))) / sum(change.size for change in changes)
    changed = sum(jnp.sum(change > 0, dtype=jnp.float32) for change in changes)
    logs = sum(jnp.sum(jnp.where(c > 0, jnp.log(jnp.where(c > 0, c, 1)), 0)) for c in changes)
    return jnp.where(changed > 0, jnp.exp(logs / jnp.maximum(changed, 1)), 0)
