"""Attention without fusion: the logits of everything first, then the softmax, then the output.

naive   a fixed weight-stationary loop nest with the largest cube for a tile
FLEX    after the FLEX of Kao et al., FLAT (ASPLOS 2023): for each matmul the best tile, order of
        loops, and mapping on the array; what is left of the buffer keeps part of the logits

A matmul [m, k] x [k, n] is made tile by tile in three nested loops. The buffer holds one tile of
each operand, twice for double buffering; a tile is fetched when the loops come to another one. So
an operand moves as often as the loops around its own repeat it: the trips of the loop that is not
its own, if that loop is outside one of its own that makes more than one trip. Partial sums come
back as often as they left before their last time. As in `dataflow_flat`, FLEX may have more live
than the buffer holds: so much of every access of the array goes to memory, on top.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from topology.accelerator.accelerator import Accelerator, MatrixArray
from topology.accelerator.dataflow_array import (
    STATIONARITIES,
    best_shape,
    candidates,
    ceil_div,
    tiled_cost,
)
from topology.accelerator.dataflow_cost import (
    Cost,
    add,
    check_published,
    energy_of,
    slowest,
    softmax_bytes,
    vector_cycles,
)
from topology.accelerator.dataflow_levels import Nested, nest
from topology.accelerator.workloads import Attention, Matmul
from topology.arrays import Floats, Integers, Numbers

ORDERS = tuple(itertools.permutations("mkn"))  # of the loops, the outermost first
_OPERANDS = {"a": "mk", "b": "kn", "c": "mn"}
_OPERATORS: dict[bool, tuple[tuple[str, str, int | None], ...]] = {
    False: (("logits", "rdc", 2), ("softmax", "", None), ("output", "rcd", 0)),
    True: (
        ("gradient of logits", "rdc", 2),
        ("softmax", "", None),
        ("gradient of values", "crd", 0),
        ("gradient of keys", "crd", 0),
        ("gradient of queries", "rcd", 0),
    ),
}
"""{backward: (name, m, k and n by letters for rows, columns and the head's size, which of A, B and
C are logits)}."""
_KEPT = (0, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 15 / 16, 31 / 32)  # of the buffer


@dataclass(frozen=True, kw_only=True)
class MatmulTraffic:
    """Elements that an order of loops moves: A and B read, C written and its partial sums read."""

    a: npt.NDArray[Any]
    b: npt.NDArray[Any]
    c_written: npt.NDArray[Any]
    c_read: npt.NDArray[Any]

    @property
    def c(self) -> npt.NDArray[Any]:
        return np.asarray(self.c_written + self.c_read)


def matmul_traffic(
    lengths: Sequence[Numbers], tiles: Sequence[Numbers] | Integers, order: Sequence[str]
) -> MatmulTraffic:
    """Counts the elements that a tiled matmul moves between buffer and memory.

    Args:
      lengths: m, k and n; tiles: of each, numbers or arrays that broadcast.
      order: of the loops, the outermost first, such as ("m", "n", "k").
    """
    size = dict(zip("mkn", np.asarray(lengths, float), strict=True))
    trips = dict(
        zip("mkn", (ceil_div(x, y) for x, y in zip(lengths, tiles, strict=True)), strict=True)
    )

    def repeats(own: str) -> npt.NDArray[Any]:
        other = next(x for x in "mkn" if x not in own)
        inside = [x for x in order[order.index(other) + 1 :] if x in own]
        moves_on = sum((trips[x] > 1) for x in inside) > 0
        return np.where(moves_on, trips[other], 1)

    moved = {name: size[own[0]] * size[own[1]] for name, own in _OPERANDS.items()}
    again = {name: repeats(own) for name, own in _OPERANDS.items()}
    return MatmulTraffic(
        a=moved["a"] * again["a"],
        b=moved["b"] * again["b"],
        c_written=moved["c"] * again["c"],
        c_read=moved["c"] * (again["c"] - 1),
    )


def live_bytes(tiles: Iterable[Any], sizes: Sequence[int]) -> Any:
    """Bytes of a tile of each operand, twice; tiles: numbers or arrays; sizes: of an element of A,
    B and C."""
    m, k, n = tiles
    return 2 * (m * k * sizes[0] + k * n * sizes[1] + m * n * sizes[2])


@dataclass(frozen=True, kw_only=True)
class _Space:
    """Tilings of a matmul: [T] tiles, a grid of m, k and n, and [6] orders."""

    grid: tuple[int, ...]
    tiles: Integers  # [3, T]
    cycles: Floats  # [T], of the array
    accesses: tuple[Floats, ...]  # a, b, c: elements [T]
    traffic: tuple[Floats, ...]  # a, b, c: elements [6, T]


@functools.lru_cache(maxsize=256)
def _space(array: MatrixArray, m: int, k: int, n: int) -> _Space:
    grid = np.meshgrid(candidates(m), candidates(k), candidates(n), indexing="ij")
    tiles = np.stack([axis.ravel() for axis in grid])
    found = [best_shape(array, name, (m, k, n), tiles)[0] for name in STATIONARITIES]
    cycles = np.stack([cost.cycles for cost in found])
    moved = np.stack([sum(cost[1:]) for cost in found])
    # Of the stationarities the one with the fewest cycles, then elements moved.
    best = np.where(cycles == cycles.min(0), moved, np.inf).argmin(0)
    columns = np.arange(tiles.shape[1])
    accesses = tuple(np.stack([cost[i] for cost in found])[best, columns] for i in (1, 2, 3))
    orders = [matmul_traffic((m, k, n), tiles, order) for order in ORDERS]
    traffic = tuple(np.stack([getattr(x, name) for x in orders]) for name in "abc")
    return _Space(
        grid=grid[0].shape,
        tiles=tiles,
        cycles=cycles[best, columns],
        accesses=accesses,
        traffic=traffic,
    )


def best_matmul(
    accelerator: Accelerator,
    matmul: Matmul,
    *,
    sizes: tuple[int, int, int] = (2, 2, 2),
    kept: tuple[float, float, float] = (0, 0, 0),
    reserved: float = 0,
    homes: tuple[int | None, int | None, int | None] = (None, None, None),
    taken: Sequence[float] | None = None,
) -> Cost:
    """The matmul with the tile and the order of loops that take the fewest cycles, then energy.

    Each level between buffer and memory has a tile and an order of its own, too.

    Args:
      sizes: bytes of an element of A, B and C.
      kept: the part of each operand that is in the buffer and not in memory.
      reserved: bytes of the buffer that are taken, with those of what is kept.
      homes: the level where each operand is, from 0 for the one next to the buffer; None: memory.
      taken: bytes of each level that are taken, with those of operands that are there.

    Raises:
      ValueError: the buffer is too small for a tile of one element.
    """
    space = _space(accelerator.array, matmul.m, matmul.k, matmul.n)
    live = live_bytes(space.tiles.astype(float), sizes)
    room = accelerator.buffer - reserved
    if room < live.min():
        raise _too_small(accelerator, matmul, live.min() + reserved)
    spilled = np.maximum(0, 1 - room / live)
    accesses = sum(size * moved for size, moved in zip(sizes, space.accesses, strict=True))
    inner = spilled * accesses + sum(  # [6, T]
        (1 - part) * size * moved
        for part, size, moved in zip(kept, sizes, space.traffic, strict=True)
    )
    nested = _nest(accelerator, space, inner, live, sizes, homes, taken)
    on = inner + accesses
    seconds = np.maximum(
        np.maximum(nested.seconds, on / accelerator.on_chip_bandwidth),
        space.cycles / accelerator.frequency,
    )
    key = np.asarray(seconds, np.float32)  # rounding must not decide between equals
    energy = energy_of(accelerator, 0, 0, on, nested.moved)
    where = np.unravel_index(np.where(key == key.min(), energy, np.inf).argmin(), key.shape)
    order, tile = where
    shape = "x".join(str(int(x)) for x in space.tiles[:, tile])
    count = matmul.count
    return _cost(
        accelerator,
        macs=matmul.macs,
        live=live[tile] + reserved,
        moved=[count * float(x[where]) for x in nested.moved],
        on=count * on[where],
        array=count * space.cycles[tile],
        mapping=f"{matmul.name}: tiles {shape}, loops {''.join(ORDERS[order])}",
    )


def _nest(
    accelerator: Accelerator,
    space: _Space,
    inner: Floats,
    live: Floats,
    sizes: Sequence[int],
    homes: Sequence[int | None],
    taken: Sequence[float] | None,
) -> Nested:
    """Chooses tiles and orders of the levels outside the buffer; results are [6, T]."""
    outer = []
    for i, level in enumerate(accelerator.levels):
        outside = [home is None or home > i for home in homes]
        moved = sum(
            here * size * moved
            for here, size, moved in zip(outside, sizes, space.traffic, strict=True)
        )
        room = level.size - (0 if taken is None else taken[i])
        least = np.where(live <= room, np.asarray(moved).min(0), np.inf)
        outer.append(least.reshape(space.grid))
    nested = nest(accelerator, inner.reshape(len(ORDERS), *space.grid), outer)
    return Nested(
        tiles=tuple(x.reshape(inner.shape) for x in nested.tiles),
        moved=tuple(x.reshape(inner.shape) for x in nested.moved),
        seconds=nested.seconds.reshape(inner.shape),
    )


def naive_matmul(
    accelerator: Accelerator,
    matmul: Matmul,
    *,
    sizes: tuple[int, int, int] = (2, 2, 2),
    kept: tuple[float, float, float] = (0, 0, 0),
    reserved: float = 0,
) -> Cost:
    """The matmul as `best_matmul`, but weight stationary, the tile the largest cube that fits.

    Its sides are a power of two, or the whole length where that is less; B stays longest.
    """
    lengths = (matmul.m, matmul.k, matmul.n)
    cubes = [tuple(min(2**i, x) for x in lengths) for i in range(max(lengths).bit_length() + 1)]
    lives = [live_bytes(cube, sizes) + reserved for cube in cubes]
    fitting = sum(live <= accelerator.buffer for live in lives)
    if not fitting:
        raise _too_small(accelerator, matmul, lives[0])
    tile = cubes[fitting - 1]
    built = accelerator.array.rows, accelerator.array.columns
    work = tiled_cost(accelerator.array, "weight", built, lengths, tile)
    moved = matmul_traffic(lengths, tile, ("n", "k", "m"))
    off = sum(
        (1 - part) * size * float(x)
        for part, size, x in zip(kept, sizes, (moved.a, moved.b, moved.c), strict=True)
    )
    on = off + sum(size * float(x) for size, x in zip(sizes, work[1:], strict=True))
    return _cost(
        accelerator,
        macs=matmul.macs,
        live=lives[fitting - 1],
        moved=[matmul.count * off],
        on=matmul.count * on,
        array=matmul.count * float(work.cycles),
        mapping=f"{matmul.name}: tiles {'x'.join(map(str, tile))}, weights stay",
    )


def _too_small(accelerator: Accelerator, matmul: Matmul, least: float) -> ValueError:
    return ValueError(
        f"a buffer of {accelerator.buffer} bytes is too small for a tile of {matmul.name}: the "
        f"least that works is {int(least)}"
    )


def _cost(
    accelerator: Accelerator,
    *,
    macs: int,
    live: float,
    moved: Sequence[float],
    on: float,
    array: float,
    mapping: str,
    vector: float = 0,
) -> Cost:
    seconds = max(
        (array + vector) / accelerator.frequency,
        on / accelerator.on_chip_bandwidth,
        slowest(accelerator, moved),
    )
    return Cost(
        macs=macs,
        live_buffer=float(live),
        off_chip_bytes=float(moved[-1]),
        on_chip_bytes=float(on),
        level_bytes=tuple(float(x) for x in moved[:-1]),
        array_cycles=float(array),
        vector_cycles=float(vector),
        cycles=float(seconds * accelerator.frequency),
        seconds=float(seconds),
        energy=float(energy_of(accelerator, macs, vector, on, moved)),
        utilisation=float(macs / accelerator.array.elements / (seconds * accelerator.frequency)),
        mapping=mapping,
    )


def search_flex(
    accelerator: Accelerator,
    work: Attention,
    *,
    softmax: str = "free",
    granularity: str = "M",
) -> Cost:
    """Searches the unfused attention of least time: the FLEX dataflow.

    The operators follow one another; each hides its transfers behind its work. Part of the logits
    may stay in the buffer from one operator to the next: all parts in `_KEPT` are tried. The others
    are in the memory off the chip, or in a level before it where they fit. The operators know no
    mask: all logits are made. The backward pass has the logits after the softmax from the forward
    pass, and makes their gradients.

    Args:
      softmax: "free", or anything else of `dataflow_cost.SOFTMAX`: then an operator of its own,
        which reads and writes the logits that are not kept.
      granularity: M: the operators run over all of the batch, as unfused ones do. B, H: over a
        sequence, a head at a time, so that fewer logits are live.

    Raises:
      ValueError: the buffer is too small for the smallest tile, or granularity is another.
    """
    if granularity not in ("M", "B", "H"):
        raise ValueError(f"no granularity {granularity!r} without fusion; there are M, B and H")
    heads = {"M": work.num_heads, "B": work.kv_heads, "H": 1}[granularity]
    total = heads * work.head_rows * work.columns * work.bytes_per_logit
    total *= 2 if work.backward else 1
    sizes = {part * accelerator.buffer for part in _KEPT if part * accelerator.buffer < total}
    if total < accelerator.buffer:
        sizes.add(total)
    found, errors = list[Cost](), list[ValueError]()
    for kept in sorted(sizes):
        levels = enumerate(accelerator.levels)
        for home in [None, *(i for i, level in levels if total - kept <= level.size)]:
            try:
                found.append(_unfused(accelerator, work, best_matmul, kept, total, softmax, home))
            except ValueError as error:  # no tile fits beside what is kept
                errors.append(error)
    if not found:
        raise errors[0]
    return min(found, key=lambda cost: (np.float32(cost.seconds), cost.energy))


def naive(accelerator: Accelerator, work: Attention, *, softmax: str = "free") -> Cost:
    """Unfused attention with `naive_matmul`; the logits stay on chip if half of the buffer does.

    Raises:
      ValueError: the buffer is too small for the smallest tile; or as of
        `dataflow_cost.check_published`.
    """
    check_published("naive", accelerator, work)
    total = work.logits * work.bytes_per_logit
    kept = total if total <= accelerator.buffer / 2 else 0
    return _unfused(accelerator, work, naive_matmul, kept, total, softmax)


def _unfused(
    accelerator: Accelerator,
    work: Attention,
    matmul: Callable[..., Cost],
    kept: float,
    total: float,
    softmax: str,
    home: int | None = None,
) -> Cost:
    """Computes the cost with `kept` of `total` bytes of logits in the buffer, the others in a level
    or in memory."""
    part = kept / total
    rest = [0.0 if i != home else total - kept for i in range(len(accelerator.levels))]
    options: dict[str, Any] = {"reserved": kept}
    if home is not None:
        options |= {"taken": rest}
    every = dataclasses.replace(work, causal=False)
    element, logit = work.bytes_per_element, work.bytes_per_logit
    parts = list[Cost]()
    for name, sizes, where in _OPERATORS[work.backward]:
        if where is None:
            if vector := vector_cycles(accelerator, every, softmax):
                touched = 3 if work.backward else 2
                moved = touched * (1 - part) * every.logits * logit
                bounds = range(len(accelerator.levels) + 1)
                crossed = [moved if home is None or i <= home else 0.0 for i in bounds]
                parts.append(
                    _cost(
                        accelerator,
                        macs=0,
                        live=kept,
                        moved=crossed,
                        on=crossed[0] + softmax_bytes(every, softmax),
                        array=0,
                        vector=vector,
                        mapping=name,
                    )
                )
            continue
        length = {"r": work.head_rows, "c": work.columns, "d": work.head_dim}
        m, k, n = (length[x] for x in sizes)
        at = [i == where for i in range(3)]
        if home is not None:
            options["homes"] = tuple(home if here else None for here in at)
        parts.append(
            matmul(
                accelerator,
                Matmul(name, work.num_heads, m, k, n),
                sizes=tuple(logit if here else element for here in at),
                kept=tuple(part if here else 0 for here in at),
                **options,
            )
        )
    mappings = [x.mapping for x in parts if x.macs]
    place = "memory" if home is None else accelerator.levels[home].name
    mappings.append(f"{part:.2g} of the logits kept" if part else f"logits in {place}")
    if part and home is not None:
        mappings[-1] += f", the others in {place}"
    cost = add(parts, "; ".join(mappings))
    useful = work.macs / accelerator.array.elements / cost.cycles
    return dataclasses.replace(cost, macs=work.macs, utilisation=useful)
