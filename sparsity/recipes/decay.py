"""Decays D of pruned weights: a forward pass reads D * W where the mask prunes W.

Each is called with j, the steps since the decay phase began, and the length of that phase in steps;
either may be traced. The result is a float32 scalar in [0, 1].
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from sparsity.ranges import Count, Positive, check_choice, check_fields

Steps = int | jax.Array

EXPONENTIAL_END = 0.01
"""What `Exponential` without a beta has fallen to at the end of the phase."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hard:
    """D = 0: pruned weights are read as zeros."""

    def __call__(self, j: Steps, length: Steps) -> jax.Array:
        return jnp.zeros((), jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """D = max(1 - beta j, 0) (MdGf-Linear, Bambhaniya et al., 2024).

    Attributes:
      beta: a step; the paper's are 0.001 (2:4, 1:4) and 0.0002 (1:8 and sparser) for its runs. None
        reaches 0 at the end of the phase.
    """

    beta: Positive | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    def __call__(self, j: Steps, length: Steps) -> jax.Array:
        if self.beta is None:
            # One minus a quotient that is exactly 1 at the end; a beta of 1 / length may miss it.
            return jnp.maximum(1 - _float(j) / jnp.maximum(_float(length), 1), 0)
        return jnp.maximum(1 - self.beta * _float(j), 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exponential:
    """D = exp(-beta j) (MdGf-Exponential, Bambhaniya et al., 2024).

    Attributes:
      beta: a step; None for D = 0.01 at the end of the phase. D never is 0 before a fine-tuning
        phase makes it so.
    """

    beta: Positive | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    def __call__(self, j: Steps, length: Steps) -> jax.Array:
        if self.beta is None:
            beta = -math.log(EXPONENTIAL_END) / jnp.maximum(_float(length), 1)
        else:
            beta = self.beta
        return jnp.exp(-beta * _float(j))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskDecay:
    """D = max(1 - u weight, 0), with u = floor(j / every) (mask decay, Kao et al., 2022).

    u is the number of updates of the mask since the first one, so that D falls in stairs.

    Attributes:
      weight: None for 1 / max_updates, so that D falls to 0 with the last of them (of 8 in "code").
      every: steps between updates; None for the length of the phase / max_updates.
      max_updates: from this u on, D is 0.
      variant: "paper" counts u on; "code" (the authors', in AQT) clamps u to 8, so that D stays at
        1 - 8 weight and `max_updates` is never reached.
    """

    weight: Positive | None = None
    every: Count | None = None
    max_updates: Count = 16
    variant: Literal["paper", "code"] = "paper"

    def __post_init__(self) -> None:
        check_choice("MaskDecay: variant", self.variant, ("paper", "code"))
        check_fields(self)

    def __call__(self, j: Steps, length: Steps) -> jax.Array:
        if self.every is None:
            updates = j * self.max_updates // jnp.maximum(length, 1)
        else:
            updates = j // jnp.asarray(self.every)
        if self.variant == "code":
            updates = jnp.minimum(updates, 8)
        last = min(self.max_updates, 8) if self.variant == "code" else self.max_updates
        weight = 1 / last if self.weight is None else self.weight
        decay = jnp.maximum(1 - _float(updates) * weight, 0)
        return jnp.where(updates >= self.max_updates, 0, decay)


Decay = Hard | Linear | Exponential | MaskDecay


def check_decay(decay: Decay, length: int, fine_tuned: bool) -> None:
    """Checks that a phase of `length` steps brings D down to 0, or that one after it does.

    Raises:
      ValueError: `Linear` has a beta too small for the phase, or D is above 0 to the end of a run
        that has no fine-tuning phase.
    """
    end = float(decay(length, length))
    if end < 1e-6:  # a beta of 1 / length, rounded
        return
    if isinstance(decay, Linear):
        digits = 10 ** (len(str(length)) + 2)
        raise ValueError(
            f"Linear: beta={decay.beta:g} leaves D at {end:.3g} after the {length} steps of the "
            f"decay phase; use beta >= {-(-digits // length) / digits:g}, or None"
        )
    if not fine_tuned:
        raise ValueError(
            f"{type(decay).__name__}: D is {end:.3g} at the end of the run, and no weight is "
            "pruned for good; use a fine_tune_fraction above 0"
        )


def _float(steps: Steps) -> jax.Array:
    return jnp.asarray(steps, jnp.float32)
