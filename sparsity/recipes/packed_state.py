"""Parameters and optimizer state of which only the kept weights are stored.

Once the masks of a recipe are fixed, a pruned weight and its moments are zeros for good. A kernel
[..., groups * m, ...] and every statistic of it shrink to [..., groups * n, ...] in the same order,
beside log2(m) bits for the place of each. 2:4 with AdamW in float32 falls from 16 bytes a weight
(weight, gradient and two moments) to 8.125, 1:8 to 2.05.

An optimizer that works weight by weight does the same to the values as it did to the kernel, so
that training goes on with the same numbers. What it is chained with may look at all of a gradient:
the sum of `optax.clip_by_global_norm` is then over the same numbers without their zeros, in another
order; `global_norm` here sums in one that packing does not change.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from sparsity.masks.nm import split_groups
from sparsity.masks.packed import encode_indices, gather_nm, nm_indices, pack_nm, unpack_nm
from sparsity.recipes.kernel_plan import KernelPlan
from sparsity.recipes.kernels import PackedKernel, indices_of

WEIGHT_BY_WEIGHT = (
    "ScaleByAdamState",
    "StepAdamState",
    "ScaleByLionState",
    "TraceState",
    "ScaleByScheduleState",
    "WeightDecaySchedule",
    "EmptyState",
    "MaskedState",
    "MaskedNode",
    "PartitionState",
)
"""Optimizer states whose arrays may be packed, by the names of their types."""


class Planned(Protocol):
    """A recipe for the leaves of a tree of parameters: the part of a `RecipeUpdater` used here."""

    @property
    def treedef(self) -> jax.tree_util.PyTreeDef: ...
    @property
    def plans(self) -> tuple[KernelPlan | None, ...]: ...
    def map_kernels(self, function: Callable[..., Any], tree: Any, *rest: Any) -> Any: ...


class MaskedState(Protocol):
    """The state that is packed: a `RecipeState`."""

    @property
    def count(self) -> jax.Array: ...
    @property
    def masks(self) -> Any: ...
    @property
    def masked_from(self) -> jax.Array: ...
    @property
    def inner_state(self) -> optax.OptState: ...


class PackedState(NamedTuple):
    """The optimizer state of a recipe with fixed masks, packed.

    Attributes:
      count: int32 [], updates done.
      codes: a tree like the parameters: `PackedKernel.code` for each kernel of the recipe, else
        None.
      masked_from: int32 [], see `RecipeState`.
      inner_state: of the wrapped optimizer, for the values.
    """

    count: jax.Array  # type: ignore[assignment]  # in place of tuple's method
    codes: Any
    masked_from: jax.Array
    inner_state: optax.OptState


def global_norm(updater: Planned, tree: Any, count: jax.Array) -> jax.Array:
    """`optax.tree.norm`, with the same bits for packed gradients and for masked ones.

    Each group is summed by itself, in the order of its entries, where a zero changes nothing.

    Args:
      count: of `rounded`.
    """

    def squares(plan: KernelPlan | None, x: jax.Array) -> jax.Array:
        total = rounded(jnp.square(x.astype(jnp.float32)), count)
        if plan is not None and isinstance(plan.axis, int):
            size = plan.target[1] if x.shape == plan.shape else plan.target[0]
            groups, axis = split_groups(total, size, plan.axis)
            parts = (jax.lax.index_in_dim(groups, i, axis, keepdims=False) for i in range(size))
            total = functools.reduce(jnp.add, parts)
        return jnp.sum(total)

    leaves = zip(updater.plans, updater.treedef.flatten_up_to(tree), strict=True)
    return jnp.sqrt(sum(squares(plan, x) for plan, x in leaves))


def pack(updater: Planned, params: Any, state: MaskedState) -> tuple[Any, PackedState]:
    """The parameters and the `RecipeState` of an updater, packed; see `RecipeUpdater.pack`."""
    for name in _state_types(state.inner_state):
        if name not in WEIGHT_BY_WEIGHT:
            raise ValueError(
                f"recipe: pack needs an optimizer that works weight by weight, and {name} may not; "
                "use adam, adamw, sgd or lion"
            )

    def indices(plan: KernelPlan, bits: jax.Array) -> jax.Array:
        return nm_indices(plan.mask(bits), *plan.target, axis=plan.one_axis)

    def code(plan: KernelPlan, bits: jax.Array) -> jax.Array:
        planes = encode_indices(indices(plan, bits), plan.target[1], axis=plan.code_axis)
        return jnp.moveaxis(planes, 0, plan.one_axis - 1)

    def values(plan: KernelPlan, w: jax.Array, bits: jax.Array) -> jax.Array:
        return pack_nm(w, plan.mask(bits), *plan.target, axis=plan.one_axis)

    def statistic(plan: KernelPlan, x: jax.Array, bits: jax.Array) -> jax.Array:
        return gather_nm(x, indices(plan, bits), *plan.target, axis=plan.one_axis)

    codes = updater.map_kernels(code, state.masks)
    inner_state = _map_statistics(updater, statistic, params, state.inner_state, state.masks)
    params = updater.map_kernels(values, params, state.masks)
    return params, PackedState(state.count, codes, state.masked_from, inner_state)


def unpack(updater: Planned, params: Any, state: PackedState) -> tuple[Any, Any, optax.OptState]:
    """(parameters, masks, inner optimizer state): the inverse of `pack`."""

    def spread(plan: KernelPlan, x: jax.Array, code: jax.Array) -> jax.Array:
        places = _indices(plan, x.shape, code)
        return unpack_nm(x, places, *plan.target, axis=plan.one_axis)

    def bits(plan: KernelPlan, code: jax.Array, w: jax.Array) -> jax.Array:
        return plan.bits(spread(plan, jnp.ones(w.shape, jnp.uint8), code) > 0)

    masks = updater.map_kernels(bits, state.codes, params)
    inner_state = _map_statistics(updater, spread, params, state.inner_state, state.codes)
    return updater.map_kernels(spread, params, state.codes), masks, inner_state


def weights(updater: Planned, params: Any, state: PackedState) -> Any:
    """The parameters with a `PackedKernel` for each kernel of the recipe."""

    def packed(plan: KernelPlan, w: jax.Array, code: jax.Array) -> PackedKernel:
        (n, m), axis = plan.target, plan.one_axis
        return PackedKernel(values=w, code=code, n=n, m=m, axis=axis, code_axis=plan.code_axis)

    return updater.map_kernels(packed, params, state.codes)


def masks(updater: Planned, state: PackedState) -> Any:
    """A tree like the parameters of bool masks, None outside the recipe."""

    def mask(plan: KernelPlan, code: jax.Array) -> jax.Array:
        (n, m), axis = plan.target, plan.one_axis
        shape = list(plan.shape)
        shape[axis] = shape[axis] // m * n
        ones = jnp.ones(shape, jnp.uint8)
        return unpack_nm(ones, _indices(plan, ones.shape, code), n, m, axis=axis) > 0

    return updater.map_kernels(mask, state.codes)


def rounded(x: jax.Array, count: jax.Array) -> jax.Array:
    """x itself, in a way that no compiler sees through and that costs no memory traffic.

    A product before it and a sum after it are so rounded each by itself, never as one fused
    operation, which depends on what else is compiled into the same loop.

    Args:
      count: int32 [], not negative, which the compiler does not know.
    """
    bits = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    nothing = (count < 0).astype(bits)
    return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, bits) ^ nothing, x.dtype)


def _indices(plan: KernelPlan, shape: tuple[int, ...], code: jax.Array) -> jax.Array:
    return indices_of(code, shape, plan.target[1], plan.one_axis, plan.code_axis)


def _map_statistics(
    updater: Planned,
    function: Callable[..., jax.Array],
    params: Any,
    inner_state: Any,
    *rest: Any,
) -> optax.OptState:
    """`function(plan, x, *leaves)` for the arrays of an optimizer state that go with a kernel.

    They are those whose path ends as the kernel's does, and that have its shape: whatever tree of
    the parameters, or part of one, the state holds.
    """
    paths = jax.tree_util.tree_leaves_with_path(params)
    others = zip(*(updater.treedef.flatten_up_to(tree) for tree in rest), strict=True)
    kernels = {
        path: (plan, leaf.shape, other)
        for plan, (path, leaf), other in zip(updater.plans, paths, others, strict=True)
        if plan is not None
    }

    def convert(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        for start in range(len(path) + 1):
            if path[start:] in kernels:
                plan, shape, other = kernels[path[start:]]
                if shape == x.shape:
                    return function(plan, x, *other)
        return x

    return jax.tree.map_with_path(convert, inner_state)


def _state_types(state: Any) -> Iterator[str]:
    """The names of the optimizer states within one."""
    if isinstance(state, tuple):
        if hasattr(state, "_fields"):
            yield type(state).__name__
        for part in state:
            yield from _state_types(part)
    elif isinstance(state, dict):
        for part in state.values():
            yield from _state_types(part)
