"""Cycles of a matmul on a matrix array, and the elements it moves to and from the buffer.

A is [m, k], B [k, n], C = A B [m, n]. One of the three stays in the array, as much as it holds,
while the other two stream past:

  output   C stays: m over the array's rows, n over its columns, k streams
  weight   B stays: k over the rows, n over the columns, m streams
  input    A stays: k over the rows, m over the columns, n streams

Where C does not stay and k takes several passes, its partial sums are read and written in each; as
in the independent rows (see docs/flat.md) the first pass reads, too.

All functions take numpy arrays or numbers that broadcast.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from topology.accelerator.accelerator import MatrixArray
from topology.arrays import Floats, Integers, Numbers

Shape = tuple[int, int]  # rows and columns of an array

STATIONARITIES = ("output", "weight", "input")


class ArrayCost(NamedTuple):
    """Cost of one matmul: cycles, and elements read of A, of B, and read and written of C."""

    cycles: npt.NDArray[Any]
    a: npt.NDArray[Any]
    b: npt.NDArray[Any]
    c: npt.NDArray[Any]

    def plus(self, other: "ArrayCost", times: Numbers = 1) -> "ArrayCost":
        return ArrayCost(*(x + times * y for x, y in zip(self, other, strict=True)))


def ceil_div(a: Numbers, b: Numbers) -> Numbers:
    return -(-a // b)


def array_cost(
    array: MatrixArray, stationarity: str, shape: Shape, m: Numbers, k: Numbers, n: Numbers
) -> ArrayCost:
    """The cost of a matmul with an array of `shape` = (rows, columns)."""
    rows, columns = shape
    if stationarity == "output":
        passes, streamed = ceil_div(m, rows) * ceil_div(n, columns), k
        a, b, c = m * k * ceil_div(n, columns), k * n * ceil_div(m, rows), m * n
    elif stationarity == "weight":
        passes, streamed = ceil_div(k, rows) * ceil_div(n, columns), m
        a, b, c = m * k * ceil_div(n, columns), k * n, 2 * m * n * ceil_div(k, rows)
    else:
        passes, streamed = ceil_div(k, rows) * ceil_div(m, columns), n
        a, b, c = m * k, k * n * ceil_div(m, columns), 2 * m * n * ceil_div(k, rows)
    cycles = passes * np.maximum(streamed, array.load_cycles) / array.count
    same = 0 * cycles  # of one shape
    return ArrayCost(cycles, a + same, b + same, c + same)


def split(
    length: Numbers, tile: Numbers
) -> tuple[tuple[Numbers, Numbers], tuple[Numbers, Numbers]]:
    """((size, how many), (size, how many)): full tiles and the ragged last one."""
    return (tile, length // tile), (length % tile, np.minimum(length % tile, 1))


def tiled_cost(
    array: MatrixArray,
    stationarity: str,
    shape: Shape,
    lengths: Sequence[Numbers],
    tiles: Sequence[Numbers] | Integers,
) -> ArrayCost:
    """The cost of a matmul of `lengths` (m, k, n), made tile by tile."""
    total = ArrayCost(*(np.zeros(()) for _ in range(4)))
    for m, many_m in split(lengths[0], tiles[0]):
        for k, many_k in split(lengths[1], tiles[1]):
            for n, many_n in split(lengths[2], tiles[2]):
                many = np.asarray(many_m * many_k * many_n)
                if many.any():
                    sizes = [np.asarray(x, float) for x in (m, k, n)]
                    total = total.plus(array_cost(array, stationarity, shape, *sizes), many)
    return total


def best_shape(
    array: MatrixArray,
    stationarity: str,
    lengths: Sequence[Numbers],
    tiles: Sequence[Numbers] | Integers,
) -> tuple[ArrayCost, Floats]:
    """(cost, shape): of the array's shapes the one with the fewest cycles, then elements moved.

    Returns: cost as `tiled_cost` gives it, and float [2, ...], rows and columns of the shape.
    """
    built, *others = array.shapes
    best = tiled_cost(array, stationarity, built, lengths, tiles)
    shapes = np.empty((2, *np.shape(best.cycles)))
    shapes[:] = np.reshape(built, (2,) + (1,) * np.ndim(best.cycles))
    for shape in others:
        cost = tiled_cost(array, stationarity, shape, lengths, tiles)
        moved, before = sum(cost[1:]), sum(best[1:])
        better = (cost.cycles < best.cycles) | ((cost.cycles == best.cycles) & (moved < before))
        best = ArrayCost(*(np.where(better, x, y) for x, y in zip(cost, best, strict=True)))
        for i in range(2):
            shapes[i] = np.where(better, shape[i], shapes[i])
    return best, shapes


def candidates(length: int) -> Integers:
    """Sizes that a search tries: powers of two, the whole, and its halves while they are whole."""
    halvings = range((length & -length).bit_length())
    powers = (2**i for i in range(length.bit_length()) if 2**i < length)
    return np.array(sorted({*powers, *(length >> i for i in halvings)}))
