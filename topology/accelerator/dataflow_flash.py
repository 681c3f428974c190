"""Attention tile by tile of rows and columns, its softmax made online: FlashAttention's dataflow.

After Dao et al., FlashAttention (arXiv 2205.14135) and FlashAttention-2 (arXiv 2307.08691). A tile
is `rows` queries and `columns` keys of a head; its logits never leave the chip. Two loops go over
the tiles of a head:

  rows outside     a tile of queries stays while all keys and values pass (FlashAttention-2)
  columns outside  a tile of keys and values stays while all queries pass (FlashAttention)

What stays moves once. What passes moves once for each tile that stays, unless it is kept: then all
of the head's is on chip and moves once, too. Sums that pass (the output; in the backward pass the
gradients) leave and come back, at the precision of the logits. Each tile of columns after the first
renews the rows' largest logit, sum and output.

With rows outside, the logits of whole rows may be on chip instead, as FLAT's are: keys pass, then
values, and there is nothing to renew.

The backward pass recomputes the logits: five matmuls instead of the two of the forward pass. On
whole rows, keys pass twice in it.

Under a causal mask, tiles that see nothing are left out, and whole rows end at the diagonal.

Time is the longest of: the array's cycles, the bytes over each boundary's bandwidth, and the vector
lanes' cycles; double buffering hides the others.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from topology.accelerator.accelerator import Accelerator, MatrixArray
from topology.accelerator.dataflow_array import (
    STATIONARITIES,
    ArrayCost,
    best_shape,
    candidates,
    ceil_div,
)
from topology.accelerator.dataflow_cost import (
    BACKWARD_ACCESSES,
    BACKWARD_OPERATIONS,
    LATE_ACCESSES,
    LATE_OPERATIONS,
    Cost,
    check_softmax,
    energy_of,
    slowest,
)
from topology.accelerator.dataflow_levels import nest
from topology.accelerator.workloads import Attention
from topology.arrays import Floats
from topology.numbers import choice, whole

LOOPS = ("rows", "columns")
_MOST_TILES = 2**17  # of rows, in a search
_STATISTICS = 2  # of a row: its largest logit, and its sum or their logarithm
_RENEWALS = 4  # operations of a row for another tile of columns, besides those of its output


@dataclass(frozen=True, kw_only=True)
class FlashTile:
    """Tile that a level of memory holds.

    Attributes:
      rows, columns: of a head.
      outside: the outer loop, of `LOOPS`.
      kept: whether what passes is on chip whole, and so moves once.
      whole: whether the logits of whole rows are on chip.

    Raises:
      ValueError: a size is not positive, a name is unknown, or rows are whole and pass.
    """

    rows: int
    columns: int
    outside: str = "rows"
    kept: bool = False
    whole: bool = False

    def __post_init__(self) -> None:
        whole("tile: rows", self.rows, least=1)
        whole("tile: columns", self.columns, least=1)
        if choice("outer loop", self.outside, LOOPS) == "columns" and self.whole:
            raise ValueError("tile: whole rows are made with rows outside")

    def __str__(self) -> str:
        passing = "columns" if self.outside == "rows" else "rows"
        stay = f"{self.outside} outside" + (f", all {passing} kept" if self.kept else "")
        stay += ", logits of whole rows" if self.whole else ""
        return f"tiles of {self.rows} rows x {self.columns} columns, {stay}"


_CHOICES = tuple((outside, kept, False) for outside in LOOPS for kept in (False, True))
_CHOICES += (("rows", False, True), ("rows", True, True))
_TILED = 4  # of the choices (outside, kept, whole); the others are of whole rows


@dataclass(frozen=True, kw_only=True)
class FlashMapping:
    """Mapping of an attention: the tile of the buffer, and of each level outside of it.

    Attributes:
      levels: from the inside outwards; None where a level only lets pass.
    """

    tile: FlashTile
    levels: tuple[FlashTile | None, ...] = ()

    def __str__(self) -> str:
        outer = [f"level {i}: {x}" for i, x in enumerate(self.levels, 1) if x is not None]
        return "; ".join([str(self.tile), *outer])


@dataclass(frozen=True)
class _Pass:
    """Bytes that a pass over a head reads and sums up, of a row and of a column.

    Attributes:
      row, column: read.
      row_sum, column_sum: made, as they are written at last.
      row_part, column_part: the same and what goes with it, as it is kept in between.
      tiles: tiles of logits that are live.
      once: bytes of a row that are moved before all else.
      again: bytes of a column that pass once more where rows are whole.
      matmuls: (m, k, n) by letters r, c and d, and bytes of an element of A, B and C.
    """

    row: int
    column: int
    row_sum: int
    column_sum: int
    row_part: int
    column_part: int
    tiles: int
    once: int
    again: int
    matmuls: tuple[tuple[str, tuple[int, int, int]], ...]


def _pass(work: Attention) -> _Pass:
    d, e, l = work.head_dim, work.bytes_per_element, work.bytes_per_logit  # noqa: E741
    of_rows = _STATISTICS * l
    if not work.backward:
        return _Pass(
            row=d * e, column=2 * d * e, row_sum=d * e, column_sum=0,
            row_part=d * l + of_rows, column_part=0, tiles=1, once=0, again=0,
            matmuls=(("rdc", (e, e, l)), ("rcd", (l, e, e))),
        )  # fmt: skip
    # The sum of a row of output times its gradient is made first.
    return _Pass(
        row=2 * d * e + of_rows, column=2 * d * e, row_sum=d * e, column_sum=2 * d * e,
        row_part=d * l, column_part=2 * d * l, tiles=2, once=2 * d * e + l, again=d * e,
        matmuls=(
            ("rdc", (e, e, l)), ("rdc", (e, e, l)),
            ("crd", (l, e, e)), ("crd", (l, e, e)), ("rcd", (l, e, e)),
        ),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Walk:
    """Tiles that the mask leaves, of a head, by [R, C] tile heights and widths.

    Attributes:
      area: logits in them.
      row_visits: rows, counted once for each tile of columns that they meet.
      column_visits: columns, counted once for each tile of rows that they meet.
      tiles: how many.
    """

    area: Floats
    row_visits: Floats
    column_visits: Floats
    tiles: Floats


@functools.lru_cache(maxsize=64)
def _walk(work: Attention, heights: tuple[int, ...], widths: tuple[int, ...]) -> _Walk:
    n, c = work.head_rows, work.columns
    group = work.heads // work.kv_heads
    found = np.empty((4, len(heights), len(widths)))
    for i, height in enumerate(heights):
        tiles = int(ceil_div(n, height))
        if work.causal:
            last = np.minimum(np.arange(1, tiles + 1, dtype=np.int64) * height, n)
            sizes = np.diff(last, prepend=0)
            seen = (last - 1) // group + 1 + c - work.rows  # columns of a tile's last row
        for j, width in enumerate(widths):
            blocks = ceil_div(c, width)
            if work.causal:
                meets = np.asarray(ceil_div(seen, width))
                columns = seen if width >= c else np.minimum(meets * width, c)
                found[:, i, j] = sizes @ columns, sizes @ meets, columns.sum(), meets.sum()
            else:
                found[:, i, j] = n * c, n * blocks, c * tiles, tiles * blocks
    return _Walk(area=found[0], row_visits=found[1], column_visits=found[2], tiles=found[3])


def flash_cost(
    accelerator: Accelerator, work: Attention, mapping: FlashMapping, *, softmax: str = "free"
) -> Cost:
    """Computes the cost of an attention by a mapping.

    Args:
      softmax: "free", "overlapped" with the matmuls, or "in-turn" with them.

    Raises:
      ValueError: there is another number of levels than the accelerator has, a level's tile is
        smaller than one inside of it, or a tile does not fit; names the least buffer.
    """
    if len(mapping.levels) != len(accelerator.levels):
        raise ValueError(
            f"mapping of {len(mapping.levels)} levels: {accelerator.name} has "
            f"{len(accelerator.levels)} between its buffer and memory"
        )
    n, c = work.head_rows, work.columns

    def cut(tile: FlashTile) -> tuple[int, int]:
        return min(tile.rows, n), min(tile.columns, c)

    rows, columns = cut(mapping.tile)
    costs = _Costs(accelerator, work, (rows,), (columns,), softmax)
    i = _CHOICES.index((mapping.tile.outside, mapping.tile.kept, mapping.tile.whole))
    live = float(costs.live[i, 0, 0])
    if live > accelerator.buffer:
        raise _too_small(accelerator, live)
    moved = [float(costs.moved[i, 0, 0])]
    for level, tile in zip(accelerator.levels, mapping.levels, strict=True):
        if tile is None:
            moved.append(moved[-1])
            continue
        inside, (rows, columns) = (rows, columns), cut(tile)
        if rows < inside[0] or columns < inside[1]:
            raise ValueError(
                f"tile of {level.name}, {rows} x {columns}: smaller than the {inside[0]} x "
                f"{inside[1]} inside of it"
            )
        size = _held(work, rows, columns)
        if size > level.size:
            raise ValueError(f"tile of {level.name}: {size} bytes, of {level.size}")
        if mapping.tile.whole and columns < c:
            raise ValueError(f"tile of {level.name}: {columns} columns; whole rows need all {c}")
        own = _crossing(work, (rows,), (columns,))[LOOPS.index(tile.outside), 0, 0]
        moved.append(min(moved[-1], work.num_heads * float(own)))
    return costs.cost((i, 0, 0), moved, str(mapping))


def search_flash(
    accelerator: Accelerator,
    work: Attention,
    *,
    softmax: str = "free",
    whole_rows: bool | None = None,
) -> tuple[FlashMapping, Cost]:
    """The mapping with the fewest cycles; of these with the least energy, bytes, live buffer.

    Tried are, for the buffer and for each level outside of it, powers of two of rows and columns
    and all of either, both orders of the loops, whether what passes is kept, and whether rows are
    whole.

    Args:
      whole_rows: whether the logits of whole rows must be on chip, or must not; None: either.

    Raises:
      ValueError: not even the smallest tile fits; the message says the least that works.
    """
    n, c = work.head_rows, work.columns
    heights = tuple(int(x) for x in candidates(n) if ceil_div(n, int(x)) <= _MOST_TILES)
    widths = tuple(int(x) for x in candidates(c))
    costs = _Costs(accelerator, work, heights, widths, softmax)
    allowed = np.ones(costs.live.shape, bool)
    if whole_rows is not None:
        allowed[:_TILED] = not whole_rows
        allowed[_TILED:] = whole_rows
        if not whole_rows and c > 1:
            allowed[..., -1] = False  # the whole row in one tile
    side = min(c, max(accelerator.array.rows, accelerator.array.columns))
    allowed[_TILED:, :, np.array(widths) < side] = False  # what passes feeds the array
    fits = allowed & (costs.live <= accelerator.buffer)
    if not fits.any():
        raise _too_small(accelerator, float(costs.live[allowed].min()))
    held = _held(work, np.array(heights)[:, None], np.array(widths))
    crossing = work.num_heads * _crossing(work, heights, widths)
    best_loop = crossing.argmin(0)
    least = crossing.min(0)
    outer = [np.where(held <= level.size, least, np.inf) for level in accelerator.levels]
    # Whole rows are done with all columns before the next: a level has all of them, or lets pass.
    outer_whole = [np.where(np.array(widths) == c, moved, np.inf) for moved in outer]
    nested = [
        nest(accelerator, costs.moved[:_TILED], outer),
        nest(accelerator, costs.moved[_TILED:], outer_whole),
    ]
    moved = [np.concatenate(both) for both in zip(*(x.moved for x in nested), strict=True)]
    tiles = [np.concatenate(both) for both in zip(*(x.tiles for x in nested), strict=True)]
    seconds = np.maximum(slowest(accelerator, moved), costs.seconds_inside(moved[0]))
    seconds = seconds + costs.overhead
    keys = [np.asarray(x, np.float32).ravel() for x in (costs.live, moved[-1], costs.energy(moved))]
    order = np.lexsort((*keys, np.where(fits, np.asarray(seconds, np.float32), np.inf).ravel()))
    option, height, width = (int(x) for x in np.unravel_index(order[0], seconds.shape))
    where = option, height, width
    outside, kept, is_whole = _CHOICES[option]

    def tile_of(flat: int) -> FlashTile | None:
        if flat < 0:
            return None
        i, j = (int(x) for x in np.unravel_index(flat, least.shape))
        return FlashTile(rows=heights[i], columns=widths[j], outside=LOOPS[int(best_loop[i, j])])

    inside = FlashTile(
        rows=heights[height], columns=widths[width], outside=outside, kept=kept, whole=is_whole
    )
    mapping = FlashMapping(tile=inside, levels=tuple(tile_of(int(x[where])) for x in tiles))
    return mapping, costs.cost(where, [float(x[where]) for x in moved], str(mapping))


def _held(work: Attention, rows: Any, columns: Any) -> Any:
    """Bytes of a tile in a level outside the buffer: what is read, twice; what is summed up."""
    sizes = _pass(work)
    return rows * (2 * sizes.row + sizes.row_sum + sizes.row_part) + columns * (
        2 * sizes.column + sizes.column_sum + sizes.column_part
    )


def _crossing(work: Attention, heights: tuple[int, ...], widths: tuple[int, ...]) -> Floats:
    """Bytes of a head, [2, R, C], by the outer loop, that enter and leave what holds such tiles."""
    sizes, walk = _pass(work), _walk(work, heights, widths)
    n, c = work.head_rows, work.columns
    all_rows = np.array([height >= n for height in heights])[:, None]
    all_columns = np.array([width >= c for width in widths])

    def passes(visits: Floats, once: int, read: int, made: int, part: int) -> Floats:
        """Bytes of rows or columns that meet tiles `visits` times in all, `once` if they stay."""
        return visits * read + once * made + 2 * (visits - once) * part

    columns = passes(
        np.where(all_columns, c, walk.column_visits),
        c, sizes.column, sizes.column_sum, sizes.column_part,
    )  # fmt: skip
    rows = passes(
        np.where(all_rows, n, walk.row_visits),
        n, sizes.row, sizes.row_sum, sizes.row_part,
    )  # fmt: skip
    rows_stay = n * (sizes.row + sizes.row_sum)
    columns_stay = c * (sizes.column + sizes.column_sum)
    shape = walk.area.shape
    found = [
        np.broadcast_to(rows_stay + columns, shape),
        np.broadcast_to(columns_stay + rows, shape),
    ]
    return np.stack(found) + n * sizes.once


def _whole_crossing(work: Attention, heights: tuple[int, ...]) -> Floats:
    """Bytes of a head, [R, 1], that enter and leave a buffer where whole rows are made and the
    columns that they see pass by."""
    sizes, visits = _pass(work), _walk(work, heights, (work.columns,)).column_visits
    n, c = work.head_rows, work.columns
    return np.asarray(
        n * (sizes.row + sizes.row_sum + sizes.once)
        + visits * (sizes.column + sizes.again)
        + c * sizes.column_sum
        + 2 * (visits - c) * sizes.column_part
    )


class _Costs:
    """Costs of all tiles of a buffer: arrays [choices, R, C], of `_CHOICES`."""

    def __init__(
        self,
        accelerator: Accelerator,
        work: Attention,
        heights: tuple[int, ...],
        widths: tuple[int, ...],
        softmax: str,
    ):
        check_softmax(softmax)
        self.accelerator, self.work = accelerator, work
        self.in_turn = softmax == "in-turn"
        sizes, heads = _pass(work), work.num_heads
        n, c = work.head_rows, work.columns
        grid = len(heights), len(widths)
        tiled = _work_inside(accelerator, work, heights, widths, softmax)
        whole_rows = _work_inside(accelerator, work, heights, (c,), softmax)

        def by_choice(name: str) -> Floats:
            ends = [np.broadcast_to(getattr(x, name), grid) for x in (tiled, whole_rows)]
            return np.stack([ends[choice[2]] for choice in _CHOICES])

        self.array_cycles = by_choice("array_cycles")
        self.vector_cycles = by_choice("vector_cycles")
        self.accesses = by_choice("accesses")
        self.macs = by_choice("macs")
        self.overhead = accelerator.tile_seconds * by_choice("tiles")

        crossing = _crossing(work, heights, widths)  # [2, R, C]
        # Of whole rows, the columns that a tile sees pass once for it, in blocks of any width.
        once = n * (sizes.row + sizes.row_sum + sizes.once) + c * (sizes.column + sizes.column_sum)
        kept = np.full(grid, float(once))
        streamed = np.where(np.array(widths) >= c, kept, _whole_crossing(work, heights))
        self.moved = heads * np.stack([crossing[0], kept, crossing[1], kept, streamed, kept])

        rows, columns = np.array(heights, float)[:, None], np.array(widths, float)
        row = 2 * sizes.row + sizes.row_sum + sizes.row_part
        column = 2 * sizes.column + sizes.column_sum + sizes.column_part
        logits = sizes.tiles * work.bytes_per_logit * rows
        held = [
            rows * row + columns * column + logits * columns,
            rows * row + c * column + logits * columns,
            rows * row + columns * column + logits * columns,
            n * row + columns * column + logits * columns,
            rows * row + columns * column + logits * c,
            rows * row + c * column + logits * c,
        ]
        self.live = np.stack([np.broadcast_to(x, grid) for x in held])

    def seconds_inside(self, moved: Any) -> Any:
        """Seconds of the array, the lanes and the buffer, when so many bytes cross its boundary."""
        busy = np.maximum(self.array_cycles, self.vector_cycles)
        if self.in_turn:
            busy = self.array_cycles + self.vector_cycles
        through = (self.accesses + moved) / self.accelerator.on_chip_bandwidth
        return np.maximum(busy / self.accelerator.frequency, through)

    def energy(self, moved: Sequence[Any]) -> Any:
        """Joules, when so many bytes cross each boundary."""
        on_chip = self.accesses + moved[0]
        return energy_of(self.accelerator, self.macs, self.vector_cycles, on_chip, moved)

    def cost(self, where: tuple[int, int, int], moved: Sequence[float], mapping: str) -> Cost:
        """The cost at one place of the arrays."""
        seconds = max(float(self.seconds_inside(moved[0])[where]), slowest(self.accelerator, moved))
        seconds += float(self.overhead[where])
        cycles = seconds * self.accelerator.frequency
        return Cost(
            macs=self.work.macs,
            live_buffer=float(self.live[where]),
            off_chip_bytes=moved[-1],
            on_chip_bytes=float(self.accesses[where]) + moved[0],
            level_bytes=tuple(moved[:-1]),
            array_cycles=float(self.array_cycles[where]),
            vector_cycles=float(self.vector_cycles[where]),
            cycles=cycles,
            seconds=seconds,
            energy=float(self.energy(moved)[where]),
            utilisation=self.work.macs / self.accelerator.array.elements / cycles,
            mapping=mapping,
        )


@dataclass(frozen=True, kw_only=True)
class _WorkInside:
    """Work that tiles of a size give the array, the lanes and the buffer: arrays [R, C]."""

    array_cycles: Floats
    vector_cycles: Floats
    accesses: Floats
    macs: Floats
    tiles: Floats


def _work_inside(
    accelerator: Accelerator,
    work: Attention,
    heights: tuple[int, ...],
    widths: tuple[int, ...],
    softmax: str,
) -> _WorkInside:
    sizes, walk = _pass(work), _walk(work, heights, widths)
    n, c, heads = work.head_rows, work.columns, work.num_heads
    d, e, logit = work.head_dim, work.bytes_per_element, work.bytes_per_logit
    seen = walk.area / (n * c)
    cycles, accesses = np.zeros(walk.area.shape), np.zeros(walk.area.shape)
    for letters, bytes_of in sizes.matmuls:
        cost = _best_array(accelerator.array, letters, (n, c, d), heights, widths)
        cycles += heads * seen * cost.cycles
        for size, moved in zip(bytes_of, cost[1:], strict=True):
            accesses += heads * seen * size * moved
    extra = walk.row_visits - n  # rows that are renewed
    if work.backward:
        vector = BACKWARD_OPERATIONS * walk.area + 2 * d * n
        through = BACKWARD_ACCESSES * logit * walk.area + (2 * d * e + logit) * n
    else:
        vector = LATE_OPERATIONS * walk.area + (d + _RENEWALS) * extra + d * n
        through = LATE_ACCESSES * logit * walk.area + 2 * d * (logit * extra + e * n)
    charged = softmax != "free"
    return _WorkInside(
        array_cycles=cycles,
        vector_cycles=charged * heads * vector / accelerator.vector_lanes,
        accesses=accesses + charged * heads * through,
        macs=heads * d * len(sizes.matmuls) * walk.area,
        tiles=heads * walk.tiles,
    )


@functools.lru_cache(maxsize=256)
def _best_array(
    array: MatrixArray,
    letters: str,
    lengths: tuple[int, int, int],
    heights: tuple[int, ...],
    widths: tuple[int, ...],
) -> ArrayCost:
    """Cost of a matmul of a head, [R, C], by tile: of what may stay in the array the best.

    Args:
      letters: of m, k and n, r for rows, c for columns, d for the head's size; lengths: of r, c, d.
    """
    length = dict(zip("rcd", lengths, strict=True))
    tile = {
        "r": np.array(heights)[:, None],
        "c": np.array(widths)[None, :],
        "d": np.asarray(lengths[2]),
    }
    found = [
        best_shape(array, name, [length[x] for x in letters], [tile[x] for x in letters])[0]
        for name in STATIONARITIES
    ]
    shape = len(heights), len(widths)
    stacked = [np.stack([np.broadcast_to(cost[i], shape) for cost in found]) for i in range(4)]
    cycles, moved = stacked[0], sum(stacked[1:])
    best = np.where(cycles == cycles.min(0), moved, np.inf).argmin(0)[None]
    return ArrayCost(*(np.take_along_axis(x, best, 0)[0] for x in stacked))


def _too_small(accelerator: Accelerator, least: float) -> ValueError:
    return ValueError(
        f"a buffer of {accelerator.buffer} bytes is too small for a tile of an attention: the "
        f"least that works is {int(least)}"
    )
