"""Goodput of a pod whose hosts fail: how many slices of one size the healthy blocks can make.

A block is up when all its hosts are, and hosts fail independently. Goodput is the part of all
blocks that is in slices when, at one moment, as many slices of the size are made as can be:
  - with optical switches any n blocks that are up make a slice of n: floor(up / n) slices;
  - with static wiring a slice is a box of blocks, turned any way, in the fixed grid of blocks, all
    of them up, and boxes do not overlap.
(Jouppi et al., ISCA 2023, compare the two so.) Each has a closed form, and a Monte Carlo in which
a trial is one word of 64 bits, a bit to a block.

Letters: a host availability, p block availability, n blocks of a slice.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import special

from topology.arrays import Integers
from topology.fabric.fabric import boxes
from topology.hardware import TPU_V4, Pod, block_of, of_blocks
from topology.numbers import number, whole
from topology.torus.shapes import Shape, times

WORD = 64  # bits of a trial: the blocks of the largest pod that is sampled
_PRECISION = 32  # bits to which a sampled probability is rounded
_CHUNK = 1 << 14  # trials that stay in the processor's cache
_MOST_PACKINGS = 5000  # sets of boxes that are tried on each trial
_MOST_TERMS = 200_000  # of an inclusion-exclusion sum


def block_availability(host_availability: float, pod: Pod = TPU_V4) -> float:
    """a^hosts: the part of the time that all hosts of a block are up."""
    return _probability(host_availability) ** block_of(pod).hosts


def ocs_goodput(host_availability: float, slice_blocks: int, pod: Pod = TPU_V4) -> float:
    """Expected goodput with optical switches: E[floor(X / n)] n / blocks, X ~ Binomial(blocks, p).

    Args:
      slice_blocks: n.

    Raises:
      ValueError: the availability is not in 0 .. 1, or the pod does not have n blocks.
    """
    p, total = block_availability(host_availability, pod), of_blocks(pod).num_blocks
    n = _fitting(slice_blocks, total)
    up = np.arange(total + 1)
    chances = special.comb(total, up) * p**up * (1 - p) ** (total - up)
    return float(chances @ (up // n)) * n / total


def static_goodput(
    host_availability: float,
    block_shape: Sequence[int],
    pod: Pod = TPU_V4,
    wraparound: bool = False,
) -> float:
    """Expected goodput with static wiring: sum over k of P(k disjoint boxes are up) n / blocks.

    Each of those chances is the inclusion-exclusion sum over the sets of blocks that k disjoint
    boxes can take, a polynomial in p.

    Args:
      block_shape: blocks along the sides of a slice, as `Slice.block_shape`.
      wraparound: a box may reach over an edge of the grid to the opposite one.

    Raises:
      ValueError: as `ocs_goodput`; or the sum has too many terms, as for slices of 4 or 8 blocks:
        `sample_goodput` answers.
    """
    p, pod = block_availability(host_availability, pod), of_blocks(pod)
    shape, total = _shape(block_shape), pod.num_blocks
    n = _fitting(math.prod(shape), total)
    expected = 0.0
    for coefficients in _polynomials(shape, pod.block_grid, wraparound):
        expected += math.fsum(c * p**power for power, c in coefficients.items())
    return expected * n / total


@dataclass(frozen=True)
class Estimate:
    """A mean, its standard error, and whether what was averaged is exact (else a lower bound)."""

    mean: float
    error: float
    exact: bool = True


def sample_goodput(
    host_availability: float,
    block_shape: Sequence[int],
    *,
    static: bool = False,
    wraparound: bool = False,
    trials: int = 1_000_000,
    seed: int = 0,
    pod: Pod = TPU_V4,
) -> Estimate:
    """Goodput by Monte Carlo; the same seed takes the same blocks down with either wiring.

    Static slices are packed best where the ways to pack them are few enough to try them all (in the
    pod's 4x4x4 grid the boxes 2x2x2, 1x4x4, 2x2x4 and all larger ones), and otherwise each is put
    at the first place that is free and up: a lower bound, and the estimate says so.

    Args:
      block_shape: as in `static_goodput`.
      static: static wiring; optical switches otherwise.
      wraparound: as in `static_goodput`.

    Raises:
      ValueError: as `ocs_goodput`, or the pod has more than 64 blocks.
    """
    p, pod = block_availability(host_availability, pod), of_blocks(pod)
    shape, total = _shape(block_shape), pod.num_blocks
    n = _fitting(math.prod(shape), total)
    if total > WORD:
        raise ValueError(f"pod {pod.name}: {total} blocks, at most {WORD} can be sampled")
    trials, seed = whole("trials", trials, least=2, most=10**10), whole("seed", seed)
    exact = True
    if static:
        places = grid_boxes(shape, pod.block_grid, wraparound)
        packings = _packings(shape, pod.block_grid, wraparound)
        exact = packings is not None or n == 1
    rng, sums = np.random.Generator(np.random.SFC64([seed, 0])), np.zeros(2)
    for start in range(0, trials, _CHUNK):
        up = sample_blocks(p, min(_CHUNK, trials - start), rng, total)
        count: Integers
        if not static:
            count = np.bitwise_count(up) // np.uint8(n)
        elif packings is not None:
            count = most_boxes(up, packings)
        else:
            count = first_fit_boxes(up, places)
        tally = np.bincount(count)
        slices = np.arange(len(tally))
        sums += tally @ slices, tally @ slices**2
    mean = float(sums[0]) / trials
    variance = max(float(sums[1]) / trials - mean**2, 0) * trials / (trials - 1)
    return Estimate(mean * n / total, math.sqrt(variance / trials) * n / total, exact)


def sample_blocks(p: float, trials: int, rng: np.random.Generator, blocks: int = WORD) -> Integers:
    """uint64 [trials]: bit b is set, with chance p, where block b is up; the other bits are 0.

    p is rounded to 32 bits. All 64 bits compare a random binary fraction with p at once, digit by
    digit from the last: where p has a 1 a random 0 decides for up, where p has a 0 a random 1
    decides for down, and otherwise the digits behind decide.
    """
    digits = round(p * 2**_PRECISION)
    every = np.uint64(2**blocks - 1)
    if digits == 2**_PRECISION:
        return np.full(trials, every)
    up = np.zeros(trials, np.uint64)
    random = rng.integers(2**64, size=(_PRECISION, trials), dtype=np.uint64)
    for row in random:
        up = np.bitwise_or(up, row, out=up) if digits & 1 else np.bitwise_and(up, row, out=up)
        digits >>= 1
    return np.bitwise_and(up, every, out=up)


def grid_boxes(block_shape: Sequence[int], grid: Sequence[int], wraparound: bool) -> list[int]:
    """The boxes of a shape in a grid, turned any way: of each a number with its blocks' bits set.

    As `fabric.boxes`, and with wraparound also those that reach over an edge of the grid.
    """
    inside = boxes(block_shape, grid)
    if wraparound:
        places = np.stack(np.unravel_index(inside, grid), axis=-1)
        shifts = np.indices(grid).reshape(3, -1).T[:, None, None, :]
        moved = np.moveaxis((places + shifts) % grid, -1, 0)
        inside = np.ravel_multi_index(tuple(moved), grid).reshape(-1, inside.shape[1])
    return sorted({sum(1 << block for block in set(row)) for row in inside.tolist()})


def most_boxes(up: Integers, packings: Sequence[Sequence[int]]) -> Integers:
    """uint8 [trials]: the most disjoint boxes with all blocks up.

    Args:
      up: uint64 [trials].
      packings: entry k - 1 has the sets of blocks, as bits, that k disjoint boxes take together.
    """
    count = np.zeros(len(up), np.uint8)
    left, where = up, np.arange(len(up))
    for k, unions in enumerate(packings, start=1):
        found, met, same = (
            np.zeros(len(left), bool),
            np.empty_like(left),
            np.empty(len(left), bool),
        )
        for union in unions:
            blocks = np.uint64(union)
            found |= np.equal(np.bitwise_and(left, blocks, out=met), blocks, out=same)
        left, where = left[found], where[found]
        count[where] = k
    return count


def first_fit_boxes(up: Integers, places: Sequence[int]) -> Integers:
    """uint8 [trials]: disjoint boxes with all blocks up, each taken at the first place in order."""
    free, count = up.copy(), np.zeros(len(up), np.uint8)
    for place in places:
        blocks = np.uint64(place)
        fits = (free & blocks) == blocks
        count += fits
        free &= ~(blocks * fits)
    return count


@lru_cache
def _packings(shape: Shape, grid: Shape, wraparound: bool) -> list[list[int]] | None:
    """Lists, by number of boxes, the unions of disjoint placements of `shape` in `grid`, for
    `most_boxes`; None if there are too many."""
    places = grid_boxes(shape, grid, wraparound)
    unions, levels = set(places), []
    while unions:
        levels.append(sorted(unions))
        if sum(map(len, levels)) > _MOST_PACKINGS:
            return None
        unions = {union | place for union in unions for place in places if not union & place}
    return levels


@lru_cache
def _polynomials(shape: Shape, grid: Shape, wraparound: bool) -> list[dict[int, int]]:
    """{power: coefficient} of p in the chance that k disjoint boxes are up, for k = 1, 2, ..."""
    packings = _packings(shape, grid, wraparound)
    found = []
    for unions in packings or ():
        signs = {0: -1}  # of every set of blocks that is a union of some of them
        for union in unions:
            for blocks, sign in list(signs.items()):
                signs[blocks | union] = signs.get(blocks | union, 0) - sign
            signs = {blocks: sign for blocks, sign in signs.items() if sign}
            if len(signs) > _MOST_TERMS:
                packings = None
                break
        coefficients: dict[int, int] = {}
        for blocks, sign in signs.items():
            coefficients[blocks.bit_count()] = coefficients.get(blocks.bit_count(), 0) + sign
        coefficients[0] += 1
        found.append(coefficients)
    if packings is None:
        raise ValueError(
            f"static slices of {times(shape)} blocks: the closed form has more than {_MOST_TERMS} "
            "terms; take sample_goodput"
        )
    return found


def _probability(a: float) -> float:
    return number("host_availability", a, most=1, unit="a part of the time, like 0.999")


def _fitting(n: int, total: int) -> int:
    return whole("slice_blocks", n, least=1, most=total)


def _shape(block_shape: Sequence[int]) -> Shape:
    """The sides of a slice in blocks, ascending."""
    if len(block_shape) != 3:
        raise ValueError(f"block_shape {tuple(block_shape)}: blocks along x, y and z")
    return tuple(sorted(whole("block_shape", k, least=1) for k in block_shape))
