"""Layout of a recipe's groups and masks in one kernel."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sparsity.masks.bits import pack_bits, unpack_bits
from sparsity.masks.nm import check_nm, nm_mask
from sparsity.recipes.patterns import Pattern, Stages, parse_pattern

Contraction = Callable[[str, tuple[int, ...]], int | tuple[int, ...] | None]
"""(name, shape) of a parameter -> the axes that its matmul sums over; see `Recipe.build`."""

_MANY = 1024  # shards times eight, beyond which one axis is as good as another


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelPlan:
    """Plan of a recipe for one kernel.

    Attributes:
      axis: of the groups of M, negative; a tuple of adjacent axes is taken as one, flattened.
      bits_axis: that its mask is packed along, negative.
      code_axis: that the indices of `packed_state` are packed along, negative.
      stages: (n, m), the target last.
      stacked: shape of the axis of layers in front, (layers,) or ().
    """

    name: str
    shape: tuple[int, ...]
    axis: int | tuple[int, ...]
    bits_axis: int
    code_axis: int
    stages: Stages
    stacked: tuple[int, ...]

    @property
    def one_axis(self) -> int:
        """The axis of the groups. ValueError where they go over several, taken as one."""
        if isinstance(self.axis, int):
            return self.axis
        n, m = self.target
        raise ValueError(
            f"recipe: pack finds groups of {self.name} of {n}:{m} that go over the axes "
            f"{self.axis}; use an M that divides the last of them, {self.shape[self.axis[-1]]}"
        )

    @property
    def target(self) -> tuple[int, int]:
        return self.stages[-1]

    def mask(self, bits: jax.Array) -> jax.Array:
        return unpack_bits(bits, self.shape[self.bits_axis], axis=self.bits_axis)

    def bits(self, mask: jax.Array) -> jax.Array:
        return pack_bits(mask, axis=self.bits_axis)

    def bits_at(self, stage: int | jax.Array, scores: jax.Array) -> jax.Array:
        """The bits of the mask of a stage, which may be traced.

        Stages of the same M share a program with a traced N.
        """
        if isinstance(stage, int):
            n, m = self.stages[stage]
            return self.bits(nm_mask(scores, n, m, axis=self.axis))
        n = jnp.asarray([n for n, _ in self.stages], jnp.int32)[stage]
        sizes = list(dict.fromkeys(m for _, m in self.stages))

        def of_size(m: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
            kept = {n for n, other in self.stages if other == m}
            fixed = kept.pop() if len(kept) == 1 else None
            return lambda n, scores: self.bits(
                nm_mask(scores, n if fixed is None else fixed, m, axis=self.axis)
            )

        which = jnp.asarray([sizes.index(m) for _, m in self.stages], jnp.int32)[stage]
        branches = [of_size(m) for m in sizes]
        return (
            branches[0](n, scores)
            if len(sizes) == 1
            else jax.lax.switch(which, branches, n, scores)
        )


def plan_kernel(
    name: str,
    leaf: Any,
    text: str,
    pattern: Pattern,
    contraction: Contraction | None = None,
    ways: Callable[[str], int] | None = None,
) -> KernelPlan | None:
    """The plan for one parameter; None where it has no contraction axis.

    Args:
      contraction: and `ways`, of `Recipe.build`.
      leaf: array or `jax.ShapeDtypeStruct`.
      text: the target, such as "2:4".

    Raises:
      ValueError: the groups do not fit the kernel or its shards.
    """
    shape = tuple(leaf.shape)
    axis = -2 if contraction is None else contraction(name, shape)
    if axis is None:
        return None
    if len(shape) < 2:
        raise ValueError(
            f"recipe: {name} of shape {shape} has no input axis for {text}; leave it out with "
            "None before the pattern that matches it"
        )
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    if not all(-len(shape) <= a < 0 for a in axes) or any(
        b - a != 1 for a, b in itertools.pairwise(axes)
    ):
        raise ValueError(
            f"recipe: {name} of shape {shape} has contraction axes {axes}; use adjacent "
            f"negative axes in order, from {-len(shape)} to -1"
        )
    shards = shards_of(leaf)
    size = math.prod(shape[a] for a in axes)
    count = cuts(shape, shards, axes) if ways is None else ways(name)
    n, m = parse_pattern(text)
    stages = pattern.stages(n, m)
    for stage in stages:
        try:
            check_nm(*stage, size, ways=count, name=name)
        except ValueError as error:
            if stage == (n, m):
                raise
            raise ValueError(
                f"{error}, or a pattern without {stage[0]}:{stage[1]} on the way to {n}:{m}, such "
                "as patterns.Geometric with a smaller k, or patterns.Fixed"
            ) from None
    if all(shape[axes[-1]] % size == 0 for _, size in stages):
        axes = axes[-1:]  # the same groups
    values = list(shape)
    values[axes[-1]] = values[axes[-1]] // m * n
    return KernelPlan(
        name=name,
        shape=shape,
        axis=axes[0] if len(axes) == 1 else axes,
        bits_axis=packing_axis(name, shape, shards, axes[0]),
        code_axis=packing_axis(name, tuple(values), shards, axes[0]),
        stages=stages,
        stacked=shape[:1] if len(shape) + axes[0] > 0 else (),
    )


def shards_of(leaf: Any) -> list[int]:
    """Number of shards along each axis of an array, by its sharding."""
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        return [1] * len(leaf.shape)
    local = sharding.shard_shape(tuple(leaf.shape))
    return [-(-size // part) for size, part in zip(leaf.shape, local, strict=True)]


def cuts(shape: tuple[int, ...], shards: Sequence[int], axes: tuple[int, ...]) -> int:
    """Pieces that shards cut the flattened axes into."""
    run = 1  # entries that follow each other on a device
    for axis in reversed(axes):
        run *= shape[axis] // shards[axis]
        if shards[axis] > 1:
            break
    return math.prod(shape[axis] for axis in axes) // run


def packing_axis(name: str, shape: tuple[int, ...], shards: Sequence[int], first: int) -> int:
    """The axis, from `first` on, along which eight entries go to a byte.

    It depends on the shape alone, since a checkpoint moves between meshes: the axis that most
    shards divide, the first of several (packing along the last axis is slowest).
    """
    axis = max(range(first, 0), key=lambda a: min(shape[a] & -shape[a], _MANY))
    if shards[axis] > 1 and shape[axis] % (8 * shards[axis]):
        raise ValueError(
            f"recipe: {name} of shape {tuple(shape)} in {tuple(shards)} shards; its mask is packed "
            f"by eights along the axis of {shape[axis]}; use at most "
            f"{max((shape[axis] & -shape[axis]) // 8, 1)} shards there"
        )
    return axis
