"""A pruning algorithm by its name, for a model and a run: what `Recipe` is for N:M training."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from sparsity.algorithms.acdc import CycleSchedule
from sparsity.algorithms.sparse_trainers import StaticRandomSparse
from sparsity.algorithms.ste import SteMixin
from sparsity.algorithms.topkast import TopKAST
from sparsity.api import create_updater_from_config
from sparsity.base_updater import BaseUpdater, SparseState
from sparsity.masks.bits import pack_bits
from sparsity.masks.layers import KERNELS, assign, listed, names
from sparsity.masks.nm import check_nm
from sparsity.masks.validity import Validity, by_name, nm_validity, zeros
from sparsity.ranges import Count, Decay, Fraction, check_fields
from sparsity.recipes.kernel_plan import Contraction, packing_axis, shards_of
from sparsity.recipes.kernels import MaskedKernel, dense_tree
from sparsity.sparsity_schedules import OneShotSchedule, PeriodicSchedule, PolynomialSchedule
from sparsity.sparsity_types import NByM, parse_sparsity_type
from sparsity.updater import Scored, Sparsity, Updater

DEFAULT_LAYERS = (KERNELS,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pruning(Sparsity):
    """Pruning by one of `sparsity.all_algorithm_names()`, its steps given as fractions of a run.

    Attributes:
      sparsity: fraction of the weights of these layers that is pruned in the end, in [0, 1).
      sparsity_type: "unstructured", "2:4", "block_4,4" or "channel_-1"; N:M is along the
        contraction axis of a kernel.
      distribution: "uniform", the same for each kernel; or "erk", less for the smaller ones.
      layers: patterns of the names of the parameters that are pruned; see `layers.assign`.
      start_fraction: of the run, where the first mask is made.
      end_fraction: of the run, where the last one is made.
      update_every: steps between two masks.
      packed_masks: masks take a bit an entry in memory and checkpoints, instead of a byte.
      options: other fields of the algorithm, such as {"drop_fraction": 0.3} of rigl.
    """

    algorithm: str = "magnitude"
    sparsity: Decay = 0.8
    sparsity_type: str = "unstructured"
    distribution: Literal["uniform", "erk"] = "uniform"
    layers: tuple[str, ...] = DEFAULT_LAYERS
    start_fraction: Fraction = 0.05
    end_fraction: Fraction = 0.75
    update_every: Count = 100
    packed_masks: bool = True
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.start_fraction > self.end_fraction:
            raise ValueError(
                f"pruning: start_fraction={self.start_fraction} and end_fraction="
                f"{self.end_fraction}; use start_fraction <= end_fraction"
            )
        kind = parse_sparsity_type(self.sparsity_type)
        if isinstance(kind, NByM) and abs(self.sparsity - (1 - kind.n / kind.m)) > 1e-6:
            raise ValueError(
                f"pruning: sparsity={self.sparsity} is not that of {kind.n}:{kind.m}; use "
                f"{1 - kind.n / kind.m}"
            )

    def build(
        self,
        params: Any,
        *,
        steps: int,
        contraction: Contraction | None = None,
        scored: Scored | None = None,
    ) -> "PruningUpdater":
        """The algorithm for a model and a run.

        Args:
          params: tree of arrays or of `jax.ShapeDtypeStruct`.
          steps: of the run.
          contraction: (name, shape) -> the input axes of a kernel; see `Recipe.build`. The axes in
            front of them stack layers, each of which is pruned by itself. None: nothing is stacked.
          scored: see `Recipe.build`.

        Raises:
          ValueError: a pattern of `layers` matches no parameter, or an option is unknown or wrong.
        """
        leaves, chosen = by_name(params), dict[str, tuple[int, ...]]()  # by name, the input axes
        for name in by_name(assign(params, dict.fromkeys(self.layers, True))):
            axes = -2 if contraction is None else contraction(name, leaves[name].shape)
            if axes is not None:
                chosen[name] = (axes,) if isinstance(axes, int) else axes
        if not chosen:
            raise ValueError(
                f"layers: {self.layers} match no kernel; use for example {DEFAULT_LAYERS}"
            )

        def stacked(path: Sequence[str], leaf: Any) -> int:
            inputs = chosen.get("/".join(path))
            return len(leaf.shape) + inputs[0] if inputs and contraction else 0

        first = min(math.floor(self.start_fraction * steps), steps - 1)
        last = min(math.floor(self.end_fraction * steps), steps - 1)
        config = {
            "algorithm": self.algorithm,
            "sparsity": self.sparsity,
            "sparsity_type": self.sparsity_type,
            "dist_type": self.distribution,
            "filter_fn": lambda path, _: "/".join(path) in chosen,
            "update_freq": self.update_every,
            "update_start_step": first,
            "update_end_step": last,
            "use_packed_masks": self.packed_masks,
            "stacked_fn": stacked,
            "axis_fn": lambda path, _: chosen["/".join(path)][-1],
            "scored_fn": scored,
            **self.options,
        }
        updater = create_updater_from_config(config)
        if isinstance(kind := updater.sparsity_type, NByM):
            for name in sorted(chosen):
                check_nm(kind.n, kind.m, leaves[name].shape[chosen[name][-1]], name=name)
        masked = {}
        if scored is not None and updater.masks_forward:
            for name, inputs in chosen.items():
                shape = leaves[name].shape
                axis = packing_axis(name, shape, shards_of(leaves[name]), inputs[0])
                masked[name] = axis, shape[: stacked(name.split("/"), leaves[name])]
        given = f"{self.algorithm} to {self.sparsity:.4g}"
        given += f" ({self.sparsity_type}, {self.distribution})"
        order = [name for name in leaves if name in chosen]
        said = f"sparse: {listed(dict.fromkeys(order, given))}; {_phases(updater, steps)}"
        return PruningUpdater(updater, self.sparsity, frozenset(chosen), masked, said)


def _phases(updater: BaseUpdater, steps: int) -> str:
    """Says when an algorithm prunes in a run of so many steps, which are counted from 1."""
    scheduler = updater.scheduler
    if type(updater).update_state is StaticRandomSparse.update_state:
        return f"random masks, fixed in steps 1 to {steps}"
    if isinstance(scheduler, CycleSchedule):
        start, end = scheduler.init_dense_steps_end, scheduler.final_sparse_steps_start
        return (
            f"dense to step {start}; then {scheduler.cycle_sparse_steps} sparse steps and "
            f"{scheduler.cycle_dense_steps} dense ones in turn; sparse in steps {end + 1} to "
            f"{steps}"
        )
    always = isinstance(updater, StaticRandomSparse | TopKAST)
    rises = isinstance(scheduler, PolynomialSchedule) and not always
    match scheduler:
        case OneShotSchedule(target_step=step):
            when, span = "", f"in step {step + 1}"
        case PeriodicSchedule(update_freq=every, update_start_step=first, update_end_step=last):
            when = f"every {every} steps "
            span = f"from step {first + 1} to step {steps if last is None else last + 1}"
        case _:
            when, span = "", "once"
    if isinstance(updater, SteMixin):
        return f"masks made anew in each of steps 1 to {steps}" + (
            f", the sparsity rising {span}" if rises else ""
        )
    said = f"{'sparse' if always else 'dense'} at first; masks made {when}{span}"
    return f"{said}{', ever sparser' if rises else ''}, of {steps} steps"


@dataclasses.dataclass(frozen=True)
class PruningUpdater(Updater):
    """A `BaseUpdater` as an `Updater`.

    Attributes:
      sparsity: of the pruned parameters together, in the end.
      chosen: their names.
      masked: by name, (axis to pack a mask along, shape of stacked layers) of a `MaskedKernel`:
        where weights that are all kept are to be masked after something else was done to them.
      said: what `describe` gives.
    """

    updater: BaseUpdater
    sparsity: float
    chosen: frozenset[str]
    masked: Mapping[str, tuple[int, tuple[int, ...]]] = dataclasses.field(default_factory=dict)
    said: str = "sparse"

    @property
    def scores_training(self) -> bool:
        """Tells whether masks are made of gradients or moments of the parameters."""
        return self.updater.scores_training

    def wrap_optax(
        self,
        inner: optax.GradientTransformation,
        learning_rate: optax.ScalarOrSchedule | None = None,
    ) -> optax.GradientTransformationExtraArgs:
        """The optimizer with the algorithm around it; its state is a `SparseState`."""
        del learning_rate
        return self.updater.wrap_optax(inner)

    def describe(self) -> str:
        """Says in one line which kernels are pruned, by which algorithm, how far and when."""
        return self.said

    def skip(self, params: Any, state: SparseState) -> SparseState:
        """The state after a step whose update is left out: the schedule of the masks waits for it.

        So no mask is made of a gradient that is not finite, and none is left out.
        """
        del params
        return state

    def weights(self, params: Any, state: SparseState) -> Any:
        """Returns the parameters, or masked kernels, that the forward pass reads."""
        read = self.updater.pre_forward_update(params, state)

        def kernel(name: str, w: jax.Array, read: Any) -> Any:
            if name not in self.masked:
                return read
            axis, stacked = self.masked[name]
            bits = pack_bits(jax.lax.stop_gradient(read) != 0, axis=axis)
            zeros, ones = jnp.zeros(stacked, jnp.float32), jnp.ones(stacked, jnp.float32)
            return MaskedKernel(weight=w, bits=bits, decay=zeros, gradient=ones, axis=axis)

        return jax.tree.map(kernel, names(params), params, read) if self.masked else read

    def post_gradient_update(self, params: Any, state: SparseState) -> Any:
        """Returns the parameters to keep after an update."""
        return self.updater.post_gradient_update(params, state)

    def masks(self, state: SparseState, params: Any) -> Any:
        """Masks, 1 where kept, None for a parameter that is not pruned."""
        if jax.tree.leaves(state.masks):
            return self.updater.unpack(state.masks, params)
        read = self.updater.pre_forward_update(params, state)  # made anew in every forward pass
        return jax.tree.map(
            lambda name, w: w != 0 if name in self.chosen else None, names(params), read
        )

    def validity(self, weights: Any) -> dict[str, Validity]:
        """Counts zeros: of each kernel for N:M, else of all pruned parameters together."""
        named = by_name(dense_tree(weights))
        named = {name: w for name, w in named.items() if name in self.chosen}
        if isinstance(self.updater.sparsity_type, NByM):
            kinds = {
                name: self.updater.type_of(tuple(name.split("/")), named[name]) for name in named
            }
            return {
                name: nm_validity(named[name], kind.n, kind.m, kind.axis)
                for name, kind in kinds.items()
                if isinstance(kind, NByM)
            }
        kernels = list(named.values())
        size = sum(kernel.size for kernel in kernels)
        share = sum(zeros(kernel) * kernel.size for kernel in kernels) / size
        return {"all": Validity(str(self.sparsity), share)}
