"""The smallest cut of a graph into halves that is found by exchanging chips between them.

The least cut into halves is hard to find in general (NP-hard), so what is found here is an upper
bound of it, where no proof says more.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from topology.arrays import Booleans, Integers

Cut = tuple[int, Booleans]
"""Links of a cut, and bool [N]: the chips on one side of it."""

_STARTS = 16  # random ones
_LIFTED = 3  # of the best halves of cells, improved chip by chip
_FEW = 512  # chips up to which random halves of them are tried as well


def least_cut_found(
    shape: Sequence[int], neighbours: npt.ArrayLike, halves: Iterable[npt.ArrayLike]
) -> int:
    """Links between the two halves of the best cut found of a torus.

    Tried are the halves given and random ones, of chips and, where all sides are even, of cells of
    2x2x2 chips. Each is
    improved by passes of exchanges (Kernighan and Lin, Bell System Technical Journal 49, 1970): the
    two chips whose exchange cuts the fewest links change sides, then the next two, and so on, each
    chip once; the best of all these cuts is where the next pass begins. The same call gives the
    same number.

    Args:
      shape: chips along x, y and z, indices row-major.
      neighbours: int [N, 6], the chip over each directed link; -1 where there is none.
      halves: each bool [N], N // 2 of them True.
    """
    neighbours, rng = np.asarray(neighbours), np.random.default_rng(0)
    improved = [_improve(neighbours, np.asarray(half)) for half in halves]
    improved += _of_cells(shape, neighbours, rng)
    if len(neighbours) <= _FEW:
        improved += _random(neighbours, rng, _STARTS // 4)
    return min(links for links, _ in improved)


def _of_cells(shape: Sequence[int], neighbours: Integers, rng: np.random.Generator) -> list[Cut]:
    """The best halves of the cells of 2x2x2 chips, improved chip by chip."""
    cells = [k // 2 for k in shape]
    if any(k % 2 for k in shape) or np.prod(cells) % 2:
        return []
    places: Integers = np.indices(shape).reshape(3, -1)
    cell = np.ravel_multi_index(tuple(places // 2), cells)
    to = np.full((math.prod(cells), 6), -1)
    for direction in range(6):  # from the cell's chips on that side, all to the same cell
        out = places[direction // 2] % 2 == 1 - direction % 2
        to[cell[out], direction] = cell[neighbours[out, direction]]
        if (to[cell[out], direction] != cell[neighbours[out, direction]]).any():
            return []  # the twist parts the chips of a cell
    to[to == np.arange(len(to))[:, None]] = -1  # a cell that meets itself is never cut there
    found = _of_cells(cells, to, rng) + _random(to, rng, _STARTS)
    best = sorted(found, key=lambda pair: pair[0])[:_LIFTED]
    return [_improve(neighbours, half[cell]) for _, half in best]


def _random(neighbours: Integers, rng: np.random.Generator, count: int) -> list[Cut]:
    N = len(neighbours)
    return [_improve(neighbours, rng.permutation(N) < N // 2) for _ in range(count)]


def cut_links(neighbours: Integers, half: Booleans) -> int:
    """Links, each counted once, between chips where `half` is True and the others."""
    there = neighbours >= 0
    return int((there & half[:, None] & ~half[np.where(there, neighbours, 0)]).sum())


def _improve(neighbours: Integers, half: Booleans) -> Cut:
    """The cut after passes of exchanges, until none is better."""
    links, side = cut_links(neighbours, half), np.where(half, 1, -1)
    while True:
        best, made = _one_pass(neighbours, side)
        if best <= 0:
            return links, side > 0
        links -= best
        side[np.concatenate(made)] *= -1


def _one_pass(neighbours: Integers, side: Integers) -> tuple[int, list[tuple[int, int]]]:
    """(links that the best beginning of a pass of exchanges saves, the chips that it exchanges)."""
    N, there = len(side), neighbours >= 0
    chips = np.where(there, neighbours, N)
    side = np.append(side, 0)
    # What a chip's change of side saves: its links to the other side less those to its own.
    gain = -(side[:N, None] * side[chips]).sum(axis=1)
    low = -4 * neighbours.shape[1]
    free = {s: np.where(side[:N] == s, gain, low) for s in (1, -1)}
    total = best = 0
    made, length = [], 0
    for _ in range(N // 2):
        a, b = int(free[1].argmax()), int(free[-1].argmax())
        joined = int((chips[a] == b).sum())
        total += int(free[1][a] + free[-1][b]) - 2 * joined
        made.append((a, b))
        if total > best:
            best, length = total, len(made)
        if total < best - 64:
            break
        for chip, s in ((a, 1), (b, -1)):
            free[s][chip] = low
            for other in chips[chip]:
                if other < N and free[side[other]][other] > low:
                    free[side[other]][other] += 2 if side[other] == s else -2
    return best, made[:length]
