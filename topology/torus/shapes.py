"""Shapes and twists of a slice that the wiring of a pod can make, and the nearest to one it cannot.

Limits are the pod's data (`topology.hardware`). A pod of blocks makes any box of whole blocks, up
to its largest slice, and some boxes inside a block; another pod has the shapes that it lists.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np

from topology import numbers
from topology.hardware import PODS, TPU_V4, AnyTorus, Pod

DIMENSIONS = "xyz"

T = TypeVar("T")
Shape = tuple[int, ...]
Wrap = tuple[bool, ...]
Twist = tuple[tuple[int, ...], ...]
NO_TWIST: Twist = ((0, 0, 0),) * 3


def three(values: Iterable[T]) -> tuple[T, T, T]:
    """The three values, of x, y and z."""
    x, y, z = values
    return x, y, z


def shipped_twist(shape: Shape, pod: Pod = TPU_V4) -> Twist | None:
    """The twist of `_twisted`, or None where the shape has none.

    n x n x 2n: both short dimensions shift the long one by n; n x 2n x 2n: the short dimension
    shifts both long ones by n. n is a multiple of a block's side, and the dimensions may stand in
    any order. A pod without blocks ships no twists.
    """
    shape = in_three(shape, pod)
    n, twice = min(shape), max(shape)
    if pod.block is None or n % pod.block.side or twice != 2 * n or not set(shape) <= {n, twice}:
        return None
    return tuple(three(n if k == n and to != n else 0 for to in shape) for k in shape)


def legal_shapes(max_blocks: int | None = None, pod: Pod = TPU_V4) -> list[Shape]:
    """Lists all legal shapes of slices, dimensions ascending, the smallest first.

    Args:
      max_blocks: of slices of whole blocks; by default those of the pod's largest slice.
    """
    if max_blocks is not None:
        max_blocks = numbers.whole("max_blocks", max_blocks, most=2**16)
    if pod.shapes is None:
        raise ValueError(f"pod {pod.name}: which slices wrap around is not published; {_take()}")
    whole = []
    if pod.block is not None:
        side = pod.block.side
        most = pod.largest_slice // pod.block.chips if max_blocks is None else max_blocks
        whole = [
            (side * i, side * j, side * k)
            for i in range(1, most + 1)
            for j in range(i, most // i + 1)
            for k in range(j, most // (i * j) + 1)
        ]
    return sorted([*pod.shapes, *whole], key=lambda shape: (math.prod(shape), shape))


def nearest_shape(
    shape: Shape, *, whole: bool = False, among: Sequence[Shape] | None = None, pod: Pod = TPU_V4
) -> Shape:
    """The legal shape nearest to any shape, its dimensions in the same order.

    Nearest is the least sum of squared logarithms of the ratios of the sorted dimensions; of equal
    ones the larger.

    Args:
      whole: only shapes of whole blocks.
      among: shapes with ascending dimensions; all legal ones by default.
    """
    _check_sizes(shape, pod)
    side = pod.block.side if whole and pod.block is not None else 1
    among = [s for s in among or legal_shapes(pod=pod) if s[0] % side == 0]
    sizes = np.sort([min(max(k, 1), 10**9) for k in shape])
    away = np.log(among) - np.log(sizes)
    best = np.lexsort((-np.prod(among, axis=1), (away**2).sum(axis=1).round(9)))[0]
    places = np.argsort(np.argsort(shape, kind="stable"))
    return tuple(int(among[best][place]) for place in places)


def nearest_twistable(shape: Shape, pod: Pod = TPU_V4) -> Shape | None:
    """The shape nearest to any that has a shipped twist; None where the pod has none."""
    twistable = [s for s in legal_shapes(pod=pod) if shipped_twist(s, pod)]
    return nearest_shape(shape, among=twistable, pod=pod) if twistable else None


def in_three(shape: Shape, pod: Pod = TPU_V4) -> tuple[int, int, int]:
    """The shape along x, y and z: 1 in those that the pod does not have."""
    _check_sizes(shape, pod)
    return three((*shape, *(1,) * (3 - len(shape))))


def check_shape(shape: Shape, pod: Pod = TPU_V4) -> None:
    """Raises a ValueError, with the nearest legal shape, where it is not legal."""
    if isinstance(pod, AnyTorus):
        if min(shape) < 1 or math.prod(shape) > pod.largest_slice:
            raise ValueError(
                f"slice {times(shape)}: sides of 1 chip or more, at most {pod.largest_slice} chips"
            )
        return
    legal = legal_shapes(0, pod)  # those that are not of whole blocks
    wrong = None
    if tuple(sorted(shape)) in legal:
        return
    if pod.block is None:
        shapes = [times(s) for s in legal]
        wrong = f"slices of {pod.name} are {', '.join(shapes[:-1])} and {shapes[-1]}"
    else:
        side, most = pod.block.side, pod.largest_slice // pod.block.chips
        whole = all(k % side == 0 and k > 0 for k in shape)
        blocks = math.prod(k // side for k in shape)
        if whole and blocks <= most:
            return
        if whole and most == pod.num_blocks:
            wrong = f"takes {blocks} blocks, a pod has {most}"
        elif whole:
            wrong = f"takes {blocks} blocks, the largest slice of {pod.name} has {most}"
        elif max(shape) > side:
            wrong = f"beyond one block every dimension is a multiple of {side}"
        else:
            wrong = "inside a block a slice is whole hosts of 2x2x1, its dimensions 1, 2 or 4"
    nearest = times(nearest_shape(shape, pod=pod))
    raise ValueError(f"slice {times(shape)}: {wrong}; the nearest legal is {nearest}")


def wraparound(shape: Shape, pod: Pod = TPU_V4) -> Wrap:
    """The dimensions x, y and z in which the wiring of a legal shape can wrap around.

    Whole blocks do in all, by the optical switches; on a pod without blocks, dimensions as long as
    its ring do. On an `AnyTorus` those that do where a slice says nothing else.
    """
    if isinstance(pod, AnyTorus):
        return three(k > 2 for k in in_three(shape, pod))
    if pod.block is None:
        return three(k == pod.ring for k in in_three(shape, pod))
    return (all(k % pod.block.side == 0 for k in shape),) * 3


def check_wrap(shape: Shape, wrap: Wrap, pod: Pod = TPU_V4) -> None:
    """Raises a ValueError where the wiring of a legal shape does not wrap around so."""
    if isinstance(pod, AnyTorus):
        for d, k, wraps in zip(DIMENSIONS, in_three(shape, pod), wrap, strict=True):
            if wraps and k == 1:
                raise ValueError(f"slice {times(shape)}: one chip along {d} does not wrap around")
        return
    can = wraparound(shape, pod)
    if all(c or not w for c, w in zip(can, wrap, strict=True)):
        return
    if pod.block is not None:
        raise ValueError(
            f"slice {times(shape)}: wraparound needs every dimension to be a multiple of "
            f"{pod.block.side}; the nearest that wraps is "
            f"{times(nearest_shape(shape, whole=True, pod=pod))}"
        )
    there = ", ".join(d for d, c in zip(DIMENSIONS, can, strict=True) if c) or "no dimension"
    raise ValueError(
        f"slice {times(shape)}: on {pod.name} dimensions of {pod.ring} chips wrap around, and no "
        f"shorter ones; this one wraps in {there}"
    )


def check_twist(shape: Shape, twist: Twist, wrap: Wrap, pod: Pod = TPU_V4) -> None:
    """Raises a ValueError where the wiring of a legal shape cannot make the twist."""
    if len(twist) != 3 or any(len(row) != 3 for row in twist):
        raise ValueError(f"twist {twist}: three rows of three shifts, like {NO_TWIST}")
    if twist == NO_TWIST:
        return
    name = f"twist {'/'.join(','.join(map(str, row)) for row in twist)} of {times(shape)}"
    if isinstance(pod, AnyTorus):
        sides = in_three(shape, pod)
        for d, k, w, row in zip(DIMENSIONS, sides, wrap, twist, strict=True):
            if (any(row) or k > 1) and not w:
                raise ValueError(
                    f"{name}: a twisted slice wraps around in all its dimensions, and {d} does "
                    "not; drop the twist"
                )
        _check_order(name, shape, twist)
        return
    if pod.block is None:
        raise ValueError(
            f"{name}: the wiring of {pod.name} is fixed, without twists; drop the twist"
        )
    if not all(wrap):
        raise ValueError(f"{name}: a twisted slice wraps around in x, y and z; drop the twist")
    side = pod.block.side
    for row, d in zip(twist, DIMENSIONS, strict=True):
        for s in row:
            if s % side:
                raise ValueError(
                    f"{name}: the wiring keeps a chip's place in its block's face, so a shift is "
                    f"a multiple of {side}; in place of {s} of {d} take {side * round(s / side)}"
                )
    _check_order(name, shape, twist)


def _check_order(name: str, shape: Shape, twist: Twist) -> None:
    if not shift_order(twist):
        raise ValueError(
            f"{name}: dimensions shift each other in a circle, which makes no torus of "
            f"{math.prod(shape)} chips; let each shift only later ones in some order of x, y, z"
        )


def shift_order(twist: Twist) -> tuple[int, ...]:
    """Dimensions in an order in which each shifts only later ones; empty if there is none."""
    for order in itertools.permutations(range(3)):
        if not any(twist[d][e] for i, d in enumerate(order) for e in order[: i + 1]):
            return order
    return ()


def _check_sizes(shape: Shape, pod: Pod) -> None:
    if len(shape) != pod.dimensions:
        like = "three sizes like 4x4x8" if pod.dimensions == 3 else "two sizes like 4x8"
        raise ValueError(f"shape {times(shape)}: {like}")
    for k in shape:
        numbers.whole(f"size of the shape {times(shape)}", k, least=-(10**9))


def _take() -> str:
    return "take one of " + ", ".join(p.name for p in PODS.values() if p.shapes is not None)


def times(shape: Iterable[int]) -> str:
    """Writes a shape as text: (4, 4, 8) -> "4x4x8"."""
    return "x".join(map(numbers.shown, shape))
