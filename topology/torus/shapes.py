"""Which shapes and twists of a slice the wiring of a pod can make, and the nearest that it can."""

import itertools
import math

import numpy as np

from topology import numbers

BLOCK = 4  # chips along a side of a block, the electrically wired cube
MAX_BLOCKS = 64  # of a TPU v4 pod
DIMENSIONS = "xyz"

Shape = tuple[int, int, int]
Twist = tuple[Shape, Shape, Shape]
NO_TWIST: Twist = ((0, 0, 0),) * 3

# Whole hosts (2x2x1 chips) inside one block, dimensions ascending.
_PARTS_OF_A_BLOCK = [(1, 2, 2), (1, 2, 4), (1, 4, 4), (2, 2, 2), (2, 2, 4), (2, 4, 4)]


def shipped_twist(shape: Shape) -> Twist | None:
    """The twist of `_twisted`, or None where the shape has none.

    n x n x 2n: both short dimensions shift the long one by n; n x 2n x 2n: the short dimension
    shifts both long ones by n. n is a multiple of 4, and the dimensions may stand in any order.
    """
    _check_sizes(shape)
    n, twice = min(shape), max(shape)
    if n % BLOCK or twice != 2 * n or not set(shape) <= {n, twice}:
        return None
    return tuple(tuple(n if k == n and to != n else 0 for to in shape) for k in shape)


def legal_shapes(max_blocks: int = MAX_BLOCKS) -> list[Shape]:
    """All legal shapes, dimensions ascending, the smallest first."""
    max_blocks = numbers.whole("max_blocks", max_blocks, most=2**16)
    whole = [
        (BLOCK * i, BLOCK * j, BLOCK * k)
        for i in range(1, max_blocks + 1)
        for j in range(i, max_blocks // i + 1)
        for k in range(j, max_blocks // (i * j) + 1)
    ]
    return sorted(_PARTS_OF_A_BLOCK + whole, key=lambda shape: (math.prod(shape), shape))


def nearest_shape(shape: Shape, *, whole: bool = False, among=None) -> Shape:
    """The legal shape nearest to any shape, its dimensions in the same order.

    Nearest is the least sum of squared logarithms of the ratios of the sorted dimensions; of equal
    ones the larger.

    Args:
      whole: only shapes of whole blocks.
      among: shapes with ascending dimensions; all legal ones by default.
    """
    _check_sizes(shape)
    among = [s for s in among or legal_shapes() if s[0] % BLOCK == 0 or not whole]
    sizes = np.sort([min(max(k, 1), 10**9) for k in shape])
    away = np.log(among) - np.log(sizes)
    best = np.lexsort((-np.prod(among, axis=1), (away**2).sum(axis=1).round(9)))[0]
    places = np.argsort(np.argsort(shape, kind="stable"))
    return tuple(int(among[best][place]) for place in places)


def nearest_twistable(shape: Shape) -> Shape:
    """The shape nearest to any that has a shipped twist."""
    twistable = [s for s in legal_shapes() if shipped_twist(s)]
    return nearest_shape(shape, among=twistable)


def check_shape(shape: Shape) -> None:
    """Raises a ValueError, with the nearest legal shape, where it is not legal."""
    ordered = tuple(sorted(shape))
    whole = all(k % BLOCK == 0 and k > 0 for k in shape)
    blocks = math.prod(k // BLOCK for k in shape)
    if ordered in _PARTS_OF_A_BLOCK or (whole and blocks <= MAX_BLOCKS):
        return
    if whole:
        wrong = f"takes {blocks} blocks, a pod has {MAX_BLOCKS}"
    elif max(shape) > BLOCK:
        wrong = f"beyond one block every dimension is a multiple of {BLOCK}"
    else:
        wrong = "inside a block a slice is whole hosts of 2x2x1, its dimensions 1, 2 or 4"
    raise ValueError(
        f"slice {times(shape)}: {wrong}; the nearest legal is {times(nearest_shape(shape))}"
    )


def check_twist(shape: Shape, twist: Twist, wrap) -> None:
    """Raises a ValueError where the wiring of a legal shape cannot make the twist."""
    if len(twist) != 3 or any(len(row) != 3 for row in twist):
        raise ValueError(f"twist {twist}: three rows of three shifts, like {NO_TWIST}")
    if twist == NO_TWIST:
        return
    name = f"twist {'/'.join(','.join(map(str, row)) for row in twist)} of {times(shape)}"
    if not all(wrap):
        raise ValueError(f"{name}: a twisted slice wraps around in x, y and z; drop the twist")
    for row, d in zip(twist, DIMENSIONS, strict=True):
        for s in row:
            if s % BLOCK:
                raise ValueError(
                    f"{name}: the wiring keeps a chip's place in its block's face, so a shift is "
                    f"a multiple of {BLOCK}; in place of {s} of {d} take {BLOCK * round(s / BLOCK)}"
                )
    if shift_order(twist) is None:
        raise ValueError(
            f"{name}: dimensions shift each other in a circle, which makes no torus of "
            f"{math.prod(shape)} chips; let each shift only later ones in some order of x, y, z"
        )


def shift_order(twist: Twist) -> tuple[int, int, int] | None:
    """Dimensions in an order in which each shifts only later ones; None if there is none."""
    for order in itertools.permutations(range(3)):
        if not any(twist[d][e] for i, d in enumerate(order) for e in order[: i + 1]):
            return order
    return None


def _check_sizes(shape):
    if len(shape) != 3:
        raise ValueError(f"shape {times(shape)}: three sizes like 4x4x8")
    for k in shape:
        numbers.whole(f"size of the shape {times(shape)}", k, least=-(10**9))


def times(shape) -> str:
    """(4, 4, 8) -> "4x4x8"."""
    return "x".join(map(numbers.shown, shape))
