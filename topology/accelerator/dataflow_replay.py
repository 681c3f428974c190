"""The dataflows walked tile by tile, every element that moves counted where it moves.

Slow and plain: it checks the formulas of `dataflow_flat`, `dataflow_flash` and `dataflow_unfused`
on small work.
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from topology.accelerator.accelerator import Accelerator, MatrixArray
from topology.accelerator.dataflow_flash import FlashTile
from topology.accelerator.dataflow_flat import TENSORS, FlatMapping, heads_of
from topology.accelerator.workloads import Attention
from topology.arrays import Booleans


def replay_matmul(
    lengths: Sequence[int], tiles: Sequence[int], order: Sequence[str]
) -> Counter[str]:
    """Elements that a tiled matmul moves: "a", "b", "c_written" and "c_read".

    Arguments as of `dataflow_unfused.matmul_traffic`. The buffer holds one tile of each operand. A
    tile of C that is left is written; one that has been left before is read again.
    """
    blocks = {x: _blocks(size, tile) for x, size, tile in zip("mkn", lengths, tiles, strict=True)}
    held: dict[str, tuple[int, int]] = {}
    left: set[tuple[int, int]] = set()
    moved: Counter[str] = Counter()

    def leave() -> None:
        if "c" in held:
            rows, columns = held["c"]
            moved["c_written"] += _size(blocks["m"][rows]) * _size(blocks["n"][columns])
            left.add(held["c"])

    for at in itertools.product(*(range(len(blocks[x])) for x in order)):
        here = dict(zip(order, at, strict=True))
        for name, row, column in (("a", "m", "k"), ("b", "k", "n"), ("c", "m", "n")):
            tile = here[row], here[column]
            if held.get(name) == tile:
                continue
            size = _size(blocks[row][tile[0]]) * _size(blocks[column][tile[1]])
            if name == "c":
                leave()
                moved["c_read"] += size if tile in left else 0
            else:
                moved[name] += size
            held[name] = tile
    leave()
    return moved


def replay_flat(
    accelerator: Accelerator, work: Attention, mapping: FlatMapping, *, spilled: float = 0.0
) -> tuple[float, float]:
    """(bytes moved from and to memory, cycles of the matrix array) of an attention by FLAT.

    Every pass of the array takes its operands from the buffer, where they are kept, or from memory.
    What is kept comes from memory when it is first taken. `spilled` is the part of what is in the
    buffer that does not fit: so much of it comes and goes at each pass, on top.
    """
    counted = dict.fromkeys(TENSORS, 0.0)
    cycles = 0.0
    array = accelerator.array
    built = array.rows, array.columns
    shapes = mapping.shapes or (built, built)
    heads = range(work.num_heads)
    together = heads_of(mapping.granularity, work)
    for first in range(0, work.num_heads, together):
        for _ in heads[first : first + together]:
            there = {"K": np.zeros((work.head_dim, work.columns), bool)}
            there["V"] = np.zeros((work.columns, work.head_dim), bool)
            for tile in _blocks(work.head_rows, mapping.rows):
                m, k, n = _size(tile), work.head_dim, work.columns
                there["Q"] = np.zeros((m, k), bool)
                there["O"] = np.zeros((m, k), bool)
                there["L"] = np.zeros((m, n), bool)
                for names, size, stationarity, shape in (
                    ("QKL", (m, k, n), mapping.stationarity[0], shapes[0]),
                    ("LVO", (m, n, k), mapping.stationarity[1], shapes[1]),
                ):
                    made = np.zeros((size[0], size[2]), bool)
                    for access, taken in _passes(array, stationarity, shape, size):
                        cycles += taken
                        for name, operand, where in zip(names, "abc", access, strict=True):
                            _take(counted, mapping, name, operand, where, there[name], made)
                        through = 1 if stationarity == "output" else 2  # partial sums
                        for name, where in zip(names, access, strict=True):
                            held = name in "QL" or name in mapping.kept
                            if held or (name == "O" and through == 2):
                                uses = through if name == names[2] else 1
                                counted[name] += spilled * uses * there[name][where].size
    sizes = dict.fromkeys("QKVO", work.bytes_per_element) | {"L": work.bytes_per_logit}
    return sum(sizes[name] * moved for name, moved in counted.items()), cycles


def replay_flash(work: Attention, tile: FlashTile) -> tuple[float, float]:
    """(bytes moved between the buffer and what is outside of it, multiplications and additions) of
    an attention by FlashAttention's dataflow.

    Every tile of a head is visited in the order of the loops. What stays is fetched when its tile
    begins; what passes is fetched at each visit, unless it is kept, or all of it is one tile: then
    at the first. Sums that pass leave after each visit and come back for the next.
    """
    n, c, d = work.head_rows, work.columns, work.head_dim
    element, logit = work.bytes_per_element, work.bytes_per_logit
    group = work.heads // work.kv_heads
    counted, macs = 0, 0
    rows, columns = _blocks(n, tile.rows), _blocks(c, tile.columns)
    if tile.whole:
        columns = [slice(j, j + 1) for j in range(c)]

    def seen(i: slice, j: slice) -> int:
        """Columns of a tile that are computed; one tile of all columns ends at the diagonal."""
        last = (i.stop - 1) // group + c - work.rows  # column that the tile's last row sees last
        if not work.causal or (j.start <= last and len(columns) > 1):
            return _size(j)
        return max(0, int(min(j.stop, last + 1) - j.start))

    rows_outside = tile.outside == "rows"
    outer, inner = (rows, columns) if rows_outside else (columns, rows)
    stays_once = tile.kept or (len(inner) == 1 and not tile.whole)
    stays_once |= tile.whole and tile.columns >= c
    visited: Counter[int] = Counter()
    # Bytes of a row and of a column: read, summed up at last, and in between.
    statistics = 2 * logit
    row = (d * element, d * element, d * logit + statistics)
    column = (2 * d * element, 0, 0)
    if work.backward:
        row = (2 * d * element + statistics, d * element, d * logit)
        column = (2 * d * element, 2 * d * element, 2 * d * logit)
        counted += n * (2 * d * element + logit)  # of the sums of output times its gradient
    stay, go = (row, column) if rows_outside else (column, row)
    twice = d * element if tile.whole and work.backward and not stays_once else 0
    for a in outer:
        counted += _size(a) * (stay[0] + stay[1])
        for k, b in enumerate(inner):
            i, j = (a, b) if rows_outside else (b, a)
            if not seen(i, j):
                continue
            macs += (5 if work.backward else 2) * _size(i) * seen(i, j) * d
            if stays_once:
                counted += _size(b) * (go[0] + go[1]) if not visited[k] else 0
            else:
                counted += _size(b) * (go[0] + twice)
                counted += _size(b) * (go[1] if not visited[k] else 2 * go[2])
            visited[k] += 1
    return work.num_heads * counted, work.num_heads * macs


def _take(
    counted: dict[str, float],
    mapping: FlatMapping,
    name: str,
    operand: str,
    where: tuple[slice, slice],
    there: Booleans,
    made: Booleans,
) -> None:
    """Counts what a pass moves to or from memory of one operand."""
    if operand == "c":
        if name == "O" or name not in mapping.kept:  # goes to memory once, when it is complete
            counted[name] += np.count_nonzero(~made[where])
            made[where] = True
        return
    if name not in mapping.kept:
        counted[name] += there[where].size
    elif name != "L":
        counted[name] += np.count_nonzero(~there[where])
        there[where] = True


def _passes(
    array: MatrixArray, stationarity: str, shape: tuple[int, int], size: tuple[int, int, int]
) -> Iterator[tuple[list[tuple[slice, slice]], float]]:
    """Yields ((where in A, B, C), cycles) of each pass of the array."""
    m, k, n = size
    rows, columns = shape
    every = slice(None)
    if stationarity == "output":
        walk = [((i, every), (every, j), (i, j), k)
                for i in _blocks(m, rows) for j in _blocks(n, columns)]  # fmt: skip
    elif stationarity == "weight":
        walk = [((every, i), (i, j), (every, j), m)
                for i in _blocks(k, rows) for j in _blocks(n, columns)]  # fmt: skip
    else:
        walk = [((j, i), (i, every), (j, every), n)
                for i in _blocks(k, rows) for j in _blocks(m, columns)]  # fmt: skip
    for *access, streamed in walk:
        yield access, max(streamed, array.load_cycles) / array.count


def _blocks(length: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, length)) for i in range(0, length, size)]


def _size(block: slice) -> int:
    size: int = block.stop - block.start
    return size
