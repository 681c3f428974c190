"""Cost of a dataflow on an accelerator, and a lower bound of that of every dataflow."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from topology.accelerator.accelerator import Accelerator
from topology.accelerator.workloads import Attention
from topology.numbers import choice

SOFTMAX = ("free", "overlapped", "in-turn")
_SUMS = ("off_chip_bytes", "on_chip_bytes", "array_cycles", "vector_cycles")
_SUMS += ("cycles", "seconds", "energy")
SOFTMAX_OPERATIONS = 4  # of a logit: largest, exponential of the difference, sum, quotient
SOFTMAX_ACCESSES = 5  # of a logit in the buffer: the first reads; the others read, two also write
LATE_OPERATIONS, LATE_ACCESSES = 3, 3  # the same where the output is divided, not each logit
BACKWARD_OPERATIONS = 3  # of a logit: exponential of the difference; difference and product
BACKWARD_ACCESSES = 5  # the first reads and writes, the others read two and write one


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Cost of a computation on an accelerator.

    Attributes:
      macs: multiplications and additions.
      live_buffer: bytes in use at once; what the buffer does not hold of them is spilled.
      off_chip_bytes, on_chip_bytes: moved from and to the memory off the chip, and the buffer.
      array_cycles, vector_cycles: that the matrix array and the vector lanes work.
      seconds, energy: of all of it, joules.
      utilisation: of the matrix array: macs over what it could do in these seconds.
      mapping: how, in words.
      level_bytes: across the outer boundary of the buffer and of each level but the last, whose are
        off_chip_bytes; empty where there are no levels between buffer and memory.
    """

    macs: int
    live_buffer: float
    off_chip_bytes: float
    on_chip_bytes: float
    array_cycles: float
    vector_cycles: float
    cycles: float
    seconds: float
    energy: float
    utilisation: float
    mapping: str = ""
    level_bytes: tuple[float, ...] = ()


def check_softmax(softmax: str) -> None:
    choice("softmax", softmax, SOFTMAX)


def check_published(dataflow: str, accelerator: Accelerator, work: Attention) -> None:
    """Raises a ValueError where a dataflow that was published for one buffer and for the forward
    pass without a mask is asked for more."""
    asked = [("several levels of memory", bool(accelerator.levels))]
    asked += [("a causal mask", work.causal), ("the backward pass", work.backward)]
    for what, is_asked in asked:
        if is_asked:
            raise ValueError(f"dataflow {dataflow}: {what} is not part of it; take flex or flash")


def vector_cycles(accelerator: Accelerator, work: Attention, softmax: str) -> float:
    """Cycles that the vector lanes take for the softmax of an attention; 0 where it is "free"."""
    check_softmax(softmax)
    of_logit = BACKWARD_OPERATIONS if work.backward else SOFTMAX_OPERATIONS
    operations = 0 if softmax == "free" else of_logit * work.logits
    return operations / accelerator.vector_lanes


def softmax_bytes(work: Attention, softmax: str) -> float:
    """Bytes that the softmax of an attention moves to and from the buffer; 0 where it is "free"."""
    accesses = BACKWARD_ACCESSES if work.backward else SOFTMAX_ACCESSES
    return 0 if softmax == "free" else accesses * work.logits * work.bytes_per_logit


def energy_of(
    accelerator: Accelerator, macs: Any, vector: Any, on_chip: Any, moved: Sequence[Any]
) -> Any:
    """Joules of so many macs, cycles of all vector lanes, and bytes; numbers or arrays.

    Args:
      on_chip: bytes to and from the buffer.
      moved: bytes across the outer boundary of the buffer and of each level; memory's is the last.
    """
    joules = accelerator.energy
    found = (
        macs * joules.mac
        + vector * accelerator.vector_lanes * joules.vector_operation
        + on_chip * joules.on_chip_byte
        + moved[-1] * joules.off_chip_byte
    )
    for level, inside, outside in zip(accelerator.levels, moved[:-1], moved[1:], strict=True):
        found = found + level.byte_energy * (inside + outside)
    return found


def slowest(accelerator: Accelerator, moved: Sequence[Any]) -> Any:
    """Seconds of the slowest of the boundaries outside the buffer, as of `energy_of`; numbers or
    arrays."""
    bandwidths = [
        *(level.bandwidth for level in accelerator.levels),
        accelerator.off_chip_bandwidth,
    ]
    taken = [x / bandwidth for x, bandwidth in zip(moved, bandwidths, strict=True)]
    return functools.reduce(np.maximum, taken)


def lower_bound(accelerator: Accelerator, work: Attention, softmax: str = "free") -> Cost:
    """Lower bound of the cost of an attention by any dataflow, with a buffer of any size.

    Every processing element busy in every cycle; what is given read once and what is made written
    once; the vector lanes busy with the softmax, its quotients taken where they are fewer, of the
    logits or of the output; the longest of the three hides the others.
    """
    vector = vector_cycles(accelerator, work, softmax)
    if not work.backward and softmax != "free":
        divided = min(work.logits, work.num_heads * work.head_rows * work.head_dim)
        vector = (LATE_OPERATIONS * work.logits + divided) / accelerator.vector_lanes
    array = work.macs / accelerator.array.elements
    moved = work.compulsory_bytes
    cycles = max(array, vector, moved / accelerator.off_chip_bandwidth * accelerator.frequency)
    return Cost(
        macs=work.macs,
        live_buffer=0,
        off_chip_bytes=moved,
        on_chip_bytes=moved,
        array_cycles=array,
        vector_cycles=vector,
        cycles=cycles,
        seconds=cycles / accelerator.frequency,
        energy=energy_of(
            accelerator, work.macs, vector, moved, [moved] * (len(accelerator.levels) + 1)
        ),
        utilisation=array / cycles,
        mapping="lower bound",
        level_bytes=(moved,) * len(accelerator.levels),
    )


def add(costs: list[Cost], mapping: str = "") -> Cost:
    """Total cost of phases that run one after another."""
    total = {name: math.fsum(getattr(cost, name) for cost in costs) for name in _SUMS}
    ideal = sum(cost.utilisation * cost.seconds for cost in costs)
    crossed = zip(*(cost.level_bytes for cost in costs), strict=True)
    return Cost(
        macs=sum(cost.macs for cost in costs),
        level_bytes=tuple(math.fsum(moved) for moved in crossed),
        live_buffer=max(cost.live_buffer for cost in costs),
        utilisation=ideal / total["seconds"],
        mapping=mapping,
        **total,
    )
