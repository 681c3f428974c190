"""Attention on an accelerator by four dataflows: what each costs, and by how large a buffer.

naive   unfused, weight stationary, no search                 (`dataflow_unfused.naive`)
flex    unfused, the best tile and loops per operator         (`dataflow_unfused.search_flex`)
flat    fused over tiles of whole rows, the best of them      (`dataflow_flat.search_flat`)
flash   fused over tiles of rows and columns, the best of them  (`dataflow_flash.search_flash`)

naive and flat are as published: of one buffer, the forward pass, no mask. flash tries whole rows,
too, by its own account of the softmax (`rows_against_tiles`). The other matmuls of a layer are the
same in all but naive. `best_tile` is what a kernel asks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from topology.accelerator.accelerator import Accelerator
from topology.accelerator.dataflow_cost import Cost, add, lower_bound
from topology.accelerator.dataflow_flash import search_flash
from topology.accelerator.dataflow_flat import heads_of, search_flat
from topology.accelerator.dataflow_unfused import best_matmul, naive, naive_matmul, search_flex
from topology.accelerator.workloads import BATCH, Attention, Matmul, Model
from topology.numbers import choice

__all__ = [
    "DATAFLOWS",
    "Cost",
    "Tile",
    "attention_cost",
    "best_tile",
    "block_cost",
    "dataflows_of",
    "layer_cost",
    "least_full_buffer",
    "lower_bound",
    "rows_against_tiles",
]

DATAFLOWS = ("naive", "flex", "flat", "flash")
FULL = 0.95  # of the utilisation that a buffer without limit gives


def attention_cost(
    accelerator: Accelerator,
    work: Attention,
    dataflow: str,
    *,
    softmax: str = "free",
    granularity: str = "M",
) -> Cost:
    """Computes the cost of an attention on an accelerator by a dataflow.

    Args:
      dataflow: of `DATAFLOWS`.
      softmax: "free", "overlapped", or "in-turn"; see `dataflow_flat.flat_cost`. Without fusion it
        is an operator of its own unless it is free.
      granularity: of flex; see `search_flex`.

    Raises:
      ValueError: a name is unknown, the dataflow does not cover it (`dataflows_of`), or the buffer
        is too small; the message says the least that works.
    """
    if choice("dataflow", dataflow, DATAFLOWS) == "naive":
        return naive(accelerator, work, softmax=softmax)
    if dataflow == "flex":
        return search_flex(accelerator, work, softmax=softmax, granularity=granularity)
    search = search_flat if dataflow == "flat" else search_flash
    return search(accelerator, work, softmax=softmax)[1]


def dataflows_of(accelerator: Accelerator, work: Attention) -> tuple[str, ...]:
    """The dataflows that cover an attention on an accelerator."""
    more_than_published = accelerator.levels or work.causal or work.backward
    return ("flex", "flash") if more_than_published else DATAFLOWS


def rows_against_tiles(
    accelerator: Accelerator, work: Attention, *, softmax: str = "overlapped"
) -> tuple[Cost | None, Cost | None]:
    """Costs by flash with the logits of whole rows on chip, and with those of fewer columns.

    Returns: (whole rows, tiles); None where no such tile fits.
    """

    def cost(whole_rows: bool) -> Cost | None:
        try:
            return search_flash(accelerator, work, softmax=softmax, whole_rows=whole_rows)[1]
        except ValueError:
            return None

    return cost(True), cost(False)


def layer_cost(
    accelerator: Accelerator,
    model: Model,
    sequence: int,
    dataflow: str,
    *,
    batch: int = BATCH,
    softmax: str = "free",
    granularity: str = "M",
) -> Cost:
    """Computes the cost of a model's layer: its attention, and then its other matmuls.

    Arguments and errors as of `attention_cost`.
    """
    return block_cost(
        accelerator,
        model.attention(sequence, batch),
        model.matmuls(sequence, batch),
        dataflow,
        softmax=softmax,
        granularity=granularity,
    )


def block_cost(
    accelerator: Accelerator,
    work: Attention,
    matmuls: Sequence[Matmul],
    dataflow: str,
    *,
    softmax: str = "free",
    granularity: str = "M",
) -> Cost:
    """Computes the cost of an attention, and then of other matmuls; as `attention_cost`."""
    attention = attention_cost(
        accelerator, work, dataflow, softmax=softmax, granularity=granularity
    )
    matmul = naive_matmul if dataflow == "naive" else best_matmul
    others = [matmul(accelerator, each) for each in matmuls]
    return add([attention, *others], attention.mapping)


def least_full_buffer(
    cost_of: Callable[[int], Cost], *, low: int = 2**10, high: int = 2**50, steps: int = 4
) -> int:
    """The least buffer, in bytes, with `FULL` of the utilisation that `high` bytes give.

    Args:
      cost_of: bytes -> Cost; a ValueError of it means that the buffer is too small. Its utilisation
        must not fall with a larger buffer.
      steps: sizes tried between a power of two and the next.
    """

    def utilisation(i: float) -> float:
        try:
            return cost_of(int(low * 2 ** (i / steps))).utilisation
        except ValueError:
            return 0.0

    below, above = 0, round(steps * np.log2(high / low))
    full = FULL * utilisation(above)
    while above - below > 1:
        middle = (below + above) // 2
        if utilisation(middle) >= full:
            above = middle
        else:
            below = middle
    return int(low * 2 ** (above / steps))


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Tile that an attention kernel computes at once.

    Attributes:
      granularity: R, H, B or M.
      rows: of queries of a head; where heads share keys and values, of all that share.
      heads: of keys and values.
      live_buffer: bytes on chip.
      seconds: that the model predicts for the whole attention.
    """

    granularity: str
    rows: int
    heads: int
    live_buffer: int
    seconds: float


def best_tile(
    accelerator: Accelerator,
    *,
    batch: int,
    heads: int,
    rows: int,
    head_dim: int,
    columns: int | None = None,
    kv_heads: int | None = None,
    bytes_per_element: int = 2,
    bytes_per_logit: int = 4,
    row_multiple: int = 8,
) -> Tile:
    """The tile with which FLAT is fastest when K and V of a head, and all of a tile, are on chip.

    That is how a row-tiled kernel runs. Its live buffer is 2 (2 R d + 2 N d) elements and R N
    logits. Of tiles equally fast the one with the least live buffer. The softmax is charged, and
    overlaps with the matmuls.

    Args:
      columns: keys of a head; None: as many as rows. kv_heads: None: as many as heads.
      bytes_per_element: of Q, K, V and the output; bytes_per_logit: as the kernel holds them.
      row_multiple: that a tile's rows are a multiple of, unless they are all.

    Raises:
      ValueError: a size is not positive, kv_heads does not divide heads, or not even the smallest
        tile fits; the message says the least that works.
    """
    work = Attention(
        batch=batch,
        heads=heads,
        rows=rows,
        columns=columns,
        kv_heads=kv_heads,
        head_dim=head_dim,
        bytes_per_element=bytes_per_element,
        bytes_per_logit=bytes_per_logit,
    )
    mapping, cost = search_flat(
        accelerator,
        work,
        softmax="overlapped",
        keep="QKVO",
        rows=[row_multiple * 2**i for i in range(work.head_rows.bit_length())],
        spill=False,
    )
    return Tile(
        granularity=mapping.granularity,
        rows=mapping.rows,
        heads=heads_of(mapping.granularity, work),
        live_buffer=int(cost.live_buffer),
        seconds=cost.seconds,
    )
