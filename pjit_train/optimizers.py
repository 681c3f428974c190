"""Optimizers and learning-rate schedules, from optax.

Each class here is the configuration of one optimizer; `build(steps, roles)` gives optax's
transformation for a run of that many steps, with gradient clipping before it and the schedule
inside. Where a recipe of `sparsity` wraps the optimizer, it wraps what `build` returns.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from pjit_train.errors import UserError
from pjit_train.models.roles import Role, Roles
from sparsity.masks.layers import names
from sparsity.ranges import (
    Count,
    Decay,
    Fraction,
    NonNegative,
    Positive,
    Whole,
    check_choice,
    check_fields,
)
from sparsity.recipes.autoswitch import scale_by_step_adam
from sparsity.updater import Updater


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up from zero, then one of four shapes.

    Attributes:
      shape: "cosine" or "linear" falls to the end of the run; "constant" stays; "wsd" stays and
        falls linearly over the last `decay_fraction` of the run (warm-up, stable, decay; Hu et al.,
        2024).
      warmup_steps: steps until the peak; in a shorter run the warm-up takes all of it.
      final_fraction: of the peak, at the end of the run.
    """

    shape: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup_steps: Whole = 100
    decay_fraction: Fraction = 0.2
    final_fraction: Fraction = 0.1

    def __post_init__(self):
        shapes = ("cosine", "linear", "constant", "wsd")
        check_choice("schedule: shape", self.shape, shapes, UserError)
        check_fields(self, UserError)

    def notice(self, steps: int) -> str | None:
        """Says what may surprise in a run of so many steps, in one line; None where nothing may."""
        if self.warmup_steps <= steps:
            return None
        return (
            f"schedule: warmup_steps={self.warmup_steps} exceeds the run's {steps} steps; "
            "the learning rate rises through all of them and does not fall"
        )

    def build(
        self, peak: float, steps: int
    ) -> Callable[[jax.typing.ArrayLike], jax.typing.ArrayLike]:
        """Learning rate as a function of the number of updates done before."""
        warmup = min(self.warmup_steps, steps)
        rest = max(steps - warmup, 1)
        match self.shape:
            case "cosine":
                after = optax.cosine_decay_schedule(peak, rest, alpha=self.final_fraction)
            case "linear":
                after = optax.linear_schedule(peak, peak * self.final_fraction, rest)
            case "constant":
                after = optax.constant_schedule(peak)
            case _:
                decay = min(round(self.decay_fraction * steps), rest)
                after = optax.linear_schedule(
                    peak, peak * self.final_fraction, max(decay, 1), transition_begin=rest - decay
                )
        if not warmup:
            return after
        # The first update already moves: step s of the warm-up has (s + 1) / (warmup + 1).
        rising = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
        return optax.join_schedules([rising, after], [warmup])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Base of all optimizers.

    Attributes:
      learning_rate: at the peak of the schedule.
      clip_norm: largest global norm of a gradient; None does not clip.
      weight_decay: decoupled, times the learning rate; for kernels and embeddings only, not for
        norm scales and biases.
    """

    learning_rate: Positive
    schedule: Schedule = Schedule()
    clip_norm: Positive | None = 1.0
    weight_decay: NonNegative = 0.1

    def __post_init__(self):
        check_fields(self, UserError)

    def build(
        self, steps: int, roles: Roles, updater: Updater | None = None
    ) -> tuple[optax.GradientTransformation, Callable]:
        """The transformation for a run of `steps` updates, and its schedule.

        Args:
          roles: of all parameters, see `models.roles.param_roles`.
          updater: of a recipe of `sparsity`, which wraps the whole; None for dense training.

        Raises:
          UserError: the recipe asks for Adam's variance and this is another optimizer.
        """
        schedule = self.schedule.build(self.learning_rate, steps)
        switch = None if updater is None else updater.variance
        if switch is None:
            transformation = self._transformation(schedule, roles)
        else:
            transformation = self._switching(schedule, roles, switch, steps)
        if self.clip_norm is not None:
            transformation = optax.chain(clip_by_global_norm(self.clip_norm), transformation)
        if updater is not None:
            transformation = updater.wrap_optax(transformation, learning_rate=schedule)
        return optax.with_extra_args_support(transformation), schedule

    @property
    def adam_betas(self) -> tuple[float, float] | None:
        """Decays of the moments where some parameters have Adam's; None where none have."""
        return None

    def _transformation(self, schedule, roles: Roles) -> optax.GradientTransformation:
        raise NotImplementedError

    def _switching(
        self, schedule, roles: Roles, switch, steps: int
    ) -> optax.GradientTransformation:
        raise UserError(
            f"optimizer: the recipe freezes Adam's variance and {type(self).__name__} has none; "
            "use AdamW, or a recipe with variance = None"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019)."""

    b1: Decay = 0.9
    b2: Decay = 0.95
    epsilon: Positive = 1e-8

    @property
    def adam_betas(self):
        return self.b1, self.b2

    def _transformation(self, schedule, roles):
        betas, decay = self.adam_betas, self.weight_decay
        return optax.adamw(schedule, *betas, self.epsilon, weight_decay=decay, mask=decayed(roles))

    def _switching(self, schedule, roles, switch, steps):
        return optax.chain(
            scale_by_step_adam(self.b1, self.b2, self.epsilon, switch=switch, steps=steps),
            optax.add_decayed_weights(self.weight_decay, decayed(roles)),
            optax.scale_by_learning_rate(schedule),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adafactor(Optimizer):
    """Adafactor (Shazeer and Stern, 2018): second moments factored into rows and columns.

    A kernel of the blocks is factored as the matrix [inputs, outputs] of each layer, all heads as
    one axis; every other parameter over its two largest axes. What is smaller than
    `min_dim_size_to_factor` in one of them is not factored.

    Its own relative clipping takes the place of `clip_norm`. Statistics over a whole parameter (the
    update's root mean square) are over all layers of a stack.
    """

    clip_norm: Positive | None = None
    weight_decay: NonNegative = 0.0
    min_dim_size_to_factor: Count = 128

    def _transformation(self, schedule, roles):
        inner = optax.adafactor(
            schedule,
            min_dim_size_to_factor=self.min_dim_size_to_factor,
            weight_decay_rate=(lambda step: self.weight_decay * schedule(step))
            if self.weight_decay
            else None,
            weight_decay_mask=decayed(roles),
        )

        matrices = functools.partial(_as_matrices, roles)

        def update(updates, state, params):
            of_matrices, state = inner.update(matrices(updates), state, matrices(params))
            return jax.tree.map(lambda x, like: x.reshape(like.shape), of_matrices, updates), state

        return optax.GradientTransformation(lambda params: inner.init(matrices(params)), update)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lion(Optimizer):
    """Lion (Chen et al., 2023); wants a third to a tenth of AdamW's learning rate."""

    b1: Decay = 0.9
    b2: Decay = 0.99

    def _transformation(self, schedule, roles):
        mask = decayed(roles)
        return optax.lion(schedule, self.b1, self.b2, weight_decay=self.weight_decay, mask=mask)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
    """Stochastic gradient descent with momentum."""

    momentum: Decay = 0.9
    nesterov: bool = False
    weight_decay: NonNegative = 0.0

    def _transformation(self, schedule, roles):
        return optax.chain(
            optax.trace(self.momentum, self.nesterov),
            optax.add_decayed_weights(self.weight_decay, decayed(roles)),
            optax.scale_by_learning_rate(schedule),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon(Optimizer):
    """Muon (Jordan et al., 2024) for the kernels of the blocks, each layer by itself; AdamW for the
    rest (embeddings, head, norms, biases) at `adam_learning_rate`, with the same schedule.
    """

    beta: Decay = 0.95
    adam_learning_rate: Positive = 3e-4
    adam_b1: Decay = 0.9
    adam_b2: Decay = 0.95

    @property
    def adam_betas(self):
        return self.adam_b1, self.adam_b2

    def _transformation(self, schedule, roles):
        scale = self.adam_learning_rate / self.learning_rate
        return optax.contrib.muon(
            schedule,
            beta=self.beta,
            weight_decay=self.weight_decay,
            weight_decay_mask=decayed(roles),
            adam_b1=self.adam_b1,
            adam_b2=self.adam_b2,
            adam_learning_rate=lambda step: scale * schedule(step),
            muon_weight_dimension_numbers=functools.partial(matrix_axes, roles),
        )


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """`optax.clip_by_global_norm` for a norm that is known already, the argument `norm` of update.

    A product, which XLA fuses into what reads the gradients; the quotients of a division it stores:
    another copy of all gradients.
    """

    def update(updates, state, params=None, *, norm=None, **extra):
        del params, extra
        scale = jnp.minimum(1.0, max_norm / (optax.tree.norm(updates) if norm is None else norm))
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def decayed(roles: Roles):
    """The function params -> a tree of bools, True for parameters with weight decay."""
    return lambda params: jax.tree.map(lambda name: roles[name].decays, names(params))


def matrix_axes(roles: Roles, params):
    """Muon's reduction and output axes of stacked kernels; None for all other parameters."""

    def axes(name, param):
        if not _is_stacked_kernel(roles[name]):
            return None
        inputs = roles[name].inputs
        return optax.contrib.MuonDimensionNumbers(
            tuple(param.ndim + axis for axis in inputs),
            tuple(axis for axis in range(1, param.ndim) if axis - param.ndim not in inputs),
        )

    return jax.tree.map(axes, names(params), params)


def _as_matrices(roles: Roles, params):
    """Stacked kernels as [layers, inputs, outputs]; all other parameters as they are."""

    def view(name, param):
        role = roles[name]
        return param.reshape(role.matrix_shape(param.shape)) if _is_stacked_kernel(role) else param

    return jax.tree.map(view, names(params), params)


def _is_stacked_kernel(role: Role) -> bool:
    return role.kind == "kernel" and role.stacked
