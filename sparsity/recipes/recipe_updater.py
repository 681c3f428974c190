"""A recipe at work: its state beside an optimizer, its masks, and what the forward pass reads.

The masks for the next step are made at the end of each update, from the new parameters, so that a
forward pass only reads bits. Nothing is retraced when a phase or a stage changes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from sparsity.masks.layers import listed
from sparsity.masks.validity import Validity, by_name, nm_validity
from sparsity.recipes import packed_state
from sparsity.recipes.autoswitch import AutoSwitch
from sparsity.recipes.decay import Decay, Hard
from sparsity.recipes.kernel_plan import KernelPlan
from sparsity.recipes.kernels import MaskedKernel, dense_tree
from sparsity.recipes.packed_state import PackedState
from sparsity.updater import Scored, Updater

DENSE, DECAY, FINE_TUNE = 0, 1, 2
"""The phases of a recipe, as `settings` numbers them."""


class Phases(Protocol):
    """Fields of a `recipes.Recipe` that say what its phases do; it tells what they mean."""

    @property
    def decay(self) -> Decay: ...
    @property
    def gradient(self) -> Literal["straight_through", "masked"]: ...
    @property
    def sr_ste(self) -> float: ...
    @property
    def sr_ste_where(self) -> Literal["gradient", "decoupled"]: ...
    @property
    def variance(self) -> AutoSwitch | None: ...
    @property
    def update_every(self) -> int: ...
    @property
    def freeze(self) -> bool: ...
    @property
    def packed(self) -> bool: ...


class RecipeState(NamedTuple):
    """Optimizer state of a recipe.

    Attributes:
      count: int32 [], updates done.
      masks: a tree like the parameters, uint8 `pack_bits` of the mask of the next forward pass for
        each kernel of the recipe and None elsewhere.
      masked_from: int32 [], the step that an AutoSwitch began the decay phase with; -1 before that,
        and without one.
      inner_state: of the wrapped optimizer. Only its update reads it, so that a trainer may keep it
        elsewhere.
    """

    count: jax.Array  # type: ignore[assignment]  # in place of tuple's method
    masks: Any
    masked_from: jax.Array
    inner_state: optax.OptState


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeUpdater(Updater):
    """A recipe for the parameters of a model and a run of so many steps; see `Recipe.build`.

    Attributes:
      treedef: of the parameters.
      plans: for each of their leaves, what the recipe does with it, or None.
      dense_steps: first step of the decay phase (with an AutoSwitch, the switch says).
      fine_tune_start: first step of the fine-tuning phase.
      scored: see `Recipe.build`.
    """

    recipe: Phases
    treedef: jax.tree_util.PyTreeDef
    plans: tuple[KernelPlan | None, ...]
    dense_steps: int
    fine_tune_start: int
    steps: int
    scored: Scored | None = None

    @property
    def variance(self) -> AutoSwitch | None:
        """The switch that the optimizer's second moments are to be frozen by; None for none."""
        return self.recipe.variance

    @property
    def packs_at(self) -> int | None:
        """The step before which a trainer is to `pack`; None for not at all."""
        return self.freezes_at if self.recipe.packed else None

    @property
    def freezes_at(self) -> int | None:
        """The step from which the masks are fixed; None where they never are."""
        fixed = self.recipe.freeze and self.fine_tune_start < self.steps
        return self.fine_tune_start if fixed else None

    def settings(self, step: int | jax.Array | RecipeState) -> dict[str, Any]:
        """Settings of the recipe in a step; all values are scalars and may be traced.

        Args:
          step: the number of updates done before, or the state. With an AutoSwitch the phases
            depend on the state, and a number will not do.

        Returns:
          "phase" (0 dense, 1 decay, 2 fine-tuning), "decay" (D; 1 in the dense phase), "frozen"
          (whether the masks are fixed), and "patterns": (n, m) by target, such as "1:8".

        Raises:
          ValueError: a number was given and the recipe has an AutoSwitch.
        """
        s = self._settings(*self._clock(step))
        patterns = {}
        for plan in filter(None, self.plans):
            stage = self._stage(s, len(plan.stages))
            n, m = jnp.asarray(plan.stages, jnp.int32)[stage]
            patterns[f"{plan.target[0]}:{plan.target[1]}"] = (n, m)
        return {"phase": s.phase, "decay": s.decay, "frozen": s.frozen, "patterns": patterns}

    def wrap_optax(
        self,
        inner: optax.GradientTransformation,
        learning_rate: optax.ScalarOrSchedule | None = None,
    ) -> optax.GradientTransformationExtraArgs:
        """The optimizer with the recipe around it; its state is a `RecipeState`.

        While the masks are fixed, pruned weights get gradients of exactly 0 and are exactly 0
        themselves, whatever momentum or weight decay the optimizer has.

        Args:
          learning_rate: of `inner`; for the decoupled regulariser of SR-STE, which it scales.

        Raises:
          ValueError: the recipe needs a learning rate, or (from `init`) an optimizer with an
            AutoSwitch, and there is none.
        """
        recipe, inner = self.recipe, optax.with_extra_args_support(inner)
        rate = None  # of a decay that is apart from the gradient
        if recipe.sr_ste > 0 and recipe.sr_ste_where == "decoupled":
            rate = learning_rate
            if rate is None:
                raise ValueError(
                    "recipe: sr_ste_where='decoupled' is scaled by the learning rate; give "
                    "wrap_optax the learning_rate of its optimizer"
                )

        def init(params: Any) -> RecipeState:
            inner_state = inner.init(params)
            count, masked_from = jnp.zeros((), jnp.int32), self._switched_at(inner_state)
            return RecipeState(count, self._first_masks(params), masked_from, inner_state)

        def inner_update(
            updates: Any, state: Any, params: Any, **extra: Any
        ) -> tuple[Any, optax.OptState]:
            if self.freezes_at is None:
                found: tuple[Any, optax.OptState]
                found = inner.update(updates, state.inner_state, params, **extra)
                return found

            # Around the optimizer a packed run does other things than a masked one. Were they
            # compiled together with it, its products and sums would not be rounded alike.
            def rounded(_: KernelPlan, x: jax.Array) -> jax.Array:
                return packed_state.rounded(x, state.count)

            updates = self.map_kernels(rounded, updates)
            updates, inner_state = inner.update(updates, state.inner_state, params, **extra)
            return self.map_kernels(rounded, updates), inner_state

        def update(
            updates: Any, state: RecipeState | PackedState, params: Any = None, **extra: Any
        ) -> tuple[Any, RecipeState | PackedState]:
            if params is None:
                raise ValueError("recipe: update needs the parameters; pass params")
            if isinstance(state, PackedState):
                updates, inner_state = inner_update(updates, state, params, **extra)
                count = optax.safe_increment(state.count)
                return updates, state._replace(count=count, inner_state=inner_state)
            frozen = self._settings(*self._clock(state)).frozen

            def gradient(
                plan: KernelPlan, g: jax.Array, w: jax.Array, bits: jax.Array
            ) -> jax.Array:
                mask = plan.mask(bits)
                if recipe.sr_ste > 0 and rate is None:
                    g = g + (recipe.sr_ste * jnp.where(mask, 0, w)).astype(g.dtype)
                return g if self.freezes_at is None else jnp.where(frozen & ~mask, 0, g)

            updates = self.map_kernels(gradient, updates, params, state.masks)
            updates, inner_state = inner_update(updates, state, params, **extra)
            if rate is not None:
                scale = (rate(state.count) if callable(rate) else rate) * recipe.sr_ste

                def shrink(
                    plan: KernelPlan, u: jax.Array, w: jax.Array, bits: jax.Array
                ) -> jax.Array:
                    pruned: jax.Array = scale * jnp.where(plan.mask(bits), 0, w)
                    return u - pruned.astype(u.dtype)

                updates = self.map_kernels(shrink, updates, params, state.masks)
            count = optax.safe_increment(state.count)
            masked_from = self._switched_at(inner_state)
            masks = self._next_masks(params, updates, state.masks, count, masked_from)
            new = RecipeState(count, masks, masked_from, inner_state)
            if self.freezes_at is not None:
                frozen = self._settings(*self._clock(new)).frozen

                def settle(
                    plan: KernelPlan, u: jax.Array, w: jax.Array, bits: jax.Array
                ) -> jax.Array:  # w - w is exactly 0
                    return jnp.where(frozen & ~plan.mask(bits), -w.astype(u.dtype), u)

                updates = self.map_kernels(settle, updates, params, masks)
            return updates, new

        return optax.GradientTransformationExtraArgs(init, update)

    def weights(self, params: Any, state: RecipeState | PackedState) -> Any:
        """The parameters with a `MaskedKernel` or `PackedKernel` for each kernel of the recipe.

        Gradients are to be taken through it, with respect to `params`.
        """
        if isinstance(state, PackedState):
            return packed_state.weights(self, params, state)
        s, rule = self._settings(*self._clock(state)), self.recipe.gradient
        gradient = jnp.ones((), jnp.float32) if rule == "straight_through" else s.decay
        gradient = jnp.where(s.frozen, 0, gradient)

        def masked(plan: KernelPlan, w: jax.Array, bits: jax.Array) -> MaskedKernel:
            decay, scale = (jnp.broadcast_to(x, plan.stacked) for x in (s.decay, gradient))
            return MaskedKernel(
                weight=w, bits=bits, decay=decay, gradient=scale, axis=plan.bits_axis
            )

        return self.map_kernels(masked, params, state.masks)

    def pre_forward_update(self, params: Any, state: RecipeState | PackedState) -> Any:
        """The parameters as a forward pass reads them, all of them arrays.

        A gradient taken through it follows the recipe's rule for pruned weights; one with respect
        to its result is the straight-through one.
        """
        return dense_tree(self.weights(params, state))

    def post_gradient_update(self, params: Any, state: RecipeState | PackedState) -> Any:
        """The parameters with pruned weights set to 0 where the masks are fixed.

        What `wrap_optax` returns does so by itself; this is for updates that were changed after it.
        """
        if self.freezes_at is None or isinstance(state, PackedState):
            return params
        frozen = self._settings(*self._clock(state)).frozen

        def settle(plan: KernelPlan, w: jax.Array, bits: jax.Array) -> jax.Array:
            return jnp.where(frozen & ~plan.mask(bits), 0, w)

        return self.map_kernels(settle, params, state.masks)

    def masks(self, state: RecipeState | PackedState, params: Any = None) -> Any:
        """A tree like the parameters of bool masks, True where kept; None outside the recipe.

        Args:
          params: not needed; algorithms that make their masks of them take it too.
        """
        if isinstance(state, PackedState):
            return packed_state.masks(self, state)
        return self.map_kernels(lambda plan, bits: plan.mask(bits), state.masks)

    def skip(self, params: Any, state: RecipeState | PackedState) -> RecipeState | PackedState:
        """The state after a step whose update is left out: the schedule goes on."""
        count = optax.safe_increment(state.count)
        if isinstance(state, PackedState):
            return state._replace(count=count)
        zeros = jax.tree.map(jnp.zeros_like, params)
        masks = self._next_masks(params, zeros, state.masks, count, state.masked_from)
        return state._replace(count=count, masks=masks)

    def global_norm(self, grads: Any, count: jax.Array) -> jax.Array:
        """`optax.tree.norm`, with the same bits for packed gradients and for masked ones.

        Args:
          count: int32 [], not negative, which the compiler does not know.
        """
        return packed_state.global_norm(self, grads, count)

    def validity(self, weights: Any) -> dict[str, Validity]:
        """Counts, by name, the zeros of each kernel of the recipe.

        Args:
          weights: what `weights` or `pre_forward_update` gives.
        """
        kernels = by_name(dense_tree(weights))
        return {
            plan.name: nm_validity(kernels[plan.name], *plan.target, plan.axis)
            for plan in self.plans
            if plan is not None
        }

    def describe(self) -> str:
        """Says in one line which kernels are pruned, by which pattern, in which steps (from 1)."""
        recipe, start, fixed = self.recipe, self.dense_steps, self.fine_tune_start
        patterns, stages = {}, []
        for plan in filter(None, self.plans):
            patterns[plan.name] = "{}:{}".format(*plan.target)
            through = ", ".join(f"{n}:{m}" for n, m in plan.stages)
            if len(plan.stages) > 1 and through not in stages:
                stages.append(through)
        phases = []
        if recipe.variance is not None:
            last = (
                min(recipe.variance.bounds(self.steps)[1], fixed) if recipe.variance.clip else fixed
            )
            phases.append(f"dense until the second moments settle, at most to step {last}")
        elif start:
            phases.append(f"dense in {_steps(0, start)}")
        if fixed > start:
            how = "" if isinstance(recipe.decay, Hard) else ", pruned weights fading by "
            how += "" if isinstance(recipe.decay, Hard) else type(recipe.decay).__name__
            how += f", through {' and '.join(stages)}" if stages else ""
            every = "step" if recipe.update_every == 1 else f"{recipe.update_every} steps"
            when = "from there" if recipe.variance is not None else f"in {_steps(start, fixed)}"
            when += f" to step {fixed}" if recipe.variance is not None else ""
            phases.append(f"masks made anew every {every} {when}{how}")
        if fixed < self.steps:
            masks = "fixed masks" if recipe.freeze else "masks made anew"
            packed = ", only the kept weights held" if recipe.packed else ""
            phases.append(f"{masks} in {_steps(fixed, self.steps)}{packed}")
        return f"sparse: {listed(patterns)}; {'; '.join(phases)}"

    def pack(self, params: Any, state: RecipeState) -> tuple[Any, PackedState]:
        """Keeps only the kept weights, and the optimizer's statistics of them; see `packed_state`.

        Args:
          params: and state, when the masks are fixed (from `freezes_at` on).

        Returns:
          The parameters with each kernel's values [..., groups * n, ...], and the state.

        Raises:
          ValueError: the masks are not fixed yet, or never are; the optimizer does not work weight
            by weight (Adam, AdamW, Lion and SGD do); or a kernel's groups go over several axes.
        """
        if self.freezes_at is None:
            raise ValueError(
                "recipe: pack needs masks that stay fixed; use fine_tune_fraction > 0 and freeze"
            )
        if not isinstance(state.count, jax.core.Tracer) and state.count < self.freezes_at:
            raise ValueError(
                f"recipe: pack after {state.count} updates; the masks are fixed after "
                f"{self.freezes_at}"
            )
        return packed_state.pack(self, params, state)

    def unpack(self, params: Any, state: PackedState) -> tuple[Any, RecipeState]:
        """The inverse of `pack`; the statistics of pruned weights are zeros."""
        params, masks, inner_state = packed_state.unpack(self, params, state)
        return params, RecipeState(state.count, masks, state.masked_from, inner_state)

    def map_kernels(self, function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
        """`function(plan, *leaves)` for the kernels of the recipe; other leaves of `tree` stay."""
        trees = [self.treedef.flatten_up_to(t) for t in (tree, *rest)]
        leaves = [
            leaves[0] if plan is None else function(plan, *leaves)
            for plan, *leaves in zip(self.plans, *trees, strict=True)
        ]
        return self.treedef.unflatten(leaves)

    def _switched_at(self, inner_state: Any) -> jax.Array:
        """Reads `RecipeState.masked_from` from the state of the optimizer."""
        if self.recipe.variance is None:
            return jnp.full((), -1, jnp.int32)
        found: jax.Array | None = optax.tree_utils.tree_get(inner_state, "switched_at")
        if found is None:
            raise ValueError(
                "recipe: variance=AutoSwitch(...) needs an optimizer that is built with "
                "scale_by_step_adam in place of Adam"
            )
        return found

    def _clock(self, step: Any) -> tuple[jax.Array, jax.Array | int]:
        """(updates done, first step of the decay phase) of a state, or of a number."""
        if isinstance(step, RecipeState | PackedState):
            return step.count, self._start(step.masked_from)
        if self.recipe.variance is not None:
            raise ValueError(
                "recipe: with an AutoSwitch the settings of a step depend on the state; give that"
            )
        return jnp.asarray(step, jnp.int32), self.dense_steps

    def _start(self, masked_from: jax.Array) -> jax.Array | int:
        """Number of the first step of the decay phase."""
        if self.recipe.variance is None:
            return self.dense_steps
        return jnp.where(masked_from < 0, self.fine_tune_start, masked_from)

    def _settings(self, count: jax.Array, start: jax.Array | int) -> "_Settings":
        length = self.fine_tune_start - start
        elapsed = jnp.clip(count - start, 0, length)
        # A run without fine-tuning ends where its decay phase does, and D with it.
        fine = (count >= self.fine_tune_start) & (self.fine_tune_start < self.steps)
        phase = jnp.where(fine, FINE_TUNE, jnp.where(count >= start, DECAY, DENSE))
        decay = self.recipe.decay(elapsed, length)
        decay = jnp.where(fine, 0, jnp.where(phase == DENSE, 1, decay))
        return _Settings(phase, elapsed, length, decay, fine & self.recipe.freeze)

    def _stage(self, s: "_Settings", stages: int) -> jax.Array:
        """Index of the stage that a step is in, of `stages` equally long ones."""
        stage = jnp.minimum(s.elapsed * stages // jnp.maximum(s.length, 1), stages - 1)
        return jnp.where(s.phase == FINE_TUNE, stages - 1, stage)

    def _first_masks(self, params: Any) -> Any:
        dense_first = self.dense_steps > 0 or self.recipe.variance is not None
        if self.fine_tune_start == 0:
            stage = -1
        elif dense_first:
            stage = None
        else:
            stage = 0

        def bits(plan: KernelPlan, _: Any, w: jax.Array) -> jax.Array:
            if stage is None:
                return plan.bits(jnp.ones_like(w, bool))
            return plan.bits_at(stage, jnp.abs(w))

        none = self.treedef.unflatten([None] * len(self.plans))
        return self.map_kernels(bits, none, params if self.scored is None else self.scored(params))

    def _next_masks(
        self, params: Any, updates: Any, masks: Any, count: jax.Array, masked_from: jax.Array
    ) -> Any:
        """The masks of params + updates, where they are due; else those that are."""
        start = self._start(masked_from)
        s, before = self._settings(count, start), self._settings(count - 1, start)
        stages = {len(plan.stages) for plan in self.plans if plan}
        since = count - jnp.where(s.phase == FINE_TUNE, self.fine_tune_start, start)
        due = (since % self.recipe.update_every == 0) | (s.phase != before.phase)
        for n in stages - {1}:
            due |= self._stage(s, n) != self._stage(before, n)
        due = (s.phase != DENSE) & jnp.where(s.frozen, since == 0, due)

        def fresh(params: Any, updates: Any) -> Any:
            def updated(plan: KernelPlan, w: jax.Array, u: jax.Array) -> jax.Array:
                # A step whose numbers are not finite is one that a trainer takes back.
                new = optax.apply_updates(w, u)
                return jnp.where(jnp.isfinite(new), new, w)

            def bits(plan: KernelPlan, _: Any, w: jax.Array) -> jax.Array:
                stage = self._stage(s, len(plan.stages)) if len(plan.stages) > 1 else 0
                return plan.bits_at(stage, jnp.abs(w))

            params = self.map_kernels(updated, params, updates)
            params = params if self.scored is None else self.scored(params)
            return self.map_kernels(bits, masks, params)

        if self._always_due():
            return fresh(params, updates)
        return jax.lax.cond(due, fresh, lambda *_: masks, params, updates)

    def _always_due(self) -> bool:
        recipe = self.recipe
        return (
            recipe.update_every == 1
            and self.dense_steps == 0
            and recipe.variance is None
            and self.freezes_at is None
        )


def _steps(start: int, end: int) -> str:
    """The steps after `start` updates up to `end`, as they are counted: from 1."""
    return f"steps {start + 1} to {end}" if end > start + 1 else f"step {end}"


class _Settings(NamedTuple):
    phase: jax.Array
    elapsed: jax.Array  # steps since the decay phase began, at most its length
    length: jax.Array | int  # of the decay phase
    decay: jax.Array
    frozen: jax.Array
