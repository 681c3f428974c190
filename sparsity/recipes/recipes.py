"""Training recipes for N:M sparsity: what each step does, as data.

A recipe says for each step of a run the pattern N:M (N kept of every M), what pruned weights are
read as (D times the weight), what gradient they get, how they are regularised, and whether the
optimizer's second moments are frozen. The published recipes are the functions at the end.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax

from sparsity.masks.layers import KERNELS, assign, names
from sparsity.ranges import Count, Fraction, NonNegative, check_choice, check_fields
from sparsity.recipes.autoswitch import AutoSwitch
from sparsity.recipes.decay import Decay, Exponential, Hard, Linear, MaskDecay, check_decay
from sparsity.recipes.kernel_plan import Contraction, plan_kernel
from sparsity.recipes.patterns import (
    Fixed,
    Geometric,
    Pattern,
    Stepwise,
    StructureDecay,
    parse_pattern,
)
from sparsity.recipes.recipe_updater import RecipeUpdater
from sparsity.updater import Scored, Sparsity

Layers = Mapping[str, str | None]
"""Pattern such as "2:4" by regular expression over the names of parameters; see `layers.assign`."""

Variant = Literal["paper", "code"]

DEFAULT_LAYERS: Layers = {KERNELS: "2:4"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe(Sparsity):
    """Recipe of N:M sparsity for a run of three phases: dense, decay, fine-tuning.

    In the dense phase nothing is pruned. In the decay phase the masks are made anew from the
    magnitudes of the weights, in the stages of `pattern`, and pruned weights W are read as D W. In
    the fine-tuning phase the pattern is the target and D = 0.

    Attributes:
      layers: the target pattern of each kernel.
      pattern: the stages of the decay phase.
      decay: D.
      gradient: of a pruned weight, for a gradient g of what is read in its place: g itself
        ("straight_through"; Bengio et al., 2013), or the true derivative D g ("masked").
      sr_ste: lambda of SR-STE (Zhou et al., 2021): a decay of pruned weights only.
      sr_ste_where: lambda W is added to the "gradient", as in the paper, where an adaptive
        optimizer divides it by its second moments; or "decoupled", learning rate times lambda W
        subtracted from the weight. A trainer clips by the norm of the loss's gradient alone.
      variance: with an AutoSwitch the dense phase ends when it says (STEP), and the optimizer is to
        be built with `scale_by_step_adam`.
      dense_fraction: of the run, at its beginning.
      fine_tune_fraction: of the run, at its end.
      update_every: steps between two masks of the same stage.
      freeze: whether the masks are fixed in the fine-tuning phase. If so, pruned weights are zeros
        there and get no gradient.
      packed: whether a trainer then holds only the kept weights, their gradients and moments, with
        the same losses: 2:4 with AdamW in float32 takes 8.1 bytes a weight instead of 16.

    Raises:
      ValueError: values that are unknown or do not go together; one line says what would do.
    """

    layers: Layers = dataclasses.field(default_factory=lambda: dict(DEFAULT_LAYERS))
    pattern: Pattern = dataclasses.field(default_factory=Fixed)
    decay: Decay = dataclasses.field(default_factory=Hard)
    gradient: Literal["straight_through", "masked"] = "straight_through"
    sr_ste: NonNegative = 0.0
    sr_ste_where: Literal["gradient", "decoupled"] = "gradient"
    variance: AutoSwitch | None = None
    dense_fraction: Fraction = 0.0
    fine_tune_fraction: Fraction = 0.0
    update_every: Count = 1
    freeze: bool = True
    packed: bool = False

    def __post_init__(self) -> None:
        for name, text in self.layers.items():
            if text is not None and text != "dense":
                try:
                    parse_pattern(text)
                except ValueError as error:
                    raise ValueError(f"recipe: layers: {name!r}: {error}") from None
        choices = {
            "gradient": ("straight_through", "masked"),
            "sr_ste_where": ("gradient", "decoupled"),
        }
        for name, values in choices.items():
            check_choice(f"recipe: {name}", getattr(self, name), values)
        check_fields(self)
        self._check_phases()

    def _check_phases(self) -> None:
        before, name = self.dense_fraction, "dense_fraction"
        if self.variance is not None:
            if self.dense_fraction:
                raise ValueError(
                    f"recipe: dense_fraction={self.dense_fraction} and an AutoSwitch, which ends "
                    "the dense phase itself; use dense_fraction=0"
                )
            if self.variance.clip:
                before, name = self.variance.max_fraction, "AutoSwitch.max_fraction"
        if self.packed and not (self.freeze and self.fine_tune_fraction):
            raise ValueError(
                "recipe: packed=True needs masks that stay fixed; use fine_tune_fraction > 0 and "
                "freeze=True"
            )
        if self.packed and self.variance is not None and not self.variance.clip:
            raise ValueError(
                "recipe: packed=True and an AutoSwitch that may come after the masks are fixed; "
                "use clip=True"
            )
        if before >= 1:
            raise ValueError(f"recipe: {name}={before} leaves no step to prune in; use less than 1")
        if before + self.fine_tune_fraction > 1 + 1e-9:
            raise ValueError(
                f"recipe: {name}={before} and fine_tune_fraction={self.fine_tune_fraction} are "
                "more than the whole run; use fractions with a sum of at most 1"
            )

    def build(
        self,
        params: Any,
        *,
        steps: int,
        contraction: Contraction | None = None,
        ways: Callable[[str], int] | None = None,
        scored: Scored | None = None,
    ) -> RecipeUpdater:
        """The recipe for a model and a run.

        Args:
          params: tree of arrays or of `jax.ShapeDtypeStruct`.
          steps: of the run.
          contraction: (name, shape) -> the input axis of a kernel, along which groups of M lie, or
            a tuple of adjacent axes that are taken as one; negative numbers, with the axes of
            stacked layers in front; None for a parameter that is no kernel, which no pattern is
            for. The default is -2: [in, out], convolutions [h, w, in, out], and stacks of these.
          ways: name -> number of shards along these axes, none of which may cut a group. The
            default reads the shardings of `params`.
          scored: parameters -> a tree like them, whose magnitudes masks are made of; the default is
            the parameters themselves. `Quantizer.scored` is one.

        Raises:
          ValueError: a pattern of `layers` matches no parameter; a group does not fit a kernel or
            its shards; or a decay does not come to an end in the run.
        """
        if steps < 1:
            raise ValueError(f"recipe: steps={steps}; use 1 or more")
        treedef: Any
        leaves, treedef = jax.tree.flatten(params)
        targets = treedef.flatten_up_to(assign(params, self.layers))
        plans = [
            None if text is None else plan_kernel(name, leaf, text, self.pattern, contraction, ways)
            for name, leaf, text in zip(
                jax.tree.leaves(names(params)), leaves, targets, strict=True
            )
        ]
        # Rounded up, so that the shortest run has each phase that its recipe has.
        fine_tune_start = steps - math.ceil(self.fine_tune_fraction * steps - 1e-6)
        dense_steps = min(math.ceil(self.dense_fraction * steps - 1e-6), fine_tune_start)
        last_start = dense_steps
        if self.variance is not None:
            last_start = self.variance.bounds(steps)[1] if self.variance.clip else steps
        if self.variance is not None and self.variance.clip and last_start >= fine_tune_start:
            raise ValueError(
                f"recipe: AutoSwitch may switch after step {last_start + 1} and fine-tuning begins "
                f"with step {fine_tune_start}; use a smaller max_fraction or fine_tune_fraction"
            )
        if not any(plans):
            raise ValueError(
                f"layers: {dict(self.layers)} give no kernel a pattern; use for example "
                f"{DEFAULT_LAYERS}"
            )
        if fine_tune_start > last_start:
            check_decay(self.decay, fine_tune_start - last_start, fine_tune_start < steps)
        return RecipeUpdater(
            recipe=self,
            treedef=treedef,
            plans=tuple(plans),
            dense_steps=dense_steps,
            fine_tune_start=fine_tune_start,
            steps=steps,
            scored=scored,
        )


def sr_ste(
    layers: Layers | None = None,
    *,
    strength: float = 2e-4,
    where: Literal["gradient", "decoupled"] = "gradient",
) -> Recipe:
    """SR-STE (Zhou et al., 2021): straight-through gradients, and a decay of pruned weights.

    The masks are made anew in every step of the run, and are not fixed at its end.

    Args:
      layers: patterns by name, here and below; None for `DEFAULT_LAYERS`.
      strength: lambda, 2e-4 in the paper.
      where: see `Recipe.sr_ste_where`. The authors add it to the gradient; decoupled it is a
        different algorithm under Adam.
    """
    return Recipe(layers=_layers(layers), sr_ste=strength, sr_ste_where=where)


def mask_decay(
    layers: Layers | None = None,
    *,
    weight: float | None = None,
    every: int | None = None,
    dense_fraction: float = 0.0,
    fine_tune_fraction: float = 0.0,
    variant: Variant = "paper",
) -> Recipe:
    """Mask decay (Kao et al., 2022): D falls in stairs; pruned weights get the true derivative.

    Args:
      weight: and `every`, of `MaskDecay`; masks are made anew as often as D falls where `every`
        says so, else in every step.
      variant: "code" clamps the count of updates to 8 as the authors' program does, so that D stays
        at 1 - 8 weight; with a weight below 1/8 that wants a fine-tuning phase.
    """
    return Recipe(
        layers=_layers(layers),
        decay=MaskDecay(weight=weight, every=every, variant=variant),
        gradient="masked",
        update_every=every or 1,
        dense_fraction=dense_fraction,
        fine_tune_fraction=fine_tune_fraction,
    )


def structure_decay(
    layers: Layers | None = None,
    *,
    dense_fraction: float = 0.05,
    fine_tune_fraction: float = 0.0,
    variant: Variant = "paper",
) -> Recipe:
    """Structure decay (Kao et al., 2022): N falls; pruned weights get the true derivative, 0.

    Args:
      variant: of the stages, see `StructureDecay`.
    """
    return Recipe(
        layers=_layers(layers),
        pattern=StructureDecay(variant=variant),
        gradient="masked",
        dense_fraction=dense_fraction,
        fine_tune_fraction=fine_tune_fraction,
    )


def mdgf_linear(
    layers: Layers | None = None,
    *,
    beta: float | None = None,
    dense_fraction: float = 0.05,
    fine_tune_fraction: float = 0.15,
    variant: Variant = "paper",
) -> Recipe:
    """MdGf-Linear (Bambhaniya et al., 2024): D falls linearly from 1 to 0.

    Args:
      beta: of `Linear`; None reaches 0 where fine-tuning begins.
      dense_fraction: 1.25 to 10 % in the paper.
      fine_tune_fraction: 10 to 20 % in the paper.
      variant: the gradient of pruned weights, on which the paper and its two programs disagree.
        "paper" takes the true derivative, D times that of what is read: the gradient flow is
        "progressively restricted", as the abstract has it and the JAX program does. "code" is the
        straight-through one of the PyTorch program, which restricts nothing.
    """
    decay = Linear(beta=beta)
    return _gradient_flow(layers, dense_fraction, fine_tune_fraction, variant, decay=decay)


def mdgf_exponential(
    layers: Layers | None = None,
    *,
    beta: float | None = None,
    dense_fraction: float = 0.05,
    fine_tune_fraction: float = 0.15,
    variant: Variant = "paper",
) -> Recipe:
    """MdGf-Exponential (Bambhaniya et al., 2024): D = exp(-beta j).

    Args:
      beta: of `Exponential`; None for D = 0.01 where fine-tuning begins.
      dense_fraction: and the others, as for `mdgf_linear`.
    """
    decay = Exponential(beta=beta)
    return _gradient_flow(layers, dense_fraction, fine_tune_fraction, variant, decay=decay)


def sdgf_stepwise(
    layers: Layers | None = None,
    *,
    dense_fraction: float = 0.05,
    fine_tune_fraction: float = 0.15,
    variant: Variant = "paper",
) -> Recipe:
    """SdGf-Stepwise (Bambhaniya et al., 2024): M-1:M, M/2:M, M/4:M, ... N:M.

    Args:
      dense_fraction: and the others, as for `mdgf_linear`; D = 0 here, so that the true derivative
        of a pruned weight is 0.
    """
    pattern = Stepwise()
    return _gradient_flow(layers, dense_fraction, fine_tune_fraction, variant, pattern=pattern)


def sdgf_geometric(
    layers: Layers | None = None,
    *,
    k: int | None = None,
    dense_fraction: float = 0.05,
    fine_tune_fraction: float = 0.15,
    variant: Variant = "paper",
) -> Recipe:
    """SdGf-Geometric (Bambhaniya et al., 2024): kN:kM, (k/2)N:(k/2)M, ... N:M.

    Args:
      k: 16 in the paper and 8 in its program; None for the variant's.
      dense_fraction: and the others, as for `sdgf_stepwise`.
    """
    pattern = Geometric(k=k, variant=variant)
    return _gradient_flow(layers, dense_fraction, fine_tune_fraction, variant, pattern=pattern)


def step(
    layers: Layers | None = None,
    *,
    switch: AutoSwitch | None = None,
    strength: float = 0.0,
    fine_tune_fraction: float = 0.0,
) -> Recipe:
    """STEP (Lu et al., 2023): dense until Adam's second moments settle, then masks with those
    frozen and straight-through gradients.

    The optimizer is to be built with `autoswitch.scale_by_step_adam` and the same switch.

    Args:
      switch: None for the paper's.
      strength: lambda of SR-STE after the switch.
    """
    return Recipe(
        layers=_layers(layers),
        variance=switch or AutoSwitch(),
        sr_ste=strength,
        fine_tune_fraction=fine_tune_fraction,
    )


def asp(layers: Layers | None = None) -> Recipe:
    """ASP (Mishra et al., 2021): masks of the weights that training begins with, fixed throughout.

    For weights that were trained before: prunes them once and trains the others again.
    """
    return Recipe(layers=_layers(layers), fine_tune_fraction=1.0)


def _layers(layers: Layers | None) -> Layers:
    return dict(DEFAULT_LAYERS if layers is None else layers)


def _gradient_flow(
    layers: Layers | None,
    dense_fraction: float,
    fine_tune_fraction: float,
    variant: Variant,
    **options: Any,
) -> Recipe:
    gradients: dict[str, Any] = {"paper": "masked", "code": "straight_through"}
    check_choice("recipe: variant", variant, gradients)
    return Recipe(
        layers=_layers(layers),
        gradient=gradients[variant],
        dense_fraction=dense_fraction,
        fine_tune_fraction=fine_tune_fraction,
        **options,
    )
