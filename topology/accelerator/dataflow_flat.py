"""FLAT: logits and attention output of a tile of whole rows are made one after the other on chip.

After Kao et al., FLAT (ASPLOS 2023, arXiv 2107.06419). A tile is `rows` rows of a head (granularity
R), or a head (H), all heads of a sequence (B), or all of the batch (M). Each tensor of Q, K, V, O
(output) and L (logits) is kept on chip while it is used, or streams past:

  kept       goes between chip and memory once; K and V serve all tiles of their head
  streamed   Q, K, V, and L as the second matmul reads it, come from memory as often as the array
             takes them; O and L go there once

What is kept, and one staging block of what streams, twice for double buffering, but L once, is the
live buffer; all kept, it is the paper's 2 (2 R d + 2 N d) + R N elements. Where it is more than the
buffer, the part that does not fit is spilled: so much of every access to the buffer goes to memory,
on top. Queries, logits and partial outputs pass through the buffer even if streamed.

Time is the longest of: the array's cycles of both matmuls, bytes over either bandwidth, and the
vector lanes' cycles of the softmax; double buffering hides the others.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from topology.accelerator.accelerator import Accelerator, MatrixArray
from topology.accelerator.dataflow_array import (
    STATIONARITIES,
    ArrayCost,
    best_shape,
    candidates,
    ceil_div,
    tiled_cost,
)
from topology.accelerator.dataflow_cost import (
    Cost,
    check_published,
    check_softmax,
    energy_of,
    softmax_bytes,
    vector_cycles,
)
from topology.accelerator.workloads import Attention
from topology.arrays import Booleans, Floats, Integers, Numbers
from topology.numbers import choice

TENSORS = "QKVOL"
GRANULARITIES = "RHBM"


@dataclass(frozen=True, kw_only=True)
class FlatMapping:
    """Mapping by which FLAT runs an attention.

    Attributes:
      granularity: R, H, B or M.
      rows: of a tile; with H, B and M all of a head.
      kept: of the letters QKVOL, those that stay on chip.
      stationarity: of the logit and of the attend matmul, as in `dataflow_array`.
      shapes: of the array in either; None: as built.

    Raises:
      ValueError: a letter or name is unknown, or rows is below 1.
    """

    granularity: str
    rows: int
    kept: str = TENSORS
    stationarity: tuple[str, str] = ("output", "output")
    shapes: tuple[tuple[int, int], tuple[int, int]] | None = None

    def __post_init__(self) -> None:
        choice("granularity", self.granularity, GRANULARITIES)
        if self.rows < 1:
            raise ValueError(f"a tile of {self.rows} rows; it must have at least 1")
        if set(self.kept) - set(TENSORS):
            raise ValueError(f"kept {self.kept!r}: the tensors are Q, K, V, O and L")
        for name in self.stationarity:
            choice("stationarity", name, STATIONARITIES)

    def __str__(self) -> str:
        one = "row" if self.rows == 1 else "rows"
        tile = {"H": "a head", "B": "a sequence", "M": "the batch"}
        tile = tile.get(self.granularity, f"{self.rows} {one}")
        streamed = "".join(x for x in TENSORS if x not in self.kept)
        return (
            f"{self.granularity}: tiles of {tile}, {'/'.join(self.stationarity)} stationary, "
            + (f"{', '.join(streamed)} streamed" if streamed else "all kept")
        )


def heads_of(granularity: str, work: Attention) -> int:
    """Number of heads in a tile of a granularity."""
    return {"R": 1, "H": 1, "B": work.kv_heads, "M": work.num_heads}[granularity]


def least_buffer(work: Attention) -> int:
    """Bytes for one row: its logits, and its query and output twice."""
    row = work.columns * work.bytes_per_logit
    return row + 4 * work.head_dim * work.bytes_per_element


def flat_cost(
    accelerator: Accelerator,
    work: Attention,
    mapping: FlatMapping,
    *,
    spilled: float | None = None,
    softmax: str = "free",
) -> Cost:
    """Computes the cost of an attention by a mapping of FLAT.

    Args:
      spilled: part of the live buffer that does not fit; None: by the accelerator's buffer.
      softmax: "free", "overlapped" with the matmuls, or "in-turn" with them.

    Raises:
      ValueError: logits are kept and the buffer is too small for one row; or as of
        `dataflow_cost.check_published`.
    """
    check_published("flat", accelerator, work)
    if "L" in mapping.kept:
        _check_row(accelerator, work)
    rows = min(mapping.rows, work.head_rows)
    built = accelerator.array.rows, accelerator.array.columns
    shapes = mapping.shapes or (built, built)
    lengths = _lengths(work.head_rows, work.columns, work.head_dim, rows)
    costs = [
        tiled_cost(accelerator.array, stationarity, shape, *lengths[matmul])
        for matmul, (stationarity, shape) in enumerate(
            zip(mapping.stationarity, shapes, strict=True)
        )
    ]
    kept = {name: np.asarray(name in mapping.kept) for name in TENSORS}
    heads = np.asarray(heads_of(mapping.granularity, work))
    found = _evaluate(
        accelerator, work, np.asarray(rows), heads, kept, mapping.stationarity, costs,
        np.asarray(shapes), spilled, softmax,
    )  # fmt: skip
    return _cost(found, (), accelerator, work, str(mapping))


def search_flat(
    accelerator: Accelerator,
    work: Attention,
    *,
    softmax: str = "free",
    keep: str = "",
    rows: Sequence[int] | None = None,
    spill: bool = True,
) -> tuple[FlatMapping, Cost]:
    """The mapping with the fewest cycles; of these with the least energy, then live buffer.

    Tried are every granularity, power of two of rows, subset of tensors kept (L always is) and pair
    of stationarities; the array takes the shape with the fewest cycles, then elements moved.

    Args:
      keep: tensors that must be kept.
      rows: tile heights to try, for granularity R; None: powers of two.
      spill: whether more may be live than fits.

    Raises:
      ValueError: the buffer is too small, for one row or for all without spilling; the message says
        the least that works; or as of `dataflow_cost.check_published`.
    """
    check_published("flat", accelerator, work)
    if spill:
        _check_row(accelerator, work)
    tried = candidates(work.head_rows) if rows is None else rows
    heights = [height for height in tried if height < work.head_rows]  # all of a head is H
    # Tiles as columns: R of every height, then a head, a sequence, the batch.
    letters = ["R"] * len(heights) + ["H", "B", "M"]
    heights = np.array([*heights, *[work.head_rows] * 3])[:, None]
    heads = np.array([heads_of(letter, work) for letter in letters])[:, None]
    names = [name for name in "QKVO" if name not in keep]
    bits = (np.arange(2 ** len(names))[:, None] >> np.arange(len(names))) & 1
    kept = {name: np.ones(len(bits), bool) for name in TENSORS}
    kept |= {name: bits[:, i] == 1 for i, name in enumerate(names)}
    sizes = work.head_rows, work.columns, work.head_dim
    made = _best_shapes(accelerator.array, *sizes, tuple(heights[:, 0].tolist()))
    best: tuple[tuple[float, ...], FlatMapping, Cost] | None = None
    least = math.inf
    for first in STATIONARITIES:
        for second in STATIONARITIES:
            pair = [made[0][first], made[1][second]]
            shapes = np.stack([shape for _, shape in pair])
            found = _evaluate(
                accelerator, work, heights, heads, kept, (first, second),
                [cost for cost, _ in pair], shapes, None, softmax,
            )  # fmt: skip
            live = found["live_buffer"]
            least = min(least, float(live.min()))
            cycles = found["cycles"]
            if not spill:
                cycles = np.where(live > accelerator.buffer, np.inf, cycles)
            # Rounding must not decide between equals.
            keys = _rounded(cycles), _rounded(found["energy"]), live
            order = np.lexsort([key.ravel() for key in keys[::-1]])
            where = np.unravel_index(order[0], cycles.shape)
            key = tuple(float(key[where]) for key in keys)
            if np.isfinite(key[0]) and (best is None or key < best[0]):
                taken = shapes[:, :, where[0], 0].astype(int).tolist()
                mapping = FlatMapping(
                    granularity=letters[where[0]],
                    rows=int(heights[where[0], 0]),
                    kept="".join(name for name in TENSORS if kept[name][where[1]]),
                    stationarity=(first, second),
                    shapes=((taken[0][0], taken[0][1]), (taken[1][0], taken[1][1])),
                )
                best = key, mapping, _cost(found, where, accelerator, work, str(mapping))
    if best is None:
        raise ValueError(
            f"a buffer of {accelerator.buffer} bytes is too small for a tile of "
            f"{work.columns} columns: the least that works is {int(least)}"
        )
    return best[1:]


def _check_row(accelerator: Accelerator, work: Attention) -> None:
    if accelerator.buffer < least_buffer(work):
        raise ValueError(
            f"a buffer of {accelerator.buffer} bytes is too small for one row of {work.columns} "
            f"logits: the least that works is {least_buffer(work)}"
        )


def _rounded(x: npt.NDArray[Any]) -> Floats:
    return np.asarray(x, np.float32)


def _lengths(n: int, c: int, d: int, rows: Numbers) -> list[tuple[list[Numbers], list[Numbers]]]:
    """((m, k, n), tiles) of the logit and of the attend matmul of a head."""
    return [([n, d, c], [rows, d, c]), ([n, c, d], [rows, c, d])]


@functools.lru_cache(maxsize=256)
def _best_shapes(
    array: MatrixArray, n: int, c: int, d: int, heights: tuple[int, ...]
) -> list[dict[str, tuple[ArrayCost, Floats]]]:
    """Finds costs and array shapes, [T, 1], by matmul and stationarity, for tile heights."""
    lengths = _lengths(n, c, d, np.array(heights)[:, None])
    return [{name: best_shape(array, name, *each) for name in STATIONARITIES} for each in lengths]


def _evaluate(
    accelerator: Accelerator,
    work: Attention,
    rows: Integers,
    heads: Integers,
    kept: dict[str, Booleans],
    stationarity: tuple[str, str],
    costs: list[ArrayCost],
    shapes: npt.NDArray[Any],
    spilled: float | None,
    softmax: str,
) -> dict[str, npt.NDArray[Any]]:
    """Evaluates mappings that share their stationarities; arguments broadcast.

    costs: of both matmuls of a head; shapes: [2, 2, ...], rows and columns of the array in either.
    """
    check_softmax(softmax)
    n, c, d = work.head_rows, work.columns, work.head_dim
    element, logit = work.bytes_per_element, work.bytes_per_logit
    logits, attend = costs
    in_place = [name == "output" for name in stationarity]

    off = element * (
        np.where(kept["Q"], n * d, logits.a)
        + np.where(kept["K"], c * d, logits.b)
        + np.where(kept["V"], c * d, attend.b)
        + n * d
    ) + logit * np.where(kept["L"], 0, n * c + attend.a + (softmax != "free") * 2 * n * c)
    staged = element * (
        logits.a
        + np.where(kept["K"], logits.b, 0)
        + np.where(kept["V"], attend.b, 0)
        + np.where(kept["O"] | (not in_place[1]), attend.c, 0)
    ) + logit * (logits.c + attend.a)
    accesses = element * (logits.a + logits.b + attend.b + attend.c) + logit * (logits.c + attend.a)

    live = _live(work, rows, heads, kept, stationarity, shapes)
    if spilled is None:
        spilled = np.maximum(0, 1 - accelerator.buffer / live)
    off = work.num_heads * (off + spilled * staged)
    on = work.num_heads * accesses + off + softmax_bytes(work, softmax)
    array = work.num_heads * (logits.cycles + attend.cycles)
    vector = vector_cycles(accelerator, work, softmax)
    busy = array + vector if softmax == "in-turn" else np.maximum(array, vector)
    seconds = np.maximum(
        busy / accelerator.frequency,
        np.maximum(off / accelerator.off_chip_bandwidth, on / accelerator.on_chip_bandwidth),
    )
    seconds = seconds + accelerator.tile_seconds * ceil_div(work.num_heads, heads) * ceil_div(
        n, rows
    )
    found = {
        "live_buffer": live,
        "off_chip_bytes": off,
        "on_chip_bytes": on,
        "array_cycles": array,
        "vector_cycles": vector,
        "cycles": seconds * accelerator.frequency,
        "seconds": seconds,
        "energy": energy_of(accelerator, work.macs, vector, on, [off]),
    }
    shape = np.broadcast_shapes(*(np.shape(x) for x in found.values()))
    return {name: np.broadcast_to(x, shape) for name, x in found.items()}


def _live(
    work: Attention,
    rows: Integers,
    heads: Integers,
    kept: dict[str, Booleans],
    stationarity: tuple[str, str],
    shapes: npt.NDArray[Any],
) -> npt.NDArray[Any]:
    """Bytes: what is kept, of all heads of a tile, and a block of what streams."""
    c, d = work.columns, work.head_dim
    blocks = []  # (kept elements, staged elements) of Q, K, V, O
    moving = []
    for matmul, name in enumerate(stationarity):
        a, b = shapes[matmul]
        m, k, n = [(rows, d, c), (rows, c, d)][matmul]
        if name == "output":
            # Of Q, K, V, O as many rows as the array takes at once.
            keys = np.minimum(b, n) if matmul == 0 else np.minimum(a, k)
            blocks.append((np.minimum(a, m) * d, keys * d, np.minimum(a, m) * d))
            moving.append(np.minimum(a, m) * np.minimum(b, n))
        elif name == "weight":
            weights = np.minimum(a, k) * np.minimum(b, n)
            blocks.append((m * np.minimum(a, k), weights, m * np.minimum(b, n)))
            moving.append(m * np.minimum(b, n) if matmul == 0 else weights)
        else:
            inputs = np.minimum(a, k) * np.minimum(b, m)
            blocks.append((inputs, np.minimum(a, k) * n, np.minimum(b, m) * n))
            moving.append(np.minimum(b, m) * n if matmul == 0 else inputs)
    elements = (
        np.where(kept["Q"], heads * rows * d, blocks[0][0])
        + np.where(kept["K"], heads * c * d, blocks[0][1])
        + np.where(kept["V"], heads * c * d, blocks[1][1])
        + np.where(kept["O"], heads * rows * d, blocks[1][2])
    )
    logits = np.where(kept["L"], heads * rows * c, 2 * (moving[0] + moving[1]))
    return np.asarray(2 * elements * work.bytes_per_element + logits * work.bytes_per_logit)


def _cost(
    found: dict[str, npt.NDArray[Any]],
    where: tuple[Any, ...],
    accelerator: Accelerator,
    work: Attention,
    mapping: str,
) -> Cost:
    values: dict[str, Any] = {name: float(x[where]) for name, x in found.items()}
    utilisation = work.macs / accelerator.array.elements / values["cycles"]
    return Cost(macs=work.macs, utilisation=utilisation, mapping=mapping, **values)
