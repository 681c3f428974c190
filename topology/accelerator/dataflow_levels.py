"""Tiles within tiles: what crosses the levels of memory outside an accelerator's buffer.

Each level between the buffer and memory holds a tile of its own, no smaller along any axis than
that of the level inside of it. What crosses a level's boundary depends on its own tile and on the
order of the loops around that, so the levels are chosen one after the other, from memory inwards. A
level that cannot save a transfer lets it pass through.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from topology.accelerator.accelerator import Accelerator
from topology.accelerator.dataflow_cost import slowest
from topology.arrays import Floats, Integers


@dataclass(frozen=True, kw_only=True)
class Nested:
    """Tiles of the levels outside the buffer, for each tile of the buffer.

    Attributes:
      tiles: of each level, from the inside outwards, int [..., *grid]: the flat index of its tile;
        -1 where all passes through.
      moved: bytes [..., *grid] across each boundary, the buffer's first and memory's last.
      seconds: [..., *grid] that the slowest of them takes.
    """

    tiles: tuple[Integers, ...]
    moved: tuple[Floats, ...]
    seconds: Floats


def nest(accelerator: Accelerator, inner: Floats, outer: Sequence[Floats]) -> Nested:
    """Chooses the tiles of an accelerator's levels by the time of the slowest boundary.

    Args:
      inner: bytes, [..., *grid], across the buffer's outer boundary by its tile; leading axes are
        of choices that the levels do not see.
      outer: bytes, [*grid], across the outer boundary of each level by its tile, from the inside
        outwards; infinite where a tile does not fit.
    """
    bandwidths = [level.bandwidth for level in accelerator.levels[1:]]
    bandwidths.append(accelerator.off_chip_bandwidth)
    best: list[Integers] = []
    beyond: npt.NDArray[Any] | float = 0.0  # by a tile, the seconds of what is outside of it
    for moved, bandwidth in zip(reversed(outer), reversed(bandwidths), strict=False):
        seconds = np.maximum(moved / bandwidth, beyond)
        best.insert(0, _best_at_least(seconds, moved))
        beyond = seconds.ravel()[best[0]]
    grid = outer[0].shape if outer else ()
    here = np.broadcast_to(np.arange(int(np.prod(grid))).reshape(grid), inner.shape)
    tiles, crossed = list[Integers](), [inner]
    for moved, chosen in zip(outer, best, strict=True):
        tile = chosen.ravel()[here]
        saves = moved.ravel()[tile] < crossed[-1]
        crossed.append(np.where(saves, moved.ravel()[tile], crossed[-1]))
        tiles.append(np.where(saves, tile, -1))
        here = np.where(saves, tile, here)
    seconds = slowest(accelerator, crossed)
    return Nested(tiles=tuple(tiles), moved=tuple(crossed), seconds=seconds)


def _best_at_least(seconds: Floats, moved: Floats) -> Integers:
    """Flat index, [*grid], of the tile with the least seconds, then bytes, of those that are no
    smaller along any axis. Rounding does not decide between equals."""
    order = np.lexsort((moved.ravel(), np.asarray(seconds, np.float32).ravel()))
    rank = np.empty(len(order), int)
    rank[order] = np.arange(len(order))
    rank = rank.reshape(seconds.shape)
    for axis in range(rank.ndim):
        rank = np.flip(np.minimum.accumulate(np.flip(rank, axis), axis=axis), axis)
    return np.asarray(order[rank])
