"""Optimizers of embedding rows: each reads and writes only the rows of a batch.

"Lazy": rows that no sample of the batch asked for stay as they are, and so do their slots. For
SGD, Adagrad and row-wise Adagrad that is what the dense optimizer does, too, since a gradient of
zero moves nothing there; for Adam and FTRL see the classes.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from pjit_train.embeddings.exact import power, rounded
from sparsity.ranges import Decay, NonNegative, Positive, check_choice, check_fields

Slots = dict[str, jax.Array]
Mean = Callable[[jax.Array], jax.Array]
"""Mean over the columns of rows, [rows, columns] -> [rows]; of all columns, where they are cut."""


@dataclasses.dataclass(frozen=True)
class Slot:
    """A number that an optimizer keeps for each value of a row, or one for the whole row."""

    initial: float
    per_row: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowOptimizer(abc.ABC):
    """Base of the optimizers of rows.

    Attributes:
      learning_rate: of these tables; a schedule multiplies it.
    """

    learning_rate: Positive

    def __post_init__(self):
        check_fields(self)

    @property
    def slots(self) -> dict[str, Slot]:
        """The numbers that are kept for each row, by name."""
        return {}

    @abc.abstractmethod
    def apply(
        self,
        w: jax.Array,
        slots: Slots,
        g: jax.Array,
        step: jax.Array,
        scale: jax.Array,
        mean: Mean,
    ) -> tuple[jax.Array, Slots]:
        """The rows of a batch and their slots after an update.

        Args:
          w: float32 [rows, columns].
          slots: [rows, columns] or, per row, [rows].
          g: gradients summed over the whole batch, float32 [rows, columns].
          step: int32 [], the number of this update, from 1.
          scale: float32 [], multiplies the learning rate.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class SGD(RowOptimizer):
    """w -= rate * g."""

    def apply(self, w, slots, g, step, scale, mean):
        return w - rounded((self.learning_rate * scale) * g), {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adagrad(RowOptimizer):
    """a += g^2, w -= rate * g / (sqrt(a) + epsilon) (Duchi et al., 2011)."""

    initial_accumulator: NonNegative = 0.1
    epsilon: Positive = 1e-10

    @property
    def slots(self):
        return {"accumulator": Slot(self.initial_accumulator)}

    def apply(self, w, slots, g, step, scale, mean):
        a = slots["accumulator"] + rounded(g * g)
        rate = self.learning_rate * scale
        return w - rate * g / (jnp.sqrt(a) + self.epsilon), {"accumulator": a}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowWiseAdagrad(RowOptimizer):
    """Adagrad with one accumulator a row: a += mean(g^2), the square before the mean."""

    initial_accumulator: NonNegative = 0.1
    epsilon: Positive = 1e-10

    @property
    def slots(self):
        return {"accumulator": Slot(self.initial_accumulator, per_row=True)}

    def apply(self, w, slots, g, step, scale, mean):
        a = slots["accumulator"] + mean(rounded(g * g))
        rate = self.learning_rate * scale
        rates = rate * (1 / (jnp.sqrt(a) + self.epsilon))
        return w - rounded(g * rates[:, None]), {"accumulator": a}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LazyAdam(RowOptimizer):
    """Adam (Kingma and Ba, 2015) whose moments and rows stand still while no sample asks for them.

    Attributes:
      variant: "global" decays the moments of a row once for each update that it has part in, as
        TensorFlow's LazyAdam; "skipped" also for the steps since its last update, so that its
        moments are those of dense Adam (whose rows move in those steps, too). Both correct the bias
        by the number of all steps.
    """

    b1: Decay = 0.9
    b2: Decay = 0.999
    epsilon: Positive = 1e-8
    variant: Literal["global", "skipped"] = "global"

    def __post_init__(self):
        super().__post_init__()
        check_choice("LazyAdam.variant", self.variant, ("global", "skipped"))

    @property
    def slots(self):
        moments = {"m": Slot(0.0), "v": Slot(0.0)}
        if self.variant == "global":
            return moments
        return {**moments, "updated": Slot(0.0, per_row=True)}

    def apply(self, w, slots, g, step, scale, mean):
        b1, b2 = np.float32(self.b1), np.float32(self.b2)
        if self.variant == "global":
            decay1, decay2, more = b1, b2, {}
        else:
            passed = step - slots["updated"].astype(jnp.int32)  # whole below 2^24 steps
            decay1, decay2 = (power(b, passed)[:, None] for b in (b1, b2))
            more = {"updated": jnp.full_like(slots["updated"], step.astype(jnp.float32))}
        m = rounded(decay1 * slots["m"]) + rounded((1 - b1) * g)
        v = rounded(decay2 * slots["v"]) + rounded((1 - b2) * g * g)
        rate = self.learning_rate * scale / (1 - power(b1, step))
        w = w - rate * m / (jnp.sqrt(v * (1 / (1 - power(b2, step)))) + self.epsilon)
        return w, {"m": m, "v": v, **more}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FTRL(RowOptimizer):
    """FTRL-Proximal (McMahan et al., Ad Click Prediction, 2013, algorithm 1).

    z and n begin at zero, so the initial value of a row counts only in its first update.

    Attributes:
      learning_rate: alpha; `beta`, `l1` and `l2` are the paper's.
    """

    beta: NonNegative = 1.0
    l1: NonNegative = 0.0
    l2: NonNegative = 0.0

    @property
    def slots(self):
        return {"z": Slot(0.0), "n": Slot(0.0)}

    def apply(self, w, slots, g, step, scale, mean):
        steepness, n = 1 / (self.learning_rate * scale), slots["n"] + rounded(g * g)
        sigma = (jnp.sqrt(n) - jnp.sqrt(slots["n"])) * steepness
        z = slots["z"] + g - rounded(sigma * w)
        strength = rounded((self.beta + jnp.sqrt(n)) * steepness) + self.l2
        moved = jnp.where(strength > 0, -(z - rounded(jnp.sign(z) * self.l1)) / strength, w)
        return jnp.where(jnp.abs(z) <= self.l1, 0.0, moved), {"z": z, "n": n}
