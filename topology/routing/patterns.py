"""Synthetic traffic of Dally and Towles, "Principles and Practices of Interconnection Networks".

Of their chapter 3, for chips (x, y, z) of a slice k_x x k_y x k_z; each chip sends one unit in all:
  - uniform: to all chips alike, itself included, 1 / N each;
  - transpose: to the chip of its coordinates in reverse order, as a matrix is transposed; the
    shape must be the same read backwards, such as 8x4x8, or 8x8 of a pod of two dimensions;
  - bit-complement: to k - 1 - x in every dimension, which where all k are powers of two turns over
    every bit of the address;
  - tornado: ceil(k / 2) - 1 further in every dimension, just short of half way round;
  - neighbour: 1 further in every dimension.
Further goes round in every dimension, on links or not.
  - hotspot: a part of each chip's unit goes to chip 0, the rest as uniform (Pfister and Norton,
    IEEE Trans. Computers C-34, 1985).
"""

from collections.abc import Callable

import numpy as np

from topology.arrays import Floats, Integers
from topology.numbers import choice, number
from topology.torus.shapes import times
from topology.torus.slices import Slice

HOT = 0.1
"""The part of hotspot's traffic that goes to chip 0, by default."""


def traffic_of(slice: Slice, pattern: str, *, hot: float = HOT) -> Floats:
    """float [N, N]: what each chip sends to each other, and to itself; every row adds up to 1.

    Args:
      pattern: one of `PATTERNS`.
      hot: of hotspot, 0 .. 1.

    Raises:
      ValueError: there is no such pattern, or it is not defined for the slice's shape.
    """
    choice("pattern", pattern, PATTERNS)
    N = slice.num_chips
    if pattern in ("uniform", "hotspot"):
        hot = number("hot", hot, most=1) if pattern == "hotspot" else 0.0
        traffic = np.full((N, N), (1 - hot) / N)
        traffic[:, 0] += hot
        return traffic
    traffic = np.zeros((N, N))
    traffic[np.arange(N), destinations(slice, pattern)] = 1.0
    return traffic


def destinations(slice: Slice, pattern: str) -> Integers:
    """int [N]: the chip to which each chip sends, of a pattern in which it is one.

    Raises:
      ValueError: as `traffic_of`, or the pattern sends to several.
    """
    to = _PERMUTATIONS[choice("pattern", pattern, _PERMUTATIONS)](slice)
    return np.asarray(np.ravel_multi_index(tuple(to.T), slice.shape))


def _transpose(slice: Slice) -> Integers:
    d = slice.pod.dimensions
    sides = slice.shape[:d]
    if sides != sides[::-1]:
        raise ValueError(
            f"pattern transpose: slice {slice} is {times(sides)}; it takes a shape that is the "
            f"same read backwards, such as {times((sides[0],) * d)}"
        )
    return np.concatenate([slice.coordinates[:, :d][:, ::-1], slice.coordinates[:, d:]], axis=1)


def _complement(slice: Slice) -> Integers:
    return np.asarray(np.array(slice.shape) - 1 - slice.coordinates)


def _further(slice: Slice, steps: Integers) -> Integers:
    return np.asarray((slice.coordinates + steps) % slice.shape)


_PERMUTATIONS: dict[str, Callable[[Slice], Integers]] = {
    "transpose": _transpose,
    "bit-complement": _complement,
    "tornado": lambda slice: _further(slice, (np.array(slice.shape) + 1) // 2 - 1),
    "neighbour": lambda slice: _further(slice, np.ones(3, int)),
}
PATTERNS = ("uniform", *_PERMUTATIONS, "hotspot")
