"""Masks beside an optimizer: what all sparse training algorithms share.

The use of an updater:

    optimizer = updater.wrap_optax(optax.adamw(1e-3))
    state = optimizer.init(params)
    params = updater.post_gradient_update(params, state)
    for batch in data:
        grads = jax.grad(loss)(updater.pre_forward_update(params, state), batch)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        params = updater.post_gradient_update(params, state)

Masks are trees like the parameters: uint8, 1 = kept, or None for a parameter that is not pruned.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sparsity import mask_calculator
from sparsity.mask_calculator import MASK_DTYPE, TopKFnType
from sparsity.masks import bits, topk
from sparsity.ranges import check_fields
from sparsity.sparsity_distributions import (
    CustomSparsityMapType,
    FilterFnType,
    Stacked,
    check_sparsity,
    uniform,
)
from sparsity.sparsity_schedules import NoUpdateSchedule
from sparsity.sparsity_types import NByM, SparsityType, Unstructured
from sparsity.utils import key_of, map_entries, name_of

__all__ = [
    "BaseUpdater",
    "CustomSparsityMapType",
    "FilterFnType",
    "NoPruning",
    "SparseState",
    "apply_mask",
]

StackedFnType = Callable[[tuple[Any, ...], Any], int]
"""(keys on the way to a parameter, the parameter) -> how many leading axes only stack layers."""


class SparseState(NamedTuple):
    """Masks and the state of the optimizer within.

    Attributes:
      masks: as the module says; packed where the updater packs.
      inner_state: of the wrapped transformation.
      target_sparsities: floats like the masks; one float for global pruning.
      count: int32 [], updates done.
      backward_masks: the weights that gradients reach, where they are not those of `masks`
        (Top-KAST); else None.
    """

    masks: Any
    inner_state: Any = None
    target_sparsities: Any = None
    count: Any = None
    backward_masks: Any = None


@functools.partial(jax.jit, static_argnames="is_packed")
def apply_mask(param: jax.Array, mask: jax.Array | None, is_packed: bool = False) -> jax.Array:
    """The parameter with exact zeros where the mask is 0; the parameter itself for None.

    Raises:
      ValueError: the mask has another shape.
    """
    if mask is None:
        return param
    if is_packed:
        mask = unpack_mask(mask, param.shape)
    if mask.shape != param.shape:
        raise ValueError(f"a mask of shape {mask.shape}; use the parameter's, {param.shape}")
    return jnp.where(mask.astype(bool), param, jnp.zeros((), param.dtype))


def pack_mask(mask: jax.Array) -> jax.Array:
    """Eight entries along the last axis to a byte: uint8 [..., ceil(size / 8)]."""
    return bits.pack_bits(jnp.atleast_1d(mask).astype(bool))


def unpack_mask(packed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The uint8 mask of `shape` that `pack_mask` packed.

    Raises:
      ValueError: a mask of that shape packs to another shape.
    """
    *rows, last = shape or (1,)
    expected = (*rows, -(-last // 8))
    if packed.shape != expected:
        raise ValueError(
            f"a packed mask of shape {packed.shape}; of a parameter {shape} it is {expected}"
        )
    return bits.unpack_bits(packed, last).reshape(shape).astype(MASK_DTYPE)


def straight_through(param: jax.Array, mask: jax.Array | None) -> jax.Array:
    """The masked parameter, whose gradient goes to the parameter as if there were no mask."""
    # param + (0 - param) and param + (param - param): both exact.
    moved: jax.Array = jax.lax.stop_gradient(apply_mask(param, mask) - param)
    return param + moved


@dataclasses.dataclass
class BaseUpdater:
    """Base of all pruning algorithms; each gives `calculate_scores` or the masks themselves.

    Attributes:
      scheduler: when masks are updated and how sparse they are then; see `sparsity_schedules`.
      skip_gradients: at an update of the masks, leave out the update of the parameters.
      is_sparse_gradients: the optimizer sees zeros for the gradients of pruned weights.
      sparsity_type: Unstructured(), NByM(n, m, axis), Block(shape) or Channel(axis).
      sparsity_distribution_fn: parameters -> tree of target sparsities; see
        `sparsity_distributions`.
      rng_seed: an integer or a key of `jax.random`.
      use_packed_masks: the state holds eight entries of a mask in a byte: uint8
        [..., ceil(size / 8)], with the axes, and so the sharding, of the parameter.
      topk_fn: (scores, sparsity) -> mask, in place of the one of `sparsity_type`.
      stacked_fn: (keys, parameter) -> number of leading axes that only stack separate layers, as in
        kernels [layers, in, out] of scanned blocks. Masks are then made for each layer by itself,
        and the distribution's filter, ERK and positive axes of `sparsity_type` see one layer.
      axis_fn: (keys, parameter) -> the axis of N:M, negative, in place of that of `sparsity_type`:
        kernels with separate heads have theirs elsewhere than others.
      scored_fn: parameters -> a tree like them, which masks are made of in their place.
      scores_training: whether scores are of gradients or of the optimizer's moments; an algorithm's
        own, and no option.
    """

    scores_training: ClassVar[bool] = False

    scheduler: Any = NoUpdateSchedule()  # noqa: RUF009 (frozen)
    skip_gradients: bool = False
    is_sparse_gradients: bool = False
    sparsity_type: SparsityType = Unstructured()  # noqa: RUF009 (frozen)
    sparsity_distribution_fn: Callable[[Any], Any] | None = functools.partial(  # noqa: RUF009
        uniform, sparsity=0.0
    )
    rng_seed: Any = 8
    use_packed_masks: bool = False
    topk_fn: TopKFnType | None = None
    stacked_fn: StackedFnType | None = None
    axis_fn: Callable[[tuple[Any, ...], Any], int] | None = None
    scored_fn: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        self.topk_fn = self.mask_fn

    @property
    def mask_fn(self) -> TopKFnType:
        """`topk_fn`, or where that is None the function of `sparsity_type`."""
        return self.get_topk_fn(self.sparsity_type) if self.topk_fn is None else self.topk_fn

    # What an algorithm gives.

    def get_topk_fn(self, sparsity_type: SparsityType) -> TopKFnType:
        """Returns the function (scores, sparsity) -> mask of a sparsity type."""
        return mask_calculator.get_topk_fn(sparsity_type)

    def calculate_scores(
        self, params: Any, sparse_state: SparseState | None = None, grads: Any = None, **kwargs: Any
    ) -> Any:
        """A tree of scores; the largest are kept.

        Args:
          sparse_state: None in `instant_sparsify`.
          grads: dense; None where none are known.
          kwargs: what the caller gave `update` or `instant_sparsify` beyond that.
        """
        raise NotImplementedError(f"{type(self).__name__} has no scores")

    def get_initial_masks(self, params: Any, target_sparsities: Any) -> Any:
        """Returns masks of ones, as they are at initialization."""
        return map_entries(
            lambda path, param, target: (
                None if target is None else jnp.ones(param.shape, MASK_DTYPE)
            ),
            params,
            target_sparsities,
            what="target_sparsities",
        )

    def update_state(
        self, sparse_state: SparseState, params: Any, grads: Any, **kwargs: Any
    ) -> SparseState:
        """The state with new masks, for the parameters and dense gradients of a step."""
        sparsities = self.scheduler.get_sparsity_at_step(
            sparse_state.target_sparsities, sparse_state.count
        )
        scores = self.calculate_scores(params, sparse_state=sparse_state, grads=grads, **kwargs)
        return sparse_state._replace(masks=self.pack(self.create_masks(scores, sparsities)))

    def scored(self, params: Any) -> Any:
        """The tree that masks are made of, like the parameters; `update_state` is given it.

        An algorithm that makes masks elsewhere, as in `pre_forward_update`, asks for it there.
        """
        return params if self.scored_fn is None else self.scored_fn(params)

    @property
    def masks_forward(self) -> bool:
        """True where all weights are kept, and masked when the forward pass reads them."""
        return type(self).pre_forward_update is not BaseUpdater.pre_forward_update

    def gradient_masks(self, sparse_state: SparseState) -> Any:
        """The masks of the gradients, as stored, where `is_sparse_gradients`."""
        return sparse_state.masks

    # Masks.

    def create_masks(self, scores: Any, sparsities: Any) -> Any:
        """Masks that keep the largest scores of each parameter.

        Args:
          scores: a tree like the parameters.
          sparsities: a tree of numbers, and of None for parameters that are not pruned.
        """

        def mask(path: tuple[Any, ...], score: jax.Array, sparsity: Any) -> jax.Array | None:
            if sparsity is None:
                return None
            try:
                return self._layers_mask(path, score, sparsity)
            except ValueError as error:
                raise ValueError(f"{name_of(path)}: {error}") from None

        return map_entries(mask, scores, sparsities, what="sparsities")

    def apply_masks(self, params: Any, masks: Any, is_packed: bool | None = False) -> Any:
        """The parameters with zeros where their masks are 0.

        Args:
          is_packed: the masks are packed; None: where the updater packs.

        Raises:
          ValueError: the tree of masks, or a mask, has another shape.
        """
        is_packed = self.use_packed_masks if is_packed is None else is_packed

        def apply(path: tuple[Any, ...], param: jax.Array, mask: jax.Array | None) -> jax.Array:
            try:
                masked: jax.Array = apply_mask(param, mask, is_packed=is_packed)
                return masked
            except ValueError as error:
                raise ValueError(f"{name_of(path)}: {error}") from None

        return map_entries(apply, params, masks)

    def pack(self, masks: Any) -> Any:
        """Converts masks to the form in which the state holds them."""
        if not self.use_packed_masks:
            return masks
        return jax.tree.map(pack_mask, masks)

    def unpack(self, masks: Any, params: Any) -> Any:
        """uint8 masks of the parameters' shapes, of masks as the state holds them."""
        if not self.use_packed_masks:
            return masks
        return map_entries(
            lambda path, param, mask: None if mask is None else unpack_mask(mask, param.shape),
            params,
            masks,
        )

    def stacked(self, path: tuple[Any, ...], param: Any) -> int:
        """Number of leading axes of a parameter that only stack layers."""
        if self.stacked_fn is None:
            return 0
        axes = self.stacked_fn(key_of(path), param)
        if not 0 <= axes <= param.ndim:
            raise ValueError(
                f"{name_of(path)}: stacked_fn gives {axes}; use 0 to {param.ndim}, its axes"
            )
        return axes

    def type_of(self, path: tuple[Any, ...], param: Any) -> SparsityType:
        """Returns the sparsity type of a parameter, with its own axis for N:M."""
        if self.axis_fn is None or not isinstance(self.sparsity_type, NByM):
            return self.sparsity_type
        return dataclasses.replace(self.sparsity_type, axis=self.axis_fn(key_of(path), param))

    def distribute(self, params: Any) -> Any:
        """Returns the tree of target sparsities; None where there is no distribution."""
        if self.sparsity_distribution_fn is None:
            return None
        if self.stacked_fn is not None:

            def layer(path: tuple[Any, ...], param: Any) -> Stacked:
                axes = self.stacked(path, param)
                copies = math.prod(param.shape[:axes])
                return Stacked(tuple(param.shape[axes:]), param.dtype, copies)

            params = jax.tree.map_with_path(layer, params)
        return self.sparsity_distribution_fn(params)

    def _layers_mask(self, path: tuple[Any, ...], score: jax.Array, sparsity: Any) -> jax.Array:
        stacked = self.stacked(path, score)
        if isinstance(sparsity, int | float):
            check_sparsity(sparsity)
        if self.topk_fn is mask_calculator.topk_mask_calculator:
            size = math.prod(score.shape[stacked:])
            mask = _topk_mask(score, topk.keep_count(size, sparsity), stacked=stacked)
        else:
            mask_fn = self.mask_fn
            if (sparsity_type := self.type_of(path, score)) != self.sparsity_type:
                mask_fn = self.get_topk_fn(sparsity_type)
            for _ in range(stacked):
                mask_fn = jax.vmap(mask_fn, in_axes=(0, None))
            mask = mask_fn(score, sparsity)
        return mask.astype(MASK_DTYPE)

    # What a user calls.

    def init_state(self, params: Any) -> SparseState:
        """The state before the first step, without the inner optimizer's."""
        targets = self.distribute(params)
        return SparseState(
            masks=self.pack(self.get_initial_masks(params, targets)),
            target_sparsities=targets,
            count=jnp.zeros([], jnp.int32),
        )

    def wrap_optax(
        self, inner: optax.GradientTransformation
    ) -> optax.GradientTransformationExtraArgs:
        """The transformation with masks: its state is a `SparseState` around that of `inner`.

        At a step that the schedule names, the masks are updated from the parameters and the dense
        gradients, before `inner` runs. Further keyword arguments of `update` go to `update_state`
        and to `inner` alike.
        """
        inner = optax.with_extra_args_support(inner)

        def init(params: Any) -> SparseState:
            return self.init_state(params)._replace(inner_state=inner.init(params))

        def update(
            updates: Any, state: SparseState, params: Any = None, **extra: Any
        ) -> tuple[Any, SparseState]:
            if params is None:
                raise ValueError("params=None; masks are made of the parameters: update needs them")
            due = self.scheduler.is_mask_update_iter(state.count)
            grads = updates
            state = _cond(
                due,
                lambda: self.update_state(state, self.scored(params), grads, **extra),
                lambda: state,
            )
            if self.is_sparse_gradients:
                updates = self.apply_masks(updates, self.gradient_masks(state), is_packed=None)
                if "norm" in extra:  # of the gradients, for clipping
                    extra = {**extra, "norm": optax.tree.norm(updates)}
            updates, inner_state = _cond(
                due if self.skip_gradients else False,
                lambda: (jax.tree.map(jnp.zeros_like, updates), state.inner_state),
                lambda: inner.update(updates, state.inner_state, params, **extra),
            )
            count = optax.safe_increment(state.count)
            return updates, state._replace(inner_state=inner_state, count=count)

        return optax.GradientTransformationExtraArgs(init, update)

    def instant_sparsify(self, params: Any, grads: Any = None, **kwargs: Any) -> tuple[Any, Any]:
        """(masked parameters, masks) at the target sparsities, with no training.

        Args:
          grads: for algorithms whose scores need them.
          kwargs: go to `calculate_scores`.
        """
        if self.sparsity_distribution_fn is None:
            raise ValueError("sparsity_distribution_fn=None; use sparsity_distributions.uniform")
        scores = self.calculate_scores(self.scored(params), grads=grads, **kwargs)
        masks = self.create_masks(scores, self.distribute(params))
        return self.apply_masks(params, masks), self.pack(masks)

    def pre_forward_update(self, params: Any, opt_state: SparseState) -> Any:
        """Returns the parameters that the forward pass reads."""
        del opt_state
        return params

    def post_gradient_update(self, params: Any, sparse_state: SparseState) -> Any:
        """Returns the parameters to keep after an update: masked."""
        return self.apply_masks(params, sparse_state.masks, is_packed=None)


@dataclasses.dataclass
class NoPruning(BaseUpdater):
    """Leaves parameters dense."""

    sparsity_distribution_fn: Callable[[Any], Any] | None = None

    def get_initial_masks(self, params: Any, target_sparsities: Any) -> Any:
        """Returns None for every parameter: nothing is pruned."""
        del target_sparsities
        return jax.tree.map(lambda _: None, params)

    def update_state(
        self, sparse_state: SparseState, params: Any, grads: Any, **kwargs: Any
    ) -> SparseState:
        """Returns the sparse state unchanged: there are no masks."""
        del params, grads, kwargs
        return sparse_state

    def instant_sparsify(self, params: Any, grads: Any = None, **kwargs: Any) -> tuple[Any, Any]:
        """Returns the parameters unchanged, and None for the mask of each."""
        del grads, kwargs
        return params, self.get_initial_masks(params, None)


# Compiled as one, where a user's `init` or `instant_sparsify` is not.
_topk_mask = jax.jit(topk.topk_mask, static_argnames="stacked")


def _cond(condition: Any, then: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
    """lax.cond, and a Python choice where the condition is known: nothing is traced for nothing."""
    if isinstance(condition, bool):
        return then() if condition else otherwise()
    return jax.lax.cond(condition, then, otherwise)
